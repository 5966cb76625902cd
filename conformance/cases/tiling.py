"""Cases of chapter 5: cores, extents, weights, the blended operator with a linear D, and with a network.

The linear D of `tiled_denoise` on a tile with points z: (own z + mean (average of z over the tile) + field on the
tile) / (1 + sigma^2). `field` stands for the conditioning at absolute coordinates, `mean` for attention over the tile.

Expected values: geometry in Python integers, weights in decimal arithmetic, and T in closed form. Weights sum to one
and the average over a tile is a product over the axes, so T z = (own z + field + mean M_y z M_x^T) / (1 + sigma^2),
where row p of M is the mixture, by weights, of the averages over the extents that hold p. Hard crops of integers with
extents of 2^k points have no rounding at all. Networks whose tiles must not show are judged by the untiled network.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays, load_adapter
from conformance.judging.case import Chain, Judge, Recipe
from conformance.judging.inputs import config, network_inputs
from conformance.judging.tolerance import Bound, Exact, MustReject, Ulp

__all__ = ["average_matrix", "axis", "blended", "geometry", "recipes", "weights"]

Axis = Mapping[str, Any]

PI = Decimal("3.14159265358979323846264338327950288419716939937511")
WHOLE = Exact("hard crops of integers, averages over 2^k points: no operation rounds")
REFERENCE = "conformance.adapters.reference:adapter"


def axis(length: int, core: int, halo: int, blend: int, periodic: bool, patch: int = 1) -> dict[str, Any]:
    """The params of one axis."""
    return {"length": length, "core": core, "halo": halo, "blend": blend, "periodic": periodic, "patch": patch}


def geometry(a: Axis) -> list[tuple[int, int, list[int]]]:
    """[TILE-2], [TILE-3]: start and stop of each core, and the unwrapped points of its extent."""
    n, c, h = a["length"], a["core"], a["halo"]
    extents = []
    for start in range(0, n, c):
        stop = min(start + c, n)
        points = range(start - h, stop + h) if c < n else range(n)
        extents.append((start, stop, [g for g in points if a["periodic"] or 0 <= g < n]))
    return extents


def _rise(point: int, boundary: int, blend: int) -> Decimal:
    """Weight at `point` of the tile that begins at `boundary`: sin^2 u = (1 - cos 2u) / 2 by its series."""
    k = point - (boundary - blend)
    if not 0 <= k < 2 * blend:
        return Decimal(int(k >= 2 * blend))
    double = PI * (2 * k + 1) / (4 * blend)
    terms = [(-1) ** (j + 1) * double ** (2 * j) / math.factorial(2 * j) for j in range(1, 30)]
    return sum(terms, Decimal(0)) / 2


def weights(a: Axis) -> list[Array]:
    """[TILE-4] point by point in decimal arithmetic; across a boundary the left tile has what the right one lacks."""
    profiles = []
    with localcontext() as context:
        context.prec = 50
        for start, stop, points in geometry(a):
            left = a["core"] < a["length"] and (a["periodic"] or start > 0)
            right = a["core"] < a["length"] and (a["periodic"] or stop < a["length"])
            rise = [_rise(g, start, a["blend"]) if left else Decimal(1) for g in points]
            fall = [1 - _rise(g, stop, a["blend"]) if right else Decimal(1) for g in points]
            profiles.append(np.array([float(r * f) for r, f in zip(rise, fall, strict=True)]))
    return profiles


def average_matrix(a: Axis) -> Array:
    """M [n, n] of one axis: row p is the mixture, by the weights at p, of the averages over the tiles' extents."""
    matrix = np.zeros((a["length"], a["length"]))
    for (_, _, points), weight in zip(geometry(a), weights(a), strict=True):
        inside = np.array(points) % a["length"]
        matrix[np.ix_(inside, inside)] += weight[:, None] / len(points)
    return matrix


