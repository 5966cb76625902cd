"""The background: values that can be worked out by hand, and no use of the frames that it is tried on."""

import numpy as np
import pytest
import synthetic
import torch

from storm_ref.workbench.prior.background import Background, daily_waves, fit

TIME = np.datetime64("2001-03-01", "ns") + np.arange(160) * np.timedelta64(6, "h")
LONGITUDE = torch.tensor([0.0, 90.0, 180.0]).double()
TARGET = np.arange(2, 160)
PAST = TARGET[:, None] - np.array([1, 2])


def test_daily_waves_value() -> None:
    """6 UTC: a = pi / 2 at longitude 0 and pi at 90 E."""
    w = daily_waves(np.array(["2001-03-01T06"], "datetime64[ns]"), LONGITUDE[:2])[0]
    torch.testing.assert_close(w[:, 0], torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0]).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(w[:, 1], torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0]).double(), rtol=0, atol=1e-15)


def test_predict_value() -> None:
    """Climatology 10, coefficients -0.25 of the newest frame and 0.5 sin a of the older one.

    At 6 UTC the background is 10 + 4 - 1 + 0.5 * 1 * 2 at longitude 0.
    """
    regression = torch.zeros(1, 2, 5).double()
    regression[0, 0, 0] = -0.25
    regression[0, 1, 1] = 0.5
    climatology = torch.zeros(5, 1, 1, 2).double()
    climatology[0] = 10
    one = torch.ones(1).double()
    background = Background(climatology, regression, one, one, LONGITUDE[:2])
    anomalies = torch.tensor([4.0, 2.0]).double().reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 2)
    got = background.predict(anomalies, np.array(["2001-03-01T06"], "datetime64[ns]"))
    torch.testing.assert_close(got.flatten(), torch.tensor([14.0, 13.0]).double(), rtol=0, atol=1e-12)


def made(generator: torch.Generator, noise: float) -> torch.Tensor:
    """A daily wave, and A_k = 0.5 A_{k-1} + 0.3 A_{k-2} + noise.

    The regression, which starts from persistence, has -0.5 for the newest frame and 0.3 for the older one.
    """
    a = torch.randn(160, 1, 4, 3, generator=generator, dtype=torch.float64)
    for k in range(2, 160):
        a[k] = 0.5 * a[k - 1] + 0.3 * a[k - 2] + noise * a[k]
    return 280 + a + 5 * daily_waves(TIME, LONGITUDE)[:, 1][:, None, None, :]


def test_fit_recovers_climatology_and_regression(generator: torch.Generator) -> None:
    """2,000 values of an autoregression: coefficients within 0.05; the wave is 5 sin of the *local* time."""
    values = made(generator, 1.0)
    background, departure = fit(values, torch.ones_like(values).bool(), TIME, LONGITUDE, TARGET, PAST)
    assert background.regression[0, :, 0].tolist() == pytest.approx([-0.5, 0.3], abs=0.05)
    residual = background.anomalies(values, TIME).mean(0)
    assert residual.abs().max() < 0.2
    assert background.departure_std.item() == pytest.approx(1, abs=0.05)
    assert departure.square().mean().item() == pytest.approx(1, abs=1e-9)


def test_fit_departures_are_cross_fitted(generator: torch.Generator) -> None:
    """They exceed the fit's own residuals.

    A changed target leaves the background of its own block as it is, hence moves its departure by exactly the change.
    """
    values = made(generator, 1.0)
    known = torch.ones_like(values).bool()
    background, departure = fit(values, known, TIME, LONGITUDE, TARGET, PAST)
    anomalies = background.anomalies(values, TIME)
    residual = values[TARGET] - background.predict(anomalies[PAST], TIME[TARGET])
    assert (departure * background.departure_std).square().mean() > residual.square().mean()
    moved = values.clone()
    moved[-1] += 100
    other, after = fit(moved, known, TIME, LONGITUDE, TARGET, PAST)
    change = after[-1] * other.departure_std - departure[-1] * background.departure_std
    torch.testing.assert_close(change, torch.full_like(change, 100.0), rtol=0, atol=1e-9)


def test_fit_invalid_values_have_no_say(generator: torch.Generator) -> None:
    """Departures there are 0, and the regression is that of the others, whatever stands there."""
    values = made(generator, 1.0)
    known = torch.ones_like(values).bool()
    known[:, :, 0, 0] = False
    wild = values.clone()
    wild[:, :, 0, 0] = 280 + 50 * torch.randn(160, 1, generator=generator)
    one, departure = fit(values, known, TIME, LONGITUDE, TARGET, PAST)
    two, _ = fit(wild, known, TIME, LONGITUDE, TARGET, PAST)
    assert (departure[:, :, 0, 0] == 0).all()
    torch.testing.assert_close(one.regression, two.regression, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.departure_std, two.departure_std, rtol=1e-12, atol=0)


def test_fit_beats_persistence() -> None:
    """On the synthetic weather: its anomalies lose a fifth a step and it has a daily cycle."""
    f = synthetic.fields(1, days=40)
    values, target = torch.from_numpy(f.values).double(), np.arange(4, 160)
    past, known = target[:, None] - np.arange(1, 5), torch.from_numpy(f.valid)
    background, _ = fit(values, known, f.time, torch.from_numpy(f.longitude), target, past)
    assert background.departure_std.item() < 0.5 * (values[1:] - values[:-1]).square().mean().sqrt().item()


def test_fit_invalid_too_few(generator: torch.Generator) -> None:
    values = made(generator, 1.0)
    with pytest.raises(ValueError, match="15 training times are too few"):
        fit(values, torch.ones_like(values).bool(), TIME, LONGITUDE, TARGET[:15], PAST[:15])


def test_fit_invalid_constant() -> None:
    values = torch.zeros(160, 2, 4, 3).double()
    with pytest.raises(ValueError, match=r"channels \[0, 1\] never depart"):
        fit(values, torch.ones_like(values).bool(), TIME, LONGITUDE, TARGET, PAST)
