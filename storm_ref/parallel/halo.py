"""Tile parallelism: tiles are partitioned over ranks, which exchange halos and seams.

With R ranks on the tile axis, and points in the order of their tiles' cores:

[PAR-8]  rank r has a contiguous run of tiles in row-major order, [PAR-3], and owns the points of their cores; its
         *shard* of a state x [b, C, H, W] is x_r [b, C, P_r]
[PAR-9]  gather: the extents of a rank's tiles are assembled from the shards of all ranks by one all-to-all; gradients
         return by its adjoint
[PAR-10] blend: w_i * D_i is sent, where a tile has weight, to the owners of the points by one all-to-all; an owner adds
         what it receives in the order of the serial sum, so that T[D], given the memory, has the serial run's bits
[PAR-11] collect: the shards become a state that is replicated on all ranks, and so is its gradient; scatter is the
         reverse. The sampler runs on shards, or on replicated states between scatter and collect, with the same bits

A point is sent once for each tile that covers it, so halos of neighbouring tiles on one rank are sent twice. gather and
blend are adjoint to each other except for the weights, and for the halo beyond the blend, which has no weight.

The paper: halo exchange and blending at each step (Fig. 3a). Shards, order and messages are our interpretation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise, precondition
from storm_ref.parallel.mesh import World, share
from storm_ref.tiling import Axis, LocalDenoise, Tile, Tiling, batches, cores, once_per_batch, tile_conditions, tiles

__all__ = [
    "Batch",
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
    """Sends `send[r]` rows to each rank r and receives `receive[r]` from it; gradients travel the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own = _AllToAll.apply(gradient, ctx.receive, ctx.send, ctx.group)  # type: ignore[no-untyped-call]
        return own, None, None, None


class _Collect(torch.autograd.Function):
    """Replicates the rows of all ranks, `counts[r]` of rank r; the gradient, equal on all of them, is sharded again."""

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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own = _Scatter.apply(gradient, ctx.counts, ctx.rank, ctx.group)  # type: ignore[no-untyped-call]
        return own, None, None, None


