"""Analyses with a model: draw ensembles given the true past or in a cycle, and score them.

    one stage    members are drawn from p(x_k | true past, y_k), each time on its own, [DA-1]
    cycle        each member has its own analyses as its past, [DA-4]; without observations it is a free-running
                 forecast

Scores are averages over times and over the points that were not observed, weighted by area, in the unit of each
variable. The headline of several variables is the mean of their scores, each in units of its variable's standard
deviation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from storm_ref import verification
from storm_ref.assimilation import Sampler, draw_members, member_noise
from storm_ref.assimilation import cycle as run_cycle
from storm_ref.edm import Denoise, schedule
from storm_ref.guidance import Observations, ObservationsLike, dps, mmps, pigdm, sda
from storm_ref.parallel.ensemble import draw_shared
from storm_ref.tiling import Tiling
from storm_ref.workbench.io.data import Fields, history
from storm_ref.workbench.io.observations import observed, random_points, scale
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior import covariance
from storm_ref.workbench.prior.model import Model, Prior

__all__ = [
    "GUIDANCE",
    "DrawSettings",
    "analyse",
    "check_fractions",
    "counter",
    "cycle",
    "draw",
    "headline",
    "observe",
    "observed_points",
    "reductions",
    "score_table",
    "without_network",
]

Method = Callable[[Denoise, ObservationsLike, covariance.Covariance], Denoise]


def _mmps(denoise: Denoise, observations: ObservationsLike, prior: covariance.Covariance) -> Denoise:
    return mmps(denoise, observations, steps=10, tolerance=1e-3)


def _pigdm(denoise: Denoise, observations: ObservationsLike, prior: covariance.Covariance) -> Denoise:
    return pigdm(denoise, observations, float(prior.mean(lambda v: v)) ** 0.5)


def _sda(denoise: Denoise, observations: ObservationsLike, prior: covariance.Covariance) -> Denoise:
    return sda(denoise, observations, gamma=0.1)


def _dps(denoise: Denoise, observations: ObservationsLike, prior: covariance.Covariance) -> Denoise:
    return dps(denoise, observations)


# The methods that a user may ask for by name, with the settings of the workbench.
GUIDANCE: Mapping[str, Method] = {
    "covariance": covariance.guidance,
    "mmps": _mmps,
    "pigdm": _pigdm,
    "sda": _sda,
    "dps": _dps,
}


@dataclass(frozen=True)
class DrawSettings:
    """The settings with which ensembles are drawn.

    Raises ValueError for fewer than 2 members, a seed outside [0, 2^64), errors that are not positive, an unknown
    guidance, and a noise schedule that makes no sense.
    """

    members: int = 16
    seed: int = 0
    obs_std: float | tuple[float, ...] = 0.3  # physical units; one number, or one for each variable
    guidance: str = "covariance"
    sampler_steps: int = 16
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    tiling: Tiling | None = None  # None: default_tiling of the model

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(f"an ensemble has at least 2 members, got {self.members}")
        if self.guidance not in GUIDANCE:
            raise ValueError(f"no guidance {self.guidance!r}; there are {', '.join(GUIDANCE)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"the seed must be in [0, 2^64), got {self.seed}")
        std = np.atleast_1d(self.obs_std)
        if not (np.isfinite(std) & (std > 0)).all():
            raise ValueError(f"the observations' error std must be positive and finite, got {self.obs_std}")
        schedule(self.sampler_steps, self.sigma_min, self.sigma_max)

    @property
    def sampler(self) -> Sampler:
        """The deterministic sampler, with all members in one batch."""
        return Sampler(schedule(self.sampler_steps, self.sigma_min, self.sigma_max), members_per_batch=self.members)

    def noise(self, analysis: int, shape: Sequence[int]) -> Float[Tensor, "1 m *s"]:
        """Return the latents of all members of one analysis, [DA-3]."""
        return torch.stack([member_noise(self.seed, analysis, m, shape) for m in range(self.members)], 1)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError unless there are some, all different and in [0, 1): a score needs points not observed."""
    if not fractions or not all(0 <= f < 1 for f in fractions) or len(set(fractions)) < len(fractions):
        raise ValueError(f"fractions observed must differ and lie in [0, 1), got {tuple(fractions)}")