def blended(inputs: Arrays, y: Axis, x: Axis, own: float, mean: float, evaluations: int = 1) -> Array:
    """[TILE-6] in the closed form of the module's docstring, [TILE-7] applied `evaluations` times."""
    rows, cols = average_matrix(y), average_matrix(x)
    z, gain = inputs["x"], 1 / (1 + inputs["sigma"] ** 2)[:, None, None, None]
    for _ in range(evaluations):
        z = (own * z + inputs["field"] + mean * (rows @ z @ cols.T)) * gain
    return z


def _geometry(name: str, a: Axis, meaning: str, *requirements: str) -> Recipe:
    tiles = geometry(a)
    expected = {
        "cores": np.array([[start, stop] for start, stop, _ in tiles]),
        "sizes": np.array([len(points) for _, _, points in tiles]),
        "points": np.array([g % a["length"] for _, _, points in tiles for g in points]),
    }
    wanted = requirements or ("TILE-2", "TILE-3")
    judge = Exact("indices")
    return Recipe(
        f"tiling/geometry-{name}", "tile_geometry", requirements=wanted, profiles=("tiling",), judge=judge,
        meaning=meaning, inputs={}, params=a, expected=expected,
    )  # fmt: skip


def _weights(name: str, a: Axis, meaning: str) -> Recipe:
    why = "relative errors of angle and sine are an ULP each, doubled by the square"
    judge = Ulp(4, why) if a["blend"] else Exact("weights of a hard crop are 0 and 1")
    requirements, expected = ("TILE-4", "TILE-5", "NUM-2"), {"weights": np.concatenate(weights(a))}
    return Recipe(
        f"tiling/weights-{name}", "tile_weights", requirements=requirements, profiles=("tiling",), judge=judge,
        meaning=meaning, inputs={}, params=a, expected=expected,
    )  # fmt: skip


def _cuts() -> list[Recipe]:
    """Geometry and weights of one axis: fine operations, which show where a tiled denoiser first goes wrong."""
    closed, ring = axis(14, 4, 3, 2, False), axis(16, 4, 6, 2, True)
    clipped = "cores or extents are not clipped at the edges, or the last core is not the rest"
    return [
        _geometry("closed", closed, clipped),
        _geometry("periodic", ring, "extents are clipped at the date line, sorted, or not taken modulo the length"),
        _geometry("patches", axis(24, 8, 4, 4, False, 4), "extents are counted in patches where points are meant"),
        _geometry("one-tile", axis(12, 12, 0, 0, True), "one tile gets a halo, and with it points twice", "TILE-3"),
        _geometry("wide-halo", axis(30, 6, 14, 2, False), "a halo wider than a core is cut to the next core"),
        _geometry("covering", axis(12, 4, 12, 2, False), "an extent that covers the axis is not the axis, once"),
        _geometry("no-halo", axis(15, 4, 0, 0, False), "without a halo extents are not the cores"),
        _geometry("long", axis(720, 90, 15, 15, True, 3), "indices overflow or drift along a long axis"),
        _weights("closed", closed, "weights taper at a closed edge, where no other tile makes up for it"),
        _weights("periodic", ring, "weights are of a periodic or plain Hann window (no half, or 2 b + 1 points)"),
        _weights("hard-crop", axis(12, 4, 2, 0, True), "without a blend the halo is not thrown away entirely"),
        _weights("widest", axis(24, 8, 4, 4, True, 2), "with 2 b = c the two blends of a tile disturb one another"),
        _weights("last-core", axis(14, 4, 4, 2, False), "a last core as narrow as b has weight beyond the edge"),
        _weights("long", axis(240, 80, 40, 40, False), "many points of a wide blend are not at the midpoints k + 1/2"),
    ]


def _fields(y: Axis, x: Axis, sigma: Sequence[float], seed: int, whole: bool = False) -> dict[str, Array]:
    """States and a field of two channels: normal numbers, or integers."""
    rng = np.random.default_rng(seed)
    grid = (y["length"], x["length"])

    def generic(*shape: int) -> Array:
        drawn: Array = rng.integers(-8, 9, shape).astype(np.float64) if whole else rng.standard_normal(shape)
        return drawn

    return {"x": generic(len(sigma), 2, *grid), "sigma": np.array(sigma, float), "field": generic(2, *grid)}


