"""[ATT-1] to [ATT-7]: values against loops, the gate's laws, windows, and the baselines."""

import checks_network as checks
import pytest
import torch
from checks_network import generic, normal
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.attention import Block, attention, attention_by_definition, layer_norm, noise_gate, window_mask

small = st.integers(1, 6)


@given(small, small, small, st.booleans(), st.sampled_from([0.0, 1.0, 20.0]))
def test_attention_value(n: int, m: int, d: int, masked: bool, stretch: float) -> None:
    """[ATT-1] the fused kernel and the reference form."""
    checks.check_attention(n, m, d, masked, stretch)


def test_attention_finite_at_extreme_scores() -> None:
    """[ATT-1] scores of 1e4: the largest takes all, in both forms."""
    q, k = torch.full((1, 1, 1, 1), 1e4), torch.tensor([-1.0, 1.0, 0.5]).reshape(1, 1, 3, 1)
    v = torch.tensor([5.0, 7.0, 9.0]).reshape(1, 1, 3, 1)
    assert attention(q, k, v).item() == attention_by_definition(q, k, v).item() == 7


@given(st.permutations(range(6)))
def test_attention_order_of_keys(order: list[int]) -> None:
    """[ATT-1] keys have no order of their own."""
    q, k, v = normal(1, 2, 4, 3), normal(1, 2, 6, 3, seed=1), normal(1, 2, 6, 3, seed=2)
    got = attention(q, k[:, :, order], v[:, :, order])
    # Reordered sums of 6 terms, and of 3 in scores of at most 16.
    checks.close(got, attention(q, k, v), 2 * 3 * 16 + 2 * 6, "keys in another order", float(v.abs().max()))


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_multihead_value(heads: int) -> None:
    """[ATT-1] [ATT-3]"""
    checks.check_multihead(heads)


@pytest.mark.parametrize("spread", [1e-4, 1e-3, 1.0, 100.0])
def test_layer_norm_value(spread: float) -> None:
    """[ATT-2]"""
    checks.check_layer_norm(spread)


def test_layer_norm_constant_token() -> None:
    """[ATT-2] a constant token is zero, not NaN."""
    assert not layer_norm(torch.full((2, 3, 8), 0.5)).any()


def test_modulate_value() -> None:
    """[ATT-2]"""
    checks.check_modulate()


@pytest.mark.parametrize("window", [None, 0, 1])
def test_block_value(window: int | None) -> None:
    """[ATT-2] [ATT-3] [ATT-6]"""
    checks.check_block(window)


@pytest.mark.parametrize("spread", [1e-2, 1e-3])
def test_block_near_constant_tokens(spread: float) -> None:
    """[ATT-2] [ATT-3]"""
    checks.check_block(spread=spread)


# The gate

level = st.floats(1e-6, 1e6)
steepness, offset = st.floats(-30, 30), st.floats(-5, 5)


@given(st.lists(level, min_size=1, max_size=4), st.lists(st.tuples(steepness, offset), min_size=1, max_size=3))
def test_noise_gate_value(sigma: list[float], heads: list[tuple[float, float]]) -> None:
    """[ATT-4]"""
    checks.check_gate(sigma, [a for a, _ in heads], [b for _, b in heads])


@given(st.lists(st.floats(1e-300, 1e300), min_size=2, max_size=6), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_noise_gate_monotone(sigma: list[float], alpha: float, beta: float) -> None:
    """[ATT-4]"""
    checks.check_gate_monotone(sigma, [alpha], [beta])


def test_noise_gate_limits() -> None:
    """[ATT-4]"""
    checks.check_gate_limits()


def test_noise_gate_middle() -> None:
    """[ATT-4] beta is the logarithm of the noise level at which both branches weigh the same."""
    beta = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    gamma = noise_gate(beta.exp(), torch.tensor([-1.0, 0.0, 4.0]).double(), beta)
    checks.close(gamma.diagonal(), torch.full((3,), 0.5).double(), 16, "gate at e^beta", 1.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_noise_gate_invalid_sigma(sigma: float) -> None:
    """[ATT-4]"""
    checks.check_gate_refused(sigma)


def test_block_branches_by_noise() -> None:
    """[ATT-3] [ATT-4] vast noise: other tokens are unheard; no noise: the memory is unheard."""
    block = generic(Block(8, 2))
    x, memory, e = normal(1, 4, 8), normal(1, 4, 8, seed=1), normal(1, 8, seed=2)
    other, past = torch.cat([x[:, :1], normal(1, 3, 8, seed=3)], 1), normal(1, 4, 8, seed=4)
    for sigma, silent, heard in ((1e300, (other, memory), (x, past)), (1e-300, (x, past), (other, memory))):
        noise = torch.tensor([sigma], dtype=torch.float64)
        base = block(x, memory, e, noise)[:, 0].detach()
        # What the closed branch lets through is e^-(softplus(alpha) 690), far below a rounding.
        checks.close(block(*silent, e, noise)[:, 0], base, 4, f"closed branch at sigma {sigma}")
        change = float((block(*heard, e, noise)[:, 0].detach() - base).abs().max())
        assert change > 1e-3, f"the open branch at sigma {sigma} moves the token by {change:.1e}"


# Keys, windows, weights


def test_key_projections_have_no_bias() -> None:
    """[ATT-5]"""
    checks.check_key_bias()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_window_mask_value(rows: int, cols: int, radius: int, periodic: bool) -> None:
    """[ATT-6]"""
    checks.check_window(rows, cols, radius, periodic)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_window_mask_symmetric_and_reflexive(rows: int, cols: int, radius: int, periodic: bool) -> None:
    """[ATT-6] every token sees itself (no empty softmax), and whoever sees it."""
    mask = window_mask(rows, cols, radius, periodic)
    assert torch.equal(mask, mask.T) and bool(mask.diagonal().all())


def test_window_mask_wide_is_all() -> None:
    """[ATT-6] a window as wide as the grid is no window, bit for bit in the reference form."""
    q, k, v = normal(1, 1, 12, 3), normal(1, 1, 12, 3, seed=1), normal(1, 1, 12, 3, seed=2)
    mask = window_mask(3, 4, 3, False)
    assert torch.equal(attention_by_definition(q, k, v, mask), attention_by_definition(q, k, v))


def test_block_weights() -> None:
    """[ATT-7]"""
    checks.check_block_weights()
    checks.check_block_weights(24, 3)


# Baselines and laws of the block


def test_space_time_block_value() -> None:
    checks.check_space_time_block()


def test_divided_block_value() -> None:
    checks.check_divided_block()


@given(st.permutations(range(5)))
def test_block_order_of_tokens(order: list[int]) -> None:
    """[ATT-3] places are in the tokens, not in their order: tokens and memory permuted, output permuted."""
    block = generic(Block(8, 2))
    x, memory, e, sigma = normal(1, 5, 8), normal(1, 5, 8, seed=1), normal(1, 8, seed=2), torch.ones(1).double()
    got, want = block(x[:, order], memory[:, order[::-1]], e, sigma), block(x, memory, e, sigma)[:, order]
    checks.close(got, want, checks.block_roundings(8, 2, 5), "tokens in another order")


def test_block_no_hidden_randomness() -> None:
    block = generic(Block(8, 2))
    given_ = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(2, 8, seed=2), torch.ones(2).double()
    assert torch.equal(block(*given_), block(*given_))
