"""[MEM-2] to [MEM-7]: the streamed memory is the softmax over all frames, gradients too, in a state of fixed size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import EPS, assert_close, generic, normal, refuses
from torch import Tensor

from storm_ref.memory import (
    MemoryState,
    TemporalMemory,
    memory_by_definition,
    memory_finish,
    memory_start,
    memory_update,
)


def start(value: Tensor) -> MemoryState:
    """The state before any frame, for values [b, k, n, a, d]."""
    batch, _, locations, heads, features = value.shape
    return memory_start(value.dtype, (batch, locations, heads, features))


def streamed(score: Tensor, value: Tensor, sizes: list[int]) -> Tensor:
    """The memory of chunks of so many frames."""
    state = start(value)
    for scores, values in zip(score.split(sizes, 1), value.split(sizes, 1), strict=True):
        state = memory_update(state, scores, values)
    return memory_finish(state)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(sum), st.sampled_from([0.0, 1.0, 30.0]))
def test_memory_equals_its_definition_for_any_chunks(sizes: list[int], stretch: float) -> None:
    """[MEM-2] [MEM-3] [MEM-4] chunks without a frame among them."""
    frames = sum(sizes)
    score = stretch * normal(2, frames, 3, 2, seed=1)
    value = normal(2, frames, 3, 2, 4, seed=2)
    # Scores differ by at most 8 stretch (the draws are within 4), and the argument of exp is rounded to that.
    limit = 2 * (frames + 8 * stretch + 4) * EPS * value.abs().max().item()
    assert_close(streamed(score, value, sizes), memory_by_definition(score, value), limit, "streamed memory")


def test_memory_gradients_equal_those_of_its_definition() -> None:
    """[MEM-3] training sees the softmax."""
    score = normal(1, 5, 2, 2).requires_grad_()
    value = normal(1, 5, 2, 2, 3, seed=1).requires_grad_()
    target = normal(1, 2, 2, 3, seed=2)
    want = torch.autograd.grad((memory_by_definition(score, value) * target).sum(), (score, value))
    got = torch.autograd.grad((streamed(score, value, [2, 2, 1]) * target).sum(), (score, value))
    for mine, theirs, name in zip(got, want, ("scores", "values"), strict=True):
        assert_close(mine, theirs, 4 * (5 + 8) * EPS * theirs.abs().max().item(), f"gradient of the {name}")


def test_temporal_memory_extreme_scores() -> None:
    """[MEM-6] through the weights, float32: scores of +-1e4 and their gradients stay finite."""
    memory = generic(TemporalMemory(8, 2)).float()
    tokens = normal(1, 6, 3, 8).float()
    with torch.no_grad():
        memory.query *= 1e4 / memory.scores_and_values(tokens)[0].abs().max()
    out = memory(tokens)
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in memory.parameters() if p.grad is not None)


@pytest.mark.parametrize("frames", [1, 4, 64])
def test_memory_state_size_independent_of_frames(frames: int) -> None:
    """[MEM-3] what is kept between chunks is of one size for any number of frames."""
    memory = generic(TemporalMemory(8, 2))
    state = None
    for chunk in normal(1, frames, 3, 8).split(1, 1):
        state = memory.update(state, chunk)
    assert state is not None
    assert {name: tuple(tensor.shape) for name, tensor in vars(state).items()} == {
        "maximum": (1, 3, 2),
        "denominator": (1, 3, 2),
        "accumulator": (1, 3, 2, 4),
    }


def test_memory_update_empty_chunk_changes_nothing() -> None:
    """[MEM-4] to the last bit."""
    value = normal(1, 3, 2, 2, 4)
    state = memory_update(start(value), normal(1, 3, 2, 2), value)
    again = memory_update(state, normal(1, 0, 2, 2), value[:, :0])
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(state).values(), strict=True))


def test_memory_nan_is_not_hidden() -> None:
    """[MEM-3] a NaN among the scores shows in the memory."""
    score = torch.tensor([1.0, torch.nan]).double().reshape(1, 2, 1, 1)
    assert bool(streamed(score, normal(1, 2, 1, 1, 3), [2]).isnan().all())


def test_memory_invalid_no_frame() -> None:
    """[MEM-7]"""
    refuses(lambda: memory_finish(start(normal(1, 1, 2, 2, 3))), "no frame", "at least one past frame")
    refuses(lambda: generic(TemporalMemory(4, 2))(normal(1, 0, 3, 4)), "no frame")


def test_key_projection_has_no_bias() -> None:
    """[ATT-5]"""
    assert TemporalMemory(8, 2).key.bias is None
