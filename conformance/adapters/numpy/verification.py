"""The scores of chapter 8 in plain NumPy, sums as they stand in the text; float64 whatever comes in, [VER-10].

Members are [M, ...], truth, weights and mask as one member. A NaN is a score's own business: it stays in its point, and
where a mean selects it the mean is NaN, [VER-4].
"""

import math

import numpy as np

from conformance.adapter import Array
from conformance.adapters.numpy import checks as check
from conformance.adapters.numpy.tokens import finite_degrees

__all__ = ["area_weights", "average", "crps", "rank_histogram", "spread_skill"]


def ensemble(members: Array, truth: Array, least: int = 1) -> tuple[Array, Array]:
    """Members and truth in float64, of fitting shapes; refuses fewer members than `least`."""
    x, y = np.asarray(members, np.float64), np.asarray(truth, np.float64)
    if x.ndim < 1 or x.shape[1:] != y.shape:
        raise ValueError(f"members of shape {list(x.shape)} do not fit truth {list(y.shape)}; give [M, ...] and [...]")
    if len(x) < least:
        raise ValueError(f"there are {len(x)} members; give at least {least}")
    return x, y


def crps(members: Array, truth: Array, fair: bool) -> Array:
    """The CRPS of each point, [VER-1], or the fair one, [VER-2]."""
    x, y = ensemble(members, truth, 2 if fair else 1)
    m = len(x)
    distance = sum(np.abs(a - b) for a in x for b in x)
    return np.abs(x - y).sum(0) / m - distance / (2 * m * (m - 1 if fair else m))  # type: ignore[no-any-return]


def selected(mask: Array | None, like: Array) -> Array:
    """The points that take part."""
    if mask is None:
        return np.ones(like.shape, bool)
    if mask.dtype != bool:
        raise ValueError(f"mask is of dtype {mask.dtype}; give true where a point takes part")
    return check.shape("mask", mask, *like.shape)


def average(score: Array, weights: Array | None = None, mask: Array | None = None) -> float:
    """The weighted mean over the points that the mask selects, [VER-4]."""
    score = np.asarray(score, np.float64)
    chosen = selected(mask, score)
    w = np.ones(score.shape) if weights is None else check.shape("weights", weights, *score.shape)
    w = check.finite("weights", w[chosen].astype(np.float64))
    if (w < 0).any():
        raise ValueError(f"weights reach {w.min()}; give none below 0")
    if w.sum() == 0:
        raise ValueError(f"a mean over {len(w)} points of weight 0 is over nothing; select points that have weight")
    return float((w * score[chosen]).sum() / w.sum())


def area_weights(latitude: Array) -> Array:
    """cos(latitude), [VER-5]."""
    return np.cos(np.deg2rad(finite_degrees("latitude", latitude)))


def spread_skill(
    members: Array, truth: Array, weights: Array | None = None, mask: Array | None = None
) -> tuple[float, float, float]:
    """RMSE of the ensemble mean, spread, and sqrt(1 + 1/M) times their ratio, [VER-6] to [VER-8]."""
    x, y = ensemble(members, truth, 2)
    mean = x.mean(0)
    rmse = math.sqrt(average((mean - y) ** 2, weights, mask))
    spread = math.sqrt(average(((x - mean) ** 2).sum(0) / (len(x) - 1), weights, mask))
    if rmse == 0:
        raise ValueError(f"the RMSE is 0 at a spread of {spread}; a ratio to it is not defined")
    return rmse, spread, math.sqrt(1 + 1 / len(x)) * spread / rmse


def rank_histogram(members: Array, truth: Array, mask: Array | None, seed: int) -> Array:
    """Count how often the truth takes each of the M + 1 ranks, ties drawn uniformly, [VER-9]."""
    x, y = ensemble(members, truth)
    chosen, counts = selected(mask, y), np.zeros(len(x) + 1, np.int64)
    generator = np.random.default_rng(check.integer("seed", seed, 0))
    for values, target in zip(x[:, chosen].T, y[chosen], strict=True):
        if not (math.isfinite(target) and np.isfinite(values).all()):
            raise ValueError(f"members {values.tolist()} or truth {target} are no numbers; mask the point out")
        below, equal = int((values < target).sum()), int((values == target).sum())
        counts[below + generator.integers(0, equal + 1)] += 1
    return counts
