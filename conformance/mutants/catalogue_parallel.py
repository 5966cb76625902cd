"""Wrong ports of chapter 9: what ranks have, send, add up and forget to tell one another.

A pool of their own is forked for each (`adapters/parallel.py`), so that its ranks have the fault too.
"""

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref.attention import MultiHead
from storm_ref.denoiser import Storm
from storm_ref.memory import MemoryState, TemporalMemory
from storm_ref.parallel import ensemble, halo, mesh, shard, tensor
from storm_ref.parallel.mesh import Mesh, World

__all__ = ["PARALLEL"]

_tensor_parallel, _cut, _shard_weights, _gather = (
    tensor.tensor_parallel, tensor.cut, shard.shard_weights, halo.ShardedTiles.gather,
)  # fmt: skip


# Tensor parallelism


def _packed(network: Storm, world: World) -> Storm:
    """Query, key and value stacked as one matrix, which is cut into as many parts as there are ranks."""
    ranks = world.mesh.tp
    for module in network.modules():
        if isinstance(module, MultiHead):
            projections = (module.query, module.key, module.value)
            stacked = torch.cat([p.weight.detach() for p in projections])
            rows = [part.chunk(3) for part in stacked.chunk(ranks)]
            for n, projection in enumerate(projections):
                projection.weight = nn.Parameter(torch.cat([part[n] for part in rows]))
    return _tensor_parallel(network, world)


