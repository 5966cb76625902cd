"""Optimal interpolation against the Kalman formulas with every matrix written out."""

import numpy as np
import pytest
import torch

from storm_ref.guidance import Observations
from storm_ref.workbench.prior.optimal_interpolation import OptimalInterpolation, fit

SHAPE = (2, 2, 3)
SIZE = 12
# Products and solves of order 10 in float64, well conditioned (R >= 0.1 on the diagonal).
CLOSE = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def interpolation() -> OptimalInterpolation:
    """Fitted to 40 pairs at hours 0, 6 and 18; rank 37, so B is of full rank."""
    generator = np.random.default_rng(1)
    mixing = generator.standard_normal((SIZE, SIZE))
    previous = generator.standard_normal((40, *SHAPE))
    change = (generator.standard_normal((40, SIZE)) @ mixing).reshape(40, *SHAPE)
    return fit(previous, previous + change, generator.permutation(np.resize([0, 6, 18], 40)))


@pytest.fixture
def observations() -> Observations:
    """Five: two read single points, one of them twice with different errors, two read means of points."""
    index = torch.tensor([[3, 0], [3, 0], [7, 0], [0, 11], [4, 5]])
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    return Observations(
        value=torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0]),
        variance=torch.tensor([0.1, 0.4, 0.2, 0.3, 1.0]),
        index=index,
        weight=weight,
        shape=SHAPE,
    )