def counter(progress: Progress | None, label: str, total: int) -> Callable[[int], None] | None:
    """Return a function that reports how much of one kind of work is done; None without `progress`."""
    if progress is None:
        return None

    def report(done: int) -> None:
        progress(label, done, total, "")

    return report


def draw(
    prior: Prior, observations: Observations | None, noise: Float[Tensor, "draws m c h w"], settings: DrawSettings
) -> Float[Tensor, "m c h w"]:
    """Draw the members of one analysis; they and `observations` are in physical units.

    Members are partitioned over the data ranks of `prior.world` and gathered on all ranks, [PAR-18]. Raises ValueError
    for fewer members than data ranks, and NotFiniteError, which is a ValueError, when the state stops being finite; on
    many ranks all raise the same ValueError, [PAR-19].
    """

    def draw_own(members: range) -> Tensor:
        return _draw(prior, observations, noise, settings, slice(members.start, members.stop))

    return draw_shared(draw_own, noise.shape[1], prior.world)


def _draw(prior: Prior, observations: Observations | None, noise: Tensor, settings: DrawSettings, own: slice) -> Tensor:
    """Draw the members `own`."""
    prior, shift = _about_mean(prior, own)
    latents = noise[:, own] + shift / settings.sigma_max  # each member starts about its own background
    if observations is None:
        return prior.physical(draw_members(prior.denoise, latents, settings.sampler))
    normalised = scale(observations, prior.background[0], prior.std)
    method = GUIDANCE[settings.guidance]

    def guide(denoise: Denoise, given: ObservationsLike) -> Denoise:
        return method(denoise, given, prior.covariance)

    return prior.physical(draw_members(prior.denoise, latents, settings.sampler, normalised, guide))


