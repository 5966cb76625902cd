"""[MEM-1] to [MEM-6]: values against loops, and the laws of the online softmax."""

import checks_network as checks
import pytest
import torch
from checks_network import generic, normal, refuses
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.memory import (
    MemoryState,
    TemporalMemory,
    memory_by_definition,
    memory_finish,
    memory_start,
    memory_update,
)


def start(value: torch.Tensor) -> MemoryState:
    """The state before any frame, for values [b, k, n, a, d]."""
    batch, _, locations, heads, features = value.shape
    return memory_start(value.dtype, (batch, locations, heads, features))


def test_scores_and_values_value() -> None:
    """[MEM-1]"""
    checks.check_memory_scores()


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_memory_tokens_value(frames: int) -> None:
    """[MEM-2]"""
    checks.check_memory_tokens(frames)


@pytest.mark.parametrize("frames", [1, 3])
def test_memory_update_value(frames: int) -> None:
    """[MEM-3]"""
    checks.check_memory_update(frames)


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of the chunks (0 allowed) and an order of the frames."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(sum))
    return sizes, draw(st.permutations(range(sum(sizes))))


@given(splits(), st.sampled_from([0.0, 1.0, 30.0]))
def test_memory_any_split_any_order(split: tuple[list[int], list[int]], stretch: float) -> None:
    """[MEM-3] [MEM-4]"""
    checks.check_memory_split(*split, stretch)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_temporal_memory_any_split_any_order(sizes: list[int], random: object) -> None:
    """[MEM-4] through the weights: frames carry what they need, so that order and chunks do not matter."""
    memory, tokens = generic(TemporalMemory(12, 3)), normal(2, sum(sizes), 4, 12)
    order = list(range(sum(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    state = None
    for frames in torch.tensor(order).split(sizes):
        state = memory.update(state, tokens[:, frames])
    assert state is not None
    checks.close(memory.finish(state), memory(tokens), 2 * (12 + 4 + 12) + sum(sizes), "memory in chunks")


def test_memory_one_frame() -> None:
    """[MEM-5]"""
    checks.check_memory_single()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [1e4, 3e4])
def test_memory_extreme_scores(dtype: torch.dtype, top: float) -> None:
    """[MEM-6]"""
    checks.check_memory_extreme(dtype, top)


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


def test_memory_gradients_equal_definition() -> None:
    """[MEM-3] training sees the softmax: gradients of the streamed form equal those of the plain one."""
    score, value = normal(1, 5, 2, 2).requires_grad_(), normal(1, 5, 2, 2, 3, seed=1).requires_grad_()
    target = normal(1, 2, 2, 3, seed=2)
    want = torch.autograd.grad((memory_by_definition(score, value) * target).sum(), (score, value))
    state = start(value)
    for s, v in zip(score.split(2, 1), value.split(2, 1), strict=True):
        state = memory_update(state, s, v)
    got = torch.autograd.grad((memory_finish(state) * target).sum(), (score, value))
    for a, b, name in zip(got, want, ("scores", "values"), strict=True):
        checks.close(a, b, 4 * (5 + 8), f"gradient of the {name}")


def test_memory_invalid_no_frame() -> None:
    """[MEM-3]"""
    checks.check_memory_empty()


def test_memory_update_empty_chunk_changes_nothing() -> None:
    """[MEM-4]"""
    value = normal(1, 3, 2, 2, 4)
    state = memory_update(start(value), normal(1, 3, 2, 2), value)
    again = memory_update(state, normal(1, 0, 2, 2), value[:, :0])
    assert all(torch.equal(a, b) for a, b in zip(vars(again).values(), vars(state).values(), strict=True))


@pytest.mark.parametrize("frames", [1, 4, 64])
def test_memory_state_size_independent_of_frames(frames: int) -> None:
    """[MEM-3] what is kept between chunks is of one size for any number of frames."""
    memory = generic(TemporalMemory(8, 2))
    state = None
    for chunk in normal(1, frames, 3, 8).split(1, 1):
        state = memory.update(state, chunk)
    assert state is not None
    assert {name: tuple(t.shape) for name, t in vars(state).items()} == {
        "maximum": (1, 3, 2),
        "denominator": (1, 3, 2),
        "accumulator": (1, 3, 2, 4),
    }


def test_memory_keeps_locations_apart() -> None:
    """[MEM-2] the memory of a location is of its own tokens alone, and of its own sample."""
    memory, tokens = generic(TemporalMemory(8, 2)), normal(2, 3, 4, 8)
    moved = tokens.clone()
    moved[0, :, 1] += 1
    changed = (memory(moved) != memory(tokens)).any(-1)
    assert changed.tolist() == [[False, True, False, False], [False] * 4]


def test_memory_duplicate_frames_change_nothing() -> None:
    """[MEM-2] a weighted mean: every frame twice is the same memory."""
    memory, tokens = generic(TemporalMemory(8, 2)), normal(1, 3, 4, 8)
    checks.close(memory(torch.cat([tokens, tokens], 1)), memory(tokens), 2 * (8 + 4 + 8 + 6), "frames twice")


def test_memory_nan_is_not_hidden() -> None:
    """[MEM-3] NaN among the scores is not hidden."""
    value = normal(1, 2, 1, 1, 3)
    state = memory_update(start(value), torch.tensor([1.0, torch.nan]).double().reshape(1, 2, 1, 1), value)
    assert bool(memory_finish(state).isnan().all())


def test_memory_no_hidden_randomness() -> None:
    memory, tokens = generic(TemporalMemory(8, 2)), normal(2, 3, 4, 8)
    assert torch.equal(memory(tokens), memory(tokens))


def test_memory_finish_refuses_before_dividing() -> None:
    """[MEM-3]"""
    refuses(lambda: memory_finish(start(normal(1, 1, 2, 2, 3))), "no frame", "at least one past frame")
