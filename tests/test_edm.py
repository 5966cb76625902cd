"""[EDM-1] to [EDM-12]: dtypes, gradients, hidden randomness and convergence; values are the suite's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_problems import EPS, flow, gaussian, normal, pointwise, probe, world
from torch import Tensor

from storm_ref.denoiser import denoiser
from storm_ref.edm import (
    Churn,
    NotFiniteError,
    draw_sigma,
    edm_loss,
    euler_sample,
    gaussian_denoiser,
    loss_weight,
    precondition,
    sample,
    schedule,
    training_sigma,
)

# Coefficients and loss


def test_precondition_keeps_the_dtype_of_the_state() -> None:
    """[EDM-9] float32 in, float32 out, float64 between: the result is the float64 one, rounded once."""
    x, sigma = normal(2, 5).float(), torch.tensor([0.3, 3.0])
    got = precondition(lambda z, s: z.tanh(), x, sigma, 1.0)
    assert got.dtype == torch.float32
    want = precondition(lambda z, s: z.tanh(), x.double(), sigma.double(), 1.0)
    assert torch.equal(got, want.float())


def test_precondition_does_not_round_sigma() -> None:
    """[EDM-9] two noise levels closer than float32 can tell stay two for a float32 network."""
    sigma = torch.tensor([1.0, 1.0 + 2.0**-30], dtype=torch.float64)
    seen: list[Tensor] = []
    precondition(lambda z, s: (seen.append(s), z)[1], normal(2, 3), sigma, 1.0)
    assert torch.equal(seen[0], sigma)


def test_edm_loss_of_a_perfect_denoiser_is_zero() -> None:
    """[EDM-3] and its gradient reaches the network."""
    x = normal(2, 3)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert edm_loss(lambda z, s: x, x, normal(2, 3, seed=1), sigma, 1.0).item() == 0
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    edm_loss(lambda z, s: x + 1 + shift, x, normal(2, 3, seed=1), sigma, 1.0).backward()
    want = 2 * loss_weight(sigma, 1.0).sum() / 6
    assert shift.grad is not None and (shift.grad - want).abs().max() <= 8 * EPS * want


def test_edm_loss_has_no_gradient_at_points_that_are_not_valid() -> None:
    """[EDM-11]"""
    valid = normal(3, 4, seed=2) > -0.3
    shift = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss = edm_loss(lambda z, s: z / 2 + shift, normal(3, 4), normal(3, 4, seed=1), sigma, 1.0, valid)
    (gradient,) = torch.autograd.grad(loss, shift)
    assert torch.equal(gradient != 0, valid)


def test_draw_sigma_is_training_sigma_of_its_generator() -> None:
    """[EDM-4] [EDM-8] of standard normal numbers in float64 that the generator alone decides."""
    normal_numbers = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(7)
    drawn = draw_sigma(5, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, training_sigma(normal_numbers))
    other = draw_sigma(5, torch.Generator().manual_seed(1), mean=0.5, std=2.4)
    assert torch.equal(other, training_sigma(normal_numbers, 0.5, 2.4))


# Sampler


def observed_orders(sampler: Callable[..., Tensor], steps: Sequence[int]) -> list[float]:
    """The order at which the error against the exact flow of a Gaussian falls from one number of steps to the next."""
    mean, covariance = gaussian(4)
    denoise = gaussian_denoiser(mean, covariance)
    errors = []
    for n in steps:
        sigmas = schedule(n)
        offset, factor = probe(lambda z, sigmas=sigmas: sampler(denoise, z, sigmas), 4)
        want_offset, want_factor = flow(mean, covariance, sigmas)
        errors.append(max((offset - want_offset).abs().max().item(), (factor - want_factor).abs().max().item()))
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize(("sampler", "order"), [(sample, 2.0), (euler_sample, 1.0)])
def test_sample_is_second_order_and_euler_first(sampler: Callable[..., Tensor], order: float) -> None:
    """[EDM-7] [EDM-10] doubling the steps divides the error by 2^order, to a tenth in the order."""
    assert observed_orders(sampler, (64, 128, 256)) == pytest.approx([order, order], abs=0.1)


def test_sample_leaves_its_inputs_alone() -> None:
    """[EDM-8]"""
    latents, noises, sigmas = normal(2, 3), normal(4, 2, 3, seed=1), schedule(4)
    kept = latents.clone(), noises.clone(), sigmas.clone()
    sample(pointwise, latents, sigmas, Churn(2.0), noises)
    assert all(torch.equal(a, b) for a, b in zip(kept, (latents, noises, sigmas), strict=True))


def test_sample_is_float64_around_a_float32_network() -> None:
    """[EDM-9] with a float32 network the result differs from the float64 one by the network's rounding alone."""
    w = world((4, 8), True)
    z = normal(2, 2, 4, 8, seed=4)
    sigmas = schedule(6)
    want = sample(denoiser(w.network, w.condition), z, sigmas)
    seen: list[torch.dtype] = []
    hook = w.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    c = w.condition
    single = denoiser(w.network.float(), replace(c, static=c.static.float(), memory=c.memory.float()))
    got = sample(single, z.float(), sigmas)
    hook.remove()
    assert set(seen) == {torch.float32} and got.dtype == torch.float64
    assert torch.equal(got, sample(single, z.float().double(), sigmas))
    assert 1e-12 < (got - want).abs().max().item() <= 1e-3 * want.abs().max().item()


def test_sample_reports_progress() -> None:
    """One call a step."""
    calls: list[int] = []
    sample(pointwise, normal(1, 2), schedule(5), progress=lambda: calls.append(1))
    assert len(calls) == 5


def test_sample_invalid_state_names_member_and_step() -> None:
    """[EDM-12] [DA-6] [NUM-11] the first step and the members that are lost, infinite or not a number."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        out = x / 2
        if sigma[0] < 1:
            out[1], out[3, 0] = math.nan, math.inf
        return out

    sigmas = torch.tensor([4.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    with pytest.raises(
        NotFiniteError, match=r"members \[1, 3\] stopped being finite at step 2 of 3 \(sigma 2\)"
    ) as caught:
        sample(denoise, normal(4, 2), sigmas)
    assert (caught.value.members, caught.value.step, caught.value.steps) == ([1, 3], 2, 3)


@pytest.mark.parametrize("arguments", [{"s_churn": -1.0}, {"s_noise": -0.1}, {"s_churn": math.nan}])
def test_churn_invalid(arguments: dict[str, float]) -> None:
    """[EDM-6]"""
    with pytest.raises(ValueError, match="must not be negative"):
        Churn(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "at least one step, got 0"),
        ((5, 2.0, 1.0), "sigma_min < sigma_max, got 2.0 and 1.0"),
        ((5, math.nan, 1.0), "0 < sigma_min"),
        ((5, 1.0, math.inf), "sigma_max"),
        ((5, 0.1, 1.0, 0.0), "rho must be positive, got 0.0"),
    ],
)
def test_schedule_invalid(arguments: tuple[float, ...], message: str) -> None:
    """[EDM-5]"""
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)  # type: ignore[arg-type]
