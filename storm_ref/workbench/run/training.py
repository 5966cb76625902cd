"""Training: a series of fields becomes a model, in a number of steps, the same bits every time.

    x            departure from the climate, cross-fitted, in units of its standard deviation (climate.py)
    loss         E[ |D(x + s n; s) - x|^2 / c_out(s)^2 ] over valid points: [EDM-3], with the c_out of covariance.py
    ln s         ~ N(noise_mean, noise_std^2)
    tiles        with `tile` D is T[D] of [TILE-6], its network part, and gradients go through the blend
    step         AdamW, gradient norm at most `clip`, learning rate linear over `warmup` steps, then half a cosine to 0
    average      w' <- d w' + (1 - d) w,  d = min(ema, (1 + i) / (10 + i)): these weights are kept
    mixing       x = sum_j g_j * x_j,  A = sum_j g_j * A_j,  j = 1..J transitions of one time of day, g_j(p) smooth
                 random fields with sum_j g_j^2 = 1 at every point p
    choice       of the averages at ten moments, the one with the least loss on the last `held_back` of the record

Mixing is for short records: relations between neighbouring points and times survive it, so the network can learn them,
while the weather of a given day, which it would otherwise learn by heart, is never seen. J = 1 turns it off.

References: Karras et al. (2022), section 5; Loshchilov & Hutter (2019).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import draw_sigma
from storm_ref.tiling import Tiling
from storm_ref.workbench.io import checkpoints
from storm_ref.workbench.io.data import Fields, history
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior import background as climates
from storm_ref.workbench.prior import covariance as covariances
from storm_ref.workbench.prior.covariance import Covariance, covariance_denoiser, output_scale, precondition
from storm_ref.workbench.prior.model import Model, default_patch, read_tensors, write_tensors

__all__ = [
    "CHECKS",
    "KIND",
    "MOMENTS",
    "Batch",
    "Samples",
    "TrainSettings",
    "averaging",
    "drawn",
    "judged",
    "learning_rate",
    "mixed",
    "plain",
    "prepare",
    "same_settings",
    "train",
    "weighted_loss",
    "weighted_squares",
]

KIND = "storm-ref training state 2"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of the optimiser, for each weight
_YEAR = np.timedelta64(330, "D")
CHECKS = 10  # how often in a run the average is judged and the checkpoint written
_TOGETHER = 64  # tiles evaluated at a time
_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # where the held-back loss is measured


@dataclass(frozen=True)
class TrainSettings:
    """Sizes of the network and how it is trained. Raises ValueError for numbers that make no sense."""

    patch: tuple[int, int] | None = None  # None: default_patch of the grid
    width: int = 64
    heads: int = 4
    depth: int = 2
    frames: int = 4  # K
    rank: int = 400  # leading directions of the covariance, at most a quarter of all; 0 is plain EDM
    shrinkage: float = 0.15
    steps: int = 1000
    batch: int = 32
    rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    noise_mean: float = 0.0
    noise_std: float = 1.5
    mix: int = 3  # J
    held_back: float = 0.125
    season: bool | None = None  # tell the network the season; None: when the record covers a year
    tile: tuple[int, int] | None = None  # core of a tile, points: train it as it will be run; None: untiled
    halo: tuple[int, int] = (0, 0)
    blend: tuple[int, int] = (0, 0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "batch", "warmup", "mix"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.steps, self.rank, self.seed, self.weight_decay) < 0:
            raise ValueError("steps, rank, seed and weight_decay must not be negative")
        if not (0 < self.held_back <= 0.5 and 0 <= self.ema < 1 and self.rate > 0 and self.clip > 0):
            raise ValueError("need 0 < held_back <= 0.5, 0 <= ema < 1, and a positive rate and clip")
        if self.tile is None and any((*self.halo, *self.blend)):
            raise ValueError("halo and blend belong to tiles of a given size: give the tile, too")


@dataclass(frozen=True, eq=False)
class Samples:
    """N training transitions among T frames, normalised."""

    departure: Float[Tensor, "n c h w"]
    valid: Bool[Tensor, "n c h w"]
    anomaly: Float[Tensor, "t c h w"]
    forcing: Float[Tensor, "t s h w"]
    target: Int64[Tensor, " n"]  # the frame of each transition
    past: Int64[Tensor, "n k"]  # and of its history
    age: Float[Tensor, "n k"]  # hours
    clock: Int64[Tensor, " n"]  # minute of the day: transitions of one are mixed
    roots: tuple[Float[Tensor, "h h"], Float[Tensor, "w w"]]  # square roots of the smooth fields' covariances


def prepare(
    fields: Fields, when: Shaped[np.ndarray, " n"], step: np.timedelta64, settings: TrainSettings
) -> tuple[Model, Samples]:
    """An untrained model and the samples to train it, from the analyses at the times `when` and their past alone.

    Raises ValueError when the patch does not divide the grid or the times are too few.
    """
    grid = (len(fields.latitude), len(fields.longitude))
    patch = settings.patch or default_patch(*grid)
    if grid[0] % patch[0] or grid[1] % patch[1]:
        raise ValueError(f"patch {patch} does not divide the grid {grid}: choose one that does, or pad or crop it")
    found = [history(fields.time, t, settings.frames, step) for t in when]
    past, age = np.stack([i for i, _ in found]), np.stack([a for _, a in found])
    target = np.searchsorted(fields.time, when)
    stop = int(target[-1]) + 1  # frames after the last training time stay out of sight
    time, longitude = fields.time[:stop], torch.from_numpy(fields.longitude)
    values, valid = torch.from_numpy(fields.values[:stop]), torch.from_numpy(fields.valid[:stop])
    climate, departure = climates.fit(values, valid, time, longitude, target, past)
    generator = torch.Generator().manual_seed(settings.seed)
    rank = min(settings.rank, departure[0].numel() // 4)
    covariance = covariances.fit(departure, fields.periodic, rank, generator, settings.shrinkage)
    season = bool(when[-1] - when[0] > _YEAR) if settings.season is None else settings.season
    model = _untrained(fields, climate, covariance, season, step, settings)
    samples = Samples(
        departure.float(), valid[target], model.anomalies(values, time), model.forcing(time),
        torch.from_numpy(target), torch.from_numpy(past), torch.from_numpy(age),
        torch.from_numpy((when - when.astype("datetime64[D]")) // np.timedelta64(1, "m")).long(),
        _roots(departure, fields.periodic),
    )  # fmt: skip
    return model, samples


def _untrained(
    fields: Fields,
    climate: climates.Climate,
    covariance: Covariance,
    season: bool,
    step: np.timedelta64,
    s: TrainSettings,
) -> Model:
    grid = (len(fields.latitude), len(fields.longitude))
    latitude = torch.from_numpy(fields.latitude).deg2rad().sin()[:, None].expand(1, -1, grid[1])
    static = torch.cat([torch.from_numpy(fields.static).double(), latitude])
    static = static - static.mean((1, 2), keepdim=True)
    static = static / static.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    config = StormConfig(
        len(fields.variables), len(static) + (4 if season else 2), s.patch or default_patch(*grid), s.width, s.heads,
        s.depth, position_features=3 if fields.periodic else 2,
    )  # fmt: skip
    tiling = s.tile and Tiling.of(grid, s.tile, s.halo, s.blend, fields.periodic, config.patch)
    return Model(
        config, Storm(config, torch.Generator().manual_seed(s.seed)), climate, covariance, static.float(),
        torch.from_numpy(fields.latitude), torch.from_numpy(fields.longitude), fields.periodic, season, s.frames, step,
        fields.variables, fields.units, tiling=tiling,
    )  # fmt: skip


def _roots(departure: Float[Tensor, "n c h w"], periodic: bool) -> tuple[Tensor, Tensor]:
    roots = []
    lengths = covariances.correlation_length(departure, periodic)
    for size, length, wraps in zip(departure.shape[-2:], lengths, (False, periodic), strict=True):
        values, vectors = torch.linalg.eigh((-(covariances.distance(size, length, wraps) ** 2) / 2).exp())
        roots.append((vectors * values.clamp_min(0).sqrt() @ vectors.T).float())
    return roots[0], roots[1]


@dataclass(frozen=True)
class Batch:
    x: Tensor
    valid: Tensor
    past: Tensor
    index: Tensor


def mixed(samples: Samples, index: Tensor, count: int, generator: torch.Generator) -> Batch:
    """The transitions `index`, each mixed with count - 1 others of its time of day."""
    if count == 1:
        return Batch(samples.departure[index], samples.valid[index], samples.anomaly[samples.past[index]], index)
    same = samples.clock[index][:, None] == samples.clock
    others = torch.multinomial(same.float(), count - 1, replacement=True, generator=generator)
    chosen = torch.cat([index[:, None], others], 1)
    fields = torch.randn(*chosen.shape, 1, *samples.departure.shape[-2:], generator=generator)
    fields = samples.roots[0] @ fields @ samples.roots[1]
    fields = fields / fields.square().sum(1, keepdim=True).sqrt()
    return Batch(
        (fields * samples.departure[chosen]).sum(1),
        samples.valid[chosen].all(1),
        (fields[:, :, None] * samples.anomaly[samples.past[chosen]]).sum(1),
        index,
    )


def weighted_loss(
    model: Model, samples: Samples, batch: Batch, sigma: Float[Tensor, " b"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """The loss of the module's equations: one for a network that is still zero, if the data are N(0, Sigma)."""
    return weighted_squares(model, samples, batch, sigma, noise)[batch.valid].mean()


