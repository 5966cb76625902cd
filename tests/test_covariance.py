"""The covariance extension against the same formulas with every matrix written out, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, denoiser, randomise
from storm_ref.edm import precondition as plain_precondition
from storm_ref.edm import sample, schedule
from storm_ref.guidance import Observations, OperatorObservations, pigdm
from storm_ref.tiling import Tiling
from storm_ref.tokenisation import region_position
from storm_ref.workbench.prior.covariance import (
    Covariance,
    correlation_length,
    covariance_denoiser,
    distance,
    fit,
    guidance,
    output_scale,
    precondition,
    white,
)

SHAPE = (2, 3, 4)
SIZE = 24
EYE = torch.eye(SIZE, dtype=torch.float64)


@pytest.fixture
def covariance(generator: torch.Generator) -> Covariance:
    """A covariance of five leading directions above a white rest."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5]).double()
    return Covariance(basis[:, :5].contiguous(), values, torch.tensor(0.2).double(), SHAPE)


@pytest.fixture
def observations() -> Observations:
    """Four observations of separate points with different errors, one of them a mean of two points."""
    index = torch.tensor([[0, 0], [5, 6], [17, 17], [23, 23]])
    weight = torch.tensor([[1.0, 0.0], [0.25, 0.75], [1.0, 0.0], [1.0, 0.0]])
    return Observations(torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.1, 0.3, 0.2, 1.0]), index, weight, SHAPE)


def dense(covariance: Covariance) -> Tensor:
    v = covariance.vectors
    return v @ torch.diag(covariance.values - covariance.rest) @ v.T + covariance.rest * EYE


def operator(observations: Observations) -> Tensor:
    return observations.apply(EYE.reshape(SIZE, *SHAPE)).T


def gaussian(covariance: Covariance):  # type: ignore[no-untyped-def]
    """Return D with F = 0."""
    return lambda x, sigma: precondition(lambda z, _: torch.zeros_like(z), x, sigma, covariance)


