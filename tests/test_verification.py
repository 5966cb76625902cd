"""[VER-1] to [VER-10]: values against closed forms, exact enumeration and an independent package, and properties."""

import math
from collections.abc import Callable
from itertools import permutations, product

import pytest
import scoringrules
import torch
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.verification import (
    area_weights,
    average,
    crps_ensemble,
    crps_fair,
    rank_histogram,
    rmse,
    spread,
    spread_skill,
    sum_of_differences,
    sum_of_differences_pairwise,
)

# Sums of n < 50 float64 terms of order 1, in any order: their rounding stays below n^2 eps / 4. Seen: 2e-15.
CLOSE = {"rtol": 0.0, "atol": 1e-13}

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# A lopsided distribution, small enough to enumerate: value -> probability.
DISCRETE = {0.0: 0.5, 1.0: 0.3, 4.0: 0.2}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every_draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All tuples of `count` independent draws from DISCRETE [count, tuples], and their probabilities [tuples]."""
    values = torch.tensor(list(product(DISCRETE, repeat=count)), dtype=torch.float64).T
    return values, torch.tensor([math.prod(p) for p in product(DISCRETE.values(), repeat=count)], dtype=torch.float64)


def discrete_crps(truth: float) -> tuple[float, float]:
    """CRPS of DISCRETE itself, and E |X - X'|."""
    near = sum(p * abs(x - truth) for x, p in DISCRETE.items())
    apart = sum(p * q * abs(x - z) for x, p in DISCRETE.items() for z, q in DISCRETE.items())
    return near - apart / 2, apart


# CRPS


@pytest.mark.parametrize("members", [1, 2, 3, 16])
def test_sum_of_differences_is_pairwise(members: int) -> None:
    """[VER-3]"""
    x = normal(members, 3, 4)
    torch.testing.assert_close(sum_of_differences(x), sum_of_differences_pairwise(x), rtol=1e-13, atol=1e-13)


def test_sum_of_differences_value() -> None:
    """[VER-3] Ordered pairs of (7, 1, 3): 2 (6 + 4 + 2)."""
    x = torch.tensor([7.0, 1.0, 3.0])
    assert sum_of_differences(x).item() == sum_of_differences_pairwise(x).item() == 24.0


@pytest.mark.parametrize("members", [1, 2, 5, 16])
def test_crps_ensemble_agrees_with_scoringrules(members: int) -> None:
    """[VER-1]"""
    x, y = normal(members, 40), normal(40, seed=1)
    theirs = scoringrules.crps_ensemble(y.numpy(), x.numpy(), m_axis=0, estimator="nrg")
    torch.testing.assert_close(crps_ensemble(x, y), torch.from_numpy(theirs), **CLOSE)


@pytest.mark.parametrize("estimator", ["fair", "pwm"])
@pytest.mark.parametrize("members", [2, 5, 16])
def test_crps_fair_agrees_with_scoringrules(members: int, estimator: str) -> None:
    """[VER-2] Their pwm is the fair score in another form."""
    x, y = normal(members, 40), normal(40, seed=1)
    theirs = scoringrules.crps_ensemble(y.numpy(), x.numpy(), m_axis=0, estimator=estimator)
    torch.testing.assert_close(crps_fair(x, y), torch.from_numpy(theirs), **CLOSE)


def test_crps_value() -> None:
    """[VER-1], [VER-2] Members 1 and 3, truth 0: 2 - 4/8 and 2 - 4/4."""
    members, truth = torch.tensor([[1.0], [3.0]]), torch.zeros(1)
    assert crps_ensemble(members, truth).item() == 1.5
    assert crps_fair(members, truth).item() == 1.0


@pytest.mark.parametrize("truth", [-2.0, 0.0, 0.7, 3.0])
def test_crps_ensemble_tends_to_gaussian(truth: float) -> None:
    """[VER-1] Members at the quantiles (i - 1/2)/M of N(1, 2^2): closed form of Gneiting & Raftery (2007), eq. 5."""
    mean, std, m = 1.0, 2.0, 4001
    quantile = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    members = mean + std * math.sqrt(2.0) * torch.erfinv(2 * quantile - 1)
    z = (truth - mean) / std
    density, cumulative = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(z / math.sqrt(2.0)))
    expected = std * (z * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi))
    # The mid-point rule errs by O(1/M^2): at most 2.2/M^2 was seen at M = 1001, 4001 and 16001. The fair score is
    # further off, by 1.1/M.
    assert abs(crps_ensemble(members[:, None], torch.tensor([truth])).item() - expected) < 10 / m**2


