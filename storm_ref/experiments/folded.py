"""The compressed memory without its tokens: the numbers of chapter 2's equations for a fraction of the work.

A history token is affine in what it is made of ([TOK-5]): with f_kn the values of a patch, r_n its place and a_k the
features of the frame's age, h_kn = E f_kn + P(r_n) + G a_k + b. Scores and values are linear in h, so that

    s_kna = q_a . (W_k h_kn)_a / sqrt(d) = u_a . (E f_kn + G a_k) + (a part that all frames of a place share)
    u_a   = (W_k^T)_a q_a / sqrt(d)

and the softmax over k loses the shared part. With w_kna the weights of [MEM-2],

    m_n   = W_o concat_a( (W_v)_a [E sum_k w f_kn + G sum_k w a_k + P(r_n) + b] + b_v,a ) + b_o

What streams is one weighted mean of values and of age features for each head and place, by the online softmax of
[MEM-3]: 2 A (V + J) multiply-adds a token instead of D (V + 2 D + 2), with V values a patch and 2 J age features. No
token is ever made.

The result equals `Storm.compress` to rounding. It relies on history tokens being affine, which is our interpretation of
the paper: a network with a nonlinear embedding of its past has no such form.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Storm
from storm_ref.tokenisation import age_features, fourier_features

__all__ = ["FoldedMemory", "FoldedState"]


@dataclass(frozen=True)
class FoldedState:
    """The running maximum and denominator [b, a, n], and weighted sums of values [b, a, v, n] and ages [b, a, j, n]."""

    maximum: Tensor
    denominator: Tensor
    values: Tensor
    ages: Tensor


class FoldedMemory:
    """A network's compression of history, folded, in the network's dtype or float32 where that is shorter.

    It takes `block` places at a time, so that a chunk of frames stays in the processor's cache. Raises ValueError for a
    block of no place.
    """

    def __init__(self, network: Storm, position: Float[Tensor, "rows cols p"], block: int = 4096) -> None:
        if block < 1:
            raise ValueError(f"a block is at least one place, got {block}")
        memory = network.memory
        c = network.config
        self.config = c
        self.rows = position.shape[0]
        self.block = block
        self.dtype = torch.promote_types(memory.value.weight.dtype, torch.float32)
        embed = network.embed_history.weight.double()
        age = network.embed_age.weight.double()
        key = rearrange(memory.key.weight.double(), "(a d) w -> a d w", a=c.heads)
        value = rearrange(memory.value.weight.double(), "(a d) w -> a d w", a=c.heads)
        query_key = torch.einsum("ad,adw->aw", memory.query.double(), key) / (c.width // c.heads) ** 0.5  # u_a
        self.score_values = self._detached(query_key @ embed)
        self.score_ages = self._detached(query_key @ age)
        self.values = self._detached(value @ embed)
        self.ages = self._detached(value @ age)
        code = fourier_features(position.double(), c.position_octaves).flatten(0, 1)
        shared = code @ network.embed_position.weight.double().T + network.embed_history.bias.double()
        mixed = shared @ memory.value.weight.double().T + memory.value.bias.double()
        self.shared = self._detached(rearrange(mixed, "n (a d) -> n a d", a=c.heads))
        self.out = memory.out

    def _detached(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def start(self, batch: int = 1) -> FoldedState:
        """The state before any frame."""
        heads = self.config.heads
        places = len(self.shared)
        zeros = torch.zeros(batch, heads, places, dtype=self.dtype)
        return FoldedState(
            maximum=torch.full_like(zeros, -torch.inf),
            denominator=zeros,
            values=zeros.new_zeros(batch, heads, self.score_values.shape[1], places),
            ages=zeros.new_zeros(batch, heads, self.score_ages.shape[1], places),
        )

    @torch.no_grad()
    def update(
        self,
        state: FoldedState,
        past: Float[Tensor, "b k c h w"],
        static: Float[Tensor, "b k s h w"],
        age: Float[Tensor, "b k"],
    ) -> FoldedState:
        """Stream a chunk of k frames into the state, as `Storm.compress_chunk` does; `age` in hours.

        The state's tensors are changed in place, since they are most of what moves. Raises ValueError for ages that are
        not in the past, and torch's RuntimeError for shapes that do not fit.
        """
        if past.shape[1] == 0:
            return state
        p, q = self.config.patch
        fields = torch.cat([past, static], 2).to(self.dtype)
        fields = rearrange(fields, "b k c (i p) (j q) -> b k (c p q) (i j)", p=p, q=q)
        code = age_features(age.double(), self.config.position_octaves).to(self.dtype)
        bias = (code @ self.score_ages.T)[..., None]  # b k a 1
        for at in range(0, fields.shape[-1], self.block):
            part = slice(at, at + self.block)
            self._take(state, part, fields[..., part].contiguous(), bias, code)
        return state

    def _take(self, state: FoldedState, part: slice, fields: Tensor, bias: Tensor, code: Tensor) -> None:
        """Stream some frames into the places `part`, [MEM-3]."""
        score = self.score_values @ fields + bias  # b k a n
        before = state.maximum[..., part]
        maximum = torch.maximum(before, score.amax(1))
        keep = torch.exp(before - maximum)
        weight = score.sub_(maximum[:, None]).exp_()
        state.maximum[..., part] = maximum
        state.denominator[..., part] = state.denominator[..., part] * keep + weight.sum(1)
        values = state.values[..., part]
        ages = state.ages[..., part]
        values *= keep[:, :, None]
        ages *= keep[:, :, None]
        for head in range(weight.shape[2]):  # sums over frames: elementwise products are their fastest form here
            values[:, head] += (weight[:, :, head, None] * fields).sum(1)
        ages += code.transpose(1, 2)[:, None] @ weight.transpose(1, 2)  # b a j n

    @torch.no_grad()
    def finish(self, state: FoldedState) -> Float[Tensor, "b rows cols d"]:
        """The memory tokens as `Storm.compress` returns them. Raises ValueError when no frame was taken."""
        if bool((state.denominator == 0).any()):
            raise ValueError("the memory has seen no frame; give at least one past frame")
        share = 1 / state.denominator[:, :, None]
        mixed = torch.einsum("adv,bavn->bnad", self.values, state.values * share) + self.shared
        mixed += torch.einsum("adj,bajn->bnad", self.ages, state.ages * share)
        tokens: Tensor = self.out(rearrange(mixed, "b n a d -> b n (a d)").to(self.out.weight.dtype))
        return rearrange(tokens, "b (i j) d -> b i j d", i=self.rows)
