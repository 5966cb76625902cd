"""[ATT-1] to [ATT-7]: the fused kernel against the definition, the weights of a block, and the baselines."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import EPS, assert_close, generic, normal
from torch import Tensor

from storm_ref.attention import (
    Block,
    DividedBlock,
    MultiHead,
    SpaceTimeBlock,
    attention,
    attention_by_definition,
    layer_norm,
    window_mask,
)

small = st.integers(1, 6)


@given(small, small, small, st.booleans(), st.sampled_from([0.0, 1.0, 20.0]))
def test_attention_equals_its_definition(queries: int, keys: int, width: int, masked: bool, stretch: float) -> None:
    """[ATT-1] [ATT-6]"""
    q = stretch * normal(2, 2, queries, width, seed=1)
    k = normal(2, 2, keys, width, seed=2)
    v = normal(2, 2, keys, width, seed=3)
    mask = None
    if masked:
        mask = normal(queries, keys, seed=4) > 0
        mask[:, 0] = True
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() / width**0.5  # bound of a score
    # A score s carries (d + 2) |s| eps, which exp makes relative, twice (numerator and denominator); then sums of keys.
    roundings = 2 * (2 * (width + 2) * largest + 2 * keys + 4)
    want = attention_by_definition(q, k, v, mask)
    assert_close(attention(q, k, v, mask), want, roundings * EPS * v.abs().max().item(), "attention")


def test_attention_finite_at_extreme_scores() -> None:
    """[ATT-1] scores of 1e4: the largest takes all, in both forms."""
    q = torch.full((1, 1, 1, 1), 1e4)
    k = torch.tensor([-1.0, 1.0, 0.5]).reshape(1, 1, 3, 1)
    v = torch.tensor([5.0, 7.0, 9.0]).reshape(1, 1, 3, 1)
    assert attention(q, k, v).item() == attention_by_definition(q, k, v).item() == 7


def test_window_mask_wide_is_all() -> None:
    """[ATT-6] a window as wide as the grid is no window, bit for bit in the definition."""
    q, k, v = (normal(1, 1, 12, 3, seed=seed) for seed in range(3))
    mask = window_mask(3, 4, 3, False)
    assert torch.equal(attention_by_definition(q, k, v, mask), attention_by_definition(q, k, v))


def test_block_weights() -> None:
    """[ATT-5] [ATT-7] 25 D^2 by default, in their parts, besides biases and the gate; keys have no bias."""
    for width, heads in ((16, 4), (24, 3)):
        block = Block(width, heads)
        count = {name: sum(p.numel() for p in part.parameters() if p.ndim > 1) for name, part in block.named_children()}
        want = {"adaptive": 9, "spatial": 4, "temporal": 4, "mlp": 8}
        assert count == {name: k * width**2 for name, k in want.items()}
        vectors = sum(p.numel() for p in block.parameters() if p.ndim == 1)
        assert vectors == (9 + 3 + 3 + 5) * width + 2 * heads, "biases of all projections but the keys, and the gate"
    assert MultiHead(8, 2).key.bias is None


# Baselines, from their own layers, one location and one frame at a time


def block_limit(want: Tensor) -> float:
    """A block of width 12: two attentions and an MLP of ratio 4, each rounding by its sums of up to 48 terms."""
    return 2 * (2 * 60 + 96) * EPS * want.abs().max().item()


def test_space_time_block_is_attention_over_all_tokens_of_all_frames() -> None:
    block, x = generic(SpaceTimeBlock(12, 3)), normal(2, 3, 4, 12)
    want = []
    for sample in x:
        tokens = torch.cat(list(sample))[None]
        normed = layer_norm(tokens)
        tokens = tokens + block.joint(normed, normed)
        tokens = tokens + block.mlp(layer_norm(tokens))
        want.append(torch.stack(tokens[0].split(4)))
    assert_close(block(x), torch.stack(want), block_limit(x), "space-time block")


def test_divided_block_is_attention_over_frames_then_over_locations() -> None:
    block, x = generic(DividedBlock(12, 3)), normal(2, 3, 4, 12)
    want = x.clone()
    for location in range(4):
        normed = layer_norm(x[:, :, location])
        want[:, :, location] += block.time_out(block.time(normed, normed))
    for frame in range(3):
        normed = layer_norm(want[:, frame])
        want[:, frame] = want[:, frame] + block.space(normed, normed)
    want = want + block.mlp(layer_norm(want))
    assert_close(block(x), want, block_limit(x), "divided block")
