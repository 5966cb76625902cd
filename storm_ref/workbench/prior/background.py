"""Climate: what is known of a state before any network, a mean by hour of the day and anomalies that persist or decay.

With a the local solar time of day, w(a) = (1, sin a, cos a, sin 2a, cos 2a), and A_k the anomalies
of K past frames, newest first:

    mean         m(p, t) = sum_j w_j(a) M_j(p)                 least squares at every point p
    background   b(p, t) = m(p, t) + A_1(p) + sum_k (S_k . w(a)) A_k(p)
    departure    x = (state - b) / s                           what is diffused: the same units for every variable

S = 0 is persistence plus the mean change by the hour; S is fitted by ridge regression over all points at once, so it
has 5 K numbers a channel. Departures are *cross-fitted*: those of each eighth of the record come from a climate fitted
to the other seven, because a fit makes its own residuals too small, and a spread learnt from them would be too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

__all__ = ["Climate", "fit", "waves"]

_BLOCKS, _RIDGE = 8, 1e-3


def waves(time: Shaped[np.ndarray, " t"], longitude: Float[Tensor, " w"]) -> Float[Tensor, "t 5 w"]:
    """w(a) at UTC times and longitudes (degrees east), float64."""
    now = time.astype("datetime64[ns]")
    day = torch.from_numpy(np.asarray((now - now.astype("datetime64[D]")) / np.timedelta64(1, "D"), np.float64))
    a = 2 * torch.pi * (day[:, None] + longitude.double() / 360)
    return torch.stack([torch.ones_like(a), a.sin(), a.cos(), (2 * a).sin(), (2 * a).cos()], 1)


@dataclass(frozen=True)
class Climate:
    """See the module's equations; float64, physical units."""

    mean: Float[Tensor, "5 c h w"]  # M, in terms of the waves at longitude 0
    slope: Float[Tensor, "c k 5"]  # S
    anomaly_std: Float[Tensor, " c"]  # scale of the anomalies shown to the network
    departure_std: Float[Tensor, " c"]  # s
    longitude: Float[Tensor, " w"]

    def anomalies(self, values: Float[Tensor, "t c h w"], time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t c h w"]:
        """Values less the mean of their hour."""
        return values.double() - torch.einsum("tm,mchw->tchw", _utc(time), self.mean)

    def background(
        self, anomalies: Float[Tensor, "n k c h w"], when: Shaped[np.ndarray, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """b at the times `when`, from the anomalies of the frames before them, newest first."""
        change = torch.einsum("nkchw,nmw,ckm->nchw", anomalies, waves(when, self.longitude), self.slope)
        return torch.einsum("nm,mchw->nchw", _utc(when), self.mean) + anomalies[:, 0] + change


def _utc(time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t 5"]:
    return waves(time, torch.zeros(1))[:, :, 0]


def fit(
    values: Float[Tensor, "t c h w"],
    valid: Bool[Tensor, "t c h w"],
    time: Shaped[np.ndarray, " t"],
    longitude: Float[Tensor, " w"],
    target: Int64[np.ndarray, " n"],
    past: Int64[np.ndarray, "n k"],
) -> tuple[Climate, Float[Tensor, "n c h w"]]:
    """The climate of the frames `target` with history `past` (indices into time), and their cross-fitted departures.

    Departures are in units of `departure_std`, zero where the target is not valid. Raises ValueError for fewer than 16
    targets, or a variable that never departs from its background.
    """
    if len(target) < 16:
        raise ValueError(f"{len(target)} training times are too few to fit a climate: give at least 16")
    departures = torch.zeros(len(target), *values.shape[1:], dtype=torch.float64)
    for block in np.array_split(np.arange(len(target)), _BLOCKS):
        others = np.setdiff1d(np.arange(len(target)), block)
        part = _fit(values, valid, time, longitude, target[others], past[others])
        anomalies = part.anomalies(values, time)
        found = values[target[block]].double() - part.background(anomalies[past[block]], time[target[block]])
        departures[block] = torch.where(valid[target[block]], found, 0)
    whole = _fit(values, valid, time, longitude, target, past)
    std = (departures.square().sum((0, 2, 3)) / valid[target].sum((0, 2, 3))).sqrt()
    if not bool((std > 0).all()):
        still = (std <= 0).nonzero().flatten().tolist()
        raise ValueError(f"channels {still} never depart from their climate: leave them out")
    climate = Climate(whole.mean, whole.slope, whole.anomaly_std, std, longitude.double())
    return climate, departures / std[:, None, None]


def _fit(
    values: Tensor, valid: Tensor, time: np.ndarray, longitude: Tensor, target: np.ndarray, past: np.ndarray
) -> Climate:
    channels = values.shape[1]
    # The smallest solution where hours of the day are too few for all waves.
    solution = torch.linalg.lstsq(_utc(time[target]), values[target].double().flatten(1), driver="gelsd").solution
    mean = solution.reshape(5, *values.shape[1:])
    one = torch.ones(channels, dtype=torch.float64)
    climate = Climate(mean, torch.zeros(channels, past.shape[1], 5).double(), one, one, longitude.double())
    anomalies = climate.anomalies(values, time)
    slope = torch.stack([_slope(anomalies[:, c], valid[:, c], time, longitude, target, past) for c in range(channels)])
    known = valid[target]
    std = ((anomalies[target].square() * known).sum((0, 2, 3)) / known.sum((0, 2, 3))).sqrt()
    return Climate(mean, slope, torch.where(std > 0, std, 1), one, longitude.double())


def _slope(
    anomaly: Tensor, valid: Tensor, time: np.ndarray, longitude: Tensor, target: np.ndarray, past: np.ndarray
) -> Float[Tensor, "k 5"]:
    """Ridge regression of A - A_1 on w_m A_k over the valid points of one channel, 32 times at a time."""
    size = past.shape[1] * 5
    gram, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for at in range(0, len(target), 32):
        now, before = target[at : at + 32], anomaly[past[at : at + 32]]
        known = valid[now].double()[:, None]
        basis = waves(time[now], longitude)[:, None, :, None, :]
        design = ((before * known)[:, :, None] * basis).flatten(1, 2).transpose(0, 1).flatten(1)
        gram += design @ design.T
        right += design @ (anomaly[now] - before[:, 0]).flatten()
    ridge = _RIDGE * gram.trace() / size + 1e-12
    slope: Tensor = torch.linalg.solve(gram + ridge * torch.eye(size, dtype=torch.float64), right)
    return slope.reshape(-1, 5)
