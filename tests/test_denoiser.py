"""[NET-1] to [NET-7]: the whole network against NumPy, its laws, and what it refuses. [NET-7]: also test_config."""

from dataclasses import replace

import checks_network as checks
import pytest
import torch
from checks_network import close, world
from hypothesis import given, settings
from hypothesis import strategies as st

from storm_ref.config import tiny
from storm_ref.denoiser import Storm, count_weights, denoiser, randomise

# Noise embedding


@given(st.lists(st.floats(-1.6, 1.2), min_size=1, max_size=4), st.sampled_from([2, 8, 64]))
def test_noise_features_value(c_noise: list[float], count: int) -> None:
    """[NET-1]"""
    checks.check_noise_features(c_noise, count)


def test_noise_features_smooth_in_sigma() -> None:
    """[NET-1] sigma rounded to float32 moves no feature by more than a float32 rounding or so."""
    sigma = torch.logspace(-2.7, 1.9, 50, dtype=torch.float64)
    exact, rounded = (checks.noise_features(s.log() / 4, 64) for s in (sigma, sigma.float().double()))
    # A relative 2^-24 of sigma, a quarter of it in c_noise, times the largest wave number, 23.1.
    assert float((exact - rounded).abs().max()) <= 2**-24 / 4 * 23.1


def test_noise_embedding_value() -> None:
    """[NET-1]"""
    checks.check_noise_embedding()


# The network


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_compress_value(chunk: int) -> None:
    """[NET-2] [MEM-4]"""
    checks.check_memory_of_network(chunk)


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("window", [None, 0, 1])
def test_storm_value(window: int | None, periodic: bool) -> None:
    """[NET-1] [NET-2] [NET-3] [NET-4]"""
    checks.check_network(window, periodic=periodic)


@pytest.mark.parametrize(("features", "frames"), [(1, 1), (2, 4)])
def test_storm_value_other_positions_and_histories(features: int, frames: int) -> None:
    """[NET-2] [NET-4]"""
    checks.check_network(features=features, frames=frames)


def test_bind_value() -> None:
    """[NET-5]"""
    checks.check_denoised()


def test_bind_dtype() -> None:
    """[NET-5]"""
    checks.check_bind_dtype()


def test_reset_is_no_network() -> None:
    """[NET-5]"""
    checks.check_reset()


def test_bind_memory_serves_all_noise_levels() -> None:
    """[NET-5] one condition, many x and sigma: D of a sample is what it is alone."""
    case = world()
    denoise = denoiser(case.network, replace(case.condition(), static=case.static[:1], memory=case.memory()[:1]))
    x, sigma = checks.normal(4, 2, 6, 15, seed=9), torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    with torch.no_grad():
        together = denoise(x, sigma)
        alone = torch.cat([denoise(x[i : i + 1], sigma[i : i + 1]) for i in range(4)])
    close(together, alone, case.roundings, "a batch of noise levels")


# Laws


@given(st.integers(-6, 6), st.sampled_from([None, 1]))
@settings(max_examples=8)
def test_storm_zonally_equivariant(shift: int, window: int | None) -> None:
    """[TOK-6] state, static fields and history rolled by whole patches: the output rolls with them."""
    checks.check_zonal_equivariance(shift, window)


def test_storm_on_the_sphere_knows_longitude() -> None:
    """[TOK-6] the counterpart: with absolute positions a rolled input is another place."""
    case = world()
    names = ("x", "static", "past", "past_static")
    rolled = replace(case, **{name: getattr(case, name).roll(3, -1) for name in names})
    change = (rolled.run() - case.run().roll(3, -1)).abs().max()
    assert change > 1e-3 * case.run().abs().max()


@given(st.permutations(range(3)))
@settings(max_examples=6)
def test_storm_order_of_batch(order: list[int]) -> None:
    """[NET-6] samples do not mix."""
    case = world(batch=3)
    names = ("x", "sigma", "static", "past", "past_static", "age")
    mixed = replace(case, **{name: getattr(case, name)[order] for name in names})
    close(mixed.run(), case.run()[order], case.roundings, "batch in another order")


