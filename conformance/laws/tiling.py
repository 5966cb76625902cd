"""Laws of chapter 5: weights that sum to one, seams that do not show, and how far context travels.

The limits: an average of n points is off by at most n u of the largest value, a weight by 8 u, and a point has at most
four tiles. Two honest evaluations of a small network in float64 differ by far less than `NETWORK` u of its result: a
hundred operations in a row, none of which amplifies an error a hundredfold.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.cases.tiling import axis, geometry
from conformance.judging.inputs import config, network_inputs
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.ports.checked import Port

__all__ = ["LAWS", "shaped"]

U = 2.0**-53
NETWORK = 2.0**14
QUIET = 2.0**-30  # a noise level with 1 + sigma^2 = 1
ROW = axis(1, 1, 0, 0, False)

Axis = dict[str, Any]


def shaped(value: Array, shape: tuple[int, ...], name: str) -> Array:
    """An output of the port, if it has that shape. Raises Broken."""
    if value.shape != shape:
        raise Broken(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    return value


def _axis(draw: Draw, name: str, periodic: bool, tiles: int = 4, patch: int = 1, even: bool = False) -> Axis:
    """Any axis of two tiles or more that TILE-1 to TILE-3 allow; even: the core divides the length."""
    core = draw(st.integers(1, 6), f"core of {name}")
    count, blend = draw(st.integers(2, tiles), f"tiles of {name}"), draw(st.integers(0, core // 2), f"blend of {name}")
    last = core if periodic or even else draw(st.integers(max(blend, 1), core), f"last core of {name}")
    length = core * (count - 1) + last
    halo = draw(st.integers(blend, (length - core) // 2 if periodic else length), f"halo of {name}")
    return axis(length * patch, core * patch, halo * patch, blend * patch, periodic, patch)


def _axes(draw: Draw, **settings: Any) -> tuple[Axis, Axis]:
    return _axis(draw, "rows", False, **settings), _axis(draw, "columns", draw(st.booleans(), "periodic"), **settings)


def _states(draw: Draw, y: Axis, x: Axis, members: int = 1) -> tuple[Array, Array]:
    """States [members, 1, H, W] and a field [1, H, W], standard normal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    shape = (1, y["length"], x["length"])
    return rng.standard_normal((members, *shape)), rng.standard_normal(shape)


def _call(
    port: Port, y: Axis, x: Axis, state: Array, own: float = 0.0, mean: float = 0.0, field: Array | None = None,
    sigma: Array | None = None, evaluations: int = 1,
) -> Array:  # fmt: skip
    inputs = {
        "x": state,
        "sigma": np.full(len(state), QUIET) if sigma is None else sigma,
        "field": np.zeros(state.shape[1:]) if field is None else field,
    }
    params = {"y": y, "x": x, "own": own, "mean": mean, "evaluations": evaluations}
    return shaped(port.values("tiled_denoise", inputs, params, "denoised")[0], state.shape, "denoised")


def _limit(y: Axis, x: Axis, largest: float) -> float:
    """Rounding of an average over a tile and the blend of four, for values up to `largest`."""
    rows, cols = (min(int(a["core"] + 2 * a["halo"]), int(a["length"])) for a in (y, x))
    return 2 * (rows * cols + 40) * U * largest


def _geometry(port: Port, draw: Draw) -> None:
    patch = draw(st.integers(1, 3), "patch")
    a = _axis(draw, "axis", draw(st.booleans(), "periodic"), patch=patch)
    cores, sizes, points = port.values("tile_geometry", {}, a, "cores", "sizes", "points")
    want = geometry(a)
    check_equal(cores, np.array([tile[:2] for tile in want]), "cores")
    check_equal(sizes, np.array([len(tile[2]) for tile in want]), "sizes of extents")
    check_equal(points, np.array([g % a["length"] for tile in want for g in tile[2]]), "points of extents")