def without_network(prior: Prior) -> Prior:
    """Return the Gaussian prior that remains when the network is off, F = 0: background and covariance alone."""

    def zero(z: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return covariance.precondition(zero, x, sigma, prior.covariance)

    return replace(prior, denoise=denoise)


def _about_mean(prior: Prior, own: slice) -> tuple[Prior, Float[Tensor, "b c h w"]]:
    """Express the prior about the mean of the members' backgrounds, so that one set of observations serves all.

    Returns it with d of the members `own`: where d_m is the departure of member m's background from that mean, the
    denoiser becomes D_m(x - d_m) + d_m.
    """
    mean = prior.background.mean(0, keepdim=True)
    shift = (prior.background - mean) / prior.std[:, None, None]
    if len(shift) == 1:
        return prior, shift
    about_own = prior.denoise
    shift = shift[own]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return about_own(x - shift, sigma) + shift

    return replace(prior, background=mean, denoise=denoise), shift


def observe(
    fields: Fields, when: np.datetime64, fraction: float, settings: DrawSettings, k: int
) -> Observations | None:
    """Observe every variable of the truth at `when`, with errors, at a random share of the points.

    Points and errors depend on the seed and on k, the number of the analysis. Returns None for a share of 0, and raises
    ValueError when another comes to no point.
    """
    if fraction == 0:
        return None
    index = np.searchsorted(fields.time, when)
    std = np.broadcast_to(np.asarray(settings.obs_std, np.float64), len(fields.variables))
    generator = np.random.default_rng([settings.seed, k])
    return random_points(fields.values[index], fields.valid[index], fraction, std, generator)


def observed_points(observations: Observations | None, shape: Sequence[int]) -> Bool[Tensor, "c h w"]:
    """Mark the grid points that observations read."""
    return torch.zeros(*shape, dtype=torch.bool) if observations is None else observed(observations)


def analyse(
    model: Model,
    fields: Fields,
    when: Shaped[np.ndarray, " t"],
    observations: Sequence[Observations | None],
    settings: DrawSettings,
    progress: Callable[[int], None] | None = None,
    network: bool = True,
) -> Float[Tensor, "m t c h w"]:
    """Draw one-stage analyses at the times `when`, each given the true past, with the network or with F = 0.

    Returns float32 in physical units; `progress` is called with the number of times done. Raises ValueError when the
    fields do not match the model or a time lacks its past.
    """
    members = []
    for k, (t, given) in enumerate(zip(when, observations, strict=True)):
        prior = model.prior_at(fields, t, settings.tiling)
        prior = prior if network else without_network(prior)
        members.append(draw(prior, given, settings.noise(k, fields.values.shape[1:]), settings).float())
        if progress is not None:
            progress(k + 1)
    return torch.stack(members, 1)


def cycle(
    model: Model,
    fields: Fields,
    when: Shaped[np.ndarray, " t"],
    observations: Sequence[Observations | None],
    settings: DrawSettings,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
) -> Float[Tensor, "m t c h w"]:
    """Draw analyses at the times `when`, `model.time_step` apart: the first given the true past, each other its own.

    `first` is the number of the first analysis, on which its noise depends. Without observations this is a free-running
    forecast. Returns float32 in physical units; `progress` is called with the number of times done. Raises ValueError
    when the times are not that far apart, or the past of the first has a gap.
    """
    if len(when) == 0:
        raise ValueError("a cycle needs at least one time")
    if not bool((np.diff(when) == model.time_step).all()):
        hours = model.time_step / np.timedelta64(1, "h")
        raise ValueError(f"the times of a cycle must be the model's time step of {hours:g} h apart: choose such times")
    model.check(fields)
    before = model.time_step * (np.arange(model.frames) + 1)
    index, age = history(fields.time, when[0], model.frames, model.time_step)
    if not np.array_equal(fields.time[index], when[0] - before):
        gap = f"the past of the cycle's first analysis at {np.datetime_as_string(when[0], unit='m')} has a gap"
        raise ValueError(f"{gap} (frames {age.tolist()} hours before it): start the cycle elsewhere")
    past = [torch.from_numpy(fields.values[i]).expand(settings.members, -1, -1, -1) for i in index[::-1]]

    def draw_next(frames: Sequence[Tensor], given: ObservationsLike | None, k: int) -> Tensor:
        times = when[k] - before
        prior = model.prior(torch.stack(list(frames)[::-1], 1), times, when[k], settings.tiling)
        members = draw(prior, observations[k], settings.noise(first + k, fields.values.shape[1:]), settings).float()
        if progress is not None:
            progress(k + 1)
        return members

    return torch.stack(list(run_cycle(past, observations, draw_next)), 1)


def score_table(
    members: Float[Tensor, "m t c h w"], truth: Float[Tensor, "t c h w"], mask: Bool[Tensor, "t c h w"], fields: Fields
) -> dict[str, dict[str, float]]:
    """Return the scores of each variable where the mask is True, in its unit; for a single member only the RMSE."""
    weights = verification.area_weights(torch.from_numpy(fields.latitude))
    table = {}
    for c, name in enumerate(fields.variables):
        x = members[:, :, c]
        y = truth[:, c]
        where = mask[:, c]
        row = {"rmse": float(verification.rmse(x, y, weights=weights, mask=where))}
        if len(members) > 1:
            row |= {
                "crps": float(verification.average(verification.crps_fair(x, y), weights=weights, mask=where)),
                "spread": float(verification.spread(x, weights=weights, mask=where)),
                "spread_skill": float(verification.spread_skill(x, y, weights=weights, mask=where)),
            }
        table[name] = row
    return table


def headline(table: Mapping[str, Mapping[str, float]], std: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of a single variable; of several, their mean in units of each variable's standard deviation."""
    if len(table) == 1:
        return dict(next(iter(table.values())))
    keys = next(iter(table.values())).keys()
    return {
        key: float(np.mean([row[key] / (1 if key == "spread_skill" else std[name]) for name, row in table.items()]))
        for key in keys
    }


def reductions(fractions: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the share of the forecast's CRPS that each fraction saves; empty without the forecast, fraction "0.0"."""
    forecast = fractions.get("0.0")
    if forecast is None:
        return {}
    return {f: 1 - row["crps"] / forecast["crps"] for f, row in fractions.items() if f != "0.0"}