@given(st.permutations(range(4)), st.integers(1, 5))
@settings(max_examples=8)
def test_storm_order_and_chunks_of_history(order: list[int], chunk: int) -> None:
    """[MEM-4] [TOK-8] frames in any order, each with its age."""
    case = world(frames=4)
    names = ("past", "past_static", "age")
    mixed = replace(case, **{name: getattr(case, name)[:, order] for name in names})
    close(mixed.memory(chunk), case.memory(), case.roundings, "history in another order")


def test_storm_hears_age() -> None:
    """[TOK-5] the same frames at other times are another history; with one frame too."""
    for frames in (1, 3):
        case = world(frames=frames)
        later = replace(case, age=case.age * 2)
        assert (later.memory() - case.memory()).abs().max() > 1e-3 * case.memory().abs().max()


@pytest.mark.parametrize("periodic", [True, False])
def test_storm_reach_of_window(periodic: bool) -> None:
    """[ATT-6] [NET-3]"""
    checks.check_reach(1, periodic)


def test_storm_no_hidden_randomness() -> None:
    """Two calls agree bit for bit, in training mode too."""
    case = world()
    assert case.network.training
    assert torch.equal(case.run(), case.run()) and torch.equal(case.memory(), case.memory())


def test_storm_float32_near_float64() -> None:
    """[NET-4] computed in float32 the network is a float32 rounding chain away."""
    case = world()
    truth = case.run()
    case.network.float()
    names = ("x", "static", "past", "past_static")
    single = replace(case, **{name: getattr(case, name).float() for name in names}).run()
    assert single.dtype == torch.float32
    error, limit = (single - truth).abs().max(), case.roundings * torch.finfo(torch.float32).eps * truth.abs().max()
    assert error <= limit, f"off by {error:.2g}, allowed {limit:.2g}"


def test_compress_takes_float64_into_a_float32_network() -> None:
    """[NET-5] data stay float64 outside, whatever the network's dtype."""
    case = world()
    case.network.float()
    assert case.memory().dtype == torch.float32


def test_storm_every_weight_has_a_gradient() -> None:
    """[NET-3] with generic weights no parameter is idle; none of them is a bias on keys."""
    case = world()
    out = case.network(case.x, case.sigma, case.condition())
    (out * checks.normal(*out.shape, seed=7)).sum().backward()
    idle = [n for n, p in case.network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert not idle, f"weights without effect: {idle}"
    assert not [name for name, _ in case.network.named_parameters() if "key.bias" in name]


# Conditions of tiles


def test_condition_crop_absolute() -> None:
    """[TOK-6] [NET-6]"""
    checks.check_crop()


def test_condition_stack_tile_major() -> None:
    """[NET-6]"""
    checks.check_stack()


# Refusals


def test_storm_invalid_shapes(unchecked: None) -> None:
    """[NET-6]"""
    checks.check_shapes_refused()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_bind_invalid_sigma(sigma: float) -> None:
    """[NET-5]"""
    case = world()
    denoise = denoiser(case.network, case.condition())
    checks.refuses(lambda: denoise(case.x, torch.tensor([1.0, sigma], dtype=torch.float64)), "sigma", str(sigma))


@pytest.mark.parametrize("age", [0.0, -6.0, float("nan")])
def test_compress_invalid_age(age: float) -> None:
    """[TOK-8]"""
    case = world()
    ages = case.age.clone()
    ages[1, 2] = age
    checks.refuses(replace(case, age=ages).memory, "age", str(age))


# Helpers


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


def test_reset_randomness_is_an_argument() -> None:
    """[NUM-12] weights come from the generator alone: the global one neither has a say nor notices."""

    def weights(seed: int, elsewhere: int) -> torch.Tensor:
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        network = Storm(tiny(), torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(weights(1, 2), weights(1, 3))
    assert not torch.equal(weights(1, 2), weights(2, 2))
