"""Compressed temporal memory: K past frames become one memory token a location, in an amount of memory free of K.

For location n, head a and frame k with history token h_kn:

[MEM-1] s_kna = q_a . (W_k h_kn)_a / sqrt(d)          q_a a learned query, d = D/A
[MEM-2] m_n   = W_o concat_a( sum_k softmax_k(s_kna) (W_v h_kn + b_v)_a ) + b_o
[MEM-3] online softmax, frame chunk after frame chunk: with running maximum M, denominator Z and accumulator Y,
        M' = max(M, max_k s_k),  Z' = Z e^(M-M') + sum_k e^(s_k-M'),  Y' = Y e^(M-M') + sum_k e^(s_k-M') v_k;
        after the last chunk Y / Z
[MEM-4] any split of the frames into chunks, and any order, gives the same tokens to rounding.
[MEM-5] K = 1 is the plain projection W_o (W_v h + b_v) + b_o.
[MEM-6] scores of +-1e4 neither overflow nor give NaN.

References: Milakov & Gimelshein (2018), online normaliser for softmax. That STORM compresses history into a "global
temporal representation" is the paper's; this form of it is our interpretation.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MemoryState", "TemporalMemory", "memory_by_definition", "memory_finish", "memory_start", "memory_update"]


@dataclass(frozen=True)
class MemoryState:
    """Running maximum [b, n, a], denominator [b, n, a] and accumulator [b, n, a, d] of the online softmax."""

    maximum: Tensor
    denominator: Tensor
    accumulator: Tensor


def memory_start(like: Float[Tensor, "b k n a d"]) -> MemoryState:
    """The state before any frame: M = -inf, Z = 0, Y = 0, in float32 or better: bfloat16's sums stop at 256 frames."""
    b, _, n, a, d = like.shape
    like = like[:, :0].to(torch.promote_types(like.dtype, torch.float32))
    return MemoryState(like.new_full((b, n, a), -torch.inf), like.new_zeros(b, n, a), like.new_zeros(b, n, a, d))


def memory_update(
    state: MemoryState, score: Float[Tensor, "b k n a"], value: Float[Tensor, "b k n a d"]
) -> MemoryState:
    """Take a chunk of k frames into the state, [MEM-3]; an empty chunk changes nothing."""
    if score.shape[1] == 0:
        return state
    score, value = score.to(state.maximum.dtype), value.to(state.maximum.dtype)
    maximum = torch.maximum(state.maximum, score.amax(1))
    keep = torch.exp(state.maximum - maximum)
    weight = torch.exp(score - maximum[:, None])
    return MemoryState(
        maximum,
        state.denominator * keep + weight.sum(1),
        state.accumulator * keep[..., None] + torch.einsum("bkna,bknad->bnad", weight, value),
    )


def memory_finish(state: MemoryState) -> Float[Tensor, "b n a d"]:
    """Y / Z. Raises ValueError when no frame was taken."""
    if bool((state.denominator == 0).any()):
        raise ValueError("the memory has seen no frame; give at least one past frame")
    return state.accumulator / state.denominator[..., None]


def memory_by_definition(
    score: Float[Tensor, "b k n a"], value: Float[Tensor, "b k n a d"]
) -> Float[Tensor, "b n a d"]:
    """The same by one softmax over all frames at once: what the streaming form must equal."""
    return torch.einsum("bkna,bknad->bnad", torch.softmax(score, 1), value)


class TemporalMemory(nn.Module):
    """Weights of the compression: learned queries, key (no bias), value and output projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, width // heads))
        self.key = nn.Linear(width, width, bias=False)  # a key bias shifts all scores alike: no effect, no gradient
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def scores_and_values(
        self, tokens: Float[Tensor, "b k n w"]
    ) -> tuple[Float[Tensor, "b k n a"], Float[Tensor, "b k n a d"]]:
        """[MEM-1] and the values of [MEM-2] for a chunk of history tokens."""
        key = rearrange(self.key(tokens), "b k n (a d) -> b k n a d", a=self.heads)
        value = rearrange(self.value(tokens), "b k n (a d) -> b k n a d", a=self.heads)
        return torch.einsum("bknad,ad->bkna", key, self.query) / key.shape[-1] ** 0.5, value

    def update(self, state: MemoryState | None, tokens: Float[Tensor, "b k n w"]) -> MemoryState:
        """Stream a chunk of history tokens into the state (None: the first chunk)."""
        score, value = self.scores_and_values(tokens)
        return memory_update(memory_start(value) if state is None else state, score, value)

    def finish(self, state: MemoryState) -> Float[Tensor, "b n w"]:
        """One memory token a location, [MEM-2]."""
        mixed = memory_finish(state).to(self.out.weight.dtype)
        return self.out(rearrange(mixed, "b n a d -> b n (a d)"))  # type: ignore[no-any-return]

    def forward(self, tokens: Float[Tensor, "b k n w"]) -> Float[Tensor, "b n w"]:
        """All frames in one chunk."""
        return self.finish(self.update(None, tokens))
