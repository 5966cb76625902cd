"""Verification: scores of an ensemble against the truth, in the truth's own units.

At a point, x_i, i = 1..M, are the members, y is the truth, m the members' mean and x_(i) the i-th smallest member.

[VER-1] CRPS = 1/M sum_i |x_i - y| - 1/(2 M^2) sum_ij |x_i - x_j|
[VER-2] fair CRPS = 1/M sum_i |x_i - y| - 1/(2 M (M - 1)) sum_ij |x_i - x_j|, M >= 2: its expectation is the CRPS of the
        distribution the members are drawn from, whatever M
[VER-3] sum_ij |x_i - x_j| = 2 sum_i (2 i - M - 1) x_(i), in O(M log M)
[VER-4] <s> = sum_p w_p s_p / sum_p w_p over the points p that the mask selects; other points are left out, never
        multiplied by zero, so that a NaN there does no harm (at a selected point it makes the score NaN)
[VER-5] w = cos(latitude)
[VER-6] rmse = sqrt < (m - y)^2 >
[VER-7] spread = sqrt < 1/(M - 1) sum_i (x_i - m)^2 >, M >= 2
[VER-8] spread-skill = sqrt(1 + 1/M) spread / rmse: 1 in expectation when members and truth are exchangeable, since then
        E (m - y)^2 = (1 + 1/M) variance; below 1 the ensemble is overconfident
[VER-9] rank of the truth = #{i : x_i < y} + U, with U uniform on 0..#{i : x_i = y}; counted over M + 1 ranks
[VER-10] every score is computed in float64, whatever the dtype of its input

References: Gneiting & Raftery (2007), eq. 21 for VER-1; Ferro (2014) for VER-2; Fortin et al. (2014) for VER-8; Hamill
(2001) for VER-9. The paper reports RMSE, spread and CRPS without formulas; those given here are our interpretation.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

__all__ = [
    "area_weights",
    "average",
    "crps_ensemble",
    "crps_fair",
    "rank_histogram",
    "rmse",
    "spread",
    "spread_skill",
    "sum_of_differences",
    "sum_of_differences_pairwise",
]


def sum_of_differences_pairwise(members: Float[Tensor, "m *grid"]) -> Float64[Tensor, "*grid"]:
    """Return the sum of |x_i - x_j| over all ordered pairs, pair by pair: the definition, O(M^2) in time and memory."""
    x = members.double()
    return (x[:, None] - x[None, :]).abs().sum((0, 1))


def sum_of_differences(members: Float[Tensor, "m *grid"]) -> Float64[Tensor, "*grid"]:
    """Return the sum of |x_i - x_j| over all ordered pairs from the sorted members, [VER-3].

    The nearer the members are to zero, the smaller is its rounding error.
    """
    x = members.double().sort(0).values
    m = x.shape[0]
    coefficient = 2 * torch.arange(1, m + 1, dtype=torch.float64, device=x.device) - m - 1
    return (2 * coefficient.reshape(m, *[1] * (x.ndim - 1)) * x).sum(0)


def crps_ensemble(members: Float[Tensor, "m *grid"], truth: Float[Tensor, "*grid"]) -> Float64[Tensor, "*grid"]:
    """Return the continuous ranked probability score of the ensemble at each point, [VER-1].

    members [M, ...] and truth [...] share one unit, which is also the score's. With M = 1 the score is the absolute
    error. Raises ValueError when the shapes do not fit.
    """
    departure = _departures(members, truth, least=1)
    m = departure.shape[0]
    return departure.abs().mean(0) - sum_of_differences(departure) / (2 * m * m)


def crps_fair(members: Float[Tensor, "m *grid"], truth: Float[Tensor, "*grid"]) -> Float64[Tensor, "*grid"]:
    """Return the fair CRPS at each point, [VER-2]: without the bias of a finite ensemble, so that sizes M compare.

    members [M, ...] and truth [...] share one unit, which is also the score's. The fair score can be negative. Raises
    ValueError when M < 2 or the shapes do not fit.
    """
    departure = _departures(members, truth, least=2)
    m = departure.shape[0]
    return departure.abs().mean(0) - sum_of_differences(departure) / (2 * m * (m - 1))


def average(
    score: Float[Tensor, "*grid"],
    *,
    weights: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float64[Tensor, ""]:
    """Return the weighted mean of a score over the points where the mask is true, [VER-4].

    weights (>= 0) and mask are broadcast to the shape of the score; without them all points count alike. Raises
    ValueError when they do not broadcast, when a weight is negative or not finite, and when nothing is left to average.
    """
    selected = _selection(mask, score)
    chosen = score[selected].double()
    weight = torch.ones_like(chosen) if weights is None else _broadcast("weights", weights, score)[selected].double()
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"weights must be finite and >= 0, got {weight.min().item()} to {weight.max().item()}")
    if weight.sum() == 0:
        raise ValueError(
            f"nothing to average: {chosen.numel()} of {score.numel()} points are selected and their weights sum to 0; "
            "check the mask and the weights"
        )
    return (weight * chosen).sum() / weight.sum()


def area_weights(latitude: Float[Tensor, " h"]) -> Float64[Tensor, "h 1"]:
    """Return weights proportional to the area of the cells of a regular latitude-longitude grid, [VER-5].

    latitude is in degrees; the weights have shape [H, 1] and broadcast against fields [..., H, W]. Raises ValueError
    for a latitude outside -90..90.
    """
    if not bool((latitude.abs() <= 90).all()):
        raise ValueError(f"latitude must be in -90..90 degrees, got {latitude.min().item()} to {latitude.max().item()}")
    return latitude.double().deg2rad().cos()[:, None]


def rmse(
    members: Float[Tensor, "m *grid"],
    truth: Float[Tensor, "*grid"],
    *,
    weights: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float64[Tensor, ""]:
    """Return the root-mean-square error of the ensemble mean, in the unit of members [M, ...] and truth [...], [VER-6].

    Raises ValueError when the shapes do not fit, and as `average` does.
    """
    return average(_departures(members, truth, least=1).mean(0).square(), weights=weights, mask=mask).sqrt()


def spread(
    members: Float[Tensor, "m *grid"],
    *,
    weights: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float64[Tensor, ""]:
    """Return the root of the mean unbiased ensemble variance, in the unit of members [M, ...], [VER-7].

    Raises ValueError when M < 2, and as `average` does.
    """
    _require_members(members, least=2)
    return average(members.double().var(0, correction=1), weights=weights, mask=mask).sqrt()


def spread_skill(
    members: Float[Tensor, "m *grid"],
    truth: Float[Tensor, "*grid"],
    *,
    weights: Float[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float64[Tensor, ""]:
    """Return spread over skill, corrected for the size of the ensemble, [VER-8].

    The ratio of a calibrated ensemble is 1, that of an overconfident one less. members [M, ...] and truth [...] share
    one unit. Raises ValueError when M < 2, when the error is zero at every selected point and when the shapes do not
    fit, and as `average` does.
    """
    error = rmse(members, truth, weights=weights, mask=mask)
    if error == 0:
        raise ValueError("spread-skill is undefined: the ensemble mean equals the truth at every selected point")
    m = members.shape[0]
    return math.sqrt(1 + 1 / m) * spread(members, weights=weights, mask=mask) / error


def rank_histogram(
    members: Float[Tensor, "m *grid"],
    truth: Float[Tensor, "*grid"],
    generator: torch.Generator,
    *,
    mask: Bool[Tensor, "..."] | None = None,
) -> Int64[Tensor, " ranks"]:
    """Count how often the truth has each of the M + 1 ranks among the members, [VER-9].

    The histogram is flat when truth and members are draws from one distribution. The generator breaks ties; it is
    advanced by one uniform number per selected point, whether there are ties or not. Raises ValueError for a NaN at a
    selected point, which has no rank, and when the shapes do not fit.
    """
    departure = _departures(members, truth, least=1)[:, _selection(mask, truth)]
    if bool(departure.isnan().any()):
        raise ValueError(f"NaN at {int(departure.isnan().any(0).sum())} selected points; leave them out with the mask")
    ties = (departure == 0).sum(0)
    uniform = torch.rand(ties.shape, dtype=torch.float64, generator=generator, device=generator.device).to(ties.device)
    # A uniform number is at most 1 - 2^-53, and its product with ties + 1 never rounds up to ties + 1.
    extra = (uniform * (ties + 1)).long()
    return torch.bincount((departure < 0).sum(0) + extra, minlength=members.shape[0] + 1)


def _departures(members: Tensor, truth: Tensor, least: int) -> Tensor:
    """Return x_i - y in float64, [VER-10]."""
    if members.shape[1:] != truth.shape:
        raise ValueError(
            f"members {tuple(members.shape)} do not fit truth {tuple(truth.shape)}; they must be [M, ...] and [...]"
        )
    _require_members(members, least)
    return members.double() - truth.double()


def _require_members(members: Tensor, least: int) -> None:
    if members.shape[0] < least:
        raise ValueError(f"this score needs at least {least} members, got {members.shape[0]}")


def _broadcast(name: str, value: Tensor, score: Tensor) -> Tensor:
    try:
        return value.broadcast_to(score.shape)
    except RuntimeError as error:
        raise ValueError(f"{name} {tuple(value.shape)} do not broadcast to the points {tuple(score.shape)}") from error


def _selection(mask: Tensor | None, score: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(score, dtype=torch.bool)
    return _broadcast("mask", mask, score)