def posterior(covariance: Covariance, observations: Observations) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of x given y from the Kalman formulas with full matrices."""
    b, h = dense(covariance), operator(observations)
    gain = b @ h.T @ torch.linalg.inv(h @ b @ h.T + torch.diag(observations.variance.double()))
    return gain @ observations.value.double(), b - gain @ h @ b


def test_apply_equals_function_of_matrix(covariance: Covariance, generator: torch.Generator) -> None:
    x = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    s2 = torch.tensor([[0.1], [1.0], [30.0]]).double()
    got = covariance.apply(x, lambda v: v / (v + s2))
    for i in range(3):
        want = dense(covariance) @ torch.linalg.inv(dense(covariance) + s2[i] * EYE) @ x[i].flatten()
        torch.testing.assert_close(got[i].flatten(), want, rtol=0, atol=1e-12)


def test_mean_is_trace_over_size(covariance: Covariance) -> None:
    torch.testing.assert_close(covariance.mean(lambda v: v)[0], dense(covariance).trace() / SIZE, rtol=0, atol=1e-13)


def test_output_scale_is_root_mean_square_of_what_is_left(covariance: Covariance) -> None:
    """c_out^2 is tr s^2 Sigma (Sigma + s^2)^-1 / N, for two noise levels in one batch."""
    sigma = torch.tensor([0.3, 5.0]).double()
    got = output_scale(covariance, sigma)
    for i, s in enumerate(sigma):
        left = s**2 * dense(covariance) @ torch.linalg.inv(dense(covariance) + s**2 * EYE)
        torch.testing.assert_close(got[i] ** 2, left.trace() / SIZE, rtol=1e-12, atol=0)


def test_precondition_without_directions_is_edm(generator: torch.Generator) -> None:
    """Rank 0 with variance sigma_d^2 is [EDM-1], with a network that uses its input and sigma."""
    x = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.2, 7.0]).double()

    def network(z: Tensor, s: Tensor) -> Tensor:
        return z.sin() * s[:, None, None, None].to(z)

    got = precondition(network, x, sigma, white(SHAPE, 1.5**2), torch.float64)
    torch.testing.assert_close(got, plain_precondition(network, x, sigma, 1.5, torch.float64), rtol=0, atol=1e-13)


def test_precondition_asks_network_for_unit_input(covariance: Covariance, generator: torch.Generator) -> None:
    """c_in makes the mean square of x + s n one."""
    factor = torch.linalg.cholesky(dense(covariance))
    noise = torch.randn(4000, 2, SIZE, generator=generator, dtype=torch.float64)
    x = (noise[:, 0] @ factor.T + 2.0 * noise[:, 1]).reshape(-1, *SHAPE)
    seen: list[Tensor] = []
    precondition(lambda z, _: seen.append(z) or z, x, torch.full((4000,), 2.0).double(), covariance, torch.float64)
    # The mean square of 4000 x 24 values, standard error below 1 %.
    assert seen[0].square().mean().item() == pytest.approx(1, abs=0.04)


def test_guidance_is_the_exact_posterior_mean_at_every_level(
    covariance: Covariance, observations: Observations, generator: torch.Generator
) -> None:
    """E[x_0 | x, y] of a Gaussian: x and y are both observations of x_0."""
    b, h = dense(covariance), operator(observations)
    for level in (0.05, 1.0, 40.0):
        x = level * torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
        both = torch.cat([EYE, h])
        errors = torch.full((SIZE,), level**2, dtype=torch.float64), observations.variance.double()
        noise = torch.diag(torch.cat(errors))
        gain = b @ both.T @ torch.linalg.inv(both @ b @ both.T + noise)
        want = torch.cat([x.flatten(1), observations.value.double().expand(2, -1)], 1) @ gain.T
        got = guidance(gaussian(covariance), observations, covariance)(x, torch.full((2,), level, dtype=torch.float64))
        torch.testing.assert_close(got.flatten(1), want, rtol=0, atol=1e-10)


def test_guidance_samples_the_kalman_posterior(covariance: Covariance, observations: Observations) -> None:
    """The sampler is affine in its noise, so unit latents give its exact moments.

    What is left is its own: it starts about 0 instead of about the mean, of which 3 / s_max survives (3 is the largest
    standard deviation), and 300 steps of second order.
    """
    mean, spread = posterior(covariance, observations)
    latents = torch.cat([torch.zeros(1, SIZE), EYE]).reshape(-1, *SHAPE)
    guided = guidance(gaussian(covariance), observations, covariance)
    x = sample(guided, latents, schedule(300, 0.002, 2000.0)).flatten(1)
    assert (x[0] - mean).norm() < 3 / 2000 * mean.norm() + 1e-3 * mean.norm()
    got = (x[1:] - x[0]).T @ (x[1:] - x[0])
    assert (got - spread).norm() < 0.01 * spread.norm()
    assert (got - dense(covariance)).norm() > 0.2 * spread.norm(), "observations left no mark"


def test_guidance_white_has_the_weight_of_pigdm(observations: Observations) -> None:
    """Rank 0: for an exactly Gaussian D = sd^2 x / (sd^2 + s^2), J is what pigdm differentiates [GUIDE-3]."""
    prior = white(SHAPE, 2.0)
    x, sigma = torch.linspace(-1, 1, SIZE).double().reshape(1, *SHAPE), torch.tensor([0.7]).double()
    got = guidance(gaussian(prior), observations, prior)(x, sigma)
    want = pigdm(lambda z, s: z * 2.0 / (2.0 + s[:, None, None, None] ** 2), observations, math.sqrt(2.0))(x, sigma)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_guidance_without_observations_is_the_denoiser(covariance: Covariance) -> None:
    none = Observations(torch.zeros(0), torch.zeros(0), torch.zeros(0, 1).long(), torch.zeros(0, 1), SHAPE)
    denoise = gaussian(covariance)
    assert guidance(denoise, none, covariance) is denoise


def test_guidance_invalid_operator(covariance: Covariance) -> None:
    seen = OperatorObservations(torch.ones(1), torch.ones(1), lambda x: x.flatten(-3)[..., :1] ** 2)
    with pytest.raises(ValueError, match="linear observations; use mmps"):
        guidance(gaussian(covariance), seen, covariance)


def test_guidance_invalid_levels(covariance: Covariance, observations: Observations) -> None:
    guided = guidance(gaussian(covariance), observations, covariance)
    with pytest.raises(ValueError, match="one noise level at a time"):
        guided(torch.zeros(2, *SHAPE).double(), torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rest": torch.tensor(0.0).double()}, "positive variance"),
        ({"rest": torch.tensor(0.6).double()}, "no leading direction a smaller one"),
        ({"shape": (2, 3, 5)}, "do not fit"),
    ],
)
def test_covariance_invalid(covariance: Covariance, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(covariance, **change)


def network_and_condition(generator: torch.Generator) -> tuple[Storm, Condition, Tensor]:
    network = Storm(StormConfig(2, 1, (2, 2), 16, 2, 1, position_features=2)).double()
    randomise(network, generator)
    position = region_position(torch.arange(12.0), torch.arange(16.0), (2, 2), 12.0)
    static, past = (torch.randn(1, *s, generator=generator).double() for s in ((1, 12, 16), (2, 2, 12, 16)))
    with torch.no_grad():
        memory = network.compress(past, static.expand(1, 2, 1, 12, 16), torch.tensor([[6.0, 12.0]]), position)
    return network, Condition(static, memory, position[None]), torch.randn(3, 2, 12, 16, generator=generator).double()


@torch.no_grad()
def test_covariance_denoiser_white_on_one_tile_is_the_denoiser(generator: torch.Generator) -> None:
    """[NET-5] A white covariance of variance 1 gives the denoiser with sigma_d = 1."""
    network, condition, x = network_and_condition(generator)
    sigma = torch.full((3,), 1.3).double()
    got = covariance_denoiser(network, condition, Tiling.whole((12, 16), False, (2, 2)), white((2, 12, 16)))(x, sigma)
    torch.testing.assert_close(got, denoiser(network, condition)(x, sigma), rtol=0, atol=1e-12)


@torch.no_grad()
def test_covariance_denoiser_blends_what_the_network_adds(generator: torch.Generator) -> None:
    """The tiled denoiser differs from the untiled one by the network alone: with F = 0 there are no seams."""
    network, condition, x = network_and_condition(generator)
    prior = fit(torch.randn(30, 2, 12, 16, generator=generator), False, 20, generator)
    cut = Tiling.of((12, 16), (6, 8), (2, 2), (2, 2), False, (2, 2))
    sigma = torch.full((3,), 0.8).double()
    whole, tiles = (
        covariance_denoiser(network, condition, t, prior)(x, sigma)
        for t in (Tiling.whole((12, 16), False, (2, 2)), cut)
    )
    assert (whole - tiles).abs().max() > 1e-3
    for weight in network.final.parameters():
        weight.zero_()
    network.final_adaptive.weight.zero_()
    got = covariance_denoiser(network, condition, cut, prior)(x, sigma)
    torch.testing.assert_close(got, gaussian(prior)(x, sigma), rtol=0, atol=1e-12)


def stationary(generator: torch.Generator, count: int, length: float, width: int = 40) -> Tensor:
    """Draw fields on 10 x width points with correlation exp(-|dx| / length - |dy| / 3)."""
    roots = [torch.linalg.cholesky((-distance(n, m, False)).exp()) for n, m in ((10, 3.0), (width, length))]
    return roots[0] @ torch.randn(count, 1, 10, width, generator=generator).double() @ roots[1].T


def test_correlation_length_value(generator: torch.Generator) -> None:
    """exp(-d / m) falls to 1/e at m; 2000 fields leave an error of about 2 %."""
    y, x = correlation_length(stationary(generator, 2000, 5.0), False)
    assert (y, x) == pytest.approx((3.0, 5.0), rel=0.05)


def test_correlation_length_wraps(generator: torch.Generator) -> None:
    """On a circle of 40 points exp(-chord / 5) falls to 1/e at an arc of 40 / pi asin(5 pi / 40) = 5.14 points,
    wherever the record begins.
    """
    roots = [torch.linalg.cholesky((-distance(n, m, p)).exp()) for n, m, p in ((10, 3.0, False), (40, 5.0, True))]
    x = roots[0] @ torch.randn(2000, 1, 10, 40, generator=generator).double() @ roots[1].T
    assert correlation_length(x, True) == pytest.approx((3.0, 5.14), rel=0.05)
    assert correlation_length(x.roll(7, -1), True) == pytest.approx(correlation_length(x, True), rel=1e-9)


def test_correlation_length_of_constant_is_the_axis() -> None:
    assert correlation_length(torch.randn(50, 1, 1, 1).expand(50, 2, 5, 7), False) == (5.0, 7.0)


def test_distance_value() -> None:
    """Distances are lags over length; on a circle of 4 points they are chords, sqrt 2 r and 2 r with r = 4 / (2 pi)."""
    assert distance(4, 2.0, False)[0].tolist() == [0.0, 0.5, 1.0, 1.5]
    r = 2 / math.pi
    assert distance(4, 1.0, True)[0].tolist() == pytest.approx([0.0, math.sqrt(2) * r, 2 * r, math.sqrt(2) * r])


def formula(d: Tensor, shrinkage: float, periodic: bool) -> Tensor:
    """Return Sigma of the module's equations as a full matrix."""
    channels, height, width = d.shape[1:]
    flat = d.flatten(1)
    lengths = correlation_length(d, periodic)
    y, x = distance(height, lengths[0], False), distance(width, lengths[1], periodic)
    gauss = torch.kron((-(y**2) / 2).exp(), (-(x**2) / 2).exp()).repeat(channels, channels)
    expo = torch.block_diag(*[torch.kron((-y).exp(), (-x).exp())] * channels)
    std = flat.square().mean(0).sqrt()
    return (1 - shrinkage) * gauss * (flat.T @ flat / len(d)) + shrinkage * std[:, None] * expo * std


