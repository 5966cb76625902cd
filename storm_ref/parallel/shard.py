"""Sharded weights (HSDP), gradients that agree with the serial run, and mesh-independent checkpoints.

For N valid points in the whole batch and domain, weighted squared errors e_i of points i ([EDM-3]), and M data ranks:

[PAR-12] the loss of a data rank is (M / N) sum of e_i over its own samples; the mean over data ranks is the serial
         loss. N counts the whole batch: a mean of means would weigh points by the ranks that they happen to be on
[PAR-13] gradients are averaged over ddp and fsdp, summed over tile (each tile rank has those of its own tiles), and
         left alone over tp, where the gradients of replicated weights are equal on all ranks
[PAR-14] gradients are clipped by the norm of the whole gradient: squares are summed over fsdp shards and over tp parts,
         and replicated weights count once
[PAR-15] a weight, its gradient and its moments are sharded alike, so that an optimiser's elementwise step has the
         serial bits given the serial gradients
[PAR-16] fsdp: every block and the root are units of their own, gathered before use and freed after it
[PAR-17] a checkpoint holds whole tensors under the serial names; any mesh, and a serial program, can write and read it

References: Zhao et al. (2023), FSDP; Rajbhandari et al. (2020), ZeRO.
"""

from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from storm_ref.denoiser import Storm
from storm_ref.parallel.mesh import World
from storm_ref.parallel.tensor import cut, cut_dim, join

__all__ = [
    "clip_gradients",
    "free_gathered",
    "gather_whole",
    "gradient_norm",
    "local",
    "place_whole",
    "recompute",
    "scaled_loss",
    "shard_weights",
    "sum_tile_gradients",
    "whole_loss",
]


def recompute(network: Storm) -> Storm:
    """Activation checkpointing, in place: a block keeps only its inputs and runs again in the backward pass."""
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return network


def shard_weights(root: nn.Module, network: Storm, world: World, keep: bool = False) -> None:
    """Shard the weights over fsdp and replicate them over ddp, in place, [PAR-16]; one data rank leaves them unchanged.

    root: the module whose forward runs all of one step, `network` itself or one that contains it. keep: weights stay
    gathered after their first use, which inference with gradients with respect to the state needs.
    """
    mesh = world.mesh
    if mesh.data == 1:
        return
    devices = world.devices["fsdp"] if mesh.ddp == 1 else world.devices["ddp", "fsdp"]
    for block in network.blocks:
        fully_shard(block, mesh=devices, reshard_after_forward=not keep)
    fully_shard(root, mesh=devices, reshard_after_forward=False)
    if keep:
        root.set_reshard_after_backward(False)  # type: ignore[operator]


def free_gathered(root: nn.Module) -> None:
    """Free gathered weights.

    A forward pass without a backward pass leaves the root's weights gathered; call this before they are changed.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a weight, a gradient or a moment."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scaled_loss(
    squares: Float[Tensor, "*s"], valid: Tensor | None, world: World, sharded: bool = True
) -> Float[Tensor, ""]:
    """This rank's part of the mean of weighted squared errors, times the number of data ranks, [PAR-12].

    squares, valid: the errors of the rank's own samples and where they count. `sharded` says that they are those of the
    rank's own points; else they are replicated over tile. Raises ValueError, on every rank, when no point is valid
    anywhere.
    """
    own = squares.sum() if valid is None else squares[valid].sum()
    count = torch.tensor(squares.numel() if valid is None else int(valid.sum()), device=squares.device)
    count = world.sum(count, "ddp", "fsdp", *(["tile"] if sharded else []))
    if int(count) == 0:
        raise ValueError("no point is valid: a loss over nothing is not zero; leave the sample out")
    return own / (count.to(own) / world.mesh.data)


def whole_loss(loss: Float[Tensor, ""], world: World, sharded: bool = True) -> float:
    """The serial run's loss from the `scaled_loss` of every rank, replicated on all of them."""
    total = world.sum(loss.detach().double(), "ddp", "fsdp", *(["tile"] if sharded else []))
    return float(total) / world.mesh.data


def sum_tile_gradients(network: nn.Module, world: World) -> None:
    """Sum the gradients over tile ranks in one message, [PAR-13]; a weight without a gradient gets a zero one.

    fully_shard has already averaged them over ddp and fsdp when backward returns.
    """
    if world.mesh.tile == 1:
        return
    for weight in network.parameters():
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [local(weight.grad) for weight in network.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=world.group("tile"))
    totals = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total.view_as(gradient))


def gradient_norm(network: nn.Module, world: World) -> Float[Tensor, ""]:
    """The 2-norm of the whole gradient in float64, replicated on all ranks, [PAR-14]."""
    squares = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
    for name, weight in network.named_parameters():
        if weight.grad is not None:
            squares[cut_dim(name) is not None] += local(weight.grad).double().square().sum().cpu()
    parts = world.sum(squares[True].to(world.device), "tp")
    return world.sum(parts + squares[False].to(world.device), "fsdp").sqrt()


def clip_gradients(network: nn.Module, most: float, world: World) -> Float[Tensor, ""]:
    """Scale the gradient so that its norm is at most `most`, as torch.nn.utils.clip_grad_norm_; returns the norm."""
    norm = gradient_norm(network, world)
    if world.mesh.size == 1:  # torch's own, so that a mesh of one has the bits of a serial program
        torch.nn.utils.clip_grad_norm_(network.parameters(), most)
        return norm
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for weight in network.parameters():
        if weight.grad is not None:
            local(weight.grad).mul_(factor.to(weight.grad.dtype))
    return norm


def gather_whole(name: str, part: Tensor, world: World) -> Tensor:
    """The whole of a weight, or of a tensor sharded like it, on every rank, [PAR-17]. All ranks call this together."""
    with torch.no_grad():
        own = (part.full_tensor() if isinstance(part, DTensor) else part.detach()).clone()  # never the weight itself
        if world.mesh.tp == 1 or cut_dim(name) is None:
            return own
        parts = [torch.empty_like(own) for _ in range(world.mesh.tp)]
        dist.all_gather(parts, own.contiguous(), group=world.group("tp"))
        return join(name, parts)


@torch.no_grad()
def place_whole(name: str, whole: Tensor, part: Tensor, world: World) -> None:
    """Fill this rank's `part` of a weight, or of something cut like it, from the whole, [PAR-17].

    Raises ValueError when the whole has another shape than the network's weight.
    """
    own = cut(name, whole, world.mesh.tp, world.coordinates["tp"])
    if own.shape != part.shape:
        raise ValueError(f"{name} has shape {tuple(own.shape)} on a rank, and {tuple(part.shape)} in the network")
    if isinstance(part, DTensor):
        rows = -(-len(own) // world.mesh.fsdp)
        own = own[rows * world.coordinates["fsdp"] : rows * (world.coordinates["fsdp"] + 1)]
    local(part).copy_(own)
