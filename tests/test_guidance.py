"""[GUIDE-1] to [GUIDE-10]: linear-Gaussian problems with a Kalman answer, and the exact wrong answers of the
approximations."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from checks_sampling import (
    EPS,
    SIGMAS,
    Problem,
    check_adjoint,
    check_exact,
    check_guided,
    check_posterior,
    conditional_mean,
    flow,
    gaussian,
    normal,
    probe,
    problem,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storm_ref.edm import Denoise, NotFiniteError, gaussian_denoiser, sample, schedule
from storm_ref.guidance import (
    Observations,
    ObservationsLike,
    OperatorObservations,
    conjugate_gradient,
    dps,
    mmps,
    pigdm,
    sda,
)

Method = Callable[[Denoise, ObservationsLike], Denoise]

METHODS: dict[str, Method] = {
    "dps": dps,
    "pigdm": lambda d, o: pigdm(d, o, 0.7),
    "sda": lambda d, o: sda(d, o, 0.1),
    "mmps": lambda d, o: mmps(d, o, 50),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_observation(value: float = 0.0, variance: float = 1.0, point: int = 0, weight: float = 1.0) -> Observations:
    return Observations(vector(value), vector(variance), torch.tensor([[point]]), vector(weight)[None], (2, 2, 2))


# Observations


def test_observations_apply_and_adjoint_value() -> None:
    """[GUIDE-1] H and H^T bit for bit on integers."""
    check_adjoint(Observations.apply, Observations.adjoint)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_observations_adjoint_identity(count: int, reads: int, seed: int) -> None:
    """<H x, d> = <x, H^T d>, for any rows, repeated points included; the adjoint is the derivative's transpose."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 12, (count, reads), generator=generator)
    weight = torch.randint(-4, 5, (count, reads), generator=generator).double()
    o = Observations(torch.zeros(count).double(), torch.ones(count).double(), index, weight, (3, 2, 2))
    x = torch.randint(-9, 10, (2, 3, 2, 2), generator=generator).double().requires_grad_()
    d = torch.randint(-9, 10, (2, count), generator=generator).double()
    seen = o.apply(x)
    assert (seen * d).sum() == (x * o.adjoint(d)).sum()
    assert torch.equal(torch.autograd.grad(seen, x, d)[0], o.adjoint(d))


def test_observations_apply_batch_shapes() -> None:
    """No batch dimension, one, or two; the dtype is the state's."""
    o = problem().observations
    x = normal(3, 4, 2, 2, 2)
    assert torch.equal(o.apply(x)[1, 2], o.apply(x[1, 2]))
    assert torch.equal(o.adjoint(normal(3, 4, 5))[2, 1], o.adjoint(normal(3, 4, 5)[2, 1]))
    assert o.apply(x.float()).dtype == torch.float32


def test_observations_read_no_other_point() -> None:
    """[GUIDE-7] unobserved points may hold anything."""
    o = one_observation(point=5)
    x = torch.full((2, 2, 2), math.nan, dtype=torch.float64)
    x[1, 0, 1] = 3.0
    assert o.apply(x).tolist() == [3.0]