@pytest.mark.parametrize("truth", [-1.0, 1.0, 2.5])
@pytest.mark.parametrize("members", [2, 3, 5])
def test_crps_expectation_over_every_draw(members: int, truth: float) -> None:
    """[VER-1], [VER-2] Fair is unbiased, plain too large by E |X - X'| / (2 M): exact, no sampling."""
    x, probability = every_draw(members)
    y = torch.full(x.shape[1:], truth, dtype=torch.float64)
    expected, apart = discrete_crps(truth)
    fair, plain = (probability * crps_fair(x, y)).sum(), (probability * crps_ensemble(x, y)).sum()
    assert abs(fair.item() - expected) < 1e-13
    assert abs(plain.item() - (expected + apart / (2 * members))) < 1e-13


@given(st.integers(2, 9), st.floats(-50, 50), st.floats(-20, 20), st.integers(0, 2**31))
def test_crps_equivariance(members: int, shift: float, scale: float, seed: int) -> None:
    """[VER-1], [VER-2] a x + b against a y + b scores |a| times x against y; the order of members does not matter."""
    x, y = normal(members, 6, seed=seed), normal(6, seed=seed + 1)
    for crps in (crps_ensemble, crps_fair):
        moved = crps(scale * x + shift, scale * y + shift)
        # Inputs of magnitude 50 + 20 * 5 are rounded by 1.4e-14 each before any is subtracted. Seen: 2.5e-14.
        torch.testing.assert_close(moved, abs(scale) * crps(x, y), rtol=0.0, atol=1e-12)
        torch.testing.assert_close(crps(x.flip(0), y), crps(x, y), **CLOSE)


def test_crps_of_equal_members_is_absolute_error() -> None:
    """[VER-1], [VER-2] A point forecast, whether one member says it or seven."""
    forecast, truth = normal(20), normal(20, seed=1)
    error = (forecast - truth).abs()
    torch.testing.assert_close(crps_ensemble(forecast[None], truth), error, **CLOSE)
    for crps in (crps_ensemble, crps_fair):
        torch.testing.assert_close(crps(forecast.expand(7, -1), truth), error, **CLOSE)


@pytest.mark.parametrize("crps", [crps_ensemble, crps_fair])
def test_crps_keeps_small_scores_of_large_numbers(crps: Score) -> None:
    """[VER-10] Pressures of 1e5 Pa: x - y is exact, so the score is that of the departures to the last bit."""
    members, truth = 1e5 + normal(9, 20), torch.full((20,), 1e5, dtype=torch.float64)
    assert torch.equal(crps(members, truth), crps(members - truth, torch.zeros_like(truth)))


@pytest.mark.parametrize("crps", [crps_ensemble, crps_fair])
def test_crps_passes_nan_on(crps: Score) -> None:
    """[VER-4] NaN in a member or the truth spoils its own point, visibly, and no other."""
    members, truth = normal(4, 3), normal(3, seed=1)
    members[2, 0], truth[1] = math.nan, math.nan
    assert crps(members, truth).isnan().tolist() == [True, True, False]


# averages


def test_average_value() -> None:
    """[VER-4]"""
    score = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert average(score).item() == 10.5
    assert average(score, mask=mask).item() == pytest.approx(11 / 3, rel=1e-15)
    # Weights by row, as latitudes weigh: (1 + 2 + 3 * 8) / (1 + 1 + 3).
    assert average(score, mask=mask, weights=torch.tensor([[1.0], [3.0]])).item() == pytest.approx(5.4, rel=1e-15)


def test_average_leaves_nan_out() -> None:
    """[VER-4] NaN outside the mask does no harm, in score or weights; inside it shows."""
    score = torch.tensor([1.0, math.nan, 3.0])
    weights = torch.tensor([1.0, math.nan, 1.0])
    assert average(score, weights=weights, mask=torch.tensor([True, False, True])).item() == 2.0
    assert average(score).isnan().item()