def _partition(port: Port, draw: Draw) -> None:
    a = _axis(draw, "axis", draw(st.booleans(), "periodic"), even=True)
    (weights,) = port.values("tile_weights", {}, a, "weights")
    tiles = geometry(a)
    points = np.array([g % a["length"] for _, _, extent in tiles for g in extent])
    if weights.shape != points.shape:
        raise Broken(f"weights of shape {list(weights.shape)} for extents of {len(points)} points")
    if (weights < 0).any() or (weights > 1).any():
        raise Broken(f"weights are from {weights.min()} to {weights.max()}")
    total = np.bincount(points, weights, a["length"])
    check_close(total, np.ones(a["length"]), 8 * U, "sum of the weights at each point")
    # Turned round, the axis is the same one: its last tile is the first.
    check_close(weights[::-1], weights, 32 * U, "weights against those of the axis turned round")


def _constants(port: Port, draw: Draw) -> None:
    y, x = _axes(draw)
    state, _ = _states(draw, y, x)
    largest = float(np.abs(state).max())
    check_close(_call(port, y, x, state, own=1.0), state, 40 * U * largest, "the identity by tiles")
    level = np.full_like(state, state.flat[0])
    check_close(_call(port, y, x, level, mean=1.0), level, _limit(y, x, largest), "averages of a constant field")


def _pointwise(port: Port, draw: Draw) -> None:
    y, x = _axes(draw)
    state, field = _states(draw, y, x, 3)
    sigma = np.array([draw(st.floats(0.01, 80), f"sigma of member {m}") for m in range(3)])
    blended = _call(port, y, x, state, own=0.75, field=field, sigma=sigma)
    gain = 1 / (1 + sigma**2)[:, None, None, None]
    want = (0.75 * state + field) * gain
    for m in range(3):
        largest = float((0.75 * np.abs(state[m]) + np.abs(field)).max() * gain[m].max())
        check_close(blended[m], want[m], 48 * U * largest, f"member {m}: a pointwise D by tiles against D")


def _linear(port: Port, draw: Draw) -> None:
    y, x = _axes(draw)
    (first, second), field = _states(draw, y, x, 2)
    a, first, second = draw(st.integers(-3, 3), "a") / 2, first[None], second[None]
    limit = 4 * _limit(y, x, 2 * float(np.abs(first).max() + np.abs(second).max() + np.abs(field).max()))
    together = _call(port, y, x, a * first + second, own=0.5, mean=0.5, field=field)
    apart = a * _call(port, y, x, first, 0.5, 0.5) + _call(port, y, x, second, 0.5, 0.5)
    apart = apart + _call(port, y, x, 0 * first, own=0.5, mean=0.5, field=field)
    check_close(together, apart, limit, "T of a sum against the sum of T, D being affine")


def _mirror(port: Port, draw: Draw) -> None:
    y, x = _axes(draw, even=True)
    state, field = _states(draw, y, x)
    limit = 2 * _limit(y, x, float(np.abs(state).max() + np.abs(field).max()))
    for turn, name in (((-1,), "columns"), ((-2,), "rows")):
        here = _call(port, y, x, state, own=0.5, mean=0.5, field=field)
        there = _call(port, y, x, np.flip(state, turn), own=0.5, mean=0.5, field=np.flip(field, turn))
        check_close(np.flip(there, turn), here, limit, f"with {name} in reverse order, and back")


