"""Tile parallelism: each rank has some of the tiles; what their halos and seams need goes from rank to rank.

With R ranks of the tile axis, points in the order of their tiles' cores:

[PAR-8]  rank r has a run of tiles, row-major, [PAR-3], and owns the points of their cores: of a state x [b, C, H, W]
         its *shard* is x_r [b, C, P_r]
[PAR-9]  gather: the extents of the rank's tiles from everybody's shards, one all-to-all; gradients go back by its
         adjoint
[PAR-10] blend: w_i * D_i where a tile has weight, to the owners of the points, one all-to-all; an owner adds what it is
         sent in the order of the tiles in the serial sum: given the memory, T[D] has the serial run's bits
[PAR-11] collect: all shards become the whole state on every rank, whose gradient is the same on each; scatter, the
         reverse. The sampler runs on shards, or on whole states between scatter and collect: the same bits

A rank sends a point once for each tile that has it: halos of tiles side by side on one rank are sent twice. gather and
blend are each other's adjoint but for the weights and for the halo beyond the blend, which has none.

The paper: halo exchange and blending at each step (Fig. 3a). Shards, order and messages are our interpretation.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise, precondition
from storm_ref.parallel.mesh import World, share
from storm_ref.tiling import Axis, LocalDenoise, Tile, Tiling, cores, tiles

__all__ = [
    "Exchange",
    "ShardedTiles",
    "blend_sharded",
    "compress_sharded",
    "conditions",
    "on_whole",
    "points_of",
    "sharded_denoiser",
    "token_tiling",
]


class _AllToAll(torch.autograd.Function):
    """Rows go to other ranks, `send` of them to each, and `receive` come from each; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(slope, ctx.receive, ctx.send, ctx.group), None, None, None  # type: ignore[no-untyped-call]


class _Collect(torch.autograd.Function):
    """Every rank's rows, `counts` of them, on every rank; the gradient, the same on each, is cut again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        most = max(counts)
        mine = rows.new_zeros(most, *rows.shape[1:])
        mine[: len(rows)] = rows
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        return _Scatter.apply(slope, ctx.counts, ctx.rank, ctx.group), None, None, None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """A rank's own of the rows that every rank has; its gradient collects everybody's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        return torch.split(rows, counts)[rank].clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        return _Collect.apply(slope, ctx.counts, ctx.rank, ctx.group), None, None, None  # type: ignore[no-untyped-call]


def points_of(tiling: Tiling, ranks: int) -> list[Int[Tensor, " _"]]:
    """The points that each rank owns, as indices into a flattened field: cores of its tiles, one after another, each
    row-major, [PAR-8].
    """
    width = tiling.x.length
    owned = [
        (torch.arange(*rows)[:, None] * width + torch.arange(*cols)).flatten()
        for rows in cores(tiling.y)
        for cols in cores(tiling.x)
    ]
    return [torch.cat([owned[i] for i in share(len(owned), ranks, rank)]) for rank in range(ranks)]


