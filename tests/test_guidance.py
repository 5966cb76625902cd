"""[GUIDE-1] to [GUIDE-11]: observations as functions, gradients, conjugate gradients, and the posterior drawn."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import EPS, normal, probe, problem
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


@pytest.mark.parametrize(("value", "variance"), [(math.nan, 1.0), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan)])
def test_operator_observations_invalid(value: float, variance: float) -> None:
    """[GUIDE-6] [GUIDE-7] [CONV-6]"""
    with pytest.raises(ValueError, match="observation 0"):
        OperatorObservations(vector(value), vector(variance), lambda x: x)


# The guided mean


@every_method
def test_guided_mean_with_an_operator(method: Method) -> None:
    """[GUIDE-1] the same observations given as a function."""
    p = problem()
    seen = p.observations
    x, sigma = normal(3, 2, 2, 2), vector(0.05, 0.7, 4.0)
    want = method(p.denoise, seen)(x, sigma)
    got = method(p.denoise, OperatorObservations(seen.value, seen.variance, seen.apply))(x, sigma)
    # Conjugate gradients stop at a residual of 1e-10; |sigma^2 J H^T| < 7, least variance 0.05, innovations below 10.
    assert (got - want).abs().max() <= 1e-10 * 7 / 0.05 * 10


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


def test_sda_invalid_gamma() -> None:
    for gamma in (-0.1, math.nan):
        with pytest.raises(ValueError, match="gamma must not be negative"):
            sda(problem().denoise, problem().observations, gamma)


# Sampling the posterior


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