@pytest.mark.parametrize("periodic", [False, True])
def test_fit_finds_the_leading_directions_of_the_formula(periodic: bool, generator: torch.Generator) -> None:
    """Two correlated channels. After three iterations with 28 directions variance j is off by about (l_29 / l_j)^6 of
    itself, which is below 1e-3 for the first three; float32 keeps the trace to 1e-5.
    """
    noise = torch.randn(60, 2, 5, 6, generator=generator, dtype=torch.float64)
    d = torch.einsum("cd,tdhw->tchw", torch.tensor([[1.0, 0.0], [0.7, 0.5]]).double(), noise)
    d = d + d.roll(1, -1) + d.roll(1, -2)
    sigma = formula(d, 0.1, periodic)
    values, vectors = torch.linalg.eigh(sigma)
    got = fit(d, periodic, 12, generator)
    assert (values.flip(0)[28] / values.flip(0)[2]) ** 6 < 1e-3
    torch.testing.assert_close(got.values[:3], values.flip(0)[:3], rtol=1e-3, atol=0)
    overlap = (got.vectors.T @ vectors.flip(1)[:, :1]).norm()
    assert overlap.item() == pytest.approx(1, abs=1e-3), "the first direction is not among those found"
    torch.testing.assert_close(got.vectors.T @ got.vectors, torch.eye(12).double(), rtol=0, atol=1e-5)
    trace = got.mean(lambda v: v)[0] * d[0].numel()
    assert trace.item() == pytest.approx(sigma.trace().item(), rel=1e-5)


def test_fit_repeats_with_its_generator(generator: torch.Generator) -> None:
    d = torch.randn(40, 1, 6, 6, generator=generator)
    first, again, other = (fit(d, False, 5, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_fit_of_rank_0_is_white(generator: torch.Generator) -> None:
    d = 3 * torch.randn(200, 1, 5, 5, generator=generator)
    got = fit(d, False, 0, generator)
    assert got.vectors.shape == (25, 0)
    assert got.rest.item() == pytest.approx(d.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("rank", "shrinkage", "message"), [(25, 0.1, "rank must be"), (-1, 0.1, "rank"), (3, 0.0, "shrinkage")]
)
def test_fit_invalid(rank: int, shrinkage: float, message: str, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=message):
        fit(torch.randn(20, 1, 5, 5), False, rank, generator, shrinkage)
