"""Laws of chapter 9: the answer does not depend on the mesh, whatever the network, the tiles and the noise.

A port is held against itself: many ranks against one, or against its own operation without ranks. Limits are those of
chapter 5: two honest evaluations of a small network in float64 differ by far less than `NETWORK` u of the result.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.cases.parallel import AXES, SMALL, mesh, owners, share
from conformance.cases.tiling import axis
from conformance.judging.inputs import config, network_inputs
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.laws.tiling import NETWORK, U, shaped
from conformance.ports.checked import Port

__all__ = ["LAWS"]

Axis = dict[str, Any]
CUT = (axis(4, 2, 2, 0, False, 2), axis(12, 4, 4, 2, True, 2))
MESHES = [mesh(1, 1, 2, 1), mesh(1, 1, 1, 2), mesh(1, 2, 1, 1), mesh(1, 1, 2, 2), mesh(2, 1, 2, 1), mesh(2, 2, 1, 1)]
LEVELS = np.array([3.0, 0.5, 0.0])


def _shares(port: Port, draw: Draw) -> None:
    """Every sample, tile and point is one rank's, and shares differ by one at most."""
    sizes = {name: draw(st.integers(1, 4), name) for name in AXES}
    data = sizes["ddp"] * sizes["fsdp"]
    core, blend = draw(st.integers(2, 5), "core"), draw(st.integers(0, 1), "blend")
    count = draw(st.integers(max(sizes["tile"], 3), 9), "tiles")
    x, y = axis(core * count, core, core, blend, draw(st.booleans(), "periodic")), axis(3, 3, 0, 0, False)
    samples = draw(st.integers(data, 40), "samples")
    params = {"mesh": sizes, "y": y, "x": x, "samples": samples, "heads": 4 * sizes["tp"]}
    names = ("coordinates", "samples", "tiles", "counts", "points")
    places, rows, tiles, counts, points = port.values("shares", {}, params, *names)
    ranks = data * sizes["tile"] * sizes["tp"]
    places = shaped(places, (ranks, 4), "coordinates")
    strides = np.array([sizes["fsdp"] * sizes["tile"] * sizes["tp"], sizes["tile"] * sizes["tp"], sizes["tp"], 1])
    check_equal(places @ strides, np.arange(ranks), "ranks from their coordinates")
    for what, bounds, number, parts in (("samples", rows, samples, data), ("tiles", tiles, count, sizes["tile"])):
        shaped(bounds, (parts, 2), what)
        check_equal(bounds, np.array([share(number, parts, rank) for rank in range(parts)]), f"shares of {what}")
        if np.ptp(bounds[:, 1] - bounds[:, 0]) > 1:
            raise Broken(f"shares of {what} differ by more than one: {bounds.tolist()}")
    check_equal(np.sort(points), np.arange(y["length"] * x["length"]), "points of all ranks")
    check_equal(counts, np.array([len(own) for own in owners(y, x, sizes["tile"])]), "numbers of points")


