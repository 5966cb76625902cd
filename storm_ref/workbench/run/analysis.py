"""Analyses with a model: draw ensembles from known pasts or in a cycle, and score them.

    one stage    members of p(x_k | true past, y_k), each time on its own ([DA-1])
    cycle        each member's own analyses are its past ([DA-4]); without observations: a free-running forecast

Scores are taken at points not observed, weighted by area, averaged over times, in the unit of each variable. The
headline of several variables is the mean of their scores, each in units of its variable's standard deviation.
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
    "reductions",
    "score_table",
    "seen_by",
    "without_network",
]

Method = Callable[[Denoise, ObservationsLike, covariance.Covariance], Denoise]

# What a user may ask for by name.
GUIDANCE: Mapping[str, Method] = {
    "covariance": covariance.guidance,
    "mmps": lambda denoise, observations, _: mmps(denoise, observations, steps=10, tolerance=1e-3),
    "pigdm": lambda denoise, observations, prior: pigdm(denoise, observations, float(prior.mean(lambda v: v)) ** 0.5),
    "sda": lambda denoise, observations, _: sda(denoise, observations, gamma=0.1),
    "dps": lambda denoise, observations, _: dps(denoise, observations),
}


@dataclass(frozen=True)
class DrawSettings:
    """How ensembles are drawn.

    Raises ValueError for fewer than 2 members, a negative seed, errors that are not positive and an unknown guidance.
    """

    members: int = 16
    seed: int = 0
    obs_std: float | tuple[float, ...] = 0.3  # physical units, one number or one a variable
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
        """All members members_per_batch, deterministic."""
        return Sampler(schedule(self.sampler_steps, self.sigma_min, self.sigma_max), members_per_batch=self.members)

    def noise(self, analysis: int, shape: Sequence[int]) -> Float[Tensor, "1 m *s"]:
        """Latents of every member of one analysis, [DA-3]."""
        return torch.stack([member_noise(self.seed, analysis, m, shape) for m in range(self.members)], 1)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raises ValueError unless there are some, all different and in [0, 1): a score needs points not observed."""
    if not fractions or not all(0 <= f < 1 for f in fractions) or len(set(fractions)) < len(fractions):
        raise ValueError(f"fractions observed must differ and lie in [0, 1), got {tuple(fractions)}")


def counter(progress: Progress | None, label: str, total: int) -> Callable[[int], None] | None:
    """`progress` for one kind of work: call it with how much is done."""
    return None if progress is None else lambda done: progress(label, done, total, "")


def draw(
    prior: Prior, observations: Observations | None, noise: Float[Tensor, "draws m c h w"], settings: DrawSettings
) -> Float[Tensor, "m c h w"]:
    """Members of one analysis; they and `observations` are in physical units. Ranks share them out, all get all."""
    if prior.world is None:
        return _draw(prior, observations, noise, settings)
    world = prior.world

    def own(members: range) -> Tensor:
        part = slice(members.start, members.stop)
        return _draw(prior, observations, noise[:, part], settings, part)

    return draw_shared(own, noise.shape[1], world)


def _draw(
    prior: Prior, observations: Observations | None, noise: Tensor, settings: DrawSettings, own: slice = slice(None)
) -> Tensor:
    prior, shift = _shared(prior, own)
    noise = noise + shift / settings.sigma_max  # each member starts about its own background
    if observations is None:
        return prior.physical(draw_members(prior.denoise, noise, settings.sampler))
    scaled = scale(observations, prior.background[0], prior.std)
    method = GUIDANCE[settings.guidance]

    def guide(denoise: Denoise, seen: ObservationsLike) -> Denoise:
        return method(denoise, seen, prior.covariance)

    return prior.physical(draw_members(prior.denoise, noise, settings.sampler, scaled, guide))