def _tiled(
    name: str, requirements: Sequence[str], y: Axis, x: Axis, d: Mapping[str, float], meaning: str, inputs: Arrays,
    judge: Judge, smoke: bool = False,
) -> Recipe:  # fmt: skip
    """d: own, mean and evaluations."""
    params: dict[str, Any] = {"y": y, "x": x, "own": 0.0, "mean": 0.0, "evaluations": 1, **d}
    expected = {"denoised": blended(inputs, **params)}
    profiles = ("tiling", "smoke") if smoke else ("tiling",)
    return Recipe(
        f"tiling/{name}", "tiled_denoise", requirements=tuple(requirements), profiles=profiles, judge=judge,
        meaning=meaning, inputs=inputs, params=params, expected=expected,
    )  # fmt: skip


def _rounded(y: Axis, x: Axis, d: Mapping[str, float], inputs: Arrays) -> Bound:
    """A bound for `_tiled`: averages of n points, weights of 8 u, sums of 4 tiles; a gain above 1 adds up."""
    points = min(y["core"] + 2 * y["halo"], y["length"]) * min(x["core"] + 2 * x["halo"], x["length"])
    steps, gain = int(d.get("evaluations", 1)), d.get("own", 0.0) + d.get("mean", 0.0)
    largest = gain * float(np.abs(inputs["x"]).max()) + float(np.abs(inputs["field"]).max())
    why = f"averages of {points} points, four weights of 16 u, sums of four tiles, {steps} evaluation(s)"
    return Bound(2 * (points + 40) * steps, why, largest * max(gain, 1.0) ** (steps - 1))


def _exact() -> list[Recipe]:
    """Integers and hard crops: errors of place show as whole numbers."""
    both, levels = {"own": 3.0, "mean": 1.0}, [2.0**-30, 1.0]  # 1 + sigma^2 is 1 and 2
    place = "tiles are put a point off, halos leak into the result, or the field on a tile is another place's"
    rows = [
        ("integers", ("TILE-2", "TILE-3", "TILE-6", "NUM-1"), axis(8, 6, 2, 0, False), axis(12, 4, 2, 0, True),
         both, place),
        ("integers-no-halo", ("TILE-2", "TILE-4", "NUM-1"), axis(6, 4, 0, 0, False), axis(16, 4, 0, 0, True), both,
         "without halo and blend tiles see more than their core"),
        ("integers-wide-halo", ("TILE-3", "NUM-1"), axis(8, 2, 6, 0, False), axis(16, 2, 3, 0, True), both,
         "an extent over several cores is cut to the neighbours, or wraps the wrong way"),
        ("integers-patches", ("TILE-1", "TILE-3", "NUM-1"), axis(16, 12, 4, 0, False, 4), axis(24, 8, 4, 0, True, 2),
         both, "sizes are counted in patches where points are meant"),
        ("integers-evaluations", ("TILE-7", "NUM-1"), axis(12, 6, 2, 0, False), axis(16, 4, 2, 0, True),
         both | {"evaluations": 3}, "later evaluations do not start from the blended state of the whole domain"),
        ("integers-one-tile", ("TILE-3", "TILE-8", "NUM-1"), axis(8, 8, 4, 2, False), axis(4, 4, 2, 2, True), both,
         "one tile is not the untiled D bit for bit: it has a halo or a blend"),
    ]  # fmt: skip
    return [
        _tiled(
            name, requirements, y, x, d, meaning, inputs=_fields(y, x, levels, 510 + i, whole=True), judge=WHOLE,
            smoke=name == "integers",
        )
        for i, (name, requirements, y, x, d, meaning) in enumerate(rows)
    ]  # fmt: skip


