"""Optimal interpolation: the classical baseline that a learned network has to beat, in numpy and float64.

From pairs of states a fixed step apart, with d = current - previous and its mean over each hour of the day:

    background   x_b = previous + mean d at the target's hour
    covariance   B = L L^T,  the columns of L being (d - mean d at its hour) / sqrt(T - number of hours)
    gain         K = B H^T (H B H^T + R)^-1
    analysis     mean x_b + K (y - H x_b),  covariance A = (I - K H) B
    a member     x = x' + K (y + R^(1/2) e - H x'),  x' = x_b + L z,  with z and e standard normal: exactly N(mean, A)

References: Gandin (1963); Kalnay (2003), section 5.4. Members as in Matheron's rule (perturbed observations).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Integer

from storm_ref.guidance import Observations

__all__ = ["OptimalInterpolation", "fit"]


@dataclass(frozen=True)
class OptimalInterpolation:
    """A background by persistence plus the mean change at each hour of the day, and the covariance of its errors."""

    increment: Float64[np.ndarray, "24 c h w"]  # mean change into each hour, physical units
    factor: Float64[np.ndarray, "t c h w"]  # the columns of L: B is the sum of their outer products

    def forecast(self, previous: Float[np.ndarray, "c h w"], hour: int) -> Float64[np.ndarray, "c h w"]:
        """Return x_b at hour of day `hour` (0..23, else ValueError), one time step after the state `previous`."""
        _check_hours(np.asarray(hour))
        forecast: np.ndarray = previous.astype(np.float64) + self.increment[hour]
        return forecast

    def ensemble(
        self,
        previous: Float[np.ndarray, "c h w"],
        hour: int,
        observations: Observations | None,
        members: int,
        generator: np.random.Generator,
    ) -> Float64[np.ndarray, "m c h w"]:
        """Draw members of the analysis, or of the forecast without observations; the generator draws z, then e."""
        z = generator.standard_normal((members, len(self.factor)))
        ensemble = self.forecast(previous, hour) + np.tensordot(z, self.factor, axes=1)
        if observations is None:
            return ensemble
        return self.update(ensemble, observations, generator.standard_normal((members, len(observations.value))))

    def update(
        self, ensemble: Float[np.ndarray, "m c h w"], observations: Observations, noise: Float[np.ndarray, "m n"]
    ) -> Float64[np.ndarray, "m c h w"]:
        """Return x' + K (y + R^(1/2) e - H x') for each member x', with e = noise.

        e = 0 and x' = x_b give the mean of the analysis. B enters by its factor alone, so that no matrix of the state's
        size is ever formed.
        """
        y = observations.value.double().cpu().numpy()
        variance = observations.variance.double().cpu().numpy()
        observed_factor = _observe(observations, self.factor)
        innovation = y + np.sqrt(variance) * noise - _observe(observations, ensemble)
        covariance = observed_factor.T @ observed_factor + np.diag(variance)
        weight = np.linalg.solve(covariance, innovation.T)
        return ensemble + np.tensordot((observed_factor @ weight).T, self.factor, axes=1)


def fit(
    previous: Float[np.ndarray, "t c h w"],
    current: Float[np.ndarray, "t c h w"],
    hours: Integer[np.ndarray, " t"],
) -> OptimalInterpolation:
    """Fit increments and B to T pairs of states one time step apart; hours (0..23) are those of `current`.

    An hour of day without a pair takes the mean of the nearest hour that has one, the earlier of two. Raises ValueError
    for values that are not finite, for hours out of range, and for no more pairs than hours of day, which would leave
    nothing for B.
    """
    _check_hours(hours)
    change = current.astype(np.float64) - previous.astype(np.float64)
    if not np.isfinite(change).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(change))} training values are not finite: drop those pairs")
    known = np.unique(hours)
    if len(change) <= len(known):
        raise ValueError(f"{len(change)} pairs at {len(known)} hours of day leave no departures: give more pairs")
    away = (np.arange(24)[:, None] - known) % 24
    # An hour k behind and an hour k ahead are at 2 k and 2 k + 1: nearest first, then the earlier.
    nearest = known[np.minimum(2 * away, 2 * (24 - away) + 1).argmin(1)]
    increment = np.stack([change[hours == hour].mean(0) for hour in nearest])
    factor = (change - increment[hours]) / np.sqrt(len(change) - len(known))
    return OptimalInterpolation(increment, factor)


def _observe(observations: Observations, fields: np.ndarray) -> np.ndarray:
    """Apply H to each field, in float64."""
    observed: np.ndarray = observations.apply(torch.from_numpy(fields.astype(np.float64))).numpy()
    return observed


def _check_hours(hours: np.ndarray) -> None:
    if not ((hours >= 0) & (hours < 24)).all():
        raise ValueError(f"hours of day must be 0..23, got {hours.min()} to {hours.max()}")
