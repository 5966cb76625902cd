"""Training on many ranks: the same steps as `training.train`, to rounding, on any mesh.

Every rank draws the random numbers of the whole batch and takes its own samples; F is shared out by tiles, heads and
weights ([PAR-2]). The Gaussian part of the denoiser is done by each tile rank for the whole domain: the loss is the
same on all of them, and tile gradients still sum ([PAR-13]).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storm_ref.denoiser import Condition, Storm
from storm_ref.parallel.halo import ShardedTiles, compress_sharded
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
from storm_ref.tiling import cores
from storm_ref.workbench.io import checkpoints
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior.covariance import bind_covariance_sharded, output_scale
from storm_ref.workbench.prior.model import Model, read_tensors
from storm_ref.workbench.run.training import (
    CHECKS,
    KIND,
    MOMENTS,
    Batch,
    Samples,
    TrainSettings,
    averaging,
    drawn,
    judged,
    learning_rate,
    plain,
    same_settings,
    weighted_squares,
)

__all__ = ["check_shares", "train_shared"]

_TOGETHER = 64  # tiles evaluated at a time


class _Objective(nn.Module):
    """The squares of the loss, for one rank's samples: all that happens to the weights in a step, in one forward."""

    def __init__(self, model: Model, samples: Samples, world: World) -> None:
        super().__init__()
        self.network, self.model, self.samples = model.network, model, samples
        split = world.mesh.tile > 1 and model.tiling is not None
        self.parts = ShardedTiles(model.tiling, world, _TOGETHER) if split and model.tiling is not None else None

    def forward(self, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        if self.parts is None:
            return weighted_squares(self.model, self.samples, batch, sigma, noise)
        model, samples = self.model, self.samples
        frames, at = samples.past[batch.index], samples.target[batch.index]
        told = samples.forcing[frames], samples.age[batch.index], model.position
        memory = compress_sharded(self.network, batch.past, *told, self.parts)
        nothing = memory.new_zeros(1).expand(1, *model.position.shape[:2], model.config.width)
        condition = Condition(samples.forcing[at], nothing, model.position[None], model.periodic)
        denoise = bind_covariance_sharded(self.network, condition, self.parts, model.covariance, memory)
        mean = denoise(batch.x + sigma.float()[:, None, None, None] * noise, sigma)
        weight = output_scale(model.covariance, sigma).float()[:, None, None, None] ** -2
        squares: Tensor = weight * (mean - batch.x) ** 2
        return squares


class _Run:
    """All that changes while training, each rank's part of it."""

    def __init__(self, model: Model, samples: Samples, settings: TrainSettings, world: World) -> None:
        self.world, self.settings, self.samples = world, settings, samples
        self.objective = _Objective(model, samples, world)
        self.network: Storm = model.network
        shard_weights(self.objective, self.network, world)
        self.weights = dict(self.network.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.step = 0
        self.losses: list[float] = []
        self.held: list[tuple[int, float]] = []

    def advance(self) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        loss = self._loss(*drawn(self.samples, self.settings, self.generator))
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sum_tile_gradients(self.network, self.world)
        clip_gradients(self.network, self.settings.clip, self.world)
        self.optimiser.step()
        keep = averaging(self.step, self.settings)
        with torch.no_grad():
            for name, weight in self.weights.items():
                local(self.average[name]).lerp_(local(weight), 1 - keep)
        self.losses.append(whole_loss(loss, self.world, sharded=False))
        self.step += 1

    def _loss(self, batch: Batch, sigma: Tensor, noise: Tensor) -> Tensor:
        """This rank's share of the loss; of fewer samples than data ranks each takes all, which has the same mean."""
        count = len(batch.x)
        own = self.world.share(count) if count >= self.world.mesh.data else range(count)
        part = slice(own.start, own.stop)
        mine = Batch(batch.x[part], batch.valid[part], batch.past[part], batch.index[part])
        return scaled_loss(self.objective(mine, sigma[part], noise[part]), mine.valid, self.world, sharded=False)

    @torch.no_grad()
    def judge(self) -> None:
        with self._using(self.average):
            loss = judged(
                self.samples, self.settings, lambda *given: whole_loss(self._loss(*given), self.world, sharded=False)
            )
        self.held.append((self.step, loss))
        if loss <= min(other for _, other in self.held):
            for name, weight in self.average.items():
                local(self.best[name]).copy_(local(weight))

    @contextmanager
    def _using(self, weights: dict[str, Tensor]) -> Iterator[None]:
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
        """Key in a checkpoint, name of the weight that it is cut like, and this rank's part."""
        for name, weight in self.weights.items():
            yield f"network.{name}", name, weight
            yield f"average.{name}", name, self.average[name]
            yield f"best.{name}", name, self.best[name]
            for moment in MOMENTS if weight in self.optimiser.state else ():
                yield f"optimiser.{name}.{moment}", name, self.optimiser.state[weight][moment]

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {
            key: checkpoints.rows(gather_whole(name, part, self.world), self.world) for key, name, part in self._parts()
        }
        generator = self.generator.get_state().to(self.world.device)
        state["generator"] = checkpoints.rows(generator, self.world)
        about = {"step": self.step, "losses": self.losses, "held": self.held, "settings": plain(self.settings)}
        checkpoints.write_folder(path, KIND, state, about, self.world)

    def load(self, path: Path) -> None:
        state, about = checkpoints.read_folder(path, KIND, self.world) if path.is_dir() else read_tensors(path, KIND)
        same_settings(path, about, self.settings)
        if about["step"]:
            for weight in self.weights.values():
                step = torch.tensor(float(about["step"]))
                self.optimiser.state[weight] = {"step": step} | {m: torch.zeros_like(weight) for m in MOMENTS}
        try:
            for key, name, part in self._parts():
                place_whole(name, checkpoints.whole(state[key]), part, self.world)
            self.generator.set_state(checkpoints.whole(state["generator"]).cpu())
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: does not fit this network and data ({error}): start afresh") from error
        self.step, self.losses = about["step"], about["losses"]
        self.held = [(int(step), float(loss)) for step, loss in about["held"]]


def check_shares(model: Model, settings: TrainSettings, world: World) -> None:
    """Raises ValueError, saying what to change, when heads, tiles or batch cannot be shared out, [PAR-4]."""
    tiling = model.tiling
    if tiling is None and world.mesh.tile > 1:
        raise ValueError(f"tile={world.mesh.tile} shares out tiles, and the network is trained untiled: add --tile HxW")
    tiles = None if tiling is None else len(cores(tiling.y)) * len(cores(tiling.x))
    world.mesh.check(model.config, tiles, settings.batch)


def train_shared(
    model: Model,
    samples: Samples,
    settings: TrainSettings,
    world: World,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    stop: int | None = None,
    save_memory: bool = False,
) -> Model:
    """As `training.train`, on the ranks of a world; every rank returns the whole model.

    checkpoint: a folder, mesh-independent. save_memory: blocks keep their inputs alone and run twice. Raises ValueError
    when network, tiles or batch cannot be shared out, [PAR-4], and for a checkpoint of other settings.
    """
    check_shares(model, settings, world)
    network = tensor_parallel(copy.deepcopy(model.network), world)
    if save_memory:
        recompute(network)
    run = _Run(replace(model, network=network, covariance=model.covariance.to(torch.float32)), samples, settings, world)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    every, last = max(settings.steps // CHECKS, 1), settings.steps if stop is None else min(stop, settings.steps)
    if run.step == 0:
        run.judge()
    while run.step < last:
        run.advance()
        if run.step % every == 0 or run.step == last:
            if run.step % every == 0 or run.step == settings.steps:
                run.judge()
            if checkpoint is not None:
                run.save(checkpoint)
        if progress is not None:
            note = f"loss {run.losses[-1]:.4f}, held back {run.held[-1][1]:.4f}"
            progress("training", run.step, settings.steps, note)
    whole = Storm(model.config)
    whole.load_state_dict({name: gather_whole(name, part, world).cpu() for name, part in run.best.items()})
    record = {"settings": plain(settings), "losses": run.losses, "held_back": run.held, "mesh": str(world.mesh)}
    return replace(model, network=whole.eval(), training=record)