def _blends() -> list[Recipe]:
    """Overlaps: weights, context from the whole tile, members with noise levels of their own."""
    both, three = {"own": 0.7, "mean": 0.4}, [0.5, 1.0, 2.0]
    lat, lon = axis(10, 4, 2, 2, False), axis(12, 4, 3, 1, True)
    row = axis(1, 1, 0, 0, False)
    rows: list[tuple[str, tuple[str, ...], Axis, Axis, dict[str, float], list[float], str]] = [
        ("blend", ("TILE-4", "TILE-6", "NUM-9"), lat, lon, both, three,
         "tiles are averaged without their weights, members get another's sigma, or weights are rounded"),
        ("blend-torus", ("TILE-4", "TILE-6"), axis(12, 4, 4, 2, True), axis(24, 6, 3, 3, True), both, [1.0, 3.0],
         "a periodic axis of rows, or blends that fill their cores, are not treated as the columns"),
        ("blend-patches", ("TILE-1", "TILE-4"), axis(16, 8, 4, 4, False, 4), axis(18, 6, 6, 3, True, 3), both, [0.25],
         "the blend is counted in patches, or weights are constant over a patch"),
        ("blend-last-core", ("TILE-2", "TILE-4"), axis(14, 4, 4, 2, False), axis(9, 6, 3, 3, False), both, [0.5, 2.0],
         "a shorter last core is dropped, stretched or moved inward"),
        ("blend-two-tiles", ("TILE-3", "TILE-4"), axis(8, 4, 2, 2, True), row | {"length": 5, "core": 5}, both, [1.0],
         "with two tiles on a ring one of their two seams is lost"),
        ("context", ("TILE-4", "TILE-6"), row, axis(40, 8, 3, 3, False), {"mean": 1.0}, [2.0**-30],
         "what a point gets is not the mixture of its tiles' averages by sin^2 at k + 1/2"),
        ("context-ring", ("TILE-4", "TILE-6"), row, axis(96, 4, 2, 2, True), {"mean": 1.0}, [2.0**-30],
         "weights of a tile are not those of its neighbours shifted by a core, or break at the date line"),
        ("pointwise", ("TILE-5", "TILE-8"), lat, lon, {"own": 1.0}, three,
         "a pointwise D shows the seams: weights do not sum to one"),
        ("covering", ("TILE-8",), axis(6, 2, 6, 1, False), axis(8, 4, 4, 2, False), both, [0.5],
         "extents that cover the domain do not give the untiled D"),
        ("evaluations", ("TILE-6", "TILE-7"), lat, lon, both | {"evaluations": 4}, [0.5, 0.1],
         "tiles go on from their own states and are blended at the end alone"),
    ]  # fmt: skip
    cases = []
    for i, (name, requirements, y, x, d, sigma, meaning) in enumerate(rows):
        inputs = _fields(y, x, sigma, 530 + i)
        cases.append(_tiled(name, requirements, y, x, d, meaning, inputs=inputs, judge=_rounded(y, x, d, inputs)))
    return cases


def _cones() -> list[Recipe]:
    """A state that is zero but at one point: how far it is heard after m evaluations."""
    column, dipped = axis(12, 12, 0, 0, False), {"own": 0.5, "mean": 0.5}
    rows = [
        ("cone", column, axis(24, 4, 2, 2, False), dipped | {"evaluations": 3}, (3, 1),
         "context does not travel one tile an evaluation: the blended state is not what is evaluated"),
        ("cone-date-line", axis(9, 3, 2, 1, False), axis(20, 4, 1, 1, True), dipped | {"evaluations": 2}, (4, 19),
         "context stops at the date line, or leaks past the extents of the tiles that hear it"),
    ]  # fmt: skip
    cases = []
    for name, y, x, d, at, meaning in rows:
        assert isinstance(d, dict)
        inputs = _fields(y, x, [2.0**-30], 0) | {"field": np.zeros((2, y["length"], x["length"]))}
        inputs["x"] = np.zeros_like(inputs["x"])
        inputs["x"][..., at[0], at[1]] = [[1.0, -2.0]]
        cases.append(
            _tiled(name, ("TILE-7", "TILE-9"), y, x, d, meaning, inputs=inputs, judge=_rounded(y, x, d, inputs))
        )
    return cases