@every_method
def test_guided_mean_with_nan_at_unobserved_points(method: Method) -> None:
    """[GUIDE-7] a denoiser that is NaN at a point nobody observed leaves the others as they are."""
    o = replace(one_observation(1.0, 0.5, point=5), index=torch.tensor([[5]]))

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma[:, None, None, None] ** 2)

    x, sigma = normal(1, 2, 2, 2), vector(1.5)
    want = method(half, o)(x, sigma).flatten()
    x = x.clone()
    x[0, 0, 0, 0] = math.nan
    got = method(half, o)(x, sigma).flatten()
    assert torch.equal(got[1:], want[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": vector(1.0, math.nan)}, "observation 1 is nan; leave missing"),
        ({"value": vector(math.inf, 1.0)}, "observation 0 is inf"),
        ({"variance": vector(0.5, 0.0)}, r"variance of observation 1 is 0\.0; give a positive"),
        ({"variance": vector(-1.0, 1.0)}, r"variance of observation 0 is -1\.0"),
        ({"variance": vector(1.0, math.nan)}, "variance of observation 1 is nan"),
        ({"variance": vector(1.0, math.inf)}, "variance of observation 1 is inf"),
        ({"variance": vector(1.0)}, r"\(2,\) and \(1,\)"),
        (
            {"index": torch.tensor([[0], [8]])},
            r"observation 1 reads points \[8\], outside the state of shape \(2, 2, 2\)",
        ),
        ({"index": torch.tensor([[-1], [0]])}, r"observation 0 reads points \[-1\]"),
        ({"index": torch.tensor([[0, 1], [0, 1]])}, r"\(2, 2\) and \(2, 1\) for 2 values"),
        ({"index": torch.zeros(3, 1, dtype=torch.int64), "weight": torch.ones(3, 1)}, "for 2 values"),
        ({"weight": vector(1.0, math.nan)[:, None]}, "weight of an observation is not finite"),
    ],
)
def test_observations_invalid(change: dict[str, Tensor], message: str, unchecked: None) -> None:
    """[GUIDE-6] [GUIDE-7] every refusal names the observation and what was seen."""
    good = {
        "value": vector(1, 2),
        "variance": vector(1, 1),
        "index": torch.tensor([[0], [7]]),
        "weight": vector(1, 1)[:, None],
    }
    Observations(**good, shape=(2, 2, 2))
    with pytest.raises(ValueError, match=message):
        Observations(**{**good, **change}, shape=(2, 2, 2))


def test_observations_invalid_state() -> None:
    with pytest.raises(ValueError, match=r"state of shape \(2, 2, 2\), got \(2, 4, 1\)"):
        one_observation().apply(torch.zeros(1, 2, 4, 1))


@pytest.mark.parametrize(("value", "variance"), [(math.nan, 1.0), (1.0, 0.0), (1.0, -2.0)])
def test_operator_observations_invalid(value: float, variance: float) -> None:
    """[GUIDE-6] [GUIDE-7]"""
    with pytest.raises(ValueError, match="observation 0"):
        OperatorObservations(vector(value), vector(variance), lambda x: x)


# The guided mean


@pytest.mark.parametrize("name", METHODS)
def test_guided_mean_value(name: str) -> None:
    """[GUIDE-1] to [GUIDE-6] against dense matrices."""
    check_guided(name, METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_guided_mean_value_with_an_operator(name: str) -> None:
    """[GUIDE-1] the same observations given as a function."""

    def method(denoise: Denoise, o: Observations) -> Denoise:
        return METHODS[name](denoise, OperatorObservations(o.value, o.variance, o.apply))

    check_guided(name, method)


def test_mmps_is_exact_for_a_gaussian_prior() -> None:
    """[GUIDE-8]"""
    check_exact(METHODS["mmps"], problem())


def test_pigdm_is_exact_for_an_uncorrelated_prior() -> None:
    """[GUIDE-3] C = sigma_d^2 I makes r^2 I the covariance of x_0 given x; with another C it is off."""
    check_exact(METHODS["pigdm"], problem(0.7**2 * torch.eye(8, dtype=torch.float64)))
    with pytest.raises(AssertionError):
        check_exact(METHODS["pigdm"], problem())


def test_sda_without_gamma_is_dps_and_half_of_pigdm() -> None:
    """[GUIDE-2] [GUIDE-4] gamma = 0 is dps; for one observed point gamma = r^2 / sigma^2 is pigdm."""
    p, s = problem(), 0.9
    x, sigma = normal(2, 2, 2, 2), torch.full((2,), s, dtype=torch.float64)
    assert torch.equal(sda(p.denoise, p.observations, 0.0)(x, sigma), dps(p.denoise, p.observations)(x, sigma))
    o = one_observation(0.4, 0.3, 2)
    gamma = 0.7**2 / (s**2 + 0.7**2)
    apart = sda(p.denoise, o, gamma)(x, sigma) - pigdm(p.denoise, o, 0.7)(x, sigma)
    assert apart.abs().max() <= 1e-10 * 50


@every_method
def test_guidance_without_observations_is_the_denoiser(method: Method) -> None:
    """[GUIDE-10] bit for bit, for both kinds of observations."""
    none = torch.zeros(0, dtype=torch.float64)
    o = Observations(none, none, torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4).double(), (2, 2, 2))
    p, x = problem(), normal(2, 2, 2, 2)
    sigma = vector(0.3, 3.0)
    want = p.denoise(x, sigma)
    assert torch.equal(method(p.denoise, o)(x, sigma), want)
    assert torch.equal(method(p.denoise, OperatorObservations(none, none, o.apply))(x, sigma), want)