def without_network(prior: Prior) -> Prior:
    """The Gaussian prior that is left when the network is off, F = 0: what the climate and its covariance know."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return covariance.precondition(lambda z, _: torch.zeros_like(z), x, sigma, prior.covariance)

    return replace(prior, denoise=denoise)


def _shared(prior: Prior, own: slice) -> tuple[Prior, Float[Tensor, "b c h w"]]:
    """The same prior about one background for all members, so that all of them see the same observations; and d of
    this rank's own.

    With d_m the distance of member m's background from their mean, its denoiser becomes D_m(x - d_m) + d_m.
    """
    mean = prior.background.mean(0, keepdim=True)
    shift = (prior.background - mean) / prior.std[:, None, None]
    if len(shift) == 1:
        return prior, shift
    inner, shift = prior.denoise, shift[own]
    return replace(prior, background=mean, denoise=lambda x, sigma: inner(x - shift, sigma) + shift), shift


def observe(
    fields: Fields, when: np.datetime64, fraction: float, settings: DrawSettings, k: int
) -> Observations | None:
    """A random share of the points of the truth at `when`, every variable, with errors; None for a share of 0.

    Points and errors depend on the seed and on k, the number of the analysis. ValueError when the share has no point.
    """
    if fraction == 0:
        return None
    index = np.searchsorted(fields.time, when)
    std = np.broadcast_to(np.asarray(settings.obs_std, np.float64), len(fields.variables))
    generator = np.random.default_rng([settings.seed, k])
    return random_points(fields.values[index], fields.valid[index], fraction, std, generator)


def seen_by(observations: Observations | None, shape: Sequence[int]) -> Bool[Tensor, "c h w"]:
    """The grid points that observations read."""
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
    """One-stage analyses at the times `when`, each from the true past, with the network or with F = 0.

    float32, physical units. Raises ValueError when the fields are not of the model's kind or a time lacks its past.
    """
    members = []
    for k, (t, seen) in enumerate(zip(when, observations, strict=True)):
        prior = model.prior_at(fields, t, settings.tiling)
        prior = prior if network else without_network(prior)
        members.append(draw(prior, seen, settings.noise(k, fields.values.shape[1:]), settings).float())
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
    """Analyses at the times `when`, `model.step` apart: the first from the true past, the others each from its own.

    `first` is the number of the first analysis: its noise depends on it. Without observations a free-running forecast.
    float32, physical units. Raises ValueError when the times are not that far apart, or the first one's past has a gap.
    """
    if len(when) == 0:
        raise ValueError("a cycle needs at least one time")
    if not bool((np.diff(when) == model.step).all()):
        hours = model.step / np.timedelta64(1, "h")
        raise ValueError(f"the times of a cycle must be the model's step of {hours:g} h apart: choose such times")
    model.check(fields)
    index, age = history(fields.time, when[0], model.frames, model.step)
    if not np.array_equal(fields.time[index], when[0] - model.step * (np.arange(model.frames) + 1)):
        gap = f"the past of the cycle's first analysis at {np.datetime_as_string(when[0], unit='m')} has a gap"
        raise ValueError(f"{gap} (frames {age.tolist()} hours before it): start the cycle elsewhere")
    past = [torch.from_numpy(fields.values[i]).expand(settings.members, -1, -1, -1) for i in index[::-1]]

    def one(frames: Sequence[Tensor], seen: ObservationsLike | None, k: int) -> Tensor:
        times = when[k] - model.step * (np.arange(model.frames) + 1)
        prior = model.prior(torch.stack(list(frames)[::-1], 1), times, when[k], settings.tiling)
        members = draw(prior, observations[k], settings.noise(first + k, fields.values.shape[1:]), settings).float()
        if progress is not None:
            progress(k + 1)
        return members

    return torch.stack(list(run_cycle(past, observations, one)), 1)


def score_table(
    members: Float[Tensor, "m t c h w"], truth: Float[Tensor, "t c h w"], mask: Bool[Tensor, "t c h w"], fields: Fields
) -> dict[str, dict[str, float]]:
    """Scores where the mask is True, by variable, in its unit; of a single member the RMSE alone."""
    weights = verification.area_weights(torch.from_numpy(fields.latitude))
    table = {}
    for c, name in enumerate(fields.variables):
        x, y, where = members[:, :, c], truth[:, c], mask[:, c]
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
    """One variable: its own scores. Several: their mean, each in units of its variable's standard deviation."""
    if len(table) == 1:
        return dict(next(iter(table.values())))
    keys = next(iter(table.values())).keys()
    return {
        key: float(np.mean([row[key] / (1 if key == "spread_skill" else std[name]) for name, row in table.items()]))
        for key in keys
    }


def reductions(fractions: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The share of the forecast's CRPS that each fraction saves; empty when the forecast ("0.0") is not among them."""
    alone = fractions.get("0.0")
    if alone is None:
        return {}
    return {f: 1 - row["crps"] / alone["crps"] for f, row in fractions.items() if f != "0.0"}
