"""Tensor parallelism: the heads and the MLP's hidden units of every layer are partitioned over ranks.

With P ranks on the tp axis, X replicated on all of them, and W_r the part of a weight on rank r:

[PAR-5] f: X -> X, whose gradient is summed over the ranks;  g: X_r -> sum_r X_r, whose gradient is passed on unchanged
[PAR-6] heads       y = g( W_o,r [weight_r * A_r(f(x), f(context))] ) + b_o    rank r has heads r A/P .. (r + 1) A/P - 1
        MLP         y = g( W_2,r gelu(W_1,r f(x) + b_1,r) ) + b_2              and hidden units r H/P .. (r + 1) H/P - 1
        memory      [MEM-1] and [MEM-2] with the rank's heads, one f for each chunk, one g at the end
        the biases b_o and b_2 are added once, after the sum
[PAR-7] query, key and value projections are sharded by output rows, each separately and by whole heads; output
        projections by input columns; the gates' alpha and beta by heads; all other weights are replicated, and their
        gradients are equal on all ranks

Source: Shoeybi et al. (2019), Megatron-LM. The functional all-reduce of `torch` is not g: it sums its gradient again.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from storm_ref.attention import Block, MultiHead
from storm_ref.denoiser import Storm
from storm_ref.memory import MemoryState, TemporalMemory
from storm_ref.parallel.mesh import World

__all__ = ["copy_to_ranks", "cut", "cut_dim", "join", "sum_over_ranks", "tensor_parallel"]


class _Copy(torch.autograd.Function):
    """The operator f of [PAR-5]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """The operator g of [PAR-5]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return copy_to_ranks(gradient, ctx.group), None


def copy_to_ranks(x: Float[Tensor, "*s"], group: dist.ProcessGroup) -> Float[Tensor, "*s"]:
    """The operator f of [PAR-5], applied where a replicated tensor enters sharded weights."""
    return _Copy.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def sum_over_ranks(x: Float[Tensor, "*s"], group: dist.ProcessGroup) -> Float[Tensor, "*s"]:
    """The operator g of [PAR-5]: the sum over the ranks, replicated with equal bits on all of them."""
    return _Sum.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


class _Sums(nn.Linear):
    """A linear map whose input columns are sharded: g(W_r x_r) + b, [PAR-6]."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        y = sum_over_ranks(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class _Heads(MultiHead):
    """Attention with the heads of one rank."""

    group: dist.ProcessGroup

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        context: Float[Tensor, "b m w"],
        head_weight: Float[Tensor, "b a"] | None = None,
        mask: Bool[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Attends as MultiHead does; `head_weight` has this rank's heads, and self-attention applies f once."""
        shared = copy_to_ranks(x, self.group)
        other = shared if context is x else copy_to_ranks(context, self.group)
        return super().forward(shared, other, head_weight, mask)


class _Memory(TemporalMemory):
    """The memory with the heads of one rank."""

    group: dist.ProcessGroup

    def update(self, state: MemoryState | None, tokens: Float[Tensor, "b k n w"]) -> MemoryState:
        return super().update(state, copy_to_ranks(tokens, self.group))


class _Hidden(nn.Sequential):
    """The MLP with the hidden units of one rank."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copy_to_ranks(x, self.group))  # type: ignore[no-any-return, no-untyped-call]


def cut_dim(name: str) -> int | None:
    """The dim along which the weight of that name is sharded over tp, or None for a replicated one, [PAR-7]."""
    *above, module, leaf = ["", "", *name.split(".")]
    if leaf in ("gate_alpha", "gate_beta") or (module, leaf) == ("memory", "query"):
        return 0
    if above[-1] in ("spatial", "temporal", "memory"):
        if module == "out":
            return 1 if leaf == "weight" else None
        return 0
    if above[-1] == "mlp":
        return 0 if module == "0" else 1 if leaf == "weight" else None
    return None


def cut(name: str, whole: Tensor, ranks: int, rank: int) -> Tensor:
    """The part of a weight on one rank, or of a tensor sharded like it: its gradient, or an optimiser's moments."""
    dim = cut_dim(name)
    return whole if dim is None else whole.chunk(ranks, dim)[rank]


def join(name: str, parts: list[Tensor]) -> Tensor:
    """The whole weight from the parts of all ranks, the inverse of `cut`."""
    dim = cut_dim(name)
    return parts[0] if dim is None else torch.cat(parts, dim)


def tensor_parallel(network: Storm, world: World) -> Storm:
    """The network with this rank's part of the weights, changed in place; its state_dict keeps its names.

    Raises ValueError when tp does not divide the heads, [PAR-4].
    """
    world.mesh.check(network.config)
    ranks, rank = world.mesh.tp, world.coordinates["tp"]
    if ranks == 1:
        return network
    group = world.group("tp")
    for name, weight in list(network.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        part = nn.Parameter(cut(name, weight.detach(), ranks, rank).clone(), weight.requires_grad)
        setattr(network.get_submodule(owner), leaf, part)
    for module in network.modules():
        if isinstance(module, Block):
            _become(module.mlp, _Hidden, group)
            _become(module.mlp[2], _Sums, group)
        elif isinstance(module, MultiHead | TemporalMemory):
            module.heads //= ranks
            _become(module, _Heads if isinstance(module, MultiHead) else _Memory, group)
            _become(module.out, _Sums, group)
    return network


def _become(module: Any, kind: type, group: dist.ProcessGroup) -> None:
    """Turn a module into one of class `kind` over the ranks of `group`; its weights stay."""
    module.__class__ = kind
    module.group = group