@every_method
def test_guidance_keeps_members_apart(method: Method) -> None:
    """[GUIDE-1] members of a batch, each with its sigma, answer as if alone."""
    p = problem()
    x, sigma = normal(3, 2, 2, 2), vector(0.1, 1.0, 10.0)
    guided = method(p.denoise, p.observations)
    alone = torch.cat([guided(x[m : m + 1], sigma[m : m + 1]) for m in range(3)])
    assert (guided(x, sigma) - alone).abs().max() <= 1e-10 * 7 / 0.05 * 10


@every_method
def test_guidance_order_of_observations_is_irrelevant(method: Method) -> None:
    """[GUIDE-1] permuted observations, the same guided mean."""
    p, order = problem(), torch.tensor([3, 0, 4, 2, 1])
    o = p.observations
    other = Observations(o.value[order], o.variance[order], o.index[order], o.weight[order], o.shape)
    x, sigma = normal(2, 2, 2, 2), vector(0.5, 5.0)
    apart = method(p.denoise, o)(x, sigma) - method(p.denoise, other)(x, sigma)
    assert apart.abs().max() <= 1e-10 * 7 / 0.05 * 10


@every_method
def test_guidance_is_detached_and_float64(method: Method) -> None:
    """[GUIDE-1] works under no_grad, leaves no graph, keeps the state's dtype, leaves x alone."""
    p, x = problem(), normal(2, 2, 2, 2)
    kept = x.clone()
    with torch.no_grad():
        got = method(p.denoise, p.observations)(x, vector(0.5, 5.0))
    assert got.dtype == torch.float64 and not got.requires_grad and torch.equal(x, kept) and not x.requires_grad
    again = method(p.denoise, p.observations)(x, vector(0.5, 5.0))
    assert torch.equal(got, again) and not again.requires_grad


def wind_speed(x: Tensor) -> Tensor:
    """Speeds at two points of a field (u, v) and the product of two more values: [..., 2, 2, 2] -> [..., 3]."""
    speed = (x[..., 0, 0, :] ** 2 + x[..., 1, 0, :] ** 2).sqrt()
    return torch.cat([speed, (x[..., 0, 1, 0] * x[..., 1, 1, 1])[..., None]], -1)