def weighted_squares(
    model: Model, samples: Samples, batch: Batch, sigma: Float[Tensor, " b"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """What the loss is the mean of, at every point."""
    frames, at = samples.past[batch.index], samples.target[batch.index]
    memory = model.network.compress(batch.past, samples.forcing[frames], samples.age[batch.index], model.position)
    condition = Condition(samples.forcing[at], memory, model.position[None], model.periodic)
    noisy = batch.x + sigma.float()[:, None, None, None] * noise
    if model.tiling is None:
        mean = precondition(lambda z, s: model.network(z, s, condition), noisy, sigma, model.covariance)
    else:
        mean = covariance_denoiser(model.network, condition, model.tiling, model.covariance, _TOGETHER)(noisy, sigma)
    weight = output_scale(model.covariance, sigma).float()[:, None, None, None] ** -2
    return weight * (mean - batch.x) ** 2


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear over `warmup` steps, then half a cosine down to 0 at the last step."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * share))


class _Run:
    """All that changes while training. Everything here is in the checkpoint: a resumed run has the same bits."""

    def __init__(self, network: Storm, settings: TrainSettings) -> None:
        self.network, self.average, self.best = network, copy.deepcopy(network), copy.deepcopy(network)
        self.optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.step = 0
        self.losses: list[float] = []
        self.held: list[tuple[int, float]] = []  # (step, loss on the held-back part)

    def save(self, path: Path, settings: TrainSettings) -> None:
        tensors = {"generator": self.generator.get_state()}
        for part in ("network", "average", "best"):
            tensors |= {f"{part}.{name}": weight.detach() for name, weight in getattr(self, part).named_parameters()}
        for name, weight in self.network.named_parameters():
            moments = self.optimiser.state.get(weight, {})
            tensors |= {f"optimiser.{name}.{moment}": moments[moment] for moment in MOMENTS if moment in moments}
        about = {"step": self.step, "losses": self.losses, "held": self.held, "settings": plain(settings)}
        if path.is_dir():  # begun on many ranks
            checkpoints.write_folder(path, KIND, tensors, about)
        else:
            write_tensors(path, KIND, tensors, about)

    def load(self, path: Path, settings: TrainSettings) -> None:
        tensors, about = checkpoints.read_folder(path, KIND) if path.is_dir() else read_tensors(path, KIND)
        same_settings(path, about, settings)
        try:
            for name in ("network", "average", "best"):
                own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                getattr(self, name).load_state_dict(own)
            for name, weight in self.network.named_parameters() if about["step"] else ():
                moments = {moment: tensors[f"optimiser.{name}.{moment}"].view_as(weight) for moment in MOMENTS}
                self.optimiser.state[weight] = {"step": torch.tensor(float(about["step"]))} | moments
            self.generator.set_state(tensors["generator"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: does not fit this network and data ({error}): start afresh") from error
        self.step, self.losses = about["step"], about["losses"]
        self.held = [(int(step), float(loss)) for step, loss in about["held"]]


def same_settings(path: Path, about: Mapping[str, Any], settings: TrainSettings) -> None:
    """Raises ValueError, naming what differs, for a checkpoint of other settings."""
    if about["settings"] != plain(settings):
        changed = [k for k, v in plain(settings).items() if about["settings"].get(k) != v]
        raise ValueError(f"{path}: was trained with other settings ({changed}): use the same or start afresh")


def plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}


def train(
    model: Model,
    samples: Samples,
    settings: TrainSettings,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    stop: int | None = None,
) -> Model:
    """Train a prepared model. The one given is left as it is.

    checkpoint: if the file exists the run goes on from it, to the same bits as if it had never stopped; it is written
    ten times a run. stop: leave off after this many steps. Raises ValueError for a checkpoint of other settings.
    """
    covariance = model.covariance.to(torch.float32)
    model = replace(model, network=copy.deepcopy(model.network), covariance=covariance)
    run = _Run(model.network, settings)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, settings)
    every, last = max(settings.steps // CHECKS, 1), settings.steps if stop is None else min(stop, settings.steps)
    if run.step == 0:
        _judge(run, model, samples, settings)
    while run.step < last:
        _advance(run, model, samples, settings)
        if run.step % every == 0 or run.step == last:
            if run.step % every == 0 or run.step == settings.steps:
                _judge(run, model, samples, settings)
            if checkpoint is not None:
                run.save(checkpoint, settings)
        if progress is not None:
            note = f"loss {run.losses[-1]:.4f}, held back {run.held[-1][1]:.4f}"
            progress("training", run.step, settings.steps, note)
    record = {"settings": plain(settings), "losses": run.losses, "held_back": run.held}
    return replace(model, network=run.best.eval(), covariance=model.covariance.to(torch.float64), training=record)


def _split(samples: Samples, settings: TrainSettings) -> int:
    """How many transitions the network is trained on; those after them are held back."""
    return len(samples.target) - max(round(settings.held_back * len(samples.target)), 1)


def _advance(run: _Run, model: Model, samples: Samples, settings: TrainSettings) -> None:
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(run.step, settings)
    loss = weighted_loss(model, samples, *drawn(samples, settings, run.generator))
    run.optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), settings.clip)
    run.optimiser.step()
    keep = averaging(run.step, settings)
    with torch.no_grad():
        for slow, fast in zip(run.average.parameters(), run.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)
    run.losses.append(loss.item())
    run.step += 1


def averaging(step: int, settings: TrainSettings) -> float:
    """d of the module's equations."""
    return min(settings.ema, (1 + step) / (10 + step))


def drawn(samples: Samples, settings: TrainSettings, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
    """All that is random in one step: transitions, noise levels [b], noise [b, C, H, W]."""
    count = _split(samples, settings)
    index = torch.randint(count, (settings.batch,), generator=generator)
    batch = mixed(_first(samples, count), index, settings.mix, generator)
    sigma = draw_sigma(settings.batch, generator, settings.noise_mean, settings.noise_std)
    return batch, sigma, torch.randn(batch.x.shape, generator=generator)


def _first(samples: Samples, count: int) -> Samples:
    """The first `count` transitions: mixing must not reach into those held back."""
    cut = {name: getattr(samples, name)[:count] for name in ("departure", "valid", "target", "past", "age", "clock")}
    return replace(samples, **cut)


@torch.no_grad()
def _judge(run: _Run, model: Model, samples: Samples, settings: TrainSettings) -> None:
    """The best average so far is kept."""
    averaged = replace(model, network=run.average)
    total = judged(samples, settings, lambda *given: float(weighted_loss(averaged, samples, *given)))
    run.held.append((run.step, total))
    if total <= min(loss for _, loss in run.held):
        run.best.load_state_dict(run.average.state_dict())


def judged(samples: Samples, settings: TrainSettings, loss: Callable[[Batch, Tensor, Tensor], float]) -> float:
    """The loss on the held-back part, at several noise levels, always with the same noise."""
    every = max((len(samples.target) - _split(samples, settings)) // 48, 1)
    index = torch.arange(_split(samples, settings), len(samples.target), every)
    generator, total = torch.Generator().manual_seed(settings.seed), 0.0
    for level in _LEVELS:
        batch = mixed(samples, index, 1, generator)
        noise = torch.randn(batch.x.shape, generator=generator)
        sigma = torch.full((len(index),), level, dtype=torch.float64)
        total += loss(batch, sigma, noise) / len(_LEVELS)
    return total
