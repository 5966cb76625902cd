"""Cases of the scores: CRPS, spread and skill, means over points, ranks.

Expected values: the definitions in fractions, on members that are dyadic numbers, rounded once at the end; cosines in
50 digits; ranks counted one by one.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from mpmath import mp, mpf

from conformance.adapter import Array, Arrays, Params
from conformance.judging.case import Judge, Recipe
from conformance.judging.tolerance import Bound, Exact, MustReject, Ulp

__all__ = ["recipes"]

SCORES = ("scores",)
SMOKE = ("smoke", "scores")


def _dyadic(rng: np.random.Generator, *shape: int) -> Array:
    """Standard normal numbers in 256ths: their sums and differences do not round."""
    x: Array = np.round(256 * rng.standard_normal(shape)) / 256
    return x


def _recipe(
    name: str, op: str, requirements: tuple[str, ...], judge: Judge, meaning: str, inputs: Arrays,
    params: Params | None = None, expected: Arrays | None = None, valid_counterpart: Arrays | None = None,
    targets: tuple[str, ...] = (), profiles: tuple[str, ...] = SCORES,
) -> Recipe:  # fmt: skip
    """A case of this chapter; a valid counterpart has the same params."""
    settings = params or {}
    other = None if valid_counterpart is None else (valid_counterpart, settings)
    return Recipe(
        f"verification/{name}",
        op,
        requirements=requirements,
        profiles=profiles,
        judge=judge,
        meaning=meaning,
        inputs=inputs,
        params=settings,
        expected=expected,
        valid_counterpart=other,
        targets=targets,
    )


# CRPS.


def _crps(members: Array, truth: Array, fair: bool) -> Array:
    """[VER-1], [VER-2] pair by pair in fractions: [M, points], [points] -> [points]."""
    m = len(members)
    scores = []
    for p in range(truth.size):
        x, y = [Fraction(v) for v in members[:, p].tolist()], Fraction(float(truth[p]))
        pairs = sum((abs(a - b) for a in x for b in x), Fraction(0))
        scores.append(float(sum(abs(a - y) for a in x) / m - pairs / (2 * m * (m - 1 if fair else m))))
    return np.array(scores)


def _crps_case(
    name: str, requirements: tuple[str, ...], members: Array, truth: Array, fair: bool, meaning: str,
    targets: tuple[str, ...] = (), profiles: tuple[str, ...] = SCORES,
) -> Recipe:  # fmt: skip
    m, scale = len(members), float(np.abs(members - truth).max())
    why = (
        f"sums of {m} departures below {scale:.3g}, weighted by at most 2 M and divided by M (M - 1) at least: in any "
        "order each of the two terms is off by at most 8 M u times the largest departure"
    )
    inputs = {"members": members, "truth": truth}
    expected = {"crps": _crps(members, truth, fair)}
    bound = Bound(16 * m, why, scale=scale)
    return _recipe(
        name,
        "crps",
        requirements=requirements,
        judge=bound,
        meaning=meaning,
        inputs=inputs,
        params={"fair": fair},
        expected=expected,
        targets=targets,
        profiles=profiles,
    )


def _crps_cases() -> list[Recipe]:
    rng = np.random.default_rng(901)
    members, truth = _dyadic(rng, 7, 5), _dyadic(rng, 5)
    ties = np.array([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [3.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    many, skewed = _dyadic(rng, 50, 3), _dyadic(rng, 3)
    outside = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    missing = members.copy()
    missing[2, 1] = np.nan
    scores = _crps(members, truth, False)
    scores[1] = np.nan
    half, biased = ("crps_half_double_sum", "crps_full_double_sum"), ("crps_fair_biased", "crps_fair_off_by_one")
    return [
        _crps_case(
            "crps", ("VER-1", "VER-3"), members=members, truth=truth, fair=False,
            meaning="the score is the fair one, or pairs are counted once", targets=half, profiles=SMOKE,
        ),
        _crps_case(
            "crps-fair", ("VER-2",), members=members, truth=truth, fair=True, meaning="M^2 instead of M (M - 1)",
            targets=biased,
        ),
        _crps_case(
            "crps-two-fair", ("VER-2",), members=members[:2], truth=truth, fair=True,
            meaning="M or M + 1 instead of M - 1", targets=biased,
        ),
        _crps_case(
            "crps-two", ("VER-1",), members=members[:2], truth=truth, fair=False,
            meaning="the fair score in place of the plain one", targets=half,
        ),
        _crps_case("crps-ties", ("VER-1", "VER-3"), ties, np.array([1.0, 5.0, 0.0]), False, "equal members count once"),
        _crps_case("crps-many", ("VER-1", "VER-3"), many, skewed, False, "the sorted sum is off by one"),
        _crps_case("crps-many-fair", ("VER-2", "VER-3"), many, skewed, True, "the fair score of many members"),
        _crps_case(
            "crps-outside", ("VER-1",), outside, np.array([-8.0, 16.0]), False,
            "a truth outside the ensemble: a score from the two nearest members, or from ranks",
        ),
        _crps_case(
            "crps-far", ("VER-1", "VER-10"), members=members + 2.0**30, truth=truth + 2.0**30, fair=False,
            meaning="a common offset cancels digits: single precision, or sums of members instead of departures",
            targets=("crps_in_float32",),
        ),
        _crps_case("crps-one-member", ("VER-1",), members[:1], truth, False, "not one member's absolute error"),
        _recipe(
            "crps-nan", "crps", requirements=("VER-4", "NUM-11"),
            judge=Bound(128, "as for seven members: 16 M", scale=4.0),
            meaning="a NaN among the members is left out, or spreads to other points",
            inputs={"members": missing, "truth": truth}, params={"fair": False}, expected={"crps": scores},
        ),
        _recipe(
            "refuses-one-fair-member", "crps", requirements=("VER-2", "CONV-10"),
            judge=MustReject("M (M - 1) = 0 for one member"),
            meaning="the fair score of one member is NaN or inf instead of an error",
            inputs={"members": members[:1], "truth": truth}, params={"fair": True},
            valid_counterpart={"members": members[:2], "truth": truth},
        ),
        _recipe(
            "refuses-other-points", "crps", requirements=("CONV-10",),
            judge=MustReject("members of 5 points, a truth of one"), meaning="a truth of another shape is broadcast",
            inputs={"members": members, "truth": truth[:1]}, params={"fair": False},
            valid_counterpart={"members": members, "truth": truth},
        ),
    ]  # fmt: skip


# Spread and skill.


def _root(square: Fraction) -> float:
    with mp.workdps(50):
        return float(mp.sqrt(mpf(square.numerator) / square.denominator))


def _spread_skill(members: Array, truth: Array, weights: list[Fraction], points: list[int]) -> dict[str, Array]:
    """[VER-4], [VER-6] to [VER-8] in fractions but for the three roots."""
    m = len(members)
    total = sum((weights[p] for p in points), Fraction(0))
    error = variance = Fraction(0)
    for p in points:
        x = [Fraction(v) for v in members[:, p].tolist()]
        mean = sum(x, Fraction(0)) / m
        error += weights[p] * (mean - Fraction(float(truth[p]))) ** 2 / total
        variance += weights[p] * sum(((a - mean) ** 2 for a in x), Fraction(0)) / (m - 1) / total
    ratio = _root((1 + Fraction(1, m)) * variance / error)
    return {
        name: np.array(value) for name, value in (("rmse", _root(error)), ("spread", _root(variance)), ("ratio", ratio))
    }


def _skill_case(
    name: str, requirements: tuple[str, ...], members: Array, truth: Array, meaning: str,
    weights: list[float] | None = None, mask: list[bool] | None = None, hide: bool = False,
    targets: tuple[str, ...] = (), profiles: tuple[str, ...] = SCORES,
) -> Recipe:  # fmt: skip
    """hide: truth and members are NaN where the mask leaves points out."""
    points = [p for p in range(truth.size) if mask is None or mask[p]]
    expected = _spread_skill(members, truth, [Fraction(w) for w in weights or [1.0] * truth.size], points)
    members, truth = members.copy(), truth.copy()
    if hide and mask is not None:
        members[0, ~np.array(mask)], truth[~np.array(mask)] = np.nan, np.nan
    inputs = {"members": members, "truth": truth}
    inputs |= {} if weights is None else {"weights": np.array(weights)}
    inputs |= {} if mask is None else {"mask": np.array(mask)}
    size = 1 + float(np.nanmax(np.abs(members))) / float(min(expected["rmse"], expected["spread"]))
    k = math.ceil((members.shape[0] + truth.size + 16) * size)
    why = f"sums over points of squares of departures that lose a factor of {size:.3g} in subtraction, and three roots"
    return _recipe(
        name,
        "spread_skill",
        requirements=requirements,
        judge=Bound(2 * k, why),
        meaning=meaning,
        inputs=inputs,
        params={},
        expected=expected,
        targets=targets,
        profiles=profiles,
    )


def _skill_cases() -> list[Recipe]:
    rng = np.random.default_rng(900)
    members, truth = _dyadic(rng, 5, 6), _dyadic(rng, 6)
    weights, mask = [1.0, 0.5, 0.75, 1.0, 0.25, 2.0], [True, True, True, False, True, False]
    patchy = np.array([[0.0, 1.0, 0.0, 8.0], [0.0, -1.0, 0.0, -8.0], [0.5, 0.0, 0.0, 4.0]])
    population = ("spread_with_m", "ratio_without_factor")
    return [
        _skill_case(
            "spread-skill", ("VER-4", "VER-6", "VER-7", "VER-8"), members=members, truth=truth,
            meaning="masked points are multiplied by zero (NaN), the variance has M instead of M - 1, "
            "or 1 + 1/M is missing",
            weights=weights, mask=mask, hide=True, targets=("average_masked_by_zero", *population), profiles=SMOKE,
        ),
        _skill_case(
            "spread-skill-plain", ("VER-6", "VER-7", "VER-8"), members, truth,
            "the variance has M instead of M - 1, or 1 + 1/M is missing", targets=population,
        ),
        _skill_case(
            "spread-skill-two", ("VER-7", "VER-8"), members[:2], truth, "two members: 1/(M - 1) is 1", weights,
            targets=population,
        ),
        _skill_case(
            "spread-skill-patchy", ("VER-6", "VER-7"), patchy, np.array([0.0, 0.0, 0.25, -2.0]),
            "roots are taken before the mean over points: patchy errors come out too small",
            targets=("spread_mean_of_roots",),
        ),
        _skill_case(
            "spread-skill-weights", ("VER-4", "VER-6", "VER-7"), members=members, truth=truth,
            meaning="weights are not divided by their sum, or by that of all points instead of the selected ones",
            weights=[3.0, 0.0, 5.0, 0.25, 8.0, 1.0], mask=[True, True, False, True, True, True],
            targets=("average_over_all_points",),
        ),
        _skill_case(
            "spread-skill-far", ("VER-6", "VER-7", "VER-10"), members + 1024, truth + 1024,
            "the variance is a difference of mean squares, or in single precision", targets=("average_in_float32",),
        ),
        _recipe(
            "spread-skill-nan", "spread_skill", requirements=("VER-4", "NUM-11"),
            judge=Bound(64, "sums over 6 points of squares of numbers near 1, and roots"),
            meaning="a NaN at a selected point is left out in silence, or spreads to the spread",
            inputs={"members": members, "truth": np.array([*truth[:5].tolist(), np.nan])}, params={},
            expected=_spread_skill(
                members, truth, [Fraction(1)] * 6, list(range(6)),
            ) | dict.fromkeys(("rmse", "ratio"), np.array(np.nan)),
            targets=("average_skips_nan",),
        ),
        *_skill_refusals(members, truth),
    ]  # fmt: skip


def _skill_refusals(members: Array, truth: Array) -> list[Recipe]:
    valid = {"members": members, "truth": truth}
    balanced = {"members": np.array([[1.0, -2.0], [3.0, 2.0]]), "truth": np.array([2.0, 0.0])}
    masked = valid | {"weights": np.ones(6), "mask": np.array([True] + 5 * [False])}

    def case(name: str, requirement: str, why: str, meaning: str, inputs: Arrays, valid_counterpart: Arrays) -> Recipe:
        return _recipe(
            f"refuses-{name}", "spread_skill", requirements=(requirement, "CONV-10"), judge=MustReject(why),
            meaning=meaning, inputs=inputs, params={}, expected=None, valid_counterpart=valid_counterpart,
        )  # fmt: skip

    return [
        case(
            "one-member-spread", "VER-7", "M - 1 = 0 for one member", "one member's spread is NaN or 0, not an error",
            valid | {"members": members[:1]}, valid | {"members": members[:2]},
        ),
        case(
            "zero-error", "VER-8", "the mean is the truth at every point", "a ratio of inf or NaN instead of an error",
            balanced, balanced | {"truth": np.array([2.0, 0.5])},
        ),
        case(
            "empty-mask", "VER-4", "no point is selected", "a mean over nothing is NaN or 0 instead of an error",
            masked | {"mask": np.zeros(6, dtype=bool)}, masked,
        ),
        case(
            "negative-weight", "VER-4", "a weight of -0.5", "a negative weight is used",
            masked | {"weights": np.array([-0.5] + 5 * [1.0]), "mask": np.ones(6, dtype=bool)},
            masked | {"mask": np.ones(6, dtype=bool)},
        ),
        case(
            "zero-weights", "VER-4", "the selected weights sum to 0",
            "a mean over weights of 0 is NaN or 0, not an error",
            masked | {"weights": np.array([0.0] + 5 * [1.0])}, masked,
        ),
    ]  # fmt: skip


# Means over points, area weights, ranks.


def _averages() -> list[Recipe]:
    score = np.array([1.0, -3.0, 0.5, 8.0])
    weights, mask = np.array([1.0, 2.0, 4.0, 1.0]), np.array([True, True, False, True])
    hidden, shown = score.copy(), score.copy()
    hidden[2], shown[1] = np.nan, np.nan
    parts = {"weights": weights, "mask": mask}
    few = Bound(16, "products and sums of four numbers, one division", scale=8.0)
    mean = {"average": np.array((1.0 - 6.0 + 8.0) / 4)}
    return [
        _recipe(
            "average", "average", requirements=("VER-4",), judge=few,
            meaning="the divisor is not the sum of the selected weights", inputs={"score": score} | parts, params={},
            expected=mean,
        ),
        _recipe(
            "average-masked-nan", "average", requirements=("VER-4", "NUM-11", "CONV-7"), judge=few,
            meaning="points outside the mask are multiplied by zero, and NaN spreads", inputs={"score": hidden} | parts,
            params={}, expected=mean, targets=("average_masked_by_zero",),
        ),
        _recipe(
            "average-selected-nan", "average", requirements=("VER-4", "NUM-11"), judge=few,
            meaning="a NaN at a selected point is left out in silence", inputs={"score": shown} | parts, params={},
            expected={"average": np.array(np.nan)}, targets=("average_skips_nan",),
        ),
        _recipe(
            "refuses-average-of-nothing", "average", requirements=("VER-4",), judge=MustReject("no point is selected"),
            meaning="a mean over nothing is NaN or 0 instead of an error",
            inputs={"score": score, "mask": np.zeros(4, dtype=bool)}, params={}, expected=None,
            valid_counterpart={"score": score, "mask": mask},
        ),
    ]  # fmt: skip


def _areas() -> list[Recipe]:
    latitude = [89.5, 60.0, 45.0, 0.25, 0.0, -30.0, -87.1875]
    with mp.workdps(50):
        cosines = np.array([float(mp.cos(mp.radians(mpf(value)))) for value in latitude])
        pole = float(mp.cos(mp.radians(mpf(89.5))))
    # An angle of pi/2 in radians is known to u pi/2, and the cosine's slope there is 1.
    why = f"an angle below 1.6 known to three roundings, against a cosine of {pole:.3g} at least; 2 ULP for the cosine"
    return [
        _recipe(
            "area-weights", "area_weights", requirements=("VER-5", "CONV-3"),
            judge=Ulp(math.ceil(2 + 3 * 1.6 / pole), why),
            meaning="sine for cosine, degrees for radians, or weights divided by their mean",
            inputs={"latitude": np.array(latitude)}, params={}, expected={"weights": cosines},
            targets=("area_weights_radians", "area_weights_sine"),
        ),
        _recipe(
            "area-weights-poles", "area_weights", requirements=("VER-5",),
            judge=Bound(4, "the cosine of an angle of pi/2 known to three roundings", scale=2.0),
            meaning="the poles get the weight of a cell", inputs={"latitude": np.array([90.0, -90.0])}, params={},
            expected={"weights": np.zeros(2)},
        ),
        _recipe(
            "refuses-latitude", "area_weights", requirements=("VER-5", "CONV-3", "CONV-10"),
            judge=MustReject("a latitude of 91 degrees"),
            meaning="a latitude beyond the pole gets a negative weight, or is clamped",
            inputs={"latitude": np.array([91.0, 0.0])}, params={}, expected=None,
            valid_counterpart={"latitude": np.array([90.0, 0.0])},
        ),
    ]  # fmt: skip


def _rank_case(
    name: str, members: Array, truth: Array, meaning: str, *targets: str, mask: list[bool] | None = None,
    profiles: tuple[str, ...] = SCORES,
) -> Recipe:  # fmt: skip
    points = [p for p in range(truth.size) if mask is None or mask[p]]
    counts = np.zeros(len(members) + 1, dtype=np.int64)
    for p in points:
        counts[sum(x < truth[p] for x in members[:, p].tolist())] += 1
    inputs: dict[str, Any] = {"members": members, "truth": truth} | ({} if mask is None else {"mask": np.array(mask)})
    return _recipe(
        name, "rank_histogram", requirements=("VER-9",), judge=Exact("no member equals the truth: counts alone"),
        meaning=meaning, inputs=inputs, params={"seed": 7}, expected={"counts": counts}, targets=targets,
        profiles=profiles,
    )  # fmt: skip


def _ranks() -> list[Recipe]:
    rng = np.random.default_rng(910)
    members, truth = rng.standard_normal((4, 40)), rng.standard_normal(40) - 0.75
    one, masked = np.array([[0.0, 0.0, 0.0]]), truth[:12].copy()
    mask = [p % 3 != 1 for p in range(12)]
    masked[[1, 4]] = np.nan
    return [
        _rank_case("ranks", members, truth, "members above the truth are counted", "rank_from_above", profiles=SMOKE),
        _rank_case("ranks-one-member", one, np.array([-1.0, 2.0, 3.0]), "one member, two ranks", "rank_without_first"),
        _rank_case("ranks-masked", members[:, :12], masked, "points outside the mask are counted", mask=mask),
        _recipe(
            "refuses-rank-of-nan", "rank_histogram", requirements=("VER-9", "NUM-11", "CONV-10"),
            judge=MustReject("a selected truth is NaN, which has no rank"), meaning="a NaN is given a rank",
            inputs={"members": members[:, :12], "truth": masked}, params={"seed": 7}, expected=None,
            valid_counterpart={"members": members[:, :12], "truth": masked, "mask": np.array(mask)},
            targets=("rank_nan_accepted",),
        ),
        _rank_case(
            "ranks-outside", members[:, :8], np.array([9.0] * 5 + [-9.0] * 3),
            "empty ranks, or those beyond the highest one that occurs, are missing", "rank_without_first",
        ),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """CRPS as defined and fair, spread and skill, means, area weights, ranks, and what is refused."""
    return [*_crps_cases(), *_skill_cases(), *_averages(), *_areas(), *_ranks()]
