"""The operations of chapter 9 by the reference, on many ranks and in one process.

In a rank, `RANKS[op](inputs, params)` takes tensors and returns those that this rank holds; the ranks of a mesh call it
together. `over_ranks` runs it in a pool, and returns the arrays of every rank as `rank.R.NAME`. `SERIAL[op]` solves the
same problem without ranks, by the chapters before; the expected values are frozen from its results.

`conformance.adapters.reference_ranks:launched` is one rank of a world that torchrun has started, as an adapter for
`python -m conformance answer DIR --launched`.
"""

import atexit
import importlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import storm_ref
from conformance.adapter import Array, Info, Unsupported
from conformance.adapters import reference_operations as reference
from conformance.protocol.operations import DTYPES
from storm_ref import assimilation, edm, guidance, tiling
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm
from storm_ref.parallel import ensemble, halo, mesh, shard, tensor
from storm_ref.parallel.mesh import Mesh, World
from storm_ref.parallel.pool import Pool, world_of

__all__ = ["OVER_RANKS", "RANKS", "SERIAL", "Launched", "closed", "inherited", "launched", "over_ranks", "shares"]

Tensors = Mapping[str, Tensor]
Params = Mapping[str, Any]


def _tiling(p: Params) -> tiling.Tiling:
    return tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"]))


def _count(cut: tiling.Tiling) -> int:
    return len(tiling.shapes(cut))


def _as_tile(values: Tensor, one: tiling.Tile) -> Tensor:
    return values.reshape(*values.shape[:-1], *one.shape)


def shares(i: Tensors, p: Params) -> Tensors:
    """The partition of samples, tiles and points, which needs no ranks."""
    shape, cut, heads = Mesh(**p["mesh"]), _tiling(p), p["heads"]
    shape.check(StormConfig(1, 0, (1, 1), heads, heads, 1), _count(cut), p["samples"])

    def runs(count: int, ranks: int) -> Tensor:
        own = [mesh.share(count, ranks, rank) for rank in range(ranks)]
        return torch.tensor([[run.start, run.stop] for run in own])

    owned = halo.points_of(cut, shape.tile)
    return {
        "coordinates": torch.tensor([list(shape.coordinates(rank).values()) for rank in range(shape.size)]),
        "samples": runs(p["samples"], shape.data),
        "tiles": runs(_count(cut), shape.tile),
        "counts": torch.tensor([len(points) for points in owned]),
        "points": torch.cat(owned),
    }


# In a rank.


def _own(value: Tensor, mine: range) -> Tensor:
    """The rank's samples; a batch of 1 is broadcast."""
    return value if len(value) == 1 else value[mine.start : mine.stop]


