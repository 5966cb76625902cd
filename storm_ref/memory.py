"""Compressed temporal memory: K past frames become one memory token per location, in storage independent of K.

For location n, head a and frame k with history token h_kn:

[MEM-1] s_kna = q_a . (W_k h_kn)_a / sqrt(d)          q_a a learned query, d = D/A
[MEM-2] m_n   = W_o concat_a( sum_k softmax_k(s_kna) (W_v h_kn + b_v)_a ) + b_o
[MEM-3] online softmax, one chunk of frames after another: with running maximum M, denominator Z and accumulator Y,
        M' = max(M, max_k s_k),  Z' = Z e^(M-M') + sum_k e^(s_k-M'),  Y' = Y e^(M-M') + sum_k e^(s_k-M') v_k;
        and Y / Z after the last chunk
[MEM-4] any split of the frames into chunks, and any order of the frames, gives the same tokens to rounding
[MEM-5] for K = 1 the memory is the plain projection W_o (W_v h + b_v) + b_o
[MEM-6] scores of +-1e4 neither overflow nor give NaN
[MEM-7] a memory of no frame is refused, because 0 / 0 is not a state of the atmosphere

References: Milakov & Gimelshein (2018), online normaliser for softmax. The paper says that STORM compresses history
into a "global temporal representation"; this form of it is our interpretation.
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


def memory_start(
    dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device | None = None
) -> MemoryState:
    """Return the state before any frame, M = -inf, Z = 0 and Y = 0, [MEM-3].

    shape is (b, n, a, d): batch, locations, heads and features per head. dtype is that of the values to come; the state
    is kept in it or in float32, whichever is wider, because sums in bfloat16 stop growing at 256 equal frames.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    return MemoryState(
        maximum=torch.full(shape[:3], -torch.inf, dtype=dtype, device=device),
        denominator=torch.zeros(shape[:3], dtype=dtype, device=device),
        accumulator=torch.zeros(shape, dtype=dtype, device=device),
    )


def memory_update(
    state: MemoryState, score: Float[Tensor, "b k n a"], value: Float[Tensor, "b k n a d"]
) -> MemoryState:
    """Add a chunk of k frames to the state, [MEM-3]; an empty chunk changes nothing."""
    if score.shape[1] == 0:
        return state
    score = score.to(state.maximum.dtype)
    value = value.to(state.maximum.dtype)
    maximum = torch.maximum(state.maximum, score.amax(1))
    keep = torch.exp(state.maximum - maximum)
    weight = torch.exp(score - maximum[:, None])
    return MemoryState(
        maximum=maximum,
        denominator=state.denominator * keep + weight.sum(1),
        accumulator=state.accumulator * keep[..., None] + torch.einsum("bkna,bknad->bnad", weight, value),
    )


def memory_finish(state: MemoryState) -> Float[Tensor, "b n a d"]:
    """Return Y / Z, the weighted mean of the values over all frames, [MEM-3].

    Raises ValueError when the state has seen no frame, [MEM-7].
    """
    if bool((state.denominator == 0).any()):
        raise ValueError("the memory has seen no frame; give at least one past frame")
    return state.accumulator / state.denominator[..., None]


def memory_by_definition(
    score: Float[Tensor, "b k n a"], value: Float[Tensor, "b k n a d"]
) -> Float[Tensor, "b n a d"]:
    """Return the weighted mean of the values by one softmax over all frames: the streaming form must equal it."""
    return torch.einsum("bkna,bknad->bnad", torch.softmax(score, 1), value)


class TemporalMemory(nn.Module):
    """Weights of the compression: learned queries and the key (no bias), value and output projections.

    One learned query per head serves all locations, [MEM-1].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, width // heads))
        self.key = nn.Linear(width, width, bias=False)  # a bias would shift all scores alike, without effect
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def scores_and_values(
        self, tokens: Float[Tensor, "b k n w"]
    ) -> tuple[Float[Tensor, "b k n a"], Float[Tensor, "b k n a d"]]:
        """Return the scores of [MEM-1] and the values of [MEM-2] for a chunk of history tokens."""
        key = rearrange(self.key(tokens), "b k n (a d) -> b k n a d", a=self.heads)
        value = rearrange(self.value(tokens), "b k n (a d) -> b k n a d", a=self.heads)
        return torch.einsum("bknad,ad->bkna", key, self.query) / key.shape[-1] ** 0.5, value

    def update(self, state: MemoryState | None, tokens: Float[Tensor, "b k n w"]) -> MemoryState:
        """Add a chunk of history tokens to the state; the state before the first chunk is None."""
        score, value = self.scores_and_values(tokens)
        if state is None:
            batch, _, locations, heads, features = value.shape
            state = memory_start(value.dtype, (batch, locations, heads, features), value.device)
        return memory_update(state, score, value)

    def finish(self, state: MemoryState) -> Float[Tensor, "b n w"]:
        """Return one memory token per location, [MEM-2]. Raises ValueError when the state has seen no frame."""
        mixed = memory_finish(state).to(self.out.weight.dtype)
        return self.out(rearrange(mixed, "b n a d -> b n (a d)"))  # type: ignore[no-any-return]

    def forward(self, tokens: Float[Tensor, "b k n w"]) -> Float[Tensor, "b n w"]:
        """Compress all frames as one chunk."""
        return self.finish(self.update(None, tokens))
