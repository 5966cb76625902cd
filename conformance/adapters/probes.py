"""Probes of the reference: intermediates by name, to show the author of a port where the first difference is.

| operation | probes |
|---|---|
| compress | history [b,k,n,D], score [b,k,n,a], value [b,k,n,a,d], mixed [b,n,D] before the output projection |
| denoise | those of compress; tokens, memory [b,n,D], embedding [b,D], block.L [b,n,D] after block L, raw [b,C,H,W] |
| block | gamma [b,a], spatial and temporal [b,n,D], the outputs of the two attentions before their gates g |
| sample, assimilate | state.E and denoised.E [m,v]: what the denoiser is given and returns at evaluation E |
| guided_mean, guided_denoise | denoised, before guidance |
| tiled_denoise | evaluation.E, the state after evaluation E |
| loss, gradients | denoised [b,C,H,W] |

A port that wants to be diagnosed returns those that it is asked for as `probe.NAME`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from storm_ref import attention, denoiser, edm

__all__ = ["recorded", "take", "watch_block", "watch_denoise", "watch_network"]

_RECORDS: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("records", default=None)


@contextmanager
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    """Collect what `take` records in the yielded dict."""
    records: dict[str, list[Tensor]] = {}
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def take(name: str, value: Tensor) -> None:
    """Record a value inside `recorded()`; outside it, do nothing."""
    records = _RECORDS.get()
    if records is not None:
        records.setdefault(name, []).append(value.detach().clone())


def _after(module: nn.Module, name: str) -> None:
    def hook(_: nn.Module, __: Any, out: Tensor) -> None:
        take(name, out)

    module.register_forward_hook(hook)


def _before(module: nn.Module, name: str) -> None:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        take(name, inputs[0])

    module.register_forward_pre_hook(hook)


def watch_network(network: denoiser.Storm) -> denoiser.Storm:
    """Record the intermediates of compression and denoising."""
    if _RECORDS.get() is None:
        return network
    memory = network.memory
    _before(memory.key, "history")
    _before(memory.out, "mixed")
    _after(memory.out, "memory")

    def score(_: nn.Module, __: Any, key: Tensor) -> None:
        split = rearrange(key, "b k n (a d) -> b k n a d", a=memory.heads)
        take("score", torch.einsum("bknad,ad->bkna", split, memory.query) / split.shape[-1] ** 0.5)

    def value(_: nn.Module, __: Any, out: Tensor) -> None:
        take("value", rearrange(out, "b k n (a d) -> b k n a d", a=memory.heads))

    memory.key.register_forward_hook(score)
    memory.value.register_forward_hook(value)
    _before(network.blocks[0], "tokens")
    for at, block in enumerate(network.blocks):
        _after(block, f"block.{at}")
    _after(network.embed_noise, "embedding")
    _after(network, "raw")
    return network


def watch_block(block: attention.Block) -> attention.Block:
    """Record the outputs of a block's two attentions."""
    if _RECORDS.get() is not None:
        _after(block.spatial, "spatial")
        _after(block.temporal, "temporal")
    return block


def watch_denoise(denoise: edm.Denoise, state: str = "", denoised: str = "") -> edm.Denoise:
    """Record the states before and after every evaluation, numbered from 0 where the given name ends in a dot."""
    if _RECORDS.get() is None:
        return denoise
    count = 0

    def number(name: str) -> str:
        return f"{name}{count}" if name.endswith(".") else name

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal count
        result = denoise(x, sigma)
        if state:
            take(number(state), x)
        if denoised:
            take(number(denoised), result)
        count += 1
        return result

    return watched
