"""Training: one trainer that makes a model of a series of fields, in one process or on many ranks.

    x            departure from the background, cross-fitted, in units of its standard deviation (background.py)
    loss         E[ |D(x + s n; s) - x|^2 / c_out(s)^2 ] over valid points: [EDM-3] with the c_out of covariance.py
    ln s         ~ N(noise_mean, noise_std^2)
    tiles        with `tile`, the network's part of D is T[D] of [TILE-6], and gradients pass through the blend
    step         AdamW; the gradient's norm is clipped to `clip`; the learning rate rises linearly over `warmup` steps,
                 then falls to 0 along half a cosine
    average      w' <- d w' + (1 - d) w,  d = min(ema, (1 + i) / (10 + i)): the model gets averaged weights
    mixing       x = sum_j g_j * x_j,  A = sum_j g_j * A_j  over J transitions of the same time of day, where the g_j(p)
                 are smooth random fields with sum_j g_j^2 = 1 at every point p
    selection    of the averages at ten moments of the run, the one with the least loss on the last `held_back` of the
                 record

Mixing is for short records. The relations between neighbouring points and times survive it, so the network can learn
them; the weather of a given day, which it would otherwise memorise, is never shown. J = 1 turns it off.

Every rank draws the random numbers of the whole batch and takes its own samples. The evaluation of F is partitioned by
tiles, heads and weights, [PAR-2]; every tile rank evaluates the Gaussian part of D on the whole domain, so that the
loss is the same on all of them and tile gradients still sum, [PAR-13]. A single process is a mesh of one rank, where
those sums are identities; there a run repeats, and resumes from a checkpoint, bit for bit.

References: Karras et al. (2022), section 5; Loshchilov & Hutter (2019).
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from storm_ref.config import StormConfig
from storm_ref.denoiser import Storm
from storm_ref.edm import draw_sigma
from storm_ref.parallel.halo import ShardedTiles
from storm_ref.parallel.mesh import World
from storm_ref.parallel.shard import (
    clip_gradients,
    free_gathered,
    gather_whole,
    local,
    place_whole,
    recompute,
    scaled_loss,
    shard_weights,
    sum_tile_gradients,
    whole_loss,
)
from storm_ref.parallel.tensor import tensor_parallel
from storm_ref.tiling import Tiling, cores
from storm_ref.workbench.io import checkpoints
from storm_ref.workbench.io.data import Fields, history
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior import background as backgrounds
from storm_ref.workbench.prior import covariance as covariances
from storm_ref.workbench.prior.background import Background
from storm_ref.workbench.prior.covariance import Covariance, output_scale
from storm_ref.workbench.prior.model import Model, default_patch, read_tensors, write_tensors

__all__ = [
    "Batch",
    "Objective",
    "Samples",
    "TrainSettings",
    "check_shares",
    "mix",
    "prepare",
    "scheduled_rate",
    "stored_settings",
    "train",
]

_KIND = "storm-ref training state 2"
# Names of settings in files, kept so that checkpoints and models written so far can be read.
_SETTING_KEYS = {"covariance_rank": "rank", "learning_rate": "rate", "mixed_transitions": "mix"}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, for each weight
_YEAR = np.timedelta64(330, "D")
_CHECKS = 10  # how often in a run the average is judged and the checkpoint written
_TILES_PER_BATCH = 64
_LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # noise levels of the held-back loss


@dataclass(frozen=True)
class TrainSettings:
    """The sizes of the network and how it is trained. Raises ValueError for numbers that make no sense."""

    patch: tuple[int, int] | None = None  # None: default_patch of the grid
    width: int = 64
    heads: int = 4
    depth: int = 2
    frames: int = 4  # K
    covariance_rank: int = 400  # leading directions, at most a quarter of all; 0 is plain EDM
    shrinkage: float = 0.15
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.998
    noise_mean: float = 0.0
    noise_std: float = 1.5
    mixed_transitions: int = 3  # J
    held_back: float = 0.125
    season: bool | None = None  # condition the network on the season; None: when the record covers a year
    tile: tuple[int, int] | None = None  # core of a tile in grid points; None: untiled
    halo: tuple[int, int] = (0, 0)
    blend: tuple[int, int] = (0, 0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "batch", "warmup", "mixed_transitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "covariance_rank", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not (0 < self.held_back <= 0.5 and 0 <= self.ema < 1):
            raise ValueError(f"need 0 < held_back <= 0.5 and 0 <= ema < 1, got {self.held_back} and {self.ema}")
        if self.tile is None and any((*self.halo, *self.blend)):
            raise ValueError("halo and blend belong to tiles of a given size: give the tile, too")


def stored_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings as JSON in checkpoints and models has them."""
    return {
        _SETTING_KEYS.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }


