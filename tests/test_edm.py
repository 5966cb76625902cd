"""[EDM-1] to [EDM-10]: values against fifty digits and against loops, exact flows and moments of Gaussian problems."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from checks_sampling import (
    EPS,
    check_coefficients,
    check_draw_sigma,
    check_evaluations,
    check_loss,
    check_loss_is_one,
    check_loss_weight,
    check_order,
    check_precondition,
    check_sample,
    check_schedule,
    flow,
    gaussian,
    normal,
    pointwise,
    probe,
    world,
)
from hypothesis import given
from hypothesis import strategies as st
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
    precondition_coefficients,
    sample,
    schedule,
)

levels = st.floats(1e-4, 1e4)


# Coefficients and loss


def test_precondition_coefficients_value() -> None:
    """[EDM-2]"""
    check_coefficients(precondition_coefficients)


@given(levels, st.floats(0.1, 10))
def test_precondition_coefficients_identities(sigma: float, sigma_data: float) -> None:
    """[EDM-2] unit variance in (c_in^2 (sigma^2 + sigma_d^2) = 1) and out (c_out^2 = sigma^2 c_skip): relations of
    the table."""
    skip, out, into, noise = (
        c.item() for c in precondition_coefficients(torch.tensor(sigma, dtype=torch.float64), sigma_data)
    )
    assert abs(into**2 * (sigma**2 + sigma_data**2) - 1) <= 8 * EPS
    assert abs(out**2 - sigma**2 * skip) <= 12 * EPS * out**2
    assert abs(out - sigma * sigma_data * into) <= 8 * EPS * out
    assert abs(math.exp(4 * noise) - sigma) <= 8 * EPS * sigma * (1 + abs(math.log(sigma)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("function", [precondition_coefficients, loss_weight])
def test_coefficients_invalid_sigma(function: Callable[[Tensor, float], object], sigma: float) -> None:
    """[EDM-2]"""
    with pytest.raises(ValueError, match="sigma must be positive"):
        function(torch.tensor([1.0, sigma]), 1.0)


def test_precondition_value() -> None:
    """[EDM-1] [EDM-9]"""
    check_precondition(precondition)


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


def test_loss_weight_value() -> None:
    """[EDM-3]"""
    check_loss_weight(loss_weight)


def test_edm_loss_value() -> None:
    """[EDM-3]"""
    check_loss(edm_loss)


def test_edm_loss_of_an_untrained_network_is_one() -> None:
    """[EDM-3]"""
    check_loss_is_one(edm_loss)


def test_edm_loss_of_a_perfect_denoiser_is_zero() -> None:
    """[EDM-3] and its gradient reaches the network."""
    x = normal(2, 3)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert edm_loss(lambda z, s: x, x, normal(2, 3, seed=1), sigma, 1.0).item() == 0
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    edm_loss(lambda z, s: x + 1 + shift, x, normal(2, 3, seed=1), sigma, 1.0).backward()
    want = 2 * loss_weight(sigma, 1.0).sum() / 6
    assert shift.grad is not None and (shift.grad - want).abs().max() <= 8 * EPS * want


def test_draw_sigma_moments() -> None:
    """[EDM-4]"""
    check_draw_sigma(draw_sigma)


def test_draw_sigma_is_drawn_from_its_generator() -> None:
    """[EDM-8] the same generator state, the same levels; the arguments are those of the logarithm."""
    first = draw_sigma(5, torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    assert torch.equal(first, draw_sigma(5, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, draw_sigma(5, torch.Generator().manual_seed(2)))
    moved = draw_sigma(5, torch.Generator().manual_seed(1), mean=0.5, std=2.4)
    assert (moved.log() - (0.5 + 2 * (first.log() + 1.2))).abs().max() <= 64 * EPS


# Schedule


def test_schedule_value() -> None:
    """[EDM-5] [EDM-9]"""
    check_schedule(schedule)


@given(st.integers(2, 60), st.floats(1e-3, 0.5), st.floats(1, 100), st.floats(1, 10))
def test_schedule_falls_from_top_to_bottom_to_zero(steps: int, low: float, high: float, rho: float) -> None:
    """[EDM-5]"""
    got = schedule(steps, low, high, rho).tolist()
    assert len(got) == steps + 1 and got[-1] == 0
    assert all(a > b for a, b in pairwise(got))
    # The roundings of check_schedule; those of the larger root weigh more in the smaller.
    bound = 20 * rho * EPS
    assert math.isclose(got[0], high, rel_tol=bound)
    assert math.isclose(got[-2], low, rel_tol=bound * (high / low) ** (1 / rho))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "at least one step, got 0"),
        ((5, 1.0, 1.0), "sigma_min < sigma_max, got 1.0 and 1.0"),
        ((5, 2.0, 1.0), "sigma_min < sigma_max"),
        ((5, 0.0, 1.0), "0 < sigma_min"),
        ((5, -1.0, 1.0), "0 < sigma_min"),
        ((5, math.nan, 1.0), "0 < sigma_min"),
        ((5, 1.0, math.inf), "sigma_max"),
        ((5, 0.1, 1.0, 0.0), "rho must be positive, got 0.0"),
    ],
)
def test_schedule_invalid(arguments: tuple[float, ...], message: str) -> None:
    """[EDM-5]"""
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)  # type: ignore[arg-type]


# Sampler


def test_sample_value() -> None:
    """[EDM-6] [EDM-7]"""
    check_sample(sample)


def test_sample_evaluations() -> None:
    """[EDM-7]"""
    check_evaluations(sample)


def test_sample_is_second_order_and_euler_first() -> None:
    """[EDM-7] against the closed-form flow of a Gaussian."""
    check_order(sample, 2.0)
    check_order(euler_sample, 1.0)


def test_euler_sample_value() -> None:
    """[EDM-7] the first-order sampler by a loop: n evaluations."""
    sigmas, x0, count = schedule(6, 0.05, 5.0), normal(2, 3), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        count.append(1)
        return pointwise(x, sigma)

    want = torch.zeros_like(x0)
    for m in range(2):
        for v in range(3):
            x = 5.0 * x0[m, v].item()
            for now, after in pairwise(sigmas.tolist()):
                x += (after - now) * (x - (math.tanh(x) / (1 + now) + x / (2 + now**2))) / now
            want[m, v] = x
    assert (euler_sample(denoise, x0, sigmas) - want).abs().max() <= 64 * EPS * 5
    assert len(count) == 6


def test_one_step_is_the_denoiser() -> None:
    """[EDM-7] n = 1 is Euler down to 0: D(sigma_0 z; sigma_0)."""
    z = normal(2, 3)
    got = sample(pointwise, z, schedule(1, 0.1, 5.0))
    sigma = schedule(1, 0.1, 5.0)[0].expand(2)
    assert (got - pointwise(sigma[:, None] * z, sigma)).abs().max() <= 4 * EPS * 5 * z.abs().max()


@given(st.floats(0, 50), st.integers(1, 100), st.floats(0.01, 1), st.floats(1, 50), st.floats(0.001, 100))
def test_churn_gamma_value(s_churn: float, steps: int, low: float, high: float, sigma: float) -> None:
    """[EDM-6]"""
    gamma = Churn(s_churn, low, high).gamma(sigma, steps)
    if sigma < low or sigma > high:
        assert gamma == 0
    elif s_churn / steps < math.sqrt(2) - 1:
        assert gamma == s_churn / steps
    else:
        assert gamma == math.sqrt(2) - 1


def test_churn_gamma_at_its_limits() -> None:
    """[EDM-6] both ends belong to the range; without churn nothing is added."""
    churn = Churn(2.0, 0.5, 4.0)
    assert churn.gamma(0.5, 10) == churn.gamma(4.0, 10) == 0.2
    assert churn.gamma(math.nextafter(0.5, 0), 10) == churn.gamma(math.nextafter(4.0, 5), 10) == 0
    assert Churn().gamma(1.0, 10) == 0


@pytest.mark.parametrize("arguments", [{"s_churn": -1.0}, {"s_noise": -0.1}, {"s_churn": math.nan}])
def test_churn_invalid(arguments: dict[str, float]) -> None:
    """[EDM-6]"""
    with pytest.raises(ValueError, match="s_churn and s_noise must not be negative"):
        Churn(**arguments)


@pytest.mark.parametrize("churn", [Churn(), Churn(10.0), Churn(20.0, 0.05, 50.0, 1.007)], ids=str)
def test_sample_exact_moments(churn: Churn) -> None:
    """[EDM-6] [EDM-7] [EDM-10] the sampler is affine in its noises: unit vectors give its exact mean and covariance,
    which a recursion of scalars in each mode gives too."""
    steps, size = 12, 3
    mean, covariance = gaussian(size, seed=5)
    sigmas = schedule(steps, 0.01, 20.0)

    def run(z: Tensor) -> Tensor:
        fields = z.reshape(-1, steps + 1, size).transpose(0, 1)
        return sample(gaussian_denoiser(mean, covariance), fields[0], sigmas, churn, fields[1:])

    offset, factor = probe(run, (steps + 1) * size)
    values, vectors = torch.linalg.eigh(covariance)
    shift, spread = [], []
    for c, m in zip(values.tolist(), (vectors.T @ mean).tolist(), strict=True):
        a, v = -m, sigmas[0].item() ** 2  # mean of x - m, variance
        for now, after in pairwise(sigmas.tolist()):
            hat = now * (1 + churn.gamma(now, steps))
            v += (hat**2 - now**2) * churn.s_noise**2
            # x - D = (x - m) s^2 / (c + s^2), so that one step multiplies x - m by a number.
            slope = hat / (c + hat**2)
            predicted = 1 + (after - hat) * slope
            second = predicted * after / (c + after**2)
            keep = predicted if after == 0 else 1 + (after - hat) * (slope + second) / 2
            a, v = keep * a, keep**2 * v
        shift.append(m + a)
        spread.append(v)
    want_mean = vectors @ torch.tensor(shift, dtype=torch.float64)
    want_covariance = vectors @ torch.diag(torch.tensor(spread, dtype=torch.float64)) @ vectors.T
    assert (offset - want_mean).abs().max() <= 64 * EPS * 20
    assert (factor @ factor.T - want_covariance).abs().max() <= 64 * EPS * 20


@pytest.mark.parametrize("sigma_max", [20.0, 80.0, 320.0])
def test_start_error_is_that_of_the_flow(sigma_max: float) -> None:
    """[EDM-5] [EDM-7] the sampler starts from N(0, s_max^2) in place of N(mu, C + s_max^2): it misses the mean by the
    factor sqrt(c / (c + s_max^2)) in each mode, and Heun's error comes on top, less than 2 / n of it with n = 160."""
    mean, covariance = gaussian(4)
    sigmas = schedule(160, 0.002, sigma_max)
    offset, factor = probe(lambda z: sample(gaussian_denoiser(mean, covariance), z, sigmas), 4)
    want_offset, want_factor = flow(mean, covariance, sigmas)
    missed = (offset - mean).norm().item()
    values = torch.linalg.eigvalsh(covariance)
    assert missed <= 1.01 * mean.norm().item() * (values.max().sqrt() / sigma_max).item()
    assert (offset - want_offset).norm().item() <= missed / 80
    assert (factor - want_factor).abs().max().item() <= 2e-3
    relative = (torch.linalg.matrix_norm(factor @ factor.T - covariance) / torch.linalg.matrix_norm(covariance)).item()
    assert relative <= 1.1 * values.max().item() / sigma_max**2 + 2e-3