def matrices(
    interpolation: OptimalInterpolation, observations: Observations
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B, H and the gain K, whole."""
    b = np.cov(interpolation.factor.reshape(len(interpolation.factor), -1).T, bias=True) * len(interpolation.factor)
    h = np.zeros((len(observations.value), SIZE))
    for row, (index, weight) in enumerate(zip(observations.index, observations.weight, strict=True)):
        np.add.at(h[row], index.numpy(), weight.double().numpy())
    r = np.diag(observations.variance.double().numpy())
    return b, h, b @ h.T @ np.linalg.inv(h @ b @ h.T + r)


def test_fit_value() -> None:
    """Changes 1, 3 at hour 5 and 10 at hour 7: means 2 and 10; departures -1, 1 and 0 over sqrt(3 - 2)."""
    previous = np.full((3, 1, 1, 1), 280.0)
    current = previous + np.array([1.0, 10.0, 3.0]).reshape(3, 1, 1, 1)
    interpolation = fit(previous, current, np.array([5, 7, 5]))
    assert interpolation.increment[[5, 7], 0, 0, 0].tolist() == [2.0, 10.0]
    assert interpolation.factor.ravel().tolist() == [-1.0, 0.0, 1.0]


def test_fit_takes_nearest_hour() -> None:
    """Around midnight too, and the earlier hour of two as near: hour h is known at 2, 8 and 23 with mean change h."""
    hours = np.array([2, 8, 23, 2])
    interpolation = fit(np.zeros((4, 1, 1, 1)), hours.reshape(4, 1, 1, 1).astype(float), hours)
    nearest = [23, 2, 2, 2, 2, 2, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 23, 23, 23, 23, 23, 23, 23, 23]
    # 5 is three hours from 2 and from 8; 0 is one from 23 and two from 2; 15 is seven from 8 and eight from 23.
    assert interpolation.increment.ravel().tolist() == nearest


def test_fit_covariance_is_unbiased() -> None:
    """Variance 4 within hours of very different means, over 4,000 independent points: its mean is 4, not 4 (T-1)/T."""
    generator = np.random.default_rng(2)
    hours = np.array([0, 0, 0, 12, 12])
    change = 2 * generator.standard_normal((5, 1, 50, 80)) + 100 * hours.reshape(5, 1, 1, 1)
    variance = (fit(np.zeros_like(change), change, hours).factor ** 2).sum(0).mean()
    # 3 degrees of freedom a point: standard error 4 sqrt(2 / (3 * 4000)) = 0.052. With T - 1 it would be 3.
    assert abs(variance - 4) < 5 * 0.052


def test_fit_of_float32_is_that_of_float64() -> None:
    """To the last bit: the difference of two temperatures is not rounded to float32."""
    previous, current = 280 + np.random.default_rng(4).standard_normal((2, 9, *SHAPE)).astype(np.float32)
    hours = np.arange(9) // 3
    single, double = fit(previous, current, hours), fit(previous.astype(float), current.astype(float), hours)
    np.testing.assert_array_equal(single.increment, double.increment)
    np.testing.assert_array_equal(single.factor, double.factor)


def test_forecast_value(interpolation: OptimalInterpolation) -> None:
    """Persistence plus the mean change; float32 comes out as float64."""
    previous = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    forecast = interpolation.forecast(previous, 6)
    assert forecast.dtype == np.float64
    np.testing.assert_array_equal(forecast, previous.astype(np.float64) + interpolation.increment[6])


def test_update_mean_is_kalman(interpolation: OptimalInterpolation, observations: Observations) -> None:
    """Without noise: x_b + K (y - H x_b)."""
    _, h, gain = matrices(interpolation, observations)
    mean = interpolation.forecast(np.ones(SHAPE), 18)
    expected = mean.ravel() + gain @ (observations.value.double().numpy() - h @ mean.ravel())
    analysis = interpolation.update(mean[None], observations, np.zeros((1, 5)))
    np.testing.assert_allclose(analysis.ravel(), expected, **CLOSE)


def test_update_covariance_is_kalman(interpolation: OptimalInterpolation, observations: Observations) -> None:
    """The update is affine in z and e: unit vectors give the members' covariance exactly, and it is (I - K H) B."""
    b, h, gain = matrices(interpolation, observations)
    t, mean = len(interpolation.factor), interpolation.forecast(np.ones(SHAPE), 18)
    prior = np.concatenate([mean + interpolation.factor, np.broadcast_to(mean, (5, *SHAPE))])
    noise = np.concatenate([np.zeros((t, 5)), np.eye(5)])
    still = interpolation.update(mean[None], observations, np.zeros((1, 5)))
    columns = (interpolation.update(prior, observations, noise) - still).reshape(t + 5, SIZE)
    np.testing.assert_allclose(columns.T @ columns, (np.eye(SIZE) - gain @ h) @ b, **CLOSE)


def test_ensemble_is_the_update_of_its_draws(interpolation: OptimalInterpolation, observations: Observations) -> None:
    """z first, then e, one row a member, all from the generator given."""
    previous = np.ones(SHAPE)
    members = interpolation.ensemble(previous, 0, observations, 4, np.random.default_rng(7))
    generator = np.random.default_rng(7)
    z = generator.standard_normal((4, len(interpolation.factor)))
    prior = interpolation.forecast(previous, 0) + np.einsum("mt,tchw->mchw", z, interpolation.factor)
    expected = interpolation.update(prior, observations, generator.standard_normal((4, 5)))
    assert members.shape == (4, *SHAPE)
    np.testing.assert_allclose(members, expected, **CLOSE)
    free = interpolation.ensemble(previous, 0, None, 4, np.random.default_rng(7))
    np.testing.assert_allclose(free, prior, **CLOSE)


def test_ensemble_without_observations_left_is_the_forecast(
    interpolation: OptimalInterpolation, observations: Observations
) -> None:
    """Zero observations are no observations."""
    none = Observations(
        observations.value[:0], observations.variance[:0], observations.index[:0], observations.weight[:0], SHAPE
    )
    got = interpolation.ensemble(np.ones(SHAPE), 0, none, 3, np.random.default_rng(7))
    np.testing.assert_array_equal(got, interpolation.ensemble(np.ones(SHAPE), 0, None, 3, np.random.default_rng(7)))


def test_fit_invalid_not_finite() -> None:
    current = np.zeros((3, 1, 2, 2))
    current[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^1 training values are not finite"):
        fit(np.zeros((3, 1, 2, 2)), current, np.array([0, 0, 0]))


def test_fit_invalid_too_few_pairs() -> None:
    with pytest.raises(ValueError, match="3 pairs at 3 hours of day leave no departures"):
        fit(np.zeros((3, 1, 2, 2)), np.ones((3, 1, 2, 2)), np.array([0, 1, 2]))


@pytest.mark.parametrize("hour", [-1, 24])
def test_forecast_invalid_hour(interpolation: OptimalInterpolation, hour: int) -> None:
    with pytest.raises(ValueError, match=f"hours of day must be 0..23, got {hour}"):
        interpolation.forecast(np.zeros(SHAPE), hour)
    with pytest.raises(ValueError, match=r"hours of day must be 0\.\.23"):
        fit(np.zeros((3, 1, 1, 1)), np.zeros((3, 1, 1, 1)), np.array([0, hour, 2]))