@pytest.mark.parametrize(
    ("weights", "mask", "message"),
    [
        (None, torch.zeros(3, dtype=torch.bool), "nothing to average: 0 of 3"),
        (torch.zeros(3), None, "nothing to average: 3 of 3"),
        (torch.tensor([1.0, -1.0, 1.0]), None, r"weights must be finite and >= 0, got -1\.0 to 1\.0"),
        (torch.tensor([1.0, math.nan, 1.0]), None, "weights must be finite"),
        (torch.tensor([1.0, math.inf, 1.0]), None, "weights must be finite"),
        (torch.ones(2), None, r"weights \(2,\) do not broadcast to the points \(3,\)"),
        (None, torch.ones(2, 3, dtype=torch.bool), r"mask \(2, 3\) do not broadcast"),
    ],
)
def test_average_invalid_selection(weights: torch.Tensor | None, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average(torch.ones(3), weights=weights, mask=mask)


def test_area_weights_value() -> None:
    """[VER-5]"""
    weights = area_weights(torch.tensor([90.0, 60.0, 0.0, -45.0]))
    expected = torch.tensor([[0.0], [0.5], [1.0], [math.sqrt(0.5)]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("latitude", [[0.0, 120.0], [0.0, -120.0], [0.0, math.nan]])
def test_area_weights_invalid_latitude(latitude: list[float]) -> None:
    with pytest.raises(ValueError, match=r"latitude must be in -90..90 degrees, got"):
        area_weights(torch.tensor(latitude))


# RMSE and spread


def test_rmse_and_spread_value() -> None:
    """[VER-6], [VER-7], [VER-8] Means 2 and 5, errors 2 and 1, variances 4 and 1 (M = 3)."""
    members = torch.tensor([[0.0, 4.0], [2.0, 5.0], [4.0, 6.0]])
    truth = torch.tensor([0.0, 4.0])
    assert rmse(members, truth).item() == pytest.approx(math.sqrt(2.5), rel=1e-15)
    assert spread(members).item() == pytest.approx(math.sqrt(2.5), rel=1e-15)
    assert spread_skill(members, truth).item() == pytest.approx(math.sqrt(4 / 3), rel=1e-15)
    # The second point three times: mean squares (4 + 3)/4.
    weights = torch.tensor([1.0, 3.0])
    assert rmse(members, truth, weights=weights).item() == pytest.approx(math.sqrt(1.75), rel=1e-15)
    assert spread(members, weights=weights).item() == pytest.approx(math.sqrt(1.75), rel=1e-15)


def test_scores_use_mask_and_weights_alike() -> None:
    """[VER-4] Masked scores are the scores of the points that are left, with their weights."""
    members, truth = normal(5, 4, 3), normal(4, 3, seed=1)
    mask = normal(4, 3, seed=2) > 0
    weights = area_weights(torch.tensor([70.0, 50.0, 10.0, -20.0]))
    kept = weights.expand(4, 3)[mask]
    for score in (rmse, spread_skill):
        got = score(members, truth, mask=mask, weights=weights)
        torch.testing.assert_close(got, score(members[:, mask], truth[mask], weights=kept), **CLOSE)
    got = spread(members, mask=mask, weights=weights)
    torch.testing.assert_close(got, spread(members[:, mask], weights=kept), **CLOSE)


def test_rmse_of_one_member_is_its_error() -> None:
    """[VER-6]"""
    assert rmse(torch.tensor([[3.0, 4.0]]), torch.zeros(2)).item() == pytest.approx(math.sqrt(12.5), rel=1e-15)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_spread_skill_is_one_over_every_draw(members: int) -> None:
    """[VER-7], [VER-8] Members and truth drawn alike: every outcome is a point, its probability the weight. Exact."""
    draws, probability = every_draw(members + 1)
    variance = sum(p * x * x for x, p in DISCRETE.items()) - sum(p * x for x, p in DISCRETE.items()) ** 2
    assert abs(spread(draws[:-1], weights=probability).item() - math.sqrt(variance)) < 1e-13
    assert abs(spread_skill(draws[:-1], draws[-1], weights=probability).item() - 1) < 1e-13


def test_spread_skill_is_scale_free() -> None:
    """[VER-8] The unit drops out; half the departures from the mean give half the ratio."""
    members, truth = normal(6, 30), normal(30, seed=1)
    ratio = spread_skill(members, truth)
    torch.testing.assert_close(spread_skill(7 * members + 3, 7 * truth + 3), ratio, **CLOSE)
    mean = members.mean(0)
    torch.testing.assert_close(spread_skill(mean + (members - mean) / 2, truth), ratio / 2, **CLOSE)


def test_spread_skill_invalid_no_error() -> None:
    with pytest.raises(ValueError, match="undefined"):
        spread_skill(torch.tensor([[-1.0], [1.0]]), torch.zeros(1))


# every score's arithmetic


@pytest.mark.parametrize(
    "score",
    [
        lambda members, _: sum_of_differences(members),
        lambda members, _: sum_of_differences_pairwise(members),
        crps_ensemble,
        crps_fair,
        lambda _, truth: average(truth, weights=truth.abs()),
        rmse,
        lambda members, _: spread(members),
        spread_skill,
        lambda _, truth: area_weights(truth),
    ],
)
def test_scores_of_float32_are_those_of_float64(score: Score) -> None:
    """[VER-10] To the last bit: nothing is rounded to the input's dtype on the way."""
    members, truth = normal(7, 50).float(), normal(50, seed=1).float()
    score32, score64 = score(members, truth), score(members.double(), truth.double())
    assert score32.dtype == torch.float64
    assert torch.equal(score32, score64)


# rank histogram


def test_rank_histogram_is_flat_over_every_order(generator: torch.Generator) -> None:
    """[VER-9] Each of 4 distinct values is the truth, in each order of the rest: 3! outcomes a rank."""
    orders = torch.tensor(list(permutations([-1.0, 0.5, 2.0, 9.0]))).T
    assert rank_histogram(orders[:-1], orders[-1], generator).tolist() == [6, 6, 6, 6]


def test_rank_histogram_value(generator: torch.Generator) -> None:
    """[VER-9] Rank 0 is below all members, rank M above; empty ranks are counted too; the mask leaves points out."""
    members = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 5)
    truth = torch.tensor([0.0, 2.5, 9.0, 9.0, math.nan])
    mask = torch.tensor([True, True, True, True, False])
    assert rank_histogram(members, truth, generator, mask=mask).tolist() == [1, 0, 1, 2]


def test_rank_histogram_breaks_ties_uniformly(generator: torch.Generator) -> None:
    """[VER-9] One member below, two equal, one above: ranks 1, 2 and 3 a third each. 5 sigma, seed fixed."""
    n = 30_000
    members = torch.tensor([0.0, 1.0, 1.0, 2.0])[:, None].expand(4, n)
    counts = rank_histogram(members, torch.ones(n), generator)
    assert counts.sum().item() == n
    assert counts[0] == counts[4] == 0
    assert (counts[1:4] - n / 3).abs().max().item() < 5 * math.sqrt(n * 2 / 9)


def test_rank_histogram_repeats_with_its_generator(generator: torch.Generator) -> None:
    """[VER-9] Ties are broken by the generator given and nothing else."""
    members, truth = torch.zeros(7, 200), torch.zeros(200)
    start, elsewhere = generator.get_state(), torch.get_rng_state()
    first = rank_histogram(members, truth, generator)
    assert rank_histogram(members, truth, generator).tolist() != first.tolist()
    assert rank_histogram(members, truth, generator.set_state(start)).tolist() == first.tolist()
    assert torch.equal(torch.get_rng_state(), elsewhere)


def test_rank_histogram_invalid_nan(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="NaN at 1 selected points"):
        rank_histogram(normal(3, 2), torch.tensor([1.0, math.nan]), generator)


# shapes and sizes that are refused


@pytest.mark.parametrize("score", [crps_fair, spread_skill, lambda members, _: spread(members)])
def test_scores_invalid_one_member(score: Score) -> None:
    """[VER-2], [VER-7]"""
    with pytest.raises(ValueError, match="needs at least 2 members, got 1"):
        score(normal(1, 3), normal(3, seed=1))


@pytest.mark.parametrize("score", [crps_ensemble, rmse])
def test_scores_invalid_no_member(score: Score) -> None:
    with pytest.raises(ValueError, match="needs at least 1 members, got 0"):
        score(torch.zeros(0, 3), torch.zeros(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("score", [crps_ensemble, crps_fair, rmse, spread_skill])
def test_scores_invalid_shapes(score: Score) -> None:
    """Shapes that would broadcast in silence: a truth with an axis of length 1, and members last."""
    with pytest.raises(ValueError, match=r"members \(4, 3, 2\) do not fit truth \(1, 2\)"):
        score(normal(4, 3, 2), normal(1, 2))
    with pytest.raises(ValueError, match="do not fit"):
        score(normal(5, 5, 4), normal(5, 5))
