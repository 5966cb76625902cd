"""[NET-1] to [NET-7]: weights, gradients, dtypes and fresh networks, and what the network and its condition refuse."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from small_problems import CONFIG, generic, normal, refuses
from torch import Tensor

from storm_ref.config import tiny
from storm_ref.denoiser import Condition, Storm, count_weights, denoiser, randomise
from storm_ref.tokenisation import sphere_position

GRID = (4, 8)
PLACES = sphere_position(torch.linspace(60, -60, GRID[0]), torch.arange(GRID[1]) * 45.0, CONFIG.patch)


@dataclass(frozen=True)
class Analysis:
    """The network and its inputs in an analysis with three past frames at irregular ages."""

    network: Storm
    x: Tensor
    sigma: Tensor
    static: Tensor
    past: Tensor
    past_static: Tensor
    age: Tensor
    position: Tensor

    def memory(self) -> Tensor:
        return self.network.compress(self.past, self.past_static, self.age, self.position)

    def condition(self) -> Condition:
        return Condition(self.static, self.memory(), self.position[None], periodic=True)


def analysis() -> Analysis:
    return Analysis(
        network=generic(Storm(CONFIG)),
        x=normal(2, 2, *GRID),
        sigma=torch.tensor([0.3, 3.0], dtype=torch.float64),
        static=normal(2, 2, *GRID, seed=1),
        past=normal(2, 3, 2, *GRID, seed=2),
        past_static=normal(2, 3, 2, *GRID, seed=3),
        age=torch.tensor([[1.0, 6.0, 30.0], [0.5, 12.0, 13.0]], dtype=torch.float64),
        position=PLACES,
    )


# Weights


def visible_weights(network: Storm, case: Analysis) -> set[str]:
    """The names of the weights that the denoised state has a gradient for."""
    out = denoiser(network, replace(case, network=network).condition())(case.x, case.sigma)
    names, values = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad((out * normal(2, 2, *GRID, seed=9)).sum(), values, allow_unused=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None and float(g.abs().max()) > 1e-9}


def test_generic_weights_show_the_whole_model() -> None:
    """[NET-3] [NUM-6] with `randomise` every weight has a gradient; a fresh network hides most of them."""
    case = analysis()
    every_weight = {name for name, _ in case.network.named_parameters()}
    assert all(bool((p != 0).all()) for p in case.network.parameters())
    assert visible_weights(case.network, case) == every_weight
    assert visible_weights(Storm(CONFIG).double(), case) <= {n for n in every_weight if n.startswith("final")}


def test_reset_is_no_network() -> None:
    """[NET-5] a fresh network has F = 0 and D = c_skip x to the last bit, and each of its blocks is the identity."""
    case = analysis()
    case.network.reset(torch.Generator().manual_seed(1))
    condition = case.condition()
    with torch.no_grad():
        assert not case.network(case.x, case.sigma, condition).any()
        got = denoiser(case.network, condition)(case.x, case.sigma)
    c_skip = CONFIG.sigma_data**2 / (case.sigma**2 + CONFIG.sigma_data**2)
    assert torch.equal(got, c_skip[:, None, None, None] * case.x)
    tokens, memory, embedding = normal(2, 8, CONFIG.width), normal(2, 8, CONFIG.width), normal(2, CONFIG.width)
    for block in case.network.blocks:
        assert torch.equal(block(tokens, memory, embedding, case.sigma), tokens)


def test_reset_randomness_is_an_argument() -> None:
    """[NUM-12] weights come from the generator alone: the global one neither has a say nor notices."""

    def weights(seed: int, elsewhere: int) -> Tensor:
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        network = Storm(tiny(), torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(weights(1, 2), weights(1, 3))
    assert not torch.equal(weights(1, 2), weights(2, 2))


def test_randomise_repeatable_and_scaled() -> None:
    """Matrices have standard deviation scale / sqrt(fan in), vectors scale / 2, from the given generator alone."""
    network = Storm(tiny())
    randomise(network, torch.Generator().manual_seed(3), 2.0)
    first = {name: p.detach().clone() for name, p in network.named_parameters()}
    torch.manual_seed(0)
    randomise(network, torch.Generator().manual_seed(3), 2.0)
    assert all(torch.equal(p, first[name]) for name, p in network.named_parameters())
    matrix = network.blocks[0].adaptive.weight
    # 36,864 draws: the standard deviation of their standard deviation is 1 / sqrt(2 n), 0.4 %; six of them.
    assert abs(matrix.std().item() * 64**0.5 / 2 - 1) < 6 / (2 * matrix.numel()) ** 0.5
    vectors = torch.cat([p.detach() for p in network.parameters() if p.ndim == 1])
    assert abs(vectors.std().item() - 1) < 6 / (2 * vectors.numel()) ** 0.5


def test_count_weights_counts_all() -> None:
    """[NET-7]"""
    assert count_weights(torch.nn.Linear(3, 4)) == 16


# Dtypes


def test_storm_float32_near_float64() -> None:
    """[NET-4] [NET-5] a float32 network takes float64 data and is a chain of float32 roundings away."""
    case = analysis()
    with torch.no_grad():
        truth = denoiser(case.network, case.condition())(case.x, case.sigma)
        case.network.float()
        assert case.memory().dtype == torch.float32
        got = denoiser(case.network, case.condition())(case.x, case.sigma)
    assert got.dtype == torch.float64
    single = torch.finfo(torch.float32).eps
    # Sums of up to 64 terms, ten of them a block, in two blocks; the top wave multiplies the rounding of positions.
    assert 0 < (got - truth).abs().max() <= 20 * 64 * single * truth.abs().max()


# Refusals


def test_storm_invalid_shapes(unchecked: None) -> None:
    """[NET-6] what does not share the grid or the batch is named."""
    case = analysis()
    network, condition = case.network, case.condition()

    def run(x: Tensor = case.x, sigma: Tensor = case.sigma, **parts: Tensor) -> Callable[[], Tensor]:
        return lambda: network(x, sigma, replace(condition, **parts))

    refuses(run(x=case.x[..., :6]), "state", "(2, 2, 4, 6)", "4, 8")
    refuses(run(x=case.x[:, :1]), "state", "(2, 1, 4, 8)")
    refuses(run(sigma=case.sigma[:1]), "sigma")
    refuses(run(static=case.static[..., :2, :]), "static fields", "(2, 2, 2, 8)")
    refuses(run(memory=condition.memory.transpose(1, 2)), "memory", "(2, 4, 2, 8)")
    refuses(run(memory=condition.memory.repeat(2, 1, 1, 1)), "memory")
    refuses(run(position=condition.position[..., :2]), "position")

    def compress(**parts: Tensor) -> Callable[[], Tensor]:
        return replace(case, **parts).memory

    refuses(compress(past=case.past[:, :0], past_static=case.past_static[:, :0]), "at least one past frame")
    refuses(compress(past=case.past[..., :6]), "past frames")
    refuses(compress(past_static=case.past_static[:, :1]), "static fields of the past")
    refuses(compress(age=case.age[:, :1]), "ages")
    refuses(lambda: network.compress(case.past, case.past_static, case.age, case.position, chunk=0), "chunk")


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_denoiser_invalid_sigma(sigma: float) -> None:
    """[NET-5]"""
    case = analysis()
    denoise = denoiser(case.network, case.condition())
    refuses(lambda: denoise(case.x, torch.tensor([1.0, sigma], dtype=torch.float64)), "sigma", str(sigma))


def test_condition_crop_is_of_whole_patches() -> None:
    """[NET-6] [TOK-6] a tile has the positions, memory and static fields of its own patches; none is cut."""
    condition = analysis().condition()
    part = condition.crop(torch.arange(2, 4), torch.tensor([6, 7, 0, 1]), CONFIG.patch)
    assert torch.equal(part.position[:, 0], condition.position[:, 1, [3, 0]])
    assert torch.equal(part.memory[:, 0], condition.memory[:, 1, [3, 0]])
    assert torch.equal(part.static, condition.static[:, :, 2:4][..., [6, 7, 0, 1]])
    assert not part.periodic, "a tile that is not the whole circle does not close on itself"
    refuses(lambda: condition.crop(torch.arange(1, 3), torch.arange(4), CONFIG.patch), "whole patches of 2")
    refuses(lambda: condition.crop(torch.arange(2), torch.arange(3), CONFIG.patch), "whole patches of 2")