def _shift(port: Port, draw: Draw) -> None:
    y, x = _axis(draw, "rows", False), _axis(draw, "columns", True)
    state, field = _states(draw, y, x)
    by = x["core"] * draw(st.integers(1, x["length"] // x["core"]), "cores to the east")
    here = _call(port, y, x, state, own=0.5, mean=0.5, field=field, evaluations=2)
    there = _call(port, y, x, np.roll(state, by, -1), own=0.5, mean=0.5, field=np.roll(field, by, -1), evaluations=2)
    limit = 4 * _limit(y, x, float(np.abs(state).max() + 2 * np.abs(field).max()))
    check_close(np.roll(there, -by, -1), here, limit, f"turned by {by} points along the circle, and back")


def _heard(a: Axis, evaluations: int) -> Array:
    """[TILE-9] as it stands: True at [p, q] where the value at p depends on the state at q."""
    cuts, n = geometry(a), a["length"]
    reach = np.zeros((n, n), bool)
    for p in range(n):
        for i, (start, stop, _) in enumerate(cuts):
            left = start - a["blend"] if a["periodic"] or i > 0 else 0
            right = stop + a["blend"] if a["periodic"] or i + 1 < len(cuts) else n
            if any(left <= p + turn < right for turn in (-n, 0, n)):
                near = range(i - evaluations + 1, i + evaluations)
                for j in {k % len(cuts) for k in near} if a["periodic"] else {k for k in near if 0 <= k < len(cuts)}:
                    reach[p, np.array(cuts[j][2]) % n] = True
    return reach


def _cone(port: Port, draw: Draw) -> None:
    core, periodic = draw(st.integers(2, 6), "core"), draw(st.booleans(), "periodic")
    blend = draw(st.integers(0, core // 2), "blend")
    count, evaluations = draw(st.integers(3, 7), "tiles"), draw(st.integers(1, 3), "evaluations")
    halo = draw(st.integers(max(blend, 1), core - blend), "halo")
    x, y = axis(core * count, core, halo, blend, periodic), axis(2, 2, 0, 0, False)
    at = draw(st.integers(0, x["length"] - 1), "point")
    state = np.zeros((1, 1, 2, x["length"]))
    state[..., 1, at] = 2.0**10
    response = _call(port, y, x, state, 0.25, 0.5, evaluations=evaluations)
    want = np.broadcast_to(_heard(x, evaluations)[:, at], response.shape)
    check_equal(response != 0, want, f"which points hear of point {at} after {evaluations} evaluation(s)")


def _seam(port: Port, draw: Draw) -> None:
    core = draw(st.integers(2, 12), "core")
    blend, count = draw(st.integers(1, core // 2), "blend"), draw(st.integers(2, 5), "tiles")
    x = axis(core * count, core, draw(st.integers(blend, core), "halo"), blend, False)
    state, _ = _states(draw, ROW, x)
    averages = [state[0, 0, 0, points].mean() for _, _, points in geometry(x)]
    jump = max(abs(a - b) for a, b in pairwise(averages))
    steps = np.abs(np.diff(_call(port, ROW, x, state, mean=1.0)[0, 0, 0]))
    bound = math.sin(math.pi / (4 * blend)) * jump + 2 * _limit(ROW, x, float(np.abs(state).max()))
    if not float(steps.max()) <= bound:
        raise Broken(f"a seam shows a step of {steps.max():.3g}, at most {bound:.3g} is left of tiles {jump:.3g} apart")


def _covering(port: Port, draw: Draw) -> None:
    core, count = draw(st.integers(1, 4), "core"), draw(st.integers(2, 4), "tiles")
    blend = draw(st.integers(0, core // 2), "blend")
    x = axis(core * count, core, core * count, blend, False)
    y = axis(3, 3, 0, 0, False)
    state, field = _states(draw, y, x)
    want = 0.5 * state + field + 0.25 * state.mean((-2, -1), keepdims=True)
    limit = 2 * _limit(y, x, float(np.abs(state).max() + np.abs(field).max()))
    check_close(
        _call(port, y, x, state, own=0.5, mean=0.25, field=field),
        want,
        limit,
        "extents that cover the domain against D",
    )


def _members(port: Port, draw: Draw) -> None:
    y, x = _axes(draw)
    state, field = _states(draw, y, x, 3)
    sigma, limit = np.array([0.25, 1.0, 4.0]), 2 * _limit(y, x, float(np.abs(state).max() + np.abs(field).max()))
    together = _call(port, y, x, state, own=0.5, mean=0.5, field=field, sigma=sigma, evaluations=2)
    for m in range(3):
        alone = _call(
            port, y, x, state[m : m + 1], own=0.5, mean=0.5, field=field, sigma=sigma[m : m + 1], evaluations=2
        )
        check_close(together[m : m + 1], alone, 2 * limit, f"member {m} among others against alone")


NETWORKS = {"width": 8, "depth": 1, "mlp_ratio": 2, "position_octaves": 2, "noise_features": 4}


def _network(
    draw: Draw, y: Axis, x: Axis, members: int = 1, **changes: Any
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Any]]:
    """Inputs, params of `denoise` and params of `denoise_tiled` for a small network with drawn weights and levels."""
    c = config(**NETWORKS | changes) | {"patch": [y["patch"], x["patch"]]}
    seed = draw(st.integers(0, 2**32 - 1), "seed")
    sigma = [draw(st.floats(0.05, 8), f"sigma of member {m}") for m in range(members)]
    age = [[6.0 + m, 18.0 + 3 * m] for m in range(members)]
    inputs = network_inputs(c, (y["length"], x["length"]), sigma, age, seed)
    whole = {"config": c, "chunk": 2, "periodic": x["periodic"]}
    return inputs, whole, whole | {"y": y, "x": x, "together": draw(st.integers(1, 5), "together")}


def _tiles(port: Port, inputs: dict[str, Array], params: dict[str, Any]) -> Array:
    return shaped(port.values("denoise_tiled", inputs, params, "denoised")[0], inputs["x"].shape, "denoised")


def _close(got: Array, want: Array, what: str) -> None:
    check_close(got, want, NETWORK * U * float(np.abs(want).max()), what)


def _network_one_tile(port: Port, draw: Draw) -> None:
    p, q = draw(st.integers(1, 2), "p_y"), draw(st.integers(1, 2), "p_x")
    y, x = axis(2 * p, 2 * p, 0, 0, False, p), axis(4 * q, 4 * q, 0, 0, draw(st.booleans(), "periodic"), q)
    window = draw(st.sampled_from([None, 1]), "window")
    inputs, whole, params = _network(draw, y, x, 2, window=window)
    (want,) = port.values("denoise", inputs, whole, "denoised")
    check_equal(_tiles(port, inputs, params), want, "one tile against the untiled network")


def _network_window(port: Port, draw: Draw) -> None:
    """Radius 1, depth 1: context of one token, p points, on each side; the halo has that beyond the blend."""
    p, periodic = draw(st.integers(1, 2), "patch"), draw(st.booleans(), "periodic")
    blend = draw(st.integers(0, 1), "blend") * p
    y = axis(4 * p, 2 * p, p, 0, False, p)
    x = axis(12 * p, 4 * p, blend + p, blend, periodic, p)
    inputs, whole, params = _network(draw, y, x, window=1)
    (want,) = port.values("denoise", inputs, whole, "denoised")
    _close(_tiles(port, inputs, params), want, "windowed attention within h - b, by tiles against untiled")


def _network_covering(port: Port, draw: Draw) -> None:
    blend, p = draw(st.integers(0, 1), "blend"), draw(st.integers(1, 2), "patch")
    y, x = axis(2, 2, 0, 0, False), axis(6 * p, 2 * p, 4 * p, blend * p, False, p)
    inputs, whole, params = _network(draw, y, x)
    (want,) = port.values("denoise", inputs, whole, "denoised")
    _close(_tiles(port, inputs, params), want, "extents that cover the domain against the untiled network")


GRID = axis(4, 2, 1, 1, False), axis(12, 4, 4, 2, True, 2)


def _network_together(port: Port, draw: Draw) -> None:
    inputs, _, params = _network(draw, *GRID, 2)
    denoised = _tiles(port, inputs, params)
    _close(
        _tiles(port, inputs, params | {"together": 16}), denoised, f"16 tiles at a time against {params['together']}"
    )


def _network_members(port: Port, draw: Draw) -> None:
    inputs, _, params = _network(draw, *GRID, 2)
    together = _tiles(port, inputs, params)
    for m in range(2):
        shared = ("position", *(name for name in inputs if name.startswith("weights.")))
        alone = {name: value if name in shared else value[m : m + 1] for name, value in inputs.items()}
        _close(together[m : m + 1], _tiles(port, alone, params), f"member {m} among others against alone")


def _network_shift(port: Port, draw: Draw) -> None:
    y, x = GRID
    inputs, _, params = _network(draw, y, x, position_features=1)
    inputs["position"] = np.repeat(inputs["position"][:, :1], 6, 1)  # of the latitude alone
    by = x["core"] * draw(st.integers(1, 2), "cores to the east")
    turned = {n: np.roll(v, by, -1) if n in ("x", "static", "past", "past_static") else v for n, v in inputs.items()}
    here = _tiles(port, inputs, params)
    _close(np.roll(_tiles(port, turned, params), -by, -1), here, f"turned by {by} points along the circle, and back")


def _network_condition(port: Port, draw: Draw) -> None:
    y, x = axis(2, 2, 0, 0, False), axis(20, 4, 2, 1, draw(st.booleans(), "periodic"))
    name = draw(st.sampled_from(["x", "static", "past", "past_static"]), "changed")
    at = draw(st.integers(0, 19), "column")
    inputs, _, params = _network(draw, y, x)
    other = inputs[name].copy()
    other[..., at] += 1
    same = _tiles(port, inputs, params) == _tiles(port, inputs | {name: other}, params)
    far = np.broadcast_to(~_heard(x, 1)[:, at], same.shape)
    check_equal(same[far], np.full(int(far.sum()), True), f"points whose tiles do not hold column {at} of {name}")
    if same[~far].all():
        raise Broken(f"no point notices that {name} has changed in column {at}")


Check = Callable[[Port, Draw], None]


def _law(name: str, requirements: tuple[str, ...], op: str, check: Check, meaning: str, **settings: Any) -> Law:
    ops = (op, *settings.pop("also", ()))
    return Law(f"tiling/law-{name}", requirements, ("tiling",), ops, meaning, check, **settings)


# Networks are compared in float64, where rounding cannot be taken for a fault; one tile must be equal in every dtype.
WIDE: dict[str, Any] = {"examples": 4, "dtype": "float64"}
BOTH: dict[str, Any] = {"also": ("denoise",), "examples": 4}

LAWS = (
    _law("geometry", ("TILE-1", "TILE-2", "TILE-3"), "tile_geometry", _geometry,
         "extents are not the cores grown by the halo, clipped or taken modulo the length"),
    _law("partition", ("TILE-4", "TILE-5"), "tile_weights", _partition,
         "weights leave [0, 1], do not sum to one, or favour one side"),
    _law("constants", ("TILE-5", "TILE-6"), "tiled_denoise", _constants,
         "a constant field or the identity does not survive the tiles: weights do not sum to one"),
    _law("pointwise", ("TILE-6", "TILE-8"), "tiled_denoise", _pointwise,
         "a pointwise D shows the tiles, or members share a noise level"),
    _law("linear", ("TILE-6",), "tiled_denoise", _linear,
         "the blend is not linear in what tiles return, or the field is added for each tile"),
    _law("mirror", ("TILE-3", "TILE-4"), "tiled_denoise", _mirror,
         "halo or seam sits half a point off, or differs between the two sides of a tile"),
    _law("shift", ("TILE-3", "TILE-7"), "tiled_denoise", _shift,
         "the date line is a place of its own, or later evaluations forget that the axis closes"),
    _law("cone", ("TILE-7", "TILE-9"), "tiled_denoise", _cone,
         "context travels less or more than one tile an evaluation"),
    _law("seam", ("TILE-4",), "tiled_denoise", _seam,
         "a seam is steeper than sin^2 over 2 b points: the blend is narrower, or has a corner"),
    _law("covering", ("TILE-8",), "tiled_denoise", _covering, "tiles show although each of them sees all"),
    _law("members", ("TILE-6",), "tiled_denoise", _members, "a member depends on its neighbours in the batch"),
    _law("network-one-tile", ("TILE-8",), "denoise_tiled", _network_one_tile,
         "one tile is not the untiled network bit for bit", **BOTH),
    _law("network-window", ("TILE-6", "TILE-8"), "denoise_tiled", _network_window,
         "positions, memory or window of a tile are not those of the whole domain", **BOTH, dtype="float64"),
    _law("network-covering", ("TILE-6", "TILE-8"), "denoise_tiled", _network_covering,
         "tiles show although each of them sees all", **BOTH, dtype="float64"),
    _law("network-together", ("TILE-6",), "denoise_tiled", _network_together,
         "how many tiles are evaluated at a time changes the result", **WIDE),
    _law("network-members", ("TILE-6",), "denoise_tiled", _network_members,
         "members and tiles are mixed up in a batch", **WIDE),
    _law("network-shift", ("TILE-3", "TILE-6"), "denoise_tiled", _network_shift,
         "the network on tiles knows where the date line is although positions do not say so", **WIDE),
    _law("network-condition", ("TILE-6", "TILE-9"), "denoise_tiled", _network_condition,
         "memory or static fields are not cropped to the tile, or not looked at", **WIDE),
)  # fmt: skip
