"""The background: the estimate of a state that needs no network, from a daily climatology and past anomalies.

With a the local solar time as an angle, w(a) = (1, sin a, cos a, sin 2a, cos 2a), and A_k the anomalies of the K past
frames, newest first:

    climatology  m(p, t) = sum_j w_j(a) M_j(p)                 least squares at every point p
    background   b(p, t) = m(p, t) + A_1(p) + sum_k (S_k . w(a)) A_k(p)
    departure    x = (state - b) / s                           what is diffused: dimensionless for every variable

S = 0 is persistence of the anomaly plus the mean change by the hour. S is fitted by ridge regression over all points at
once, so it has 5 K numbers per channel. Departures are *cross-fitted*: those of each eighth of the record come from a
background fitted to the other seven eighths. A fit makes its own residuals too small, and a spread learnt from them
would be too small as well.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

__all__ = ["Background", "daily_waves", "fit"]

_BLOCKS = 8
_RIDGE = 1e-3
_TARGETS_PER_BATCH = 32


def daily_waves(time: Shaped[np.ndarray, " t"], longitude: Float[Tensor, " w"]) -> Float[Tensor, "t 5 w"]:
    """Evaluate w(a) at UTC times and longitudes (degrees east), in float64."""
    now = time.astype("datetime64[ns]")
    day = torch.from_numpy(np.asarray((now - now.astype("datetime64[D]")) / np.timedelta64(1, "D"), np.float64))
    a = 2 * torch.pi * (day[:, None] + longitude.double() / 360)
    return torch.stack([torch.ones_like(a), a.sin(), a.cos(), (2 * a).sin(), (2 * a).cos()], 1)


def _utc_waves(time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t 5"]:
    return daily_waves(time, torch.zeros(1))[:, :, 0]


@dataclass(frozen=True)
class Background:
    """The coefficients of the module's equations, in float64 and physical units."""

    climatology: Float[Tensor, "5 c h w"]  # M, in terms of the waves at longitude 0
    regression: Float[Tensor, "c k 5"]  # S
    anomaly_std: Float[Tensor, " c"]  # scale of the anomalies that the network is conditioned on
    departure_std: Float[Tensor, " c"]  # s
    longitude: Float[Tensor, " w"]

    def anomalies(self, values: Float[Tensor, "t c h w"], time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t c h w"]:
        """Subtract from each frame the climatology of its time of day; float64, physical units."""
        return values.double() - torch.einsum("tm,mchw->tchw", _utc_waves(time), self.climatology)

    def predict(
        self, anomalies: Float[Tensor, "n k c h w"], when: Shaped[np.ndarray, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """Return b at the times `when` from the anomalies of the K frames before each, newest first; physical units."""
        waves = daily_waves(when, self.longitude)
        change = torch.einsum("nkchw,nmw,ckm->nchw", anomalies, waves, self.regression)
        return torch.einsum("nm,mchw->nchw", _utc_waves(when), self.climatology) + anomalies[:, 0] + change


def fit(
    values: Float[Tensor, "t c h w"],
    valid: Bool[Tensor, "t c h w"],
    time: Shaped[np.ndarray, " t"],
    longitude: Float[Tensor, " w"],
    target: Int64[np.ndarray, " n"],
    past: Int64[np.ndarray, "n k"],
) -> tuple[Background, Float[Tensor, "n c h w"]]:
    """Fit the background to the frames `target` with history `past`, both indices into `time`.

    Returns it with the cross-fitted departures, which are in units of `departure_std` and zero where the target is not
    valid. Raises ValueError for fewer than 16 targets, and for a variable that never departs from its background.
    """
    if len(target) < 16:
        raise ValueError(f"{len(target)} training times are too few to fit a background: give at least 16")
    departures = torch.zeros(len(target), *values.shape[1:], dtype=torch.float64)
    for block in np.array_split(np.arange(len(target)), _BLOCKS):
        others = np.setdiff1d(np.arange(len(target)), block)
        part = _fit(values, valid, time, longitude, target[others], past[others])
        anomalies = part.anomalies(values, time)
        predicted = part.predict(anomalies[past[block]], time[target[block]])
        departure = values[target[block]].double() - predicted
        departures[block] = torch.where(valid[target[block]], departure, 0)
    std = (departures.square().sum((0, 2, 3)) / valid[target].sum((0, 2, 3))).sqrt()
    if not bool((std > 0).all()):
        constant = (std <= 0).nonzero().flatten().tolist()
        raise ValueError(f"channels {constant} never depart from their background: leave them out")
    background = replace(_fit(values, valid, time, longitude, target, past), departure_std=std)
    return background, departures / std[:, None, None]


def _fit(
    values: Tensor, valid: Tensor, time: np.ndarray, longitude: Tensor, target: np.ndarray, past: np.ndarray
) -> Background:
    """Fit to the given targets alone, with unit `departure_std`."""
    channels = values.shape[1]
    # The smallest solution where hours of the day are too few for all waves.
    solution = torch.linalg.lstsq(_utc_waves(time[target]), values[target].double().flatten(1), driver="gelsd").solution
    one = torch.ones(channels, dtype=torch.float64)
    climatology = Background(
        climatology=solution.reshape(5, *values.shape[1:]),
        regression=torch.zeros(channels, past.shape[1], 5, dtype=torch.float64),
        anomaly_std=one,
        departure_std=one,
        longitude=longitude.double(),
    )
    anomalies = climatology.anomalies(values, time)
    regression = [_regress(anomalies[:, c], valid[:, c], time, longitude, target, past) for c in range(channels)]
    known = valid[target]
    std = ((anomalies[target].square() * known).sum((0, 2, 3)) / known.sum((0, 2, 3))).sqrt()
    return replace(climatology, regression=torch.stack(regression), anomaly_std=torch.where(std > 0, std, 1))


def _regress(
    anomaly: Tensor, valid: Tensor, time: np.ndarray, longitude: Tensor, target: np.ndarray, past: np.ndarray
) -> Float[Tensor, "k 5"]:
    """Ridge regression of A - A_1 on w_m A_k over the valid points of one channel."""
    size = past.shape[1] * 5
    gram = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(target), _TARGETS_PER_BATCH):
        now = target[start : start + _TARGETS_PER_BATCH]
        before = anomaly[past[start : start + _TARGETS_PER_BATCH]]
        known = valid[now].double()[:, None]
        waves = daily_waves(time[now], longitude)[:, None, :, None, :]
        design = ((before * known)[:, :, None] * waves).flatten(1, 2).transpose(0, 1).flatten(1)
        gram += design @ design.T
        right += design @ (anomaly[now] - before[:, 0]).flatten()
    ridge = _RIDGE * gram.trace() / size + 1e-12
    coefficients: Tensor = torch.linalg.solve(gram + ridge * torch.eye(size, dtype=torch.float64), right)
    return coefficients.reshape(-1, 5)
