"""Cases of the scores: CRPS, spread and skill.

Expected values: the pairwise definitions in fractions, on members that are dyadic numbers, rounded once at the end.
"""

import math
from fractions import Fraction

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.tolerance import Bound, MustReject

__all__ = ["cases"]


def _crps(members: Array, truth: Array, fair: bool) -> Array:
    """[VER-1], [VER-2] pair by pair in fractions: [M, points], [points] -> [points]."""
    m = len(members)
    scores = []
    for p in range(truth.size):
        x, y = [Fraction(v) for v in members[:, p].tolist()], Fraction(float(truth[p]))
        pairs = sum(abs(a - b) for a in x for b in x)
        scores.append(float(sum(abs(a - y) for a in x) / m - Fraction(pairs) / (2 * m * (m - 1 if fair else m))))
    return np.array(scores)


def _crps_case(
    name: str, requirements: tuple[str, ...], members: Array, truth: Array, fair: bool, meaning: str
) -> Case:
    m, scale = len(members), float(np.abs(members - truth).max())
    why = f"sums of {m} departures, each weighted by at most 2 M, divided by 2 M^2 at least"
    inputs = {"members": members, "truth": truth}
    bound = Bound(8 * m, why, scale=scale)
    return Case(
        f"verification/{name}",
        "crps",
        requirements,
        bound,
        meaning,
        inputs,
        {"fair": fair},
        {"crps": _crps(members, truth, fair)},
    )


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
    ratio = math.sqrt((1 + Fraction(1, m)) * variance / error)
    return {
        name: np.array(value)
        for name, value in (("rmse", math.sqrt(error)), ("spread", math.sqrt(variance)), ("ratio", ratio))
    }


def _spread_skill_case() -> Case:
    rng = np.random.default_rng(900)
    members, truth = np.round(64 * rng.standard_normal((5, 6))) / 64, np.round(64 * rng.standard_normal(6)) / 64
    weights = [Fraction(1), Fraction(1, 2), Fraction(3, 4), Fraction(1), Fraction(1, 4), Fraction(2)]
    expected = _spread_skill(members, truth, weights, [0, 1, 2, 4])
    truth[[3, 5]] = np.nan
    inputs = {
        "members": members,
        "truth": truth,
        "weights": np.array([float(w) for w in weights]),
        "mask": np.array([True, True, True, False, True, False]),
    }
    bound = Bound(
        64,
        "sums over 4 points of sums over 5 members, squares and three roots; departures are below 4 times the result",
    )
    return Case(
        "verification/spread-skill",
        "spread_skill",
        ("VER-4", "VER-6", "VER-7", "VER-8"),
        bound,
        "masked points are multiplied by zero (NaN), the variance has M instead of M - 1, or 1 + 1/M is missing",
        inputs,
        {},
        expected,
    )


def cases() -> list[Case]:
    """CRPS as defined and fair, spread-skill with weights and a mask, too few members."""
    rng = np.random.default_rng(901)
    members, truth = np.round(256 * rng.standard_normal((7, 5))) / 256, np.round(256 * rng.standard_normal(5)) / 256
    ties = np.array([[1.0, 2.0], [1.0, -2.0], [3.0, 2.0], [1.0, 2.0]])
    few, two = members[:1], members[:2]
    return [
        _crps_case(
            "crps",
            ("VER-1", "VER-3"),
            members,
            truth,
            False,
            "the score is the fair one, or pairs are counted once instead of twice",
        ),
        _crps_case(
            "crps-fair",
            ("VER-2",),
            members,
            truth,
            True,
            "the score is biased for a finite ensemble: M^2 instead of M (M - 1)",
        ),
        _crps_case("crps-ties", ("VER-1",), ties, np.array([1.0, 5.0]), False, "equal members are counted once"),
        _crps_case(
            "crps-far",
            ("VER-1", "VER-10"),
            members + 2.0**30,
            truth + 2.0**30,
            False,
            "a common offset cancels digits: scores in single precision, or sums of members instead of departures",
        ),
        _crps_case("crps-one-member", ("VER-1",), few, truth, False, "one member's score is not its absolute error"),
        _spread_skill_case(),
        Case(
            "verification/refuses-one-fair-member",
            "crps",
            ("VER-2",),
            MustReject("M (M - 1) = 0 for one member"),
            "the fair score of one member is NaN or inf instead of an error",
            {"members": few, "truth": truth},
            {"fair": True},
            neighbour=({"members": two, "truth": truth}, {"fair": True}),
        ),
        Case(
            "verification/refuses-one-member-spread",
            "spread_skill",
            ("VER-7",),
            MustReject("M - 1 = 0 for one member"),
            "the spread of one member is NaN or 0 instead of an error",
            {"members": few, "truth": truth},
            {},
            neighbour=({"members": two, "truth": truth}, {}),
        ),
    ]
