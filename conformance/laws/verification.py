"""Laws of the scores: definitions, what they do not notice, and ranks where members and truth are equal."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array, Arrays
from conformance.judging import randomness as statistics
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.ports.checked import Port

__all__ = ["LAWS"]

U = 2.0**-53


def _ensemble(draw: Draw, least: int = 1, points: int = 5) -> dict[str, Array]:
    """Members [M, points] and truth, in quarters with many ties, or generic."""
    m, seed = draw(st.integers(least, 9), "members"), draw(st.integers(0, 2**32 - 1), "seed")
    rng = np.random.default_rng(seed)
    members, truth = rng.standard_normal((m, points)), rng.standard_normal(points)
    if draw(st.booleans(), "ties"):
        members, truth = np.round(2 * members) / 4, np.round(2 * truth) / 4
    return {"members": members, "truth": truth}


def _crps(port: Port, inputs: Arrays, fair: bool = False) -> Array:
    return port.values("crps", inputs, {"fair": fair}, "crps")[0]


def _size(inputs: Arrays) -> float:
    """M times the largest departure, of which a score may lose a few units of rounding."""
    return len(inputs["members"]) * (1 + float(np.abs(inputs["members"] - inputs["truth"]).max()))


def _definition(port: Port, draw: Draw) -> None:
    inputs = _ensemble(draw)
    x, m = inputs["members"], len(inputs["members"])
    apart = np.abs(x - inputs["truth"]).mean(0)
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1))
    limit = 64 * U * _size(inputs)
    check_close(_crps(port, inputs), apart - pairs / (2 * m * m), limit, "CRPS, and its definition pair by pair")
    if m > 1:
        want = apart - pairs / (2 * m * (m - 1))
        check_close(_crps(port, inputs, True), want, limit, "fair CRPS, and its definition pair by pair")


def _moved(port: Port, draw: Draw) -> None:
    """In another place, unit, order; each member as often as the others; points in another order."""
    inputs, fair = _ensemble(draw, least=2), draw(st.booleans(), "fair")
    got, limit = _crps(port, inputs, fair), 128 * U * _size(inputs)
    shift, unit = draw(st.integers(-8, 8), "shift"), 2.0 ** draw(st.integers(-9, 9), "exponent of the unit")
    order = np.array(draw(st.permutations(range(len(inputs["members"]))), "order"))
    # Quantities of size 8 + |x| are known to 8 u: the shift itself rounds.
    shifted = {name: value + shift for name, value in inputs.items()}
    check_close(_crps(port, shifted, fair), got, limit + 64 * U * len(order), f"CRPS after a shift of {shift}")
    scaled = {"members": -unit * inputs["members"][order][:, ::-1], "truth": -unit * inputs["truth"][::-1]}
    what = f"CRPS of the mirrored ensemble in a unit of {1 / unit}, members and points in another order"
    check_close(_crps(port, scaled, fair) / unit, got[::-1], limit, what)
    if not fair:
        twice = inputs | {"members": np.concatenate([inputs["members"], inputs["members"][::-1]])}
        check_close(_crps(port, twice), got, 2 * limit, "CRPS with every member twice")


def _bounds(port: Port, draw: Draw) -> None:
    inputs = _ensemble(draw, least=2)
    plain, fair, slack = _crps(port, inputs), _crps(port, inputs, True), 64 * U * _size(inputs)
    apart = np.abs(inputs["members"] - inputs["truth"]).mean(0)
    error = np.abs(inputs["members"].mean(0) - inputs["truth"])
    for low, high, what in (
        (0 * plain, plain, "CRPS is negative"),
        (fair, plain, "fair CRPS is above the plain one"),
        (plain, apart, "CRPS is above the mean absolute error of the members"),
        (plain, error + apart, "CRPS is above any possible value"),
    ):
        if not (low <= high + slack).all():
            raise Broken(f"{what}, by {float((low - high).max()):.3g}")
    equal = {"members": np.tile(inputs["members"][:1], (len(inputs["members"]), 1)), "truth": inputs["truth"]}
    want = np.abs(equal["members"][0] - inputs["truth"])
    for both in (False, True):
        check_close(_crps(port, equal, both), want, slack, "CRPS of equal members, and their absolute error")


def _skill(port: Port, inputs: Arrays) -> dict[str, Array]:
    names = ("rmse", "spread", "ratio")
    return dict(zip(names, port.values("spread_skill", inputs, {}, *names), strict=True))


def _skill_moved(port: Port, draw: Draw) -> None:
    inputs = _ensemble(draw, least=2, points=6)
    inputs["truth"] = inputs["truth"] + 3  # away from the mean: the error is not zero
    mask = np.array(draw(st.permutations([True, True, True, True, False, False]), "mask"))
    weights = np.array(draw(st.lists(st.integers(1, 8), min_size=6, max_size=6), "weights"), dtype=np.float64) / 4
    here = inputs | {"weights": weights, "mask": mask}
    got = _skill(port, here)
    order = np.array(draw(st.permutations(range(6)), "order"))
    unit = 2.0 ** draw(st.integers(-9, 9), "exponent of the unit")
    moved = {
        "members": (unit * inputs["members"])[::-1][:, order], "truth": unit * inputs["truth"][order],
        "weights": 3 * weights[order], "mask": mask[order],
    }  # fmt: skip
    hidden = {name: np.where(mask, value, np.nan) for name, value in inputs.items()}
    chosen = {"members": inputs["members"][:, mask], "truth": inputs["truth"][mask], "weights": weights[mask]}
    other, masked, part = _skill(port, moved), _skill(port, here | hidden), _skill(port, chosen)
    size = 1 + float(np.abs(inputs["members"]).max() + np.abs(inputs["truth"]).max())
    for name, value in got.items():
        # Squares of numbers of that size lose size / result in the subtraction and in the root.
        limit = 256 * U * size**2 / max(float(min(got["rmse"], got["spread"])), 2.0**-20) ** 2 * (1 + float(value))
        scale = 1.0 if name == "ratio" else unit
        check_close(other[name] / scale, value, limit, f"{name} in another unit and order, weights times three")
        check_close(masked[name], value, limit, f"{name} with NaN where the mask leaves points out")
        check_close(part[name], value, limit, f"{name} of the selected points alone")


def _counts(port: Port, inputs: Arrays, seed: int) -> Array:
    (counts,) = port.values("rank_histogram", inputs, {"seed": seed}, "counts")
    if counts.shape != (len(inputs["members"]) + 1,):
        raise Broken(f"counts have shape {list(counts.shape)}, expected {[len(inputs['members']) + 1]}")
    return counts


def _rank_bounds(port: Port, draw: Draw) -> None:
    inputs, seed = _ensemble(draw, points=9), draw(st.integers(0, 2**31 - 1), "seed of ties")
    counts = _counts(port, inputs, seed)
    below = (inputs["members"] < inputs["truth"]).sum(0)
    most = (inputs["members"] <= inputs["truth"]).sum(0)
    if counts.sum() != 9 or counts.min() < 0:
        raise Broken(f"the counts {counts.tolist()} of 9 points are negative or do not add up")
    ranks = np.arange(len(counts))
    low, high = (most[:, None] <= ranks).sum(0), (below[:, None] <= ranks).sum(0)
    total = np.cumsum(counts)
    if not ((low <= total) & (total <= high)).all():
        raise Broken(f"ranks {counts.tolist()} do not lie between those with ties below and above the truth")
    check_equal(_counts(port, inputs, seed), counts, "ranks with the same seed")


def _rank_moved(port: Port, draw: Draw) -> None:
    m, seed = draw(st.integers(1, 6), "members"), draw(st.integers(0, 2**32 - 1), "seed")
    values = np.random.default_rng(seed).permuted(np.tile(np.arange(m + 1.0), (8, 1)), axis=1).T
    inputs = {"members": values[1:], "truth": values[0]}  # no ties: ranks are known
    order = np.array(draw(st.permutations(range(m)), "order"))
    counts = np.bincount(values[0].astype(int), minlength=m + 1)
    check_equal(_counts(port, inputs, 1), counts, "ranks of a permutation of 0, 1, ...")
    bent = {"members": np.exp(inputs["members"])[order, ::-1], "truth": np.exp(inputs["truth"])[::-1]}
    check_equal(_counts(port, bent, 2), counts, "ranks after an increasing map, members and points in another order")


def _rank_ties(port: Port, draw: Draw) -> None:
    """Each rank between the ties is equally likely: tests of stated size, seeds fixed."""
    points = 4000
    some = {"members": np.repeat([[-1.0], [0.0], [0.0], [2.0]], points, 1), "truth": np.zeros(points)}
    every = {"members": np.zeros((4, points)), "truth": np.zeros(points)}
    for inputs, ranks, seed, what in (
        (some, (1, 2, 3), 11, "two of four members"),
        (every, range(5), 12, "all members"),
    ):
        counts = _counts(port, inputs, seed)
        if int(counts[list(ranks)].sum()) != points:
            raise Broken(f"where {what} equal the truth the ranks are {counts.tolist()}: some beyond the ties")
        p = min(statistics.share(int(counts[r]), points, 1 / len(ranks)) for r in ranks) * len(ranks)
        if p <= statistics.LEVEL:
            raise Broken(f"where {what} equal the truth the ranks are {counts.tolist()}, p = {p:.3g}")
    # Two independent histograms of five equally likely ranks agree with probability 5^(5/2) / (4 pi N)^2 = 2.2e-8.
    if np.array_equal(_counts(port, every, 13), _counts(port, every, 14)):
        raise Broken("the seed of the tie-breaking numbers is ignored")


def _law(
    name: str, op: str, requirements: tuple[str, ...], meaning: str, check: Any, examples: int = 8,
    targets: tuple[str, ...] = (), profiles: tuple[str, ...] = ("scores",),
) -> Law:  # fmt: skip
    ops = (op,)
    return Law(
        f"verification/law-{name}", requirements, profiles, ops, meaning, check, targets=targets, examples=examples
    )


LAWS = (
    _law(
        "crps-definition", "crps", requirements=("VER-1", "VER-2", "VER-3"),
        meaning="CRPS is not the double sum over members", check=_definition, examples=12,
        targets=("crps_half_double_sum", "crps_fair_biased", "crps_fair_off_by_one"),
    ),
    _law("crps-moved", "crps", ("VER-1", "VER-2", "VER-10"), "CRPS depends on place, unit or order", _moved),
    _law("crps-bounds", "crps", ("VER-1", "VER-2"), "CRPS is negative, or above the mean absolute error", _bounds, 8),
    _law(
        "skill-moved", "spread_skill", requirements=("VER-4", "VER-6", "VER-7", "VER-8", "NUM-11"),
        meaning="spread and skill notice the unit, the order, the sum of the weights, or what the mask leaves out",
        check=_skill_moved, examples=8, targets=("average_masked_by_zero", "average_over_all_points"),
    ),
    _law(
        "ranks-bounds", "rank_histogram", ("VER-9", "NUM-12"), "ranks lie outside the ties, or get lost", _rank_bounds,
        10, profiles=("scores", "rng"),
    ),
    _law("ranks-moved", "rank_histogram", ("VER-9",), "ranks depend on more than the order of values", _rank_moved, 8),
    _law(
        "ranks-ties", "rank_histogram", requirements=("VER-9", "NUM-5"),
        meaning="ties are ranked low, high or in the middle, or without the seed", check=_rank_ties, examples=1,
        targets=("rank_ties_low", "rank_ties_high", "rank_ties_middle"), profiles=("scores", "rng"),
    ),
)  # fmt: skip