class _Scatter(torch.autograd.Function):
    """Keeps a rank's own rows of those that are replicated; the gradient is collected from all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        return torch.split(rows, counts)[rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own = _Collect.apply(gradient, ctx.counts, ctx.rank, ctx.group)  # type: ignore[no-untyped-call]
        return own, None, None, None


def points_of(tiling: Tiling, ranks: int) -> list[Int[Tensor, " _"]]:
    """The points that each rank owns, as indices into a flattened field, [PAR-8].

    They are those of the cores of its tiles, one core after another, each in row-major order.
    """
    width = tiling.x.length
    owned = [
        (torch.arange(*rows)[:, None] * width + torch.arange(*cols)).flatten()
        for rows in cores(tiling.y)
        for cols in cores(tiling.x)
    ]
    return [torch.cat([owned[i] for i in share(len(owned), ranks, rank)]) for rank in range(ranks)]


def token_tiling(tiling: Tiling, patch: tuple[int, int]) -> Tiling:
    """The same tiles measured in tokens and without blend, by which memory tokens are partitioned."""

    def axis(a: Axis, p: int) -> Axis:
        return Axis(a.length // p, a.core // p, a.halo // p, 0, a.periodic)

    return Tiling(axis(tiling.y, patch[0]), axis(tiling.x, patch[1]))


class Exchange:
    """One pattern of messages between the owners of points and the ranks that want them.

    wanted: the points that each rank wants, with repetitions, in its own order. `pull` sends rows of the owners' shards
    to the ranks that want them. `push` sends rows back to the owners of their points, in the order of `wanted` of the
    first rank, then of the second, and so on. The two are adjoint up to the sum over rows of one point.
    """

    def __init__(self, wanted: Sequence[Int[Tensor, " _"]], owned: Sequence[Int[Tensor, " _"]], world: World) -> None:
        size = sum(len(points) for points in owned)
        owner = torch.empty(size, dtype=torch.long)  # the rank that owns each point
        place = torch.empty(size, dtype=torch.long)  # the row of each point in its owner's shard
        for rank, points in enumerate(owned):
            owner[points] = rank
            place[points] = torch.arange(len(points))
        rank = world.coordinates["tile"]
        order = torch.argsort(owner[wanted[rank]], stable=True)
        rows_to_send = [place[points[owner[points] == rank]] for points in wanted]
        self.owner = owner
        self.group = world.group("tile")
        self.alone = len(owned) == 1
        self.send_counts = [len(rows) for rows in rows_to_send]
        self.receive_counts: list[int] = torch.bincount(owner[wanted[rank]], minlength=len(owned)).tolist()
        self.shard_rows = torch.cat(rows_to_send).to(world.device)  # of the rank's shard, in the order of sending
        self.by_owner = order.to(world.device)  # from rows as wanted to rows by owner
        self.as_wanted = torch.argsort(order).to(world.device)  # and back

    def pull(self, shard: Float[Tensor, "p *s"]) -> Float[Tensor, "e *s"]:
        """The wanted rows, in the order in which they are wanted."""
        return self._exchange(shard[self.shard_rows], self.send_counts, self.receive_counts)[self.as_wanted]

    def push(self, rows: Float[Tensor, "e *s"]) -> Float[Tensor, "a *s"]:
        """The rows that other ranks return to this one; `shard_rows` is the place of each in the shard."""
        return self._exchange(rows[self.by_owner], self.receive_counts, self.send_counts)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        if self.alone:
            return rows
        return _AllToAll.apply(rows, send, receive, self.group)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Batch:
    """Tiles of one shape that a rank evaluates together."""

    numbers: list[int]  # of the tiles, row-major in the whole tiling
    tiles: list[Tile]
    rows: slice  # of the gathered rows, for the extents of these tiles
    weighted: Int[Tensor, " a"]  # those of the rows on which a tile has weight
    weight: Float[Tensor, " a"]


class ShardedTiles:
    """The tiles of one rank, with the messages that bring their extents and send their results.

    tiles_per_batch: the most tiles of one shape in a batch. Raises ValueError for fewer than one, and for fewer tiles
    than tile ranks, [PAR-4].
    """

    def __init__(self, tiling: Tiling, world: World, tiles_per_batch: int = 16) -> None:
        every = tiles(tiling)
        ranks = world.mesh.tile
        serial_batches = batches([tile.shape for tile in every], tiles_per_batch)
        world.mesh.check(tiles=len(every))
        self.tiling = tiling
        self.world = world
        self.tiles_per_batch = tiles_per_batch
        self.rank = world.coordinates["tile"]
        self.owned = points_of(tiling, ranks)
        self.counts = [len(points) for points in self.owned]
        by_owner = torch.cat(self.owned)
        self._by_owner = by_owner.to(world.device)  # all points, in the order of the ranks' shards
        self._row_major = torch.argsort(by_owner).to(world.device)  # and back

        turn = {number: turn for turn, number in enumerate(number for batch in serial_batches for number in batch)}
        runs = [sorted(share(len(every), ranks, rank), key=turn.__getitem__) for rank in range(ranks)]
        points = [(tile.rows[:, None] * tiling.x.length + tile.cols).flatten() for tile in every]
        weighted = [p[tile.weight.flatten() > 0] for p, tile in zip(points, every, strict=True)]
        self.extents = Exchange([torch.cat([points[i] for i in run]) for run in runs], self.owned, world)
        self.results = Exchange([torch.cat([weighted[i] for i in run]) for run in runs], self.owned, world)

        sent = torch.cat([weighted[i] for run in runs for i in run])
        turns = torch.cat([torch.full((len(weighted[i]),), turn[i]) for run in runs for i in run])
        arriving = turns[self.results.owner[sent] == self.rank]
        contributions = _contributions(self.results.shard_rows.cpu(), arriving, self.counts[self.rank])
        self._contributions = contributions.to(world.device)
        self.batches = _own_batches(every, runs[self.rank], tiles_per_batch, world.device)

    def shard(self, x: Shaped[Tensor, "*s h w"]) -> Shaped[Tensor, "*s p"]:
        """This rank's shard of a replicated field that needs no gradient; see `scatter` for one that does."""
        return x.flatten(-2)[..., self.owned[self.rank].to(x.device)]

    def scatter(self, x: Float[Tensor, "*s h w"]) -> Float[Tensor, "*s p"]:
        """This rank's shard of a replicated field, [PAR-11]; the gradient is that of the whole field on every rank."""
        rows = x.flatten(-2).movedim(-1, 0)[self._by_owner]
        if len(self.counts) > 1:
            rows = _Scatter.apply(rows, self.counts, self.rank, self.world.group("tile"))  # type: ignore[no-untyped-call]
        return rows.movedim(0, -1)

    def collect(self, shard: Float[Tensor, "*s p"]) -> Float[Tensor, "*s h w"]:
        """The field that consists of all shards, replicated on every rank, [PAR-11]."""
        rows = shard.movedim(-1, 0)
        if len(self.counts) > 1:
            rows = _Collect.apply(rows, self.counts, self.rank, self.world.group("tile"))  # type: ignore[no-untyped-call]
        return rearrange(rows[self._row_major], "(i j) ... -> ... i j", j=self.tiling.x.length)

    def gather(self, shard: Float[Tensor, "b c p"]) -> list[Float[Tensor, "_ c _ _"]]:
        """The extents of the rank's tiles, [PAR-9]: one tensor per batch of tiles, tile-major."""
        rows = self.extents.pull(shard.movedim(-1, 0))
        extents = []
        for batch in self.batches:
            i, j = batch.tiles[0].shape
            extents.append(rearrange(rows[batch.rows], "(t i j) b c -> (t b) c i j", i=i, j=j).contiguous())
        return extents

    def blend(self, results: Sequence[Float[Tensor, "_ c _ _"]]) -> Float[Tensor, "b c p"]:
        """The shard of sum_i P_i^T (w_i * results_i), added in the order of the serial sum, [PAR-10]."""
        parts = []
        for batch, value in zip(self.batches, results, strict=True):
            rows = rearrange(value, "(t b) c i j -> (t i j) b c", t=len(batch.tiles))[batch.weighted]
            parts.append(batch.weight.to(rows)[:, None, None] * rows)
        rows = self.results.push(torch.cat(parts))
        rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        total = torch.zeros_like(rows[self._contributions[0]])
        for contribution in self._contributions:  # at most four: two tiles along each axis
            total = total + rows[contribution]
        return total.movedim(0, -1)