def _gather(i: Tensors, p: Params) -> Tensors:
    world, cut = world_of(Mesh(**p["mesh"])), _tiling(p)
    world.mesh.check(StormConfig(1, 0, (1, 1), world.mesh.tp, world.mesh.tp, 1), _count(cut), len(i["x"]))
    parts = halo.ShardedTiles(cut, world, p["together"])
    own = _own(i["x"], world.share(len(i["x"])))
    rows: dict[int, Tensor] = {}  # by the number of the tile
    for batch, extents in zip(parts.batches, parts.gather(parts.shard(own)), strict=True):
        rows |= zip(batch.numbers, torch.split(extents.flatten(-2), len(extents) // len(batch.tiles)), strict=True)
    return {"extents": torch.cat([rows[n] for n in sorted(rows)], -1)}


def _blend(i: Tensors, p: Params) -> Tensors:
    world, cut = world_of(Mesh(**p["mesh"])), _tiling(p)
    parts = halo.ShardedTiles(cut, world, p["together"])
    own = _own(i["values"], world.share(len(i["values"])))
    values = torch.split(own, [rows * cols for rows, cols in tiling.shapes(cut)], -1)
    results = []
    for batch in parts.batches:
        of_batch = [_as_tile(values[n], one) for n, one in zip(batch.numbers, batch.tiles, strict=True)]
        results.append(torch.cat(of_batch))
    whole = parts.collect(parts.blend(results))
    return {"blended": ensemble.gather_members(whole, len(i["values"]), world)}


def _network(i: Tensors, p: Params, samples: int) -> tuple[Storm, World]:
    """The network with the rank's part of the weights, and the world of the mesh, once it is known to fit."""
    network, shape = reference._network(i, p), Mesh(**p["mesh"])
    shape.check(network.config, _count(_tiling(p)), samples)
    world = world_of(shape)
    return tensor.tensor_parallel(network, world), world


def _denoiser(network: Storm, i: Tensors, p: Params, parts: halo.ShardedTiles, mine: range) -> edm.Denoise:
    """D of the rank's samples on shards; each rank compresses the memory tokens of its own cores."""
    past = (_own(i["past"], mine), _own(i["past_static"], mine), _own(i["age"], mine), i["position"])
    memory = halo.compress_sharded(network, *past, parts, p["chunk"])
    static = _own(i["static"], mine)
    nothing = torch.zeros(1, dtype=static.dtype).expand(1, *i["position"].shape[:2], network.config.width)
    return halo.sharded_denoiser(network, Condition(static, nothing, i["position"][None], p["periodic"]), parts, memory)


def _denoise(i: Tensors, p: Params) -> Tensors:
    count = len(i["x"])
    network, world = _network(i, p, count)
    parts, mine = halo.ShardedTiles(_tiling(p), world, p["together"]), world.share(count)
    whole = halo.on_whole(_denoiser(network, i, p, parts, mine), parts)
    own = whole(_own(i["x"], mine), _own(i["sigma"], mine))
    return {"denoised": ensemble.gather_members(own, count, world)}


class _Step(nn.Module):
    """The loss of one training step as a module, since FSDP gathers weights around its forward pass."""

    def __init__(self, network: Storm, parts: halo.ShardedTiles, p: Params) -> None:
        super().__init__()
        self.network, self.parts, self.p = network, parts, p

    def forward(self, i: Tensors, mine: range) -> Tensor:
        denoise, shard_of = _denoiser(self.network, i, self.p, self.parts, mine), self.parts.shard
        clean, noise, sigma = (_own(i[name], mine) for name in ("clean", "noise", "sigma"))
        level = sigma[:, None, None, None]
        error = denoise(shard_of(clean + level * noise), sigma) - shard_of(clean)
        weight = edm.loss_weight(sigma, self.network.config.sigma_data)[:, None, None]
        valid = shard_of(_own(i["valid"], mine)) if "valid" in i else None
        return shard.scaled_loss(weight * error**2, valid, self.parts.world)


def _gradients(i: Tensors, p: Params) -> Tensors:
    count = len(i["clean"])
    network, world = _network(i, p, count)
    step = _Step(network, halo.ShardedTiles(_tiling(p), world, p["together"]), p)
    shard.shard_weights(step, network, world)
    loss = step(i, world.share(count))
    loss.backward()
    shard.sum_tile_gradients(network, world)
    norm = shard.clip_gradients(network, p["clip"], world)
    gradients = {name: weight.grad for name, weight in network.named_parameters()}
    whole = {f"gradients.{n}": shard.gather_whole(n, g, world) for n, g in gradients.items() if g is not None}
    return {"loss": torch.tensor(shard.whole_loss(loss, world), dtype=torch.float64), "norm": norm} | whole


def _ensemble(i: Tensors, p: Params) -> Tensors:
    count = _members(i, p)
    network, world = _network(i, p, count)
    parts = halo.ShardedTiles(_tiling(p), world, p["together"])
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn(**p["churn"]))

    def draw(mine: range) -> Tensor:
        denoise = halo.on_whole(_denoiser(network, i, p, parts, mine), parts)
        noise = _noise(i, p, sampler, mine)
        return assimilation.draw_members(denoise, noise, sampler, *_guidance(i, p))

    return {"samples": ensemble.draw_shared(draw, count, world)}


def _members(i: Tensors, p: Params) -> int:
    return len(i["latents"]) if "latents" in i else int(p["members"])


def _noise(i: Tensors, p: Params, sampler: assimilation.Sampler, mine: range) -> Tensor:
    """The noise of these members, taken from the inputs where it is given there, else drawn by their numbers."""
    if "latents" in i:
        draws = [i["latents"][None], *([i["noises"]] if "noises" in i else [])]
        return torch.cat([part[:, mine.start : mine.stop] for part in draws])
    shape = (p["config"]["channels"], p["y"]["length"], p["x"]["length"])
    drawn = [assimilation.member_noise(p["seed"], p["analysis"], m, shape, sampler.draws) for m in mine]
    return torch.stack(drawn, 1)


def _guidance(i: Tensors, p: Params) -> tuple[guidance.Observations | None, assimilation.Guide | None]:
    shape = (p["config"]["channels"], p["y"]["length"], p["x"]["length"])
    seen = None
    if "value" in i:
        seen = guidance.Observations(i["value"], i["variance"], i["index"], i["weight"], shape)
    return seen, reference._guide(p) if p["method"] else None


RANKS: dict[str, Callable[[Tensors, Params], Tensors]] = {
    "parallel_gather": _gather,
    "parallel_blend": _blend,
    "parallel_denoise": _denoise,
    "parallel_gradients": _gradients,
    "parallel_ensemble": _ensemble,
}


def _in_rank(op: str, i: Tensors, p: Params) -> tuple[str, Any]:
    """The answer of a rank: its arrays, or the reason why it refuses.

    NumPy has no bfloat16, so that these arrays are sent as float32.
    """
    try:
        with torch.set_grad_enabled(op == "parallel_gradients"):
            result = RANKS[op](i, p)
    except ValueError as error:
        return "refused", str(error)
    arrays = {name: value.detach().cpu() for name, value in result.items()}
    return "values", {n: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for n, v in arrays.items()}


# Pools of ranks, one for each number of ranks, and others for wrong ports, whose ranks inherit their faults by fork.

SLOW = ("torch.distributed.fsdp", "torch._dynamo")  # modules that FSDP loads at its first step
DEADLINE = 600.0  # seconds for one operation, which only a rank that hangs exceeds
SHORT = 60.0  # the same for a wrong port, which may hang
_warm: dict[int, Pool] = {}
_forked: dict[int, Pool] = {}
_heir: list[object] = [None, None]  # the owner that is served now, and the one of the forked pools


@contextmanager
def inherited(owner: object) -> Iterator[None]:
    """Within this context, ranks are forked from this process with its patches, and kept until another owner comes."""
    before, _heir[0] = _heir[0], owner
    try:
        yield
    finally:
        _heir[0] = before


def _pool(ranks: int) -> Pool:
    owner = _heir[0]
    if owner is None:
        if not _warm:
            _preload()
        return _warm.setdefault(ranks, Pool(ranks))
    if _heir[1] is not owner:
        for name in SLOW:
            importlib.import_module(name)
        _close(_forked)
        _heir[1] = owner
    return _forked.setdefault(ranks, Pool(ranks, timeout=SHORT, method="fork"))


def _preload() -> None:
    """Have the server from which ranks are forked import what they need."""
    multiprocessing.set_forkserver_preload([*SLOW, __name__])
    forkserver.ensure_running()


def _close(pools: dict[int, Pool]) -> None:
    for pool in pools.values():
        pool.close()
    pools.clear()


@atexit.register
def closed() -> None:
    """End the ranks of all pools; the next call starts new ones."""
    _close(_warm)
    _close(_forked)
    _heir[1] = None


def over_ranks(op: str, i: Tensors, p: Params) -> Tensors:
    """One operation by the ranks of its mesh. Raises ValueError when all refuse, RuntimeError when some do."""
    shape = Mesh(**p["mesh"])
    deadline = DEADLINE if _heir[0] is None else SHORT
    answers = _pool(shape.size).run(_in_rank, op, dict(i), dict(p), deadline=deadline)
    refusals = {rank: what for rank, (kind, what) in enumerate(answers) if kind == "refused"}
    if len(refusals) == shape.size:
        raise ValueError(refusals[0])
    if refusals:
        rank, what = next(iter(refusals.items()))
        raise RuntimeError(f"rank {rank} refused, and {shape.size - len(refusals)} of {shape.size} did not: {what}")
    return {
        f"rank.{rank}.{name}": torch.from_numpy(np.array(value))
        for rank, (_, arrays) in enumerate(answers)
        for name, value in arrays.items()
    }


def _on_pool(op: str) -> reference.Operation:
    def on_pool(i: Tensors, p: Params) -> Tensors:
        return over_ranks(op, i, p)

    return on_pool


OVER_RANKS: dict[str, reference.Operation] = {"shares": shares} | {op: _on_pool(op) for op in RANKS}


# The same without ranks, by chapters 5, 6 and 8.


def _serial_gather(i: Tensors, p: Params) -> Tensors:
    """The extents of every rank, cut from the whole state."""
    shape, cut, x = Mesh(**p["mesh"]), _tiling(p), i["x"]
    every = [x[..., each.rows[:, None], each.cols].flatten(-2) for each in tiling.tiles(cut)]
    extents = {}
    for rank in range(shape.size):
        place = shape.coordinates(rank)
        mine = mesh.share(len(x), shape.data, place["ddp"] * shape.fsdp + place["fsdp"])
        own = [every[n][mine.start : mine.stop] for n in mesh.share(len(every), shape.tile, place["tile"])]
        extents[f"rank.{rank}.extents"] = torch.cat(own, -1)
    return extents


def _serial_blend(i: Tensors, p: Params) -> Tensors:
    """The given values of the tiles, blended by `tiling.blend_tiles`."""
    cut = _tiling(p)
    every = tiling.tiles(cut)
    values = torch.split(i["values"], [each.weight.numel() for each in every], -1)

    def number(one: tiling.Tile) -> int:
        same = [n for n, each in enumerate(every) if each.place == one.place]
        return next(n for n in same if torch.equal(every[n].weight, one.weight))

    def values_of_batch(z: Tensor, sigma: Tensor, batch: Sequence[tiling.Tile]) -> Tensor:
        return torch.cat([_as_tile(values[number(one)], one) for one in batch])

    state = i["values"].new_zeros(*i["values"].shape[:2], cut.y.length, cut.x.length)
    return {"blended": tiling.blend_tiles(values_of_batch, cut)(state, state.new_ones(len(state)))}


def _serial_denoise(i: Tensors, p: Params) -> Tensors:
    return {"denoised": reference._tiled_network(i, p)(i["x"], i["sigma"])}


def _serial_gradients(i: Tensors, p: Params) -> Tensors:
    network = reference._network(i, p)
    denoise = tiling.tiled_denoiser(network, reference._condition(network, i, p), _tiling(p), p["together"])
    names, weights = zip(*network.named_parameters(), strict=True)
    loss = edm.edm_loss(denoise, i["clean"], i["noise"], i["sigma"], network.config.sigma_data, i.get("valid"))
    gradients = torch.autograd.grad(loss, weights)
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    factor = (p["clip"] / (norm + 1e-6)).clamp(max=1.0)
    clipped = {f"gradients.{n}": g * factor.to(g) for n, g in zip(names, gradients, strict=True)}
    return {"loss": loss, "norm": norm} | clipped


def _serial_ensemble(i: Tensors, p: Params) -> Tensors:
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn(**p["churn"]))
    noise = _noise(i, p, sampler, range(_members(i, p)))
    return {"samples": assimilation.draw_members(reference._tiled_network(i, p), noise, sampler, *_guidance(i, p))}


SERIAL: dict[str, Callable[[Tensors, Params], Tensors]] = {
    "shares": shares,
    "parallel_gather": _serial_gather,
    "parallel_blend": _serial_blend,
    "parallel_denoise": _serial_denoise,
    "parallel_gradients": _serial_gradients,
    "parallel_ensemble": _serial_ensemble,
}


class Launched:
    """One rank of a world that a launcher has started, as a port; it returns the arrays of this rank by plain names."""

    def describe(self) -> Info:
        """The reference's operations of many ranks."""
        return Info("storm_ref", storm_ref.__version__, frozenset(RANKS), DTYPES, profiles=("parallel",))

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array]:
        """Run one operation together with the other ranks."""
        if op not in RANKS:
            raise Unsupported(op)
        if not dist.is_initialized():
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
        return reference.run_as(RANKS, op, inputs, params)


def launched() -> Launched:
    """Made when it is called: this module is imported by processes that nobody launched."""
    return Launched()