def nonlinear(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser whose Jacobian is neither constant nor symmetric."""
    mixed = x + 0.3 * x.flip(-1) * x.roll(1, -2)
    return torch.tanh(mixed) / (1 + sigma[:, None, None, None] ** 2) + 0.2


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Jacobian [outputs, inputs] by central differences, good to about step^2 and eps / step."""
    columns = []
    for k in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=torch.float64)
        e[k] = step
        e = e.reshape(x.shape)
        columns.append((f(x + e) - f(x - e)).flatten() / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("s", [0.2, 1.5])
def test_guided_mean_of_a_nonlinear_operator(name: str, s: float) -> None:
    """[GUIDE-1] to [GUIDE-5] wind speed and a product, J and H' by finite differences. For dps the correction is
    -sigma^2 times the gradient in x of |y - H(D(x))|^2 / (2 R), differences of which are a second answer."""
    o = OperatorObservations(vector(1.2, 0.4, -0.3), vector(0.3, 0.1, 0.2), wind_speed)
    x, sigma = normal(1, 2, 2, 2, seed=8), vector(s)
    xhat = nonlinear(x, sigma)
    jacobian, h = finite_difference(lambda z: nonlinear(z, sigma), x), finite_difference(wind_speed, xhat)
    r, innovation = torch.diag(o.variance), o.value - wind_speed(xhat)[0]
    matrix = {
        "dps": r,
        "pigdm": r + s**2 * 0.7**2 / (s**2 + 0.7**2) * h @ h.T,
        "sda": r + 0.1 * s**2 * torch.eye(3, dtype=torch.float64),
        # The product is formed with J^T, and conjugate gradients want it symmetric: compared below at convergence only.
        "mmps": r + s**2 * h @ jacobian.T @ h.T,
    }[name]
    if name == "mmps":
        matrix = (matrix + matrix.T) / 2
    want = xhat.flatten() + s**2 * jacobian.T @ h.T @ torch.linalg.solve(matrix, innovation)
    got = METHODS[name](nonlinear, o)(x, sigma).flatten()
    if name == "mmps":
        asymmetry = torch.linalg.matrix_norm(s**2 * h @ (jacobian - jacobian.T) @ h.T).item()
        assert asymmetry > 1e-3
        assert (got - want).abs().max() <= 10 * asymmetry
        return
    assert (got - want).abs().max() <= 1e-7
    if name == "dps":

        def misfit(z: Tensor) -> Tensor:
            return ((o.value - wind_speed(nonlinear(z, sigma))) ** 2 / (2 * o.variance)).sum()

        gradient = finite_difference(misfit, x)[0]
        assert (got - (xhat.flatten() - s**2 * gradient)).abs().max() <= 1e-7


def test_mmps_of_a_nonlinear_operator_with_a_symmetric_jacobian() -> None:
    """[GUIDE-5] H' J H'^T at xhat, to convergence."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * x.sum((1, 2, 3), keepdim=True)

    o = OperatorObservations(vector(1.2, 0.4, -0.3), vector(0.3, 0.1, 0.2), wind_speed)
    x, sigma = normal(1, 2, 2, 2, seed=8), vector(0.8)
    xhat = denoise(x, sigma)
    jacobian, h = finite_difference(lambda z: denoise(z, sigma), x), finite_difference(wind_speed, xhat)
    w = torch.linalg.solve(torch.diag(o.variance) + 0.8**2 * h @ jacobian @ h.T, o.value - wind_speed(xhat)[0])
    want = xhat.flatten() + 0.8**2 * jacobian.T @ h.T @ w
    assert (mmps(denoise, o, 50)(x, sigma).flatten() - want).abs().max() <= 1e-7


def test_mmps_needs_as_many_steps_as_observations() -> None:
    """[GUIDE-5] the stated number of steps is obeyed: five solve five observations, one does not."""
    p, x, sigma = problem(), normal(1, 2, 2, 2), vector(0.9)
    want = conditional_mean(p, x.flatten(), 0.9)
    errors = [(mmps(p.denoise, p.observations, n)(x, sigma).flatten() - want).abs().max().item() for n in range(1, 6)]
    assert min(errors[:4]) > 1e-2 and errors[4] <= 1e-9


def test_pigdm_needs_one_step_for_points_apart() -> None:
    """[GUIDE-3] distinct points with one variance: R + r^2 H H^T is a multiple of the identity."""
    o = Observations(
        normal(3), torch.full((3,), 0.3).double(), torch.tensor([[1], [4], [7]]), torch.ones(3, 1), (2, 2, 2)
    )
    p, x, sigma = problem(), normal(2, 2, 2, 2), vector(0.3, 3.0)
    once, fully = pigdm(p.denoise, o, 0.7, 1)(x, sigma), pigdm(p.denoise, o, 0.7, 50)(x, sigma)
    assert (once - fully).abs().max() <= 64 * EPS * fully.abs().max()


def test_sda_invalid_gamma() -> None:
    for gamma in (-0.1, math.nan):
        with pytest.raises(ValueError, match="gamma must not be negative"):
            sda(problem().denoise, problem().observations, gamma)


# Sampling the posterior


def test_mmps_samples_the_posterior() -> None:
    """[GUIDE-1] [GUIDE-8] 80 Heun steps: mean and covariance of the draws, exactly, by unit vectors. What is left comes
    from the start: N(0, s_max^2) stands in for N(m, P + s_max^2)."""
    whitened, relative = check_posterior(lambda d, o, z, sigmas: sample(mmps(d, o, 50), z, sigmas))
    posterior_mean, _ = problem().kalman()
    # In a mode with variance p the flow keeps sqrt(p / (p + s_max^2)) of the missed mean: |m| / s_max, whitened.
    assert 0.9 <= whitened / (posterior_mean.norm().item() / 80) <= 1.1
    assert relative <= 5e-3


def test_posterior_mean_error_falls_with_sigma_max() -> None:
    """[GUIDE-8] tenfold s_max, a tenth of the error in the mean; twice the steps keep Heun's part below it."""
    p = problem()
    posterior_mean, _ = p.kalman()
    errors = []
    for sigma_max, steps in ((80.0, 30), (800.0, 45), (8000.0, 70)):
        sigmas = schedule(steps, 0.002, sigma_max)
        zero = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
        mean = sample(mmps(p.denoise, p.observations, 50), zero, sigmas).flatten()
        errors.append((mean - posterior_mean).norm().item())
    assert 9 <= errors[0] / errors[1] <= 11 and 9 <= errors[1] / errors[2] <= 11


def variances(method: Method, c: Tensor, r: Tensor, steps: int) -> Tensor:
    """Variances that the sampler draws for independent scalars with priors N(0, c), each observed with error
    variance r."""
    denoise = gaussian_denoiser(torch.zeros_like(c), torch.diag(c))
    o = OperatorObservations(torch.zeros_like(r), r, lambda x: x)
    factor = probe(lambda z: sample(method(denoise, o), z, schedule(steps)), len(c))[1]
    assert (factor - torch.diag(factor.diagonal())).abs().max() <= 1e-9
    return factor.diagonal() ** 2


def extrapolated(method: Method, c: Tensor, r: Tensor, want: Tensor) -> float:
    """Largest relative distance from `want` after Richardson's step on 100 and 200 steps, an error of second order."""
    coarse, middle, fine = (variances(method, c, r, n) for n in (50, 100, 200))
    ratio = (coarse - middle) / (middle - fine)
    assert bool(((ratio > 3.5) & (ratio < 5)).all()), f"second order, got {ratio.tolist()}"
    return ((4 * fine - middle) / 3 / want - 1).abs().max().item()


START = 80.0**2


def test_dps_samples_its_own_variance() -> None:
    """[GUIDE-9] c exp(-c / R), and with a finite start S: S^2 c / (c + S^2) exp(-c / R S^2 / (c + S^2)). Not
    Kalman's."""
    c, r = vector(1.0, 1.0, 0.5, 2.0), vector(1.0, 0.5, 1.0, 1.0)
    want = START * c / (c + START) * torch.exp(-c / r * START / (c + START))
    assert (want / (c * torch.exp(-c / r)) - 1).abs().max() < 1e-3
    assert extrapolated(dps, c, r, want) <= 2e-4
    assert (want / (c * r / (c + r)) - 1).abs().min() > 0.08


@pytest.mark.parametrize("ratio", [20, 100])
def test_dps_is_stiff(ratio: int) -> None:
    """[GUIDE-9] with 1.3 c / R steps the variance falls, with half of c / R it is above the prior's by far."""
    c, r = vector(1.0), vector(1 / ratio)
    assert variances(dps, c, r, round(1.3 * ratio)).item() < 1e-2
    assert variances(dps, c, r, ratio // 2).item() > 10


def test_dps_too_stiff_stops_the_sampler() -> None:
    """[GUIDE-9] [DA-6] a precise observation and few steps: refused in words, not returned as numbers."""
    with pytest.raises(NotFiniteError, match=r"more steps or another guidance method"):
        variances(dps, vector(1.0), vector(1e-30), 12)


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_sda_samples_its_own_variance(gamma: float) -> None:
    """[GUIDE-4] the flow d ln x / d sigma = sigma / (c + sigma^2) + sigma J^2 / (R + gamma sigma^2), integrated by
    partial fractions in t = sigma^2 with b = R / gamma."""
    c, r = vector(1.0, 1.0, 2.0), vector(0.5, 0.2, 1.0)
    b = r / gamma

    def primitive(t: float) -> Tensor:
        return -1 / ((b - c) * (t + c)) + torch.log((t + b) / (t + c)) / (b - c) ** 2

    want = START * c / (c + START) * torch.exp(-(c**2) / gamma * (primitive(START) - primitive(0.0)))
    assert extrapolated(lambda d, o: sda(d, o, gamma), c, r, want) <= 2e-4
    assert (want / (c * r / (c + r)) - 1).abs().min() > 0.02


def test_mmps_and_pigdm_sample_the_scalar_posterior() -> None:
    """[GUIDE-8] c R / (c + R), where dps and sda are wrong; pigdm with sigma_d^2 = c."""
    c, r = vector(0.8, 0.8, 0.8), vector(2.0, 1.0, 0.1)
    posterior = c * r / (c + r)
    want = START * posterior / (posterior + START)
    for method in (METHODS["mmps"], lambda d, o: pigdm(d, o, math.sqrt(0.8))):
        assert extrapolated(method, c, r, want) <= 2e-4


def test_approximations_miss_the_posterior() -> None:
    """[GUIDE-8] only mmps: the others end elsewhere, however many steps."""
    p = problem()
    posterior_mean, posterior = p.kalman()
    want_offset, _ = flow(posterior_mean, posterior, schedule(80))
    for name in ("dps", "pigdm", "sda"):
        guided = METHODS[name](p.denoise, p.observations)
        offset, factor = probe(lambda z, g=guided: sample(g, z.reshape(-1, 2, 2, 2), schedule(80)).flatten(1), 8)
        assert (offset - want_offset).abs().max() > 0.1, name
        assert torch.linalg.matrix_norm(factor @ factor.T - posterior) > 0.05 * torch.linalg.matrix_norm(posterior), (
            name
        )


# Conjugate gradients


@st.composite
def systems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Up to four symmetric positive systems of one size, condition numbers up to a thousand."""
    size, count, seed = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(0, 999))
    matrices = []
    for m in range(count):
        vectors = torch.linalg.qr(normal(size, size, seed=seed * 7 + m))[0]
        values = 10.0 ** draw(st.lists(st.floats(-1, 2), min_size=size, max_size=size).map(vector_of))
        matrices.append(vectors @ torch.diag(values) @ vectors.T)
    return torch.stack(matrices), normal(count, size, seed=seed + 5000)


def vector_of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def times(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda d: torch.einsum("mij,mj->mi", matrices, d)


@given(systems())
def test_conjugate_gradient_solves(system: tuple[Tensor, Tensor]) -> None:
    """[GUIDE-5] numpy's answer, to the tolerance times the condition number (at most 1000)."""
    matrices, b = system
    got = conjugate_gradient(times(matrices), b, 200)
    for m in range(len(b)):
        want = np.linalg.solve(matrices[m].numpy(), b[m].numpy())
        assert np.abs(got[m].numpy() - want).max() <= 1e-10 * 1000 * np.linalg.norm(want)
        residual = (matrices[m] @ got[m] - b[m]).norm()
        # The recursion's residual and the true one part by rounding: condition times eps.
        assert residual <= 2e-10 * b[m].norm()


def test_conjugate_gradient_counts_its_steps() -> None:
    """[GUIDE-5] no more than `steps` products, none for b = 0, and none after every system has converged."""
    matrix = torch.diag(vector(1, 2, 3, 4))[None]
    calls: list[int] = []

    def apply(d: Tensor) -> Tensor:
        calls.append(1)
        return times(matrix)(d)

    for steps, expected in ((1, 1), (2, 2), (3, 3), (4, 4), (50, 4)):
        calls.clear()
        conjugate_gradient(apply, torch.ones(1, 4, dtype=torch.float64), steps)
        assert len(calls) == expected
    calls.clear()
    assert bool((conjugate_gradient(apply, torch.zeros(1, 4, dtype=torch.float64), 5) == 0).all()) and not calls


def test_conjugate_gradient_tolerance() -> None:
    """[GUIDE-5] a loose tolerance stops early, at a residual below it."""
    matrix = torch.diag(torch.logspace(0, 3, 30, dtype=torch.float64))[None]
    b = normal(1, 30)
    loose, tight = conjugate_gradient(times(matrix), b, 500, 1e-2), conjugate_gradient(times(matrix), b, 500, 1e-8)
    for w, tolerance in ((loose, 1e-2), (tight, 1e-8)):
        assert (times(matrix)(w) - b).norm() <= tolerance * b.norm()
    assert (times(matrix)(loose) - b).norm() > 1e-6 * b.norm()


def test_conjugate_gradient_stops_at_negative_curvature() -> None:
    """[GUIDE-5] an indefinite system stays where it was, finite; the others of the batch are solved all the same."""
    good, bad = torch.diag(vector(1, 2, 3)), torch.diag(vector(-1, 2, -3))
    b = torch.stack([vector(1, 1, 1), vector(1, 1, 1)])
    got = conjugate_gradient(times(torch.stack([bad, good])), b, 20)
    assert torch.equal(got[0], torch.zeros(3, dtype=torch.float64)), "curvature -2 along b: no step"
    assert (got[1] - vector(1, 1 / 2, 1 / 3)).abs().max() <= 1e-10
    # Positive along b, negative later: the first step (|b|^2 / b.Ab) b is kept and nothing follows.
    late = torch.diag(vector(-1, 4, 3))
    got = conjugate_gradient(times(late[None]), b[:1], 20)
    assert (got - 0.5 * b[:1]).abs().max() <= 4 * EPS
    broken = conjugate_gradient(lambda d: d * math.nan, b, 5)
    assert torch.equal(broken, torch.zeros_like(b))


def test_conjugate_gradient_invalid_steps() -> None:
    with pytest.raises(ValueError, match="at least one step, got 0"):
        conjugate_gradient(lambda d: d, torch.ones(1, 2), 0)


@given(st.sampled_from(SIGMAS), st.integers(0, 99))
def test_guided_mean_of_an_exact_observation(sigma: float, seed: int) -> None:
    """[GUIDE-6] [GUIDE-8] as R falls to zero the guided mean agrees with the observation; as it grows, with xhat."""
    p: Problem = problem()
    x, s = normal(1, 2, 2, 2, seed=seed) * (1 + sigma), vector(sigma)
    sharp, vague = one_observation(0.7, 1e-12, 3), one_observation(0.7, 1e12, 3)
    assert abs(mmps(p.denoise, sharp, 5)(x, s)[0].flatten()[3].item() - 0.7) <= 1e-5
    assert (mmps(p.denoise, vague, 5)(x, s) - p.denoise(x, s)).abs().max() <= 1e-9


def test_gaussian_mean_is_the_problem_mean() -> None:
    """The dense denoiser of the checks and the project's are one, so that either may stand in for the other."""
    mean, covariance = gaussian(8, seed=3)
    p, x, sigma = problem(), normal(3, 8), vector(0.1, 1.0, 10.0)
    ours = gaussian_denoiser(mean, covariance)(x, sigma)
    assert (ours - p.denoise(x.reshape(3, 2, 2, 2), sigma).flatten(1)).abs().max() <= 64 * EPS * 20