def _contributions(place: Int[Tensor, " a"], turn: Int[Tensor, " a"], size: int) -> Int[Tensor, "k p"]:
    """For each of `size` points, the rows that contribute to it, in summation order.

    Points with fewer rows than others are padded with the index of a zero row, which follows the last row. place, turn:
    the point of each row, and its position in the order of summation.
    """
    order = torch.argsort(place * (int(turn.max()) + 1) + turn)
    number = torch.bincount(place, minlength=size)
    depth = torch.arange(len(place)) - torch.repeat_interleave(number.cumsum(0) - number, number)
    rows = torch.full((int(number.max()), size), len(place))
    rows[depth, place[order]] = order
    return rows


def _own_batches(every: Sequence[Tile], run: Sequence[int], tiles_per_batch: int, device: torch.device) -> list[Batch]:
    """The batches of one rank, whose tiles are `run`, with their tensors on the device."""
    own: list[Batch] = []
    start = 0
    for batch in batches([every[number].shape for number in run], tiles_per_batch):
        numbers = [run[i] for i in batch]
        parts = [replace(every[n], rows=every[n].rows.to(device), cols=every[n].cols.to(device)) for n in numbers]
        weight = torch.cat([tile.weight.flatten() for tile in parts]).to(device)
        weighted = torch.nonzero(weight > 0).flatten()
        own.append(Batch(numbers, parts, slice(start, start + len(weight)), weighted, weight[weighted]))
        start += len(weight)
    return own