SMALL = {"width": 8, "depth": 1, "mlp_ratio": 2, "position_octaves": 2, "noise_features": 4}  # about 2000 weights


def _network(
    name: str, requirements: Sequence[str], changes: Mapping[str, Any], y: Axis, x: Axis, meaning: str,
    sigma: Sequence[float] = (0.6,), together: int = 16, untiled: bool = False, smoke: bool = False,
) -> Recipe:  # fmt: skip
    """`denoise_tiled` with generic weights; columns close where the axis x does; two past frames."""
    c = config(**SMALL | dict(changes)) | {"patch": [y["patch"], x["patch"]]}
    age = [[6.0 + 5 * i, 30.0 - 7 * i] for i in range(len(sigma))]
    inputs = network_inputs(c, (y["length"], x["length"]), sigma, age, 550 + len(name))
    whole = {"config": c, "chunk": 1, "periodic": x["periodic"]}
    profiles = ("tiling", "smoke") if smoke else ("tiling",)
    return Recipe(
        f"tiling/{name}", "denoise_tiled", requirements=tuple(requirements), profiles=profiles,
        judge=Chain("a network on tiles and their blend"), meaning=meaning, inputs=inputs,
        params=whole | {"y": y, "x": x, "together": together}, expected=_denoised(inputs, whole) if untiled else None,
    )  # fmt: skip


def _denoised(inputs: Arrays, params: Mapping[str, Any]) -> Arrays:
    """The untiled denoiser's value, which [TILE-8] demands of some tilings."""
    result = load_adapter(REFERENCE).run("denoise", dict(inputs), {**params, "dtype": "float64"}, ())
    assert isinstance(result, Mapping)
    return {"denoised": result["denoised"]}


def _networks() -> list[Recipe]:
    """The network as D: condition, positions and memory cropped to the tile; where tiles must not show, untiled."""
    lat, lon = axis(8, 4, 2, 2, False, 2), axis(12, 4, 4, 2, True, 2)
    window = {"window": 1}
    return [
        _network(
            "network-one-tile", ("TILE-8",), changes={}, y=axis(4, 4, 0, 0, False, 2), x=axis(8, 8, 0, 0, True, 2),
            meaning="one tile is not the untiled network", sigma=(0.3, 2.0), untiled=True, smoke=True,
        ),
        _network(
            "network", ("TILE-6",), {}, lat, lon,
            "positions are the tile's own, or memory and static fields are not cropped to the tile",
        ),
        _network(
            "network-members", ("TILE-6", "EDM-1"), changes={"sigma_data": 0.5}, y=lat, x=lon,
            meaning="tiles and members are mixed up in a batch: sigma, static fields or memory of another member",
            sigma=(0.05, 4.0), together=3,
        ),
        _network(
            "network-alone", ("TILE-6",), changes={}, y=axis(6, 4, 2, 1, False, 1), x=axis(9, 6, 3, 3, False, 3),
            meaning="a rectangular patch is turned, or a shorter last tile is padded", sigma=(1.7,), together=1,
        ),
        _network(
            "network-covering", ("TILE-8",), changes={}, y=axis(6, 2, 6, 0, False, 2), x=axis(8, 4, 4, 2, False, 2),
            meaning="extents that cover the domain do not give the untiled network", sigma=(0.9,), untiled=True,
        ),
        _network(
            "network-window", ("TILE-8", "ATT-6"), window, axis(8, 4, 2, 1, False, 1), axis(24, 8, 4, 2, True, 2),
            "windowed attention with L r p <= h - b shows the seams, or false neighbours at the date line",
            untiled=True,
        ),
        _network(
            "network-window-deep", ("TILE-8", "ATT-6"), changes=window | {"depth": 2}, y=axis(6, 6, 0, 0, False, 2),
            x=axis(24, 8, 8, 4, True, 2), meaning="two windowed blocks reach further, or less far, than 2 r p points",
            sigma=(1.1,), untiled=True,
        ),
        _network(
            "network-window-circle", ("TILE-6", "TILE-8", "ATT-6"), changes=window, y=axis(8, 4, 3, 2, False, 1),
            x=axis(8, 8, 0, 0, True, 2),
            meaning="a tile that spans the circle loses the neighbours across the date line", sigma=(0.4,),
            untiled=True,
        ),
        _network(
            "network-window-cut", ("TILE-6", "ATT-6"), changes=window, y=axis(4, 4, 0, 0, False, 2),
            x=axis(16, 4, 2, 2, True, 2), meaning="a tile that does not span the circle is closed on itself",
            sigma=(0.8,),
        ),
        _network(
            "network-low-noise", ("TILE-6", "NUM-9", "EDM-9"), changes={}, y=lat, x=lon,
            meaning="the blend or c_skip x is in the dtype of the network", sigma=(1e-6,),
        ),
        _network(
            "network-high-noise", ("TILE-6", "NUM-9"), changes={"sigma_data": 2.0}, y=lat, x=lon,
            meaning="the state is rounded before it is scaled, or sigma_data is taken for 1", sigma=(80.0,),
        ),
    ]  # fmt: skip