def token_tiling(tiling: Tiling, patch: tuple[int, int]) -> Tiling:
    """The same tiles counted in tokens, without blend: how memory tokens are cut."""

    def axis(a: Axis, p: int) -> Axis:
        return Axis(a.length // p, a.core // p, a.halo // p, 0, a.periodic)

    return Tiling(axis(tiling.y, patch[0]), axis(tiling.x, patch[1]))


class Exchange:
    """One pattern of messages: `wanted` says which points each rank wants, with repetitions, in its own order.

    pull: owners' shards to wanted rows; push: rows back to their points' owners, in the order of `wanted` of the first
    rank, then of the second, and so on. pull and push are each other's adjoint, up to the sum over rows of one point.
    """

    def __init__(self, wanted: Sequence[Int[Tensor, " _"]], owned: Sequence[Int[Tensor, " _"]], world: World) -> None:
        size = sum(len(points) for points in owned)
        owner, place = torch.empty(size, dtype=torch.long), torch.empty(size, dtype=torch.long)
        for rank, points in enumerate(owned):
            owner[points], place[points] = rank, torch.arange(len(points))
        self.owner = owner  # of each point, a rank
        rank = world.coordinates["tile"]
        self.group, self.alone = world.group("tile"), len(owned) == 1
        order = torch.argsort(owner[wanted[rank]], stable=True)
        self.receive: list[int] = torch.bincount(owner[wanted[rank]], minlength=len(owned)).tolist()
        asked = [place[points[owner[points] == rank]] for points in wanted]
        self.send = [len(part) for part in asked]
        self.back = torch.argsort(order).to(world.device)  # from rows by source to rows as wanted
        self.order, self.asked = order.to(world.device), torch.cat(asked).to(world.device)

    def pull(self, shard: Float[Tensor, "p *s"]) -> Float[Tensor, "e *s"]:
        """The wanted rows, in the order in which they are wanted."""
        return self._send(shard[self.asked], self.send, self.receive)[self.back]

    def push(self, rows: Float[Tensor, "e *s"]) -> Float[Tensor, "a *s"]:
        """Rows to the owners of their points: `asked` has the place of each in the shard."""
        return self._send(rows[self.order], self.receive, self.send)

    def _send(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        if self.alone:
            return rows
        return _AllToAll.apply(rows, send, receive, self.group)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Batch:
    tiles: list[Tile]
    rows: slice  # of the gathered rows: the extents of these tiles
    inside: Int[Tensor, " a"]  # where in them a tile has weight
    weight: Float[Tensor, " a"]


class ShardedTiles:
    """The tiles of one rank, and the messages that bring their extents and take their results.

    tiles_per_batch: most tiles of one shape in a batch. Raises ValueError for fewer tiles than tile ranks, [PAR-4].
    """

    def __init__(self, tiling: Tiling, world: World, tiles_per_batch: int = 16) -> None:
        if tiles_per_batch < 1:
            raise ValueError(f"at least one tile must be evaluated at a time, got tiles_per_batch = {tiles_per_batch}")
        found, ranks = tiles(tiling), world.mesh.tile
        world.mesh.check(tiles=len(found))
        self.tiling, self.world, self.tiles_per_batch = tiling, world, tiles_per_batch
        self.rank = world.coordinates["tile"]
        self.owned = points_of(tiling, ranks)
        self.counts = [len(points) for points in self.owned]
        every = torch.cat(self.owned)
        self._every, self._home = every.to(world.device), torch.argsort(every).to(world.device)
        turns = _turns(found)
        runs = [sorted(share(len(found), ranks, rank), key=turns.__getitem__) for rank in range(ranks)]
        points = [(tile.rows[:, None] * tiling.x.length + tile.cols).flatten() for tile in found]
        heavy = [p[tile.weight.flatten() > 0] for p, tile in zip(points, found, strict=True)]
        self.extents = Exchange([torch.cat([points[i] for i in run]) for run in runs], self.owned, world)
        self.results = Exchange([torch.cat([heavy[i] for i in run]) for run in runs], self.owned, world)
        sent = torch.cat([heavy[i] for run in runs for i in run])
        when = torch.cat([torch.full((len(heavy[i]),), turns[i]) for run in runs for i in run])
        arriving = when[self.results.owner[sent] == self.rank]
        slots = _slots(self.results.asked.cpu(), arriving, self.counts[self.rank])
        self._slots = slots.to(world.device)
        self.batches = _batches([found[i] for i in runs[self.rank]], tiles_per_batch, world.device)

    def shard(self, x: Shaped[Tensor, "*s h w"]) -> Shaped[Tensor, "*s p"]:
        """This rank's part of a field that every rank has, which is no variable: see `scatter` for gradients."""
        return x.flatten(-2)[..., self.owned[self.rank].to(x.device)]

    def scatter(self, x: Float[Tensor, "*s h w"]) -> Float[Tensor, "*s p"]:
        """[PAR-11]: as `shard`; the gradient is that of the whole, on every rank."""
        rows = x.flatten(-2).movedim(-1, 0)[self._every]
        if len(self.counts) > 1:
            rows = _Scatter.apply(rows, self.counts, self.rank, self.world.group("tile"))  # type: ignore[no-untyped-call]
        return rows.movedim(0, -1)

    def collect(self, shard: Float[Tensor, "*s p"]) -> Float[Tensor, "*s h w"]:
        """[PAR-11]: the whole from all shards, on every rank."""
        rows = shard.movedim(-1, 0)
        if len(self.counts) > 1:
            rows = _Collect.apply(rows, self.counts, self.rank, self.world.group("tile"))  # type: ignore[no-untyped-call]
        return rearrange(rows[self._home], "(i j) ... -> ... i j", j=self.tiling.x.length)

    def gather(self, shard: Float[Tensor, "b c p"]) -> list[Float[Tensor, "_ c _ _"]]:
        """[PAR-9]: extents of the rank's tiles, one tensor a batch of tiles, tile-major."""
        rows = self.extents.pull(shard.movedim(-1, 0))
        found = []
        for batch in self.batches:
            i, j = batch.tiles[0].weight.shape
            extents = rearrange(rows[batch.rows], "(t i j) b c -> (t b) c i j", i=i, j=j)
            found.append(extents.contiguous())
        return found

    def blend(self, results: Sequence[Float[Tensor, "_ c _ _"]]) -> Float[Tensor, "b c p"]:
        """[PAR-10]: the shard of sum_i P_i^T (w_i * results_i), added in the serial order."""
        parts = []
        for batch, value in zip(self.batches, results, strict=True):
            rows = rearrange(value, "(t b) c i j -> (t i j) b c", t=len(batch.tiles))[batch.inside]
            parts.append(batch.weight.to(rows)[:, None, None] * rows)
        rows = self.results.push(torch.cat(parts))
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        total = torch.zeros_like(rows[self._slots[0]])
        for slot in self._slots:  # at most four: two tiles along each axis
            total = total + rows[slot]
        return total.movedim(0, -1)


def _turns(found: Sequence[Tile]) -> list[int]:
    """When the serial sum adds each tile: those of one shape after another, as `tiling.blend_tiles` has it."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, tile in enumerate(found):
        shapes[tuple(tile.weight.shape)].append(i)
    turns = [0] * len(found)
    for turn, i in enumerate(i for group in shapes.values() for i in group):
        turns[i] = turn
    return turns


def _slots(place: Int[Tensor, " a"], turn: Int[Tensor, " a"], size: int) -> Int[Tensor, "k p"]:
    """Which rows make up each of `size` points: the k-th row adds k-th; the row behind the last stands for none.

    place, turn: of each row, its point and when it is added.
    """
    order = torch.argsort(place * (int(turn.max()) + 1) + turn)
    number = torch.bincount(place, minlength=size)
    depth = torch.arange(len(place)) - torch.repeat_interleave(number.cumsum(0) - number, number)
    slots = torch.full((int(number.max()), size), len(place))
    slots[depth, place[order]] = order
    return slots


def _batches(found: Sequence[Tile], tiles_per_batch: int, device: torch.device) -> list[_Batch]:
    """Tiles in their order, at most `tiles_per_batch` of one shape at a time."""
    batches: list[_Batch] = []
    at = 0
    for _, same in groupby(found, key=lambda tile: tile.weight.shape):
        group = [replace(tile, rows=tile.rows.to(device), cols=tile.cols.to(device)) for tile in same]
        for first in range(0, len(group), tiles_per_batch):
            batch = group[first : first + tiles_per_batch]
            weight = torch.cat([tile.weight.flatten() for tile in batch]).to(device)
            inside = torch.nonzero(weight > 0).flatten()
            batches.append(_Batch(batch, slice(at, at + len(weight)), inside, weight[inside]))
            at += len(weight)
    return batches


def blend_sharded(local: LocalDenoise, parts: ShardedTiles) -> Denoise:
    """T[D] on shards [b, C, p]: as `tiling.blend_tiles`, and with its bits."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        results = [
            local(z, sigma.repeat(len(batch.tiles)), batch.tiles)
            for z, batch in zip(parts.gather(x), parts.batches, strict=True)
        ]
        return parts.blend(results)

    return denoise


def on_whole(denoise: Denoise, parts: ShardedTiles) -> Denoise:
    """The same on whole states [b, C, H, W] that every tile rank has."""
    return lambda x, sigma: parts.collect(denoise(parts.scatter(x), sigma))


def conditions(
    condition: Condition, parts: ShardedTiles, patch: tuple[int, int], memory: Float[Tensor, "b d p"] | None = None
) -> Callable[[Sequence[Tile], int], Condition]:
    """What each batch of the rank's tiles is told, for so many members; made once.

    memory: this rank's shard of the memory tokens, from `compress_sharded`, in place of the condition's; it is gathered
    here, once an analysis.
    """
    gathered = (
        None if memory is None else ShardedTiles(token_tiling(parts.tiling, patch), parts.world, parts.tiles_per_batch)
    )
    tokens = None if gathered is None or memory is None else gathered.gather(memory)
    kept: dict[tuple[int, int], Condition] = {}

    def make(batch: Sequence[Tile], members: int) -> Condition:
        found = Condition.stack([condition.crop(tile.rows, tile.cols, patch) for tile in batch], members)
        if tokens is None:
            return found
        number = next(i for i, other in enumerate(parts.batches) if other.tiles is batch)
        own = rearrange(tokens[number], "(t b) d i j -> t b i j d", t=len(batch))
        return replace(found, memory=own.expand(-1, members, -1, -1, -1).flatten(0, 1))

    def of(batch: Sequence[Tile], members: int) -> Condition:
        key = (id(batch), members)
        if key not in kept:
            kept[key] = make(batch, members)
        return kept[key]

    return of


def sharded_denoiser(
    network: Storm, condition: Condition, parts: ShardedTiles, memory: Float[Tensor, "b d p"] | None = None
) -> Denoise:
    """D(x; sigma) of one analysis by tiles, on shards: as `tiling.tiled_denoiser`; memory: see `conditions`."""
    dtype, told = network.final.weight.dtype, conditions(condition, parts, network.config.patch, memory)

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        here = told(batch, z.shape[0] // len(batch))
        return precondition(lambda c, s: network(c, s, here), z, sigma, network.config.sigma_data, dtype)

    return blend_sharded(local, parts)


def compress_sharded(
    network: Storm,
    past: Float[Tensor, "b k c h w"],
    static: Float[Tensor, "b k s h w"],
    age: Float[Tensor, "b k"],
    position: Float[Tensor, "rows cols p"],
    parts: ShardedTiles,
    chunk: int = 16,
) -> Float[Tensor, "b d n"]:
    """The memory tokens that this rank owns, [NET-2]: no location needs another, so that a rank compresses the tokens
    of its cores as a strip one token high.
    """
    height, width = network.config.patch
    own = points_of(token_tiling(parts.tiling, (height, width)), parts.world.mesh.tile)[parts.rank].to(past.device)

    def strip(x: Tensor) -> Tensor:
        tokens = rearrange(x, "b k c (i p) (j q) -> (i j) b k c p q", p=height, q=width)[own]
        return rearrange(tokens, "n b k c p q -> b k c p (n q)")

    places = position.flatten(0, 1)[own][None]
    memory = network.compress(strip(past), strip(static), age, places, chunk)
    return rearrange(memory, "b 1 n d -> b d n")