@dataclass(frozen=True, eq=False)
class Samples:
    """N training transitions among T frames, normalised. A transition is a target frame and the K frames before it."""

    departure: Float[Tensor, "n c h w"]
    valid: Bool[Tensor, "n c h w"]
    anomaly: Float[Tensor, "t c h w"]
    forcing: Float[Tensor, "t s h w"]
    target: Int64[Tensor, " n"]  # index of the target frame
    past: Int64[Tensor, "n k"]  # indices of the past frames, newest first
    age: Float[Tensor, "n k"]  # of the past frames, hours
    clock: Int64[Tensor, " n"]  # minute of the day: transitions with the same one are mixed
    roots: tuple[Float[Tensor, "h h"], Float[Tensor, "w w"]]  # square roots of the smooth fields' covariances


def prepare(
    fields: Fields, when: Shaped[np.ndarray, " n"], time_step: np.timedelta64, settings: TrainSettings
) -> tuple[Model, Samples]:
    """Return an untrained model and its training samples, made of the frames at the times `when` and their past alone.

    Raises ValueError when the patch does not divide the grid or the times are too few.
    """
    grid = (len(fields.latitude), len(fields.longitude))
    patch = settings.patch or default_patch(*grid)
    if grid[0] % patch[0] or grid[1] % patch[1]:
        raise ValueError(f"patch {patch} does not divide the grid {grid}: choose one that does, or pad or crop it")
    histories = [history(fields.time, t, settings.frames, time_step) for t in when]
    past = np.stack([index for index, _ in histories])
    age = np.stack([hours for _, hours in histories])
    target = np.searchsorted(fields.time, when)
    stop = int(target[-1]) + 1  # frames after the last training time stay out of sight
    time = fields.time[:stop]
    values = torch.from_numpy(fields.values[:stop])
    valid = torch.from_numpy(fields.valid[:stop])
    background, departure = backgrounds.fit(values, valid, time, torch.from_numpy(fields.longitude), target, past)
    generator = torch.Generator().manual_seed(settings.seed)
    rank = min(settings.covariance_rank, departure[0].numel() // 4)
    covariance = covariances.fit(departure, fields.periodic, rank, generator, settings.shrinkage)
    season = bool(when[-1] - when[0] > _YEAR) if settings.season is None else settings.season
    model = _untrained(fields, background, covariance, season, time_step, settings)
    samples = Samples(
        departure=departure.float(),
        valid=valid[target],
        anomaly=model.anomalies(values, time),
        forcing=model.forcing(time),
        target=torch.from_numpy(target),
        past=torch.from_numpy(past),
        age=torch.from_numpy(age),
        clock=torch.from_numpy((when - when.astype("datetime64[D]")) // np.timedelta64(1, "m")).long(),
        roots=_roots(departure, fields.periodic),
    )
    return model, samples


def _untrained(
    fields: Fields,
    background: Background,
    covariance: Covariance,
    season: bool,
    time_step: np.timedelta64,
    settings: TrainSettings,
) -> Model:
    grid = (len(fields.latitude), len(fields.longitude))
    latitude = torch.from_numpy(fields.latitude).deg2rad().sin()[:, None].expand(1, -1, grid[1])
    static = torch.cat([torch.from_numpy(fields.static).double(), latitude])
    static = static - static.mean((1, 2), keepdim=True)
    static = static / static.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    config = StormConfig(
        channels=len(fields.variables),
        static_channels=len(static) + (4 if season else 2),
        patch=settings.patch or default_patch(*grid),
        width=settings.width,
        heads=settings.heads,
        depth=settings.depth,
        position_features=3 if fields.periodic else 2,
    )
    tiling = None
    if settings.tile is not None:
        tiling = Tiling.of(grid, settings.tile, settings.halo, settings.blend, fields.periodic, config.patch)
    return Model(
        config=config,
        network=Storm(config, torch.Generator().manual_seed(settings.seed)),
        background=background,
        covariance=covariance,
        static=static.float(),
        latitude=torch.from_numpy(fields.latitude),
        longitude=torch.from_numpy(fields.longitude),
        periodic=fields.periodic,
        season=season,
        frames=settings.frames,
        time_step=time_step,
        variables=fields.variables,
        units=fields.units,
        tiling=tiling,
    )


def _roots(departure: Float[Tensor, "n c h w"], periodic: bool) -> tuple[Tensor, Tensor]:
    """Return each axis's symmetric root of a Gaussian covariance with the departures' correlation length."""
    length_y, length_x = covariances.correlation_length(departure, periodic)
    height, width = departure.shape[-2:]
    return _root(height, length_y, False), _root(width, length_x, periodic)


def _root(size: int, length: float, periodic: bool) -> Float[Tensor, "n n"]:
    values, vectors = torch.linalg.eigh((-(covariances.distance(size, length, periodic) ** 2) / 2).exp())
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root.float()


@dataclass(frozen=True)
class Batch:
    """B transitions of one training step, mixed."""

    x: Float[Tensor, "b c h w"]
    valid: Bool[Tensor, "b c h w"]
    past: Float[Tensor, "b k c h w"]  # anomalies
    index: Int64[Tensor, " b"]  # of the transitions whose forcings and ages go with them


def mix(samples: Samples, index: Int64[Tensor, " b"], count: int, generator: torch.Generator) -> Batch:
    """Mix each of the transitions `index` with count - 1 others of the same time of day."""
    if count == 1:
        return Batch(samples.departure[index], samples.valid[index], samples.anomaly[samples.past[index]], index)
    same_time = samples.clock[index][:, None] == samples.clock
    others = torch.multinomial(same_time.float(), count - 1, replacement=True, generator=generator)
    chosen = torch.cat([index[:, None], others], 1)
    fields = torch.randn(*chosen.shape, 1, *samples.departure.shape[-2:], generator=generator)
    fields = samples.roots[0] @ fields @ samples.roots[1]
    fields = fields / fields.square().sum(1, keepdim=True).sqrt()
    return Batch(
        x=(fields * samples.departure[chosen]).sum(1),
        valid=samples.valid[chosen].all(1),
        past=(fields[:, :, None] * samples.anomaly[samples.past[chosen]]).sum(1),
        index=index,
    )


# What is random in the loss of a batch: transitions, noise levels [b] and noise [b, C, H, W].
_Draw = tuple[Batch, Tensor, Tensor]


def _draw(samples: Samples, settings: TrainSettings, generator: torch.Generator) -> _Draw:
    """Draw all random numbers of one training step."""
    count = _training_count(samples, settings)
    index = torch.randint(count, (settings.batch,), generator=generator)
    batch = mix(_first(samples, count), index, settings.mixed_transitions, generator)
    sigma = draw_sigma(settings.batch, generator, settings.noise_mean, settings.noise_std)
    return batch, sigma, torch.randn(batch.x.shape, generator=generator)


def _training_count(samples: Samples, settings: TrainSettings) -> int:
    """Return the number of transitions that the network is trained on; those after them are held back."""
    return len(samples.target) - max(round(settings.held_back * len(samples.target)), 1)


def _first(samples: Samples, count: int) -> Samples:
    """Return the first `count` transitions: mixing must not reach into those held back."""
    names = ("departure", "valid", "target", "past", "age", "clock")
    return replace(samples, **{name: getattr(samples, name)[:count] for name in names})


def _held_back_draws(samples: Samples, settings: TrainSettings) -> Iterator[_Draw]:
    """Draw held-back transitions at several noise levels, with the same noise in every call."""
    start = _training_count(samples, settings)
    every = max((len(samples.target) - start) // 48, 1)
    index = torch.arange(start, len(samples.target), every)
    generator = torch.Generator().manual_seed(settings.seed)
    for level in _LEVELS:
        batch = mix(samples, index, 1, generator)
        noise = torch.randn(batch.x.shape, generator=generator)
        yield batch, torch.full((len(index),), level, dtype=torch.float64), noise


class Objective(nn.Module):
    """The weighted squared errors of one rank's samples, whose mean over valid points is the loss.

    The mean is 1 at every noise level for a network that is still zero, if the data are N(0, Sigma). It is a module so
    that a step uses the weights in a single forward pass, as fully sharded weights require.
    """

    def __init__(self, model: Model, samples: Samples) -> None:
        super().__init__()
        self.network = model.network
        self.model = model
        self.samples = samples
        self.tiles: Tiling | ShardedTiles | None = model.tiling
        if model.tiling is not None and model.world.mesh.tile > 1:
            self.tiles = ShardedTiles(model.tiling, model.world, _TILES_PER_BATCH)

    def forward(
        self, batch: Batch, sigma: Float[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """Return |D(x + s n; s) - x|^2 / c_out(s)^2 at every point."""
        samples = self.samples
        denoise = self.model.denoiser(
            past=batch.past,
            past_static=samples.forcing[samples.past[batch.index]],
            age=samples.age[batch.index],
            static=samples.forcing[samples.target[batch.index]],
            tiles=self.tiles,
            tiles_per_batch=_TILES_PER_BATCH,
        )
        mean = denoise(batch.x + sigma.float()[:, None, None, None] * noise, sigma)
        weight = output_scale(self.model.covariance, sigma).float()[:, None, None, None] ** -2
        return weight * (mean - batch.x) ** 2


def scheduled_rate(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear over the warm-up, then half a cosine down to 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class _Trainer:
    """Everything that changes during a run, as far as this rank holds it; all of it goes into the checkpoint."""

    def __init__(self, model: Model, samples: Samples, settings: TrainSettings) -> None:
        self.world = model.world
        self.settings = settings
        self.samples = samples
        self.objective = Objective(model, samples)
        self.network: Storm = model.network
        shard_weights(self.objective, self.network, self.world)
        self.weights = dict(self.network.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.step = 0
        self.losses: list[float] = []
        self.held_back: list[tuple[int, float]] = []  # (step, loss of the average on the held-back part)

    def advance(self) -> None:
        """Take one step of the optimiser and update the average."""
        for group in self.optimiser.param_groups:
            group["lr"] = scheduled_rate(self.step, self.settings)
        loss = self._loss(*_draw(self.samples, self.settings, self.generator))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sum_tile_gradients(self.network, self.world)
        clip_gradients(self.network, self.settings.clip, self.world)
        self.optimiser.step()
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, weight in self.weights.items():
                local(self.average[name]).lerp_(local(weight), 1 - decay)
        self.losses.append(whole_loss(loss, self.world, sharded=False))
        self.step += 1

    def _loss(self, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return this rank's part of the loss, [PAR-12].

        When there are fewer samples than data ranks, each takes all of them, which has the same mean.
        """
        count = len(batch.x)
        members = self.world.share(count) if count >= self.world.mesh.data else range(count)
        own = slice(members.start, members.stop)
        part = Batch(batch.x[own], batch.valid[own], batch.past[own], batch.index[own])
        return scaled_loss(self.objective(part, sigma[own], noise[own]), part.valid, self.world, sharded=False)

    @torch.no_grad()
    def judge(self) -> None:
        """Take the loss of the averaged weights on the held-back part, and keep them if it is the least so far."""
        total = 0.0
        with self._using(self.average):
            for draw in _held_back_draws(self.samples, self.settings):
                total += whole_loss(self._loss(*draw), self.world, sharded=False) / len(_LEVELS)
        self.held_back.append((self.step, total))
        if total <= min(loss for _, loss in self.held_back):
            for name, weight in self.average.items():
                local(self.best[name]).copy_(local(weight))

    @contextmanager
    def _using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the network with other weights for a while."""
        own = {name: local(weight).detach().clone() for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                local(weight).copy_(local(weights[name]))
            yield
        finally:
            free_gathered(self.objective)  # else the next step would run with these
            for name, weight in self.weights.items():
                local(weight).copy_(own[name])

    def _parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the key in a checkpoint, the name of the weight that it is cut like, and this rank's part."""
        for name, weight in self.weights.items():
            yield f"network.{name}", name, weight
            yield f"average.{name}", name, self.average[name]
            yield f"best.{name}", name, self.best[name]
            for moment in _MOMENTS if weight in self.optimiser.state else ():
                yield f"optimiser.{name}.{moment}", name, self.optimiser.state[weight][moment]

    def save(self, path: Path) -> None:
        """Write a checkpoint that does not depend on the mesh, [PAR-17]: a file from one rank, a folder from several.

        A folder that is there already stays one.
        """
        state = {
            key: checkpoints.rows(gather_whole(name, part, self.world), self.world) for key, name, part in self._parts()
        }
        state["generator"] = checkpoints.rows(self.generator.get_state().to(self.world.device), self.world)
        about = {
            "step": self.step,
            "losses": self.losses,
            "held": self.held_back,
            "settings": stored_settings(self.settings),
        }
        if self.world.mesh.size == 1 and not path.is_dir():
            write_tensors(path, _KIND, state, about)
        else:
            checkpoints.write_folder(path, _KIND, state, about, self.world)

    def load(self, path: Path) -> None:
        """Read a checkpoint of either form, written on any mesh.

        Raises ValueError for one of other settings, or of another network.
        """
        state, about = checkpoints.read_folder(path, _KIND, self.world) if path.is_dir() else read_tensors(path, _KIND)
        _check_settings(path, about, self.settings)
        if about["step"]:
            for weight in self.weights.values():
                moments = {moment: torch.zeros_like(weight) for moment in _MOMENTS}
                self.optimiser.state[weight] = {"step": torch.tensor(float(about["step"]))} | moments
        try:
            for key, name, part in self._parts():
                place_whole(name, checkpoints.whole(state[key]), part, self.world)
            self.generator.set_state(checkpoints.whole(state["generator"]).cpu())
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: does not fit this network and data ({error}): start afresh") from error
        self.step = about["step"]
        self.losses = about["losses"]
        self.held_back = [(int(step), float(loss)) for step, loss in about["held"]]


def _check_settings(path: Path, about: Mapping[str, Any], settings: TrainSettings) -> None:
    stored = about["settings"]
    if stored != stored_settings(settings):
        names = {key: name for name, key in _SETTING_KEYS.items()}
        changed = [names.get(key, key) for key, value in stored_settings(settings).items() if stored.get(key) != value]
        raise ValueError(f"{path}: was trained with other settings ({changed}): use the same or start afresh")


def check_shares(model: Model, settings: TrainSettings, world: World) -> None:
    """Raise ValueError, saying what to change, when a rank would get no heads, tiles or samples, [PAR-4]."""
    tiling = model.tiling
    if tiling is None and world.mesh.tile > 1:
        raise ValueError(f"tile={world.mesh.tile} shares out tiles, and the network is trained untiled: add --tile HxW")
    tiles = None if tiling is None else len(cores(tiling.y)) * len(cores(tiling.x))
    world.mesh.check(model.config, tiles, settings.batch)


def train(
    model: Model,
    samples: Samples,
    settings: TrainSettings,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    stop: int | None = None,
    world: World | None = None,
    activation_checkpointing: bool = False,
) -> Model:
    """Train a prepared model, which is left as it is; every rank of the world returns the whole trained model.

    checkpoint: written ten times in a run; if it exists the run resumes from it, on the mesh that wrote it to the same
    bits as if it had never stopped. stop: leave off after this many steps. world: None for a process alone.
    activation_checkpointing: blocks keep only their inputs and run twice. Raises ValueError when network, tiles or
    batch cannot be shared out, [PAR-4], and for a checkpoint of other settings.
    """
    world = world or World.alone()
    check_shares(model, settings, world)
    network = tensor_parallel(copy.deepcopy(model.network), world)
    if activation_checkpointing:
        recompute(network)
    covariance = model.covariance.to(torch.float32)
    trainer = _Trainer(replace(model, network=network, covariance=covariance, world=world), samples, settings)
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    every = max(settings.steps // _CHECKS, 1)
    last = settings.steps if stop is None else min(stop, settings.steps)
    if trainer.step == 0:
        trainer.judge()
    while trainer.step < last:
        trainer.advance()
        due = trainer.step % every == 0
        if due or trainer.step == settings.steps:
            trainer.judge()
        if checkpoint is not None and (due or trainer.step == last):
            trainer.save(checkpoint)
        if progress is not None:
            note = f"loss {trainer.losses[-1]:.4f}, held back {trainer.held_back[-1][1]:.4f}"
            progress("training", trainer.step, settings.steps, note)
    best = copy.deepcopy(model.network)
    best.load_state_dict({name: gather_whole(name, part, world).cpu() for name, part in trainer.best.items()})
    record = {
        "settings": stored_settings(settings),
        "losses": trainer.losses,
        "held_back": trainer.held_back,
        "mesh": str(world.mesh),
    }
    # The covariance keeps the precision that it was trained with and that a file has.
    return replace(model, network=best.eval(), covariance=covariance.to(torch.float64), training=record)