def _network(draw: Draw, members: int, **changes: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    y, x = CUT
    c = config(**SMALL | changes)
    sigma = [draw(st.floats(0.05, 8), f"sigma of sample {m}") for m in range(members)]
    seed = draw(st.integers(0, 2**32 - 1), "seed")
    inputs = network_inputs(c, (y["length"], x["length"]), sigma, [[6.0 + m, 18.0 + m] for m in range(members)], seed)
    together = draw(st.integers(1, 4), "together")
    return inputs, {"config": c, "chunk": 2, "periodic": True, "y": y, "x": x, "together": together}


def _denoise(port: Port, draw: Draw) -> None:
    inputs, params = _network(draw, 4)
    sizes = draw(st.sampled_from(MESHES), "mesh")
    (want,) = port.values("denoise_tiled", inputs, params, "denoised")
    (denoised,) = port.values("parallel_denoise", inputs, params | {"mesh": sizes}, "denoised")
    limit = NETWORK * U * float(np.abs(want).max())
    check_close(shaped(denoised, want.shape, "denoised"), want, limit, f"on {sizes} against denoise_tiled")


def _drawing(
    draw: Draw, members: int, churn: float, **changes: Any
) -> tuple[dict[str, Array], dict[str, Any], Callable[[Port, Mapping[str, int]], Array]]:
    """Inputs and params of an ensemble whose noise is the port's, and a way to draw it on a mesh."""
    inputs, params = _network(draw, 1, **changes)  # one history serves all members
    known = {name: value for name, value in inputs.items() if name not in ("x", "sigma")} | {"sigmas": LEVELS}
    where = {"seed": draw(st.integers(0, 2**40), "seed of the noise"), "analysis": draw(st.integers(0, 99), "analysis")}
    settings = params | where | {"members": members, "method": None, "churn": {"s_churn": churn} if churn else {}}

    def on(port: Port, sizes: Mapping[str, int]) -> Array:
        (samples,) = port.values("parallel_ensemble", known, settings | {"mesh": dict(sizes)}, "samples")
        shape = (members, params["config"]["channels"], params["y"]["length"], params["x"]["length"])
        return shaped(samples, shape, "samples")

    return known, settings, on


def _ensemble(port: Port, draw: Draw) -> None:
    members = draw(st.integers(4, 6), "members")
    _, _, on = _drawing(draw, members, draw(st.sampled_from([0.0, 1.0]), "S_churn"))
    sizes = draw(st.sampled_from(MESHES), "mesh")
    want = on(port, mesh(1, 1, 1, 1))
    limit = 16 * NETWORK * U * float(np.abs(want).max())  # the steps of the sampler stretch errors a little
    check_close(on(port, sizes), want, limit, f"members drawn on {sizes} against one rank")


def _noise(port: Port, draw: Draw) -> None:
    """With an output layer of zeros D is c_skip x: two steps of the sampler by hand, from the port's own noise."""
    members, churn = 4, draw(st.sampled_from([0.0, 1.0]), "S_churn")
    known, params, on = _drawing(draw, members, churn)
    known |= {name: np.zeros_like(known[name]) for name in ("weights.final.weight", "weights.final.bias")}
    samples = on(port, draw(st.sampled_from(MESHES), "mesh"))
    draws = len(LEVELS) if churn else 1
    for m in range(members):
        where = {"seed": params["seed"], "analysis": params["analysis"], "member": m}
        (noise,) = port.values("noise", {}, where | {"shape": list(samples.shape[1:]), "draws": draws}, "noise")
        want = _skipped(shaped(noise, (draws, *samples.shape[1:]), "noise"), churn)
        limit = 256 * U * float(np.abs(noise).max()) * float(LEVELS[0])  # some 40 roundings of numbers of that size
        check_close(samples[m], want, limit, f"member {m} against the noise of (seed, analysis, {m})")


def _skipped(noise: Array, churn: float) -> Array:
    """[EDM-6], [EDM-7] for D(x; s) = x / (1 + s^2)."""
    steps = len(LEVELS) - 1
    x: Array = LEVELS[0] * noise[0]
    gamma = min(churn / steps, 2**0.5 - 1)
    for i in range(steps):
        raised, after = (1 + gamma) * LEVELS[i], LEVELS[i + 1]
        if churn:
            x = x + (raised**2 - LEVELS[i] ** 2) ** 0.5 * noise[1 + i]
        d = (x - x / (1 + raised**2)) / raised
        moved = x + (after - raised) * d
        if after > 0:
            other = (moved - moved / (1 + after**2)) / after
            moved = x + (after - raised) * (d + other) / 2
        x = moved
    return x


def _law(name: str, ids: tuple[str, ...], ops: tuple[str, ...], check: Callable[[Port, Draw], None], meaning: str,
         **settings: Any) -> Law:  # fmt: skip
    return Law(f"parallel/law-{name}", ids, ("parallel",), ops, meaning, check, **settings)


# Networks are compared in float64, where rounding cannot be taken for a fault.
LAWS = (
    _law("shares", ("PAR-1", "PAR-3", "PAR-8"), ("shares",), _shares,
         "a sample, tile or point is nobody's or two ranks', or some rank has more than its share"),
    _law("mesh", ("PAR-2", "PAR-6", "PAR-10"), ("parallel_denoise", "denoise_tiled"), _denoise,
         "the denoised state depends on the mesh", examples=4, dtype="float64"),
    _law("ensemble", ("PAR-11", "PAR-18"), ("parallel_ensemble",), _ensemble,
         "members depend on the mesh: their noise is that of the rank, or their order is", examples=4,
         dtype="float64", targets=("member_of_rank", "members_other_order")),
    _law("noise", ("PAR-18", "DA-3"), ("parallel_ensemble", "noise"), _noise,
         "a member is not drawn from the noise of its seed, analysis and number", examples=3, dtype="float64",
         targets=("member_of_rank",)),
)  # fmt: skip