def blend_sharded(denoise_batch: LocalDenoise, parts: ShardedTiles) -> Denoise:
    """T[D] on shards [b, C, p], with the bits of `tiling.blend_tiles`."""

    def denoise_shard(x: Tensor, sigma: Tensor) -> Tensor:
        results = [
            denoise_batch(z, sigma.repeat(len(batch.tiles)), batch.tiles)
            for z, batch in zip(parts.gather(x), parts.batches, strict=True)
        ]
        return parts.blend(results)

    return denoise_shard


def on_whole(denoise: Denoise, parts: ShardedTiles) -> Denoise:
    """A denoiser of shards as one of states [b, C, H, W] that are replicated on all tile ranks."""

    def denoise_replicated(x: Tensor, sigma: Tensor) -> Tensor:
        return parts.collect(denoise(parts.scatter(x), sigma))

    return denoise_replicated


def conditions(
    condition: Condition, parts: ShardedTiles, patch: tuple[int, int], memory: Float[Tensor, "b d p"] | None = None
) -> Callable[[Sequence[Tile], int], Condition]:
    """The condition of each batch of the rank's tiles, made once: a function of the tiles and the number of members.

    memory: this rank's shard of the memory tokens, from `compress_sharded`, in place of those of the condition. It is
    gathered here, once per analysis, so all tile ranks must call this together.
    """
    if memory is None:
        return tile_conditions(condition, patch)
    tokens = ShardedTiles(token_tiling(parts.tiling, patch), parts.world, parts.tiles_per_batch).gather(memory)
    gathered = {batch.tiles[0].place: extents for batch, extents in zip(parts.batches, tokens, strict=True)}

    def with_memory(batch: Sequence[Tile], members: int) -> Condition:
        cropped = Condition.stack([condition.crop(tile.rows, tile.cols, patch) for tile in batch], members)
        own = rearrange(gathered[batch[0].place], "(t b) d i j -> t b i j d", t=len(batch))
        return replace(cropped, memory=own.expand(-1, members, -1, -1, -1).flatten(0, 1))

    return once_per_batch(with_memory)


def sharded_denoiser(
    network: Storm, condition: Condition, parts: ShardedTiles, memory: Float[Tensor, "b d p"] | None = None
) -> Denoise:
    """D(x; sigma) of one analysis by tiles, on shards, as `tiling.tiled_denoiser` is on whole states.

    memory: this rank's shard of the memory tokens, as for `conditions`.
    """
    dtype = network.final.weight.dtype
    condition_of = conditions(condition, parts, network.config.patch, memory)

    def denoise_batch(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        own = condition_of(batch, z.shape[0] // len(batch))

        def evaluate_network(scaled: Tensor, level: Tensor) -> Tensor:
            return network(scaled, level, own)  # type: ignore[no-any-return]

        return precondition(evaluate_network, z, sigma, network.config.sigma_data, dtype)

    return blend_sharded(denoise_batch, parts)


def compress_sharded(
    network: Storm,
    past: Float[Tensor, "b k c h w"],
    static: Float[Tensor, "b k s h w"],
    age: Float[Tensor, "b k"],
    position: Float[Tensor, "rows cols p"],
    parts: ShardedTiles,
    chunk: int = 16,
) -> Float[Tensor, "b d n"]:
    """The memory tokens that this rank owns, [NET-2].

    Compression is pointwise in location, so a rank compresses the tokens of its cores as a strip one token high.
    """
    height, width = network.config.patch
    own = points_of(token_tiling(parts.tiling, (height, width)), parts.world.mesh.tile)[parts.rank].to(past.device)

    def strip(x: Tensor) -> Tensor:
        tokens = rearrange(x, "b k c (i p) (j q) -> (i j) b k c p q", p=height, q=width)[own]
        return rearrange(tokens, "n b k c p q -> b k c p (n q)")

    places = position.flatten(0, 1)[own][None]
    memory = network.compress(strip(past), strip(static), age, places, chunk)
    return rearrange(memory, "b 1 n d -> b d n")