def _offences() -> list[tuple[str, str, Axis, Axis, str, str]]:
    """Name, requirement, a bad axis, a good one that differs in the offence, why it is bad, what a port may do."""
    ring, closed = axis(16, 4, 4, 2, True), axis(16, 4, 2, 2, False)
    inside = "an extent, core or seam begins or ends inside a patch"
    return [
        ("wrapping-halo", "TILE-3", axis(16, 4, 8, 2, True), ring, "core 4 and halo 8 wrap onto themselves on 16",
         "a tile shows the network a point twice"),
        ("wide-blend", "TILE-1", axis(16, 8, 2, 4, False), axis(16, 8, 4, 4, False), "the blend 4 exceeds the halo 2",
         "points are blended that the tile does not see"),
        ("overlapping-blends", "TILE-1", axis(16, 4, 4, 4, False), axis(16, 4, 4, 2, False),
         "2 x 4 exceeds the core 4", "the blends of both ends of a tile overlap, and weights do not sum to one"),
        ("narrow-last-core", "TILE-1", axis(17, 4, 4, 2, False), axis(17, 4, 4, 1, False),
         "the blend 2 exceeds the last core 1", "the last seam reaches beyond the domain"),
        ("ragged-ring", "TILE-2", axis(18, 4, 4, 2, True), axis(18, 6, 4, 2, True),
         "the core 4 does not divide the ring 18", "a periodic axis is closed with a core of another size"),
        ("broken-halo", "TILE-1", axis(16, 4, 3, 2, False, 2), axis(16, 4, 4, 2, False, 2),
         "the halo 3 is not whole patches of 2", inside),
        ("broken-blend", "TILE-1", axis(16, 4, 4, 1, False, 2), axis(16, 4, 4, 2, False, 2),
         "the blend 1 is not whole patches of 2", inside),
        ("broken-core", "TILE-1", axis(15, 5, 3, 0, False, 3), axis(15, 6, 3, 0, False, 3),
         "the core 5 is not whole patches of 3", inside),
        ("broken-length", "TILE-1", axis(15, 4, 4, 2, False, 2), axis(16, 4, 4, 2, False, 2),
         "the length 15 is not whole patches of 2", inside),
        ("no-core", "TILE-1", axis(16, 0, 2, 0, False), closed, "a core has at least one point",
         "an empty core gives no tiles, or a hang"),
        ("long-core", "TILE-1", axis(16, 20, 2, 2, False), axis(16, 16, 2, 2, False),
         "the core 20 is longer than the axis 16", "a core is cut to the axis in silence"),
        ("negative-blend", "TILE-1", axis(16, 4, 2, -1, False), closed, "the blend is negative",
         "a negative blend leaves gaps or counts as none"),
        ("negative-halo", "TILE-1", axis(16, 4, -2, -2, False), closed, "the halo is negative",
         "tiles are smaller than their cores"),
    ]  # fmt: skip


