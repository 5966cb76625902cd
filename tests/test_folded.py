"""The folded memory gives the tokens of chapter 2's equations: any network, any chunks, any block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Storm, randomise
from storm_ref.experiments.folded import FoldedMemory, FoldedState
from storm_ref.tokenisation import sphere_position

EPS = torch.finfo(torch.float64).eps


@st.composite
def configs(draw: st.DrawFn) -> StormConfig:
    heads = draw(st.integers(1, 3))
    return StormConfig(
        channels=draw(st.integers(1, 3)),
        static_channels=draw(st.integers(0, 2)),
        patch=(draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        width=heads * draw(st.integers(1, 5)),
        heads=heads,
        depth=1,
        position_octaves=draw(st.integers(1, 4)),
    )


def problem(
    c: StormConfig, frames: int, batch: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Storm, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A network of generic weights, and past frames, static fields, ages and positions on 2 x 3 patches."""
    g = torch.Generator().manual_seed(seed)
    network = Storm(c).to(dtype)
    randomise(network, g, scale)
    h, w = 2 * c.patch[0], 3 * c.patch[1]
    past = torch.randn(batch, frames, c.channels, h, w, generator=g, dtype=torch.float64).to(dtype)
    static = torch.randn(batch, frames, c.static_channels, h, w, generator=g, dtype=torch.float64).to(dtype)
    age = 1000 * torch.rand(batch, frames, generator=g, dtype=torch.float64) + 1
    position = sphere_position(torch.linspace(-60, 80, h), torch.linspace(0, 300, w), c.patch)
    return network, (past, static, age, position)


def folded(network: Storm, inputs: tuple[Tensor, ...], chunk: int, block: int = 4096) -> Tensor:
    past, static, age, position = inputs
    memory = FoldedMemory(network, position, block)
    state = memory.start(len(past))
    for at in range(0, past.shape[1], chunk):
        part = slice(at, at + chunk)
        state = memory.update(state, past[:, part], static[:, part], age[:, part])
    return memory.finish(state)


@given(configs(), st.integers(1, 9), st.integers(1, 2), st.integers(1, 9), st.integers(1, 7), st.integers(0, 99))
def test_folded_memory_is_the_memory(
    c: StormConfig, frames: int, batch: int, chunk: int, block: int, seed: int
) -> None:
    network, inputs = problem(c, frames, batch, seed)
    with torch.no_grad():
        expected = network.compress(*inputs)
    # Sums of some hundred products of numbers near one, in two orders: a few hundred roundings at the most.
    bound = 300 * EPS * float(expected.abs().max().clamp(min=1))
    assert float((folded(network, inputs, chunk, block) - expected).abs().max()) <= bound


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_folded_memory_survives_scores_of_ten_thousands(scale: float) -> None:
    c = StormConfig(2, 1, (1, 1), 8, 2, 1)
    network, inputs = problem(c, 12, 1, 3)
    with torch.no_grad():
        network.memory.query *= scale**2
        expected = network.compress(*inputs)
        score, _ = network.memory.scores_and_values(network.embed_past(*inputs))
    assert float(score.abs().max()) > scale**2
    tokens = folded(network, inputs, 5)
    # One frame wins a softmax of such scores; rounding of the scores, relative to their size, moves its weight.
    assert float((tokens - expected).abs().max()) <= 100 * EPS * float(score.abs().max()) * float(expected.abs().max())


def test_folded_memory_in_float32_is_as_near_as_the_equations() -> None:
    c = StormConfig(3, 3, (1, 1), 32, 4, 1)
    network, inputs = problem(c, 400, 1, 5)
    with torch.no_grad():
        truth = network.compress(*inputs)
        single, given_ = network.float(), (inputs[0].float(), inputs[1].float(), *inputs[2:])
        plain = (single.compress(*given_).double() - truth).square().mean().sqrt()
        ours = (folded(single, given_, 64).double() - truth).square().mean().sqrt()
    assert float(ours) <= 3 * float(plain)


def test_update_in_bfloat16_sums_in_float32() -> None:
    c = StormConfig(1, 0, (1, 1), 8, 2, 1)
    network, (past, static, age, position) = problem(c, 4, 1, 7, dtype=torch.bfloat16)
    memory = FoldedMemory(network, position)
    state = memory.update(memory.start(), past, static, age)
    assert state.denominator.dtype == torch.float32
    assert memory.finish(state).dtype == torch.bfloat16


def test_update_of_no_frame_changes_nothing() -> None:
    network, (past, static, age, position) = problem(StormConfig(1, 1, (1, 1), 4, 1, 1), 3, 1, 1)
    memory = FoldedMemory(network, position)
    state = memory.update(memory.start(), past, static, age)
    before = [t.clone() for t in vars(state).values()]
    memory.update(state, past[:, :0], static[:, :0], age[:, :0])
    assert all(torch.equal(a, b) for a, b in zip(before, vars(state).values(), strict=True))


def test_update_invalid_age_of_the_future() -> None:
    network, (past, static, age, position) = problem(StormConfig(1, 0, (1, 1), 4, 1, 1), 2, 1, 1)
    memory = FoldedMemory(network, position)
    with pytest.raises(ValueError, match="must be positive"):
        memory.update(memory.start(), past, static, -age)


def test_finish_invalid_without_a_frame() -> None:
    network, (*_, position) = problem(StormConfig(1, 0, (1, 1), 4, 1, 1), 1, 1, 1)
    memory = FoldedMemory(network, position)
    with pytest.raises(ValueError, match="no frame"):
        memory.finish(memory.start())
    with pytest.raises(ValueError, match="at least one place"):
        FoldedMemory(network, position, block=0)


def test_state_does_not_grow_with_frames() -> None:
    network, (past, static, age, position) = problem(StormConfig(2, 1, (1, 1), 8, 2, 1), 40, 1, 2)
    memory = FoldedMemory(network, position)

    def numbers(state: FoldedState) -> int:
        return sum(t.numel() for t in vars(state).values())

    state, empty = memory.start(), numbers(memory.start())
    for at in range(0, 40, 8):
        part = slice(at, at + 8)
        state = memory.update(state, past[:, part], static[:, part], age[:, part])
        assert numbers(state) == empty