def test_gaussian_denoiser_value() -> None:
    """[EDM-10] against one dense solve a member; D -> x as sigma falls, -> mu as it grows."""
    mean, covariance = gaussian(5, seed=8)
    x, sigma = 2 * normal(3, 5), torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    got = gaussian_denoiser(mean, covariance)(x, sigma)
    for m in range(3):
        total = covariance + sigma[m] ** 2 * torch.eye(5, dtype=torch.float64)
        want = mean + covariance @ torch.linalg.solve(total, x[m] - mean)
        # The condition number of C is about 20, and eigenvalues come to eps of the largest.
        assert (got[m] - want).abs().max() <= 64 * EPS * 20
    assert (got[0] - x[0]).abs().max() <= 1e-4 / 0.12 * (x[0] - mean).norm()
    assert (got[2] - mean).abs().max() <= 2.6e-4 * (x[2] - mean).norm()


def test_sample_uses_no_hidden_randomness() -> None:
    """[EDM-8] global generators untouched and without effect; noises of steps without churn are not used."""
    latents, noises = normal(2, 3), normal(8, 2, 3, seed=1)
    churn = Churn(5.0, s_min=0.1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(pointwise, latents, schedule(8), churn, noises)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, sample(pointwise, latents, schedule(8), churn, noises))
    changed = noises.clone()
    changed[-1] += 1  # the last level lies below s_min
    assert torch.equal(first, sample(pointwise, latents, schedule(8), churn, changed))
    assert not torch.equal(first, sample(pointwise, latents, schedule(8), churn, noises + 1))


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
    """[DA-6] the first step and the members that are lost, infinite or not a number."""

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


@pytest.mark.parametrize(
    "sigmas", [[1.0], [2.0, 1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0], [math.nan, 1.0, 0.0]]
)
def test_sample_invalid_levels(sigmas: list[float]) -> None:
    """[EDM-5]"""
    with pytest.raises(ValueError, match="must decrease strictly to 0, got"):
        sample(pointwise, normal(1, 2), torch.tensor(sigmas, dtype=torch.float64))


@pytest.mark.parametrize("shape", [None, (3, 2, 3), (5, 2, 3), (4, 1, 3)])
def test_sample_invalid_churn_noises(shape: tuple[int, ...] | None, unchecked: None) -> None:
    """[EDM-8] none, too few, too many, or one for all members: that would make members alike."""
    noises = None if shape is None else normal(*shape)
    with pytest.raises(ValueError, match=r"one noise field per step, of shape \(4, 2, 3\)"):
        sample(pointwise, normal(2, 3), schedule(4), Churn(1.0), noises)