def _refused_states(a: Axis, turned: bool) -> tuple[Arrays, dict[str, Any]]:
    """A state for a bad axis and a plain one beside it; `turned`: the bad axis is that of the rows."""
    plain = axis(2, 2, 0, 0, False)
    y, x = (a, plain) if turned else (plain, a)
    inputs = _fields(y, x, [1.0], 590, whole=True)
    return inputs, {"y": y, "x": x, "own": 1.0, "mean": 0.0, "evaluations": 1}


def _refusals() -> list[Recipe]:
    """The tiled denoiser refuses all that TILE-1 to TILE-3 forbid; the geometry alone refuses a part of it."""
    cases = []
    for i, (name, requirement, bad, good, why, meaning) in enumerate(_offences()):
        inputs, params = _refused_states(bad, i % 2 == 1)
        cases.append(Recipe(
            f"tiling/refuses-{name}", "tiled_denoise", requirements=(requirement, "CONV-10"), profiles=("tiling",),
            judge=MustReject(why), meaning=meaning, inputs=inputs, params=params,
            valid_counterpart=_refused_states(good, i % 2 == 1),
        ))  # fmt: skip
        if i < 6:
            cases.append(Recipe(
                f"tiling/geometry-refuses-{name}", "tile_geometry", requirements=(requirement,),
                profiles=("tiling",), judge=MustReject(why), meaning=meaning, inputs={}, params=bad,
                valid_counterpart=({}, good),
            ))  # fmt: skip
    return [*cases, *_other_grids(), *_network_refusals()]


def _other_grids() -> list[Recipe]:
    """States that are not on the tiling's grid: too few columns for it, and too many."""
    inputs, params = _refused_states(axis(16, 4, 4, 2, True), False)
    cases = []
    for name, columns, meaning in (
        ("smaller", 12, "a state is padded, wrapped or repeated to fill the tiling"),
        ("larger", 20, "a state is cropped to the tiling"),
    ):
        other = {key: np.resize(v, (*v.shape[:-1], columns)) if v.ndim > 1 else v for key, v in inputs.items()}
        cases.append(Recipe(
            f"tiling/refuses-{name}-grid", "tiled_denoise", requirements=("TILE-6", "CONV-10"),
            profiles=("tiling",), judge=MustReject(f"the state has {columns} columns, the tiling 16"),
            meaning=meaning, inputs=other, params=params, valid_counterpart=(inputs, params),
        ))  # fmt: skip
    return cases


def _network_refusals() -> list[Recipe]:
    """The same through the network's tiling, where the patch is its own."""
    wanted = {"wrapping-halo", "overlapping-blends", "broken-halo", "ragged-ring"}
    c = config(**SMALL | {"width": 4}, channels=1, patch=[1, 1])
    plain, cases = axis(2, 2, 0, 0, False), []
    for name, requirement, bad, good, why, meaning in _offences():
        if name in wanted:
            own = c | {"patch": [1, bad["patch"]]}
            inputs = network_inputs(own, (2, bad["length"]), [1.0], [[6.0]], 595)
            params = {"config": own, "chunk": 1, "periodic": bad["periodic"], "y": plain, "together": 4}
            cases.append(Recipe(
                f"tiling/network-refuses-{name}", "denoise_tiled", requirements=(requirement, "CONV-10"),
                profiles=("tiling",), judge=MustReject(why), meaning=meaning, inputs=inputs,
                params=params | {"x": bad}, valid_counterpart=(inputs, params | {"x": good}),
            ))  # fmt: skip
    return cases


def recipes() -> list[Recipe]:
    """Axes, the linear D exactly and blended, how far context travels, the network on tiles, what is refused."""
    return [*_cuts(), *_exact(), *_blends(), *_cones(), *_networks(), *_refusals()]