def _first_gates(name: str, whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Every rank has the gates of the first heads."""
    return _cut(name, whole, ranks, 0 if "gate_" in name else rank)


def _other_context(
    self: Any, x: Tensor, context: Tensor, head_weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The memory tokens go into cut projections as they are."""
    shared = tensor.copy_to_ranks(x, self.group)
    return MultiHead.forward(self, shared, shared if context is x else context, head_weight, mask)


def _plain_memory(self: Any, state: MemoryState | None, tokens: Tensor) -> MemoryState:
    """History tokens, likewise."""
    return TemporalMemory.update(self, state, tokens)


# Tiles


def _swapped(self: halo.Exchange, rows: Tensor) -> Tensor:
    """Data from the rank before are taken for those from the one behind."""
    received = self._exchange(rows[self.shard_rows], self.send_counts, self.receive_counts)
    parts, ranks = list(torch.split(received, self.receive_counts)), len(self.send_counts)
    here = 0 if self.alone else dist.get_rank(self.group)
    before, behind = (here - 1) % ranks, (here + 1) % ranks
    if len(parts[before]) == len(parts[behind]):
        parts[before], parts[behind] = parts[behind], parts[before]
    return torch.cat(parts)[self.as_wanted]


def _not_wrapped(self: halo.ShardedTiles, x: Tensor) -> list[Tensor]:
    """The first and the last rank of the circle are no neighbours: what crosses the date line stays zero."""
    gathered = _gather(self, x)
    for batch, extents in zip(self.batches, gathered, strict=True):
        for one, value in zip(batch.tiles, extents.chunk(len(batch.tiles)), strict=True):
            breaks = torch.nonzero(one.cols.diff() != 1).flatten().tolist()
            for at in breaks[:1]:
                beyond = slice(0, at + 1) if at + 1 < len(one.cols) / 2 else slice(at + 1, None)
                value[..., beyond] = 0
    return gathered


def _halo_kept(self: halo.ShardedTiles, x: Tensor) -> list[Tensor]:
    """Halos are sent at the first evaluation and kept: later ones see their neighbours as they were."""
    gathered = _gather(self, x)
    kept = self.__dict__.setdefault("_kept", [extents.detach().clone() for extents in gathered])
    if [old.shape for old in kept] != [new.shape for new in gathered]:
        return gathered
    exchange, members = self.extents, x.shape[0]
    by_owner = [torch.full((n,), rank == self.rank) for rank, n in enumerate(exchange.receive_counts)]
    own = torch.cat(by_owner)[exchange.as_wanted]
    mixed = []
    for batch, new, old in zip(self.batches, gathered, kept, strict=True):
        rows, cols = batch.tiles[0].weight.shape
        mine = rearrange(own[batch.rows], "(t i j) -> t 1 i j", i=rows, j=cols).repeat_interleave(members, 0)
        mixed.append(torch.where(mine, new, old))
    return mixed


def _own_rows(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """Gradients of halos do not go back to their owners."""
    came = torch.split(halo._AllToAll.apply(gradient, ctx.receive, ctx.send, ctx.group), ctx.send)  # type: ignore[no-untyped-call]
    here = dist.get_rank(ctx.group)
    return torch.cat([p if rank == here else torch.zeros_like(p) for rank, p in enumerate(came)]), None, None, None


def _own_points(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """The gradient by the whole state has a rank's own points alone."""
    parts = [gradient.new_zeros(count, *gradient.shape[1:]) for count in ctx.counts]
    parts[ctx.rank] = gradient
    return torch.cat(parts), None, None, None


# Weights


def _summed(root: nn.Module, network: Storm, world: World, keep: bool = False) -> None:
    """FSDP is told not to divide by the number of ranks."""
    _shard_weights(root, network, world, keep)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def _fsdp_first(self: World) -> int:
    return self.coordinates["fsdp"] * self.mesh.ddp + self.coordinates["ddp"]


_COUNT = 'world.sum(count, "ddp", "fsdp", *(["tile"] if sharded else []))'
_SCALE = "count.to(own) / world.mesh.data"
_CUT = 'world.sum(squares[True].to(world.device), "tp")'
_REST = "parts + squares[False].to(world.device)"
_RANGE = "range(rank * count // ranks, (rank + 1) * count // ranks)"


def _edited(owner: Any, name: str, *pieces: str) -> Patch:
    return (owner, name, edit(*pieces))


PARALLEL = chapter(
    "parallel",
    ("mesh_reversed", "ranks are counted with tp outermost and ddp innermost", "PAR-1",
     _edited(Mesh, "coordinates", "in reversed(AXES)", "in AXES"),
     _edited(World, "__init__", "mesh.shape, mesh_dim_names=AXES", "mesh.shape[::-1], mesh_dim_names=AXES[::-1]")),
    ("data_rank_fsdp_first", "data ranks are numbered with fsdp before ddp", "PAR-1 PAR-2",
     (World, "data_rank", property(_fsdp_first))),
    ("tile_rank_of_world", "a rank's tiles are those of its number in the world, not of its place on the tile axis",
     "PAR-2 PAR-8",
     _edited(halo.ShardedTiles, "__init__",
             'self.rank = world.coordinates["tile"]', "self.rank = world.rank % world.mesh.tile")),
    ("share_rounded_up", "shares are chunks of ceil(n / R): the last ranks get few, or nothing", "PAR-3",
     _edited(mesh, "share", _RANGE,
             "range(min(rank * -(-count // ranks), count), min((rank + 1) * -(-count // ranks), count))")),
    ("share_rest_dropped", "shares are chunks of floor(n / R), and what remains is nobody's", "PAR-3",
     _edited(mesh, "share", _RANGE, "range(rank * (count // ranks), (rank + 1) * (count // ranks))")),
    ("heads_cut_in_silence", "heads that tp does not divide are accepted", "PAR-4",
     _edited(Mesh, "check", "config.heads % self.tp", "config.heads < self.tp")),
    ("idle_ranks_accepted", "fewer tiles than tile ranks, or fewer samples than data ranks, are accepted", "PAR-4",
     _edited(Mesh, "check", "tiles < self.tile", "tiles < 1", "samples < self.data", "samples < 1")),
    ("f_without_sum", "the gradient is not summed over tp ranks where their common input enters cut weights", "PAR-5",
     _edited(tensor._Copy, "backward", "sum_over_ranks(gradient, ctx.group)", "gradient")),
    ("g_summed_twice", "the gradient of a sum over tp ranks is summed over them again", "PAR-5",
     _edited(tensor._Sum, "backward", "copy_to_ranks(gradient, ctx.group)", "sum_over_ranks(gradient, ctx.group)")),
    ("context_without_f", "the gradient by the memory tokens is not summed over tp ranks", "PAR-5 PAR-6",
     (tensor._Heads, "forward", _other_context)),
    ("memory_without_f", "the gradient by the history tokens is not summed over tp ranks", "PAR-5 PAR-6",
     (tensor._Memory, "update", _plain_memory)),
    ("bias_before_sum", "the bias of an output projection is added on each tp rank, before the sum", "PAR-6",
     _edited(tensor._Sums, "forward", "F.linear(x, self.weight)", "F.linear(x, self.weight, self.bias)",
             "return y if self.bias is None else y + self.bias", "return y")),
    ("qkv_cut_as_one", "query, key and value are cut as one stacked matrix: ranks mix them up", "PAR-7",
     (tensor, "tensor_parallel", _packed)),
    ("gates_of_first_rank", "every tp rank gates its heads as the first rank's", "PAR-7",
     (tensor, "cut", _first_gates)),
    ("halo_of_other_neighbour", "the halo of the rank before and of the one behind are exchanged", "PAR-9",
     (halo.Exchange, "pull", _swapped)),
    ("halo_not_wrapped", "nothing is sent across the date line", "PAR-9 TILE-3",
     (halo.ShardedTiles, "gather", _not_wrapped)),
    ("halo_order_not_undone", "rows from other ranks are put where they came from, by the permutation in place of its "
     "inverse", "PAR-9",
     _edited(halo.Exchange, "__init__", "torch.argsort(order).to(world.device)", "order.to(world.device)")),
    ("halo_kept", "halos are those of the first evaluation", "PAR-9 TILE-7",
     (halo.ShardedTiles, "gather", _halo_kept)),
    ("halo_detached", "gradients of halos do not go back to their owners", "PAR-9",
     (halo._AllToAll, "backward", staticmethod(_own_rows))),
    ("results_in_tile_order", "an owner takes what it is sent for rows of its points in order", "PAR-10",
     _edited(halo.Exchange, "push", "rows[self.by_owner]", "rows")),
    ("gradient_of_own_points", "the gradient by the state is that of a rank's own points", "PAR-11",
     (halo._Scatter, "backward", staticmethod(_own_points))),
    ("loss_mean_of_ranks", "the loss is the mean of the data ranks' means, whatever their numbers of valid points",
     "PAR-12",
     _edited(shard, "scaled_loss", _COUNT, 'world.sum(count, *(["tile"] if sharded else []))',
             _SCALE, "count.to(own)")),
    ("loss_mean_of_tile_ranks", "the loss is the mean of the tile ranks' means, whatever their numbers of valid points",
     "PAR-12",
     _edited(shard, "scaled_loss", _COUNT, 'world.sum(count, "ddp", "fsdp")',
             _SCALE, "count.to(own) * world.mesh.tile / world.mesh.data")),
    ("tile_gradients_averaged", "gradients are averaged over tile ranks", "PAR-13",
     _edited(shard, "sum_tile_gradients", "total.view_as(gradient)", "total.view_as(gradient) / world.mesh.tile")),
    ("tile_gradients_not_summed", "each tile rank goes on with the gradient of its own tiles", "PAR-13",
     _edited(shard, "sum_tile_gradients", "world.mesh.tile == 1", "world.mesh.tile >= 1")),
    ("data_gradients_summed", "gradients are summed over data ranks", "PAR-13",
     (shard, "shard_weights", _summed)),
    ("ddp_replicas_apart", "gradients are averaged over fsdp, and not over ddp", "PAR-13",
     _edited(shard, "shard_weights", 'world.devices["fsdp"] if mesh.ddp == 1 else world.devices["ddp", "fsdp"]',
             'world.devices["fsdp"]')),
    ("norm_of_tp_part", "gradients are clipped by the norm of a tp rank's own part", "PAR-14",
     _edited(shard, "gradient_norm", _CUT, "squares[True].to(world.device)")),
    ("norm_of_fsdp_part", "gradients are clipped by the norm of an fsdp rank's own shard", "PAR-14",
     _edited(shard, "gradient_norm", f'world.sum({_REST}, "fsdp").sqrt()', f"({_REST}).sqrt()")),
    ("norm_replicated_twice", "weights that every tp rank has count once for each in the norm", "PAR-14",
     _edited(shard, "gradient_norm", _CUT, 'world.sum((squares[True] + squares[False]).to(world.device), "tp")',
             _REST, "parts")),
    ("member_of_rank", "the noise of a member is that of its number on the rank", "PAR-18 DA-3",
     _edited(ensemble, "draw_shared", "own = draw(mine)", "own = draw(range(len(mine)))")),
    ("members_other_order", "members are gathered along ddp before fsdp", "PAR-18",
     _edited(ensemble, "gather_members", '("fsdp", "ddp")', '("ddp", "fsdp")')),
    ("ranks_fail_alone", "a rank that cannot go on stops without telling the others", "PAR-19",
     _edited(ensemble, "draw_shared", "world.raise_together(error)",
             "if error is not None:\n        raise ValueError(error)")),
)  # fmt: skip
