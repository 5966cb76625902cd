"""[VER-1] to [VER-10]: agreement with an independent package, the generator of ranks, and refusals in words."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import scoringrules
import torch
from small_problems import normal

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


@pytest.mark.parametrize("members", [1, 2, 3, 16])
def test_sum_of_differences_is_pairwise(members: int) -> None:
    """[VER-3]"""
    x = normal(members, 3, 4)
    torch.testing.assert_close(sum_of_differences(x), sum_of_differences_pairwise(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("crps", "estimator", "members"),
    [*((crps_ensemble, "nrg", m) for m in (1, 2, 16)), *((crps_fair, e, m) for e in ("fair", "pwm") for m in (2, 16))],
)
def test_crps_agrees_with_scoringrules(crps: Score, estimator: str, members: int) -> None:
    """[VER-1] [VER-2] their pwm is the fair score in another form."""
    x, y = normal(members, 40), normal(40, seed=1)
    theirs = scoringrules.crps_ensemble(y.numpy(), x.numpy(), m_axis=0, estimator=estimator)
    torch.testing.assert_close(crps(x, y), torch.from_numpy(theirs), **CLOSE)


def test_average_has_no_gradient_outside_its_mask() -> None:
    """[VER-4] [CONV-7] [NUM-11] NaN outside the mask leaves value and gradient as they were."""
    score = normal(4, 5).requires_grad_()
    mask = normal(4, 5, seed=1) > 0
    got = average(score + torch.where(mask, 0.0, torch.nan), mask=mask)
    assert got.item() == pytest.approx(score.detach()[mask].mean().item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(got, score)
    assert torch.equal(gradient != 0, mask)


@pytest.mark.parametrize(
    ("weights", "mask", "message"),
    [
        (None, torch.zeros(3, dtype=torch.bool), "nothing to average: 0 of 3"),
        (torch.tensor([1.0, -1.0, 1.0]), None, r"weights must be finite and >= 0, got -1\.0 to 1\.0"),
        (torch.tensor([1.0, math.nan, 1.0]), None, "weights must be finite"),
        (torch.ones(2), None, r"weights \(2,\) do not broadcast to the points \(3,\)"),
        (None, torch.ones(2, 3, dtype=torch.bool), r"mask \(2, 3\) do not broadcast"),
    ],
)
def test_average_invalid_selection(weights: torch.Tensor | None, mask: torch.Tensor | None, message: str) -> None:
    """[VER-4]"""
    with pytest.raises(ValueError, match=message):
        average(torch.ones(3), weights=weights, mask=mask)


@pytest.mark.parametrize(
    "score",
    [
        crps_ensemble,
        crps_fair,
        rmse,
        lambda members, _: spread(members),
        spread_skill,
        lambda _, truth: area_weights(truth),
    ],
)
def test_scores_of_float32_are_those_of_float64(score: Score) -> None:
    """[VER-10] To the last bit: nothing is rounded to the input's dtype on the way."""
    members, truth = normal(7, 50).float(), normal(50, seed=1).float()
    single, double = score(members, truth), score(members.double(), truth.double())
    assert single.dtype == torch.float64
    assert torch.equal(single, double)


def test_rank_histogram_is_flat_over_every_order(generator: torch.Generator) -> None:
    """[VER-9] Each of 4 distinct values is the truth, in each order of the rest: 3! outcomes a rank."""
    orders = torch.tensor(list(permutations([-1.0, 0.5, 2.0, 9.0]))).T
    assert rank_histogram(orders[:-1], orders[-1], generator).tolist() == [6, 6, 6, 6]


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


@pytest.mark.usefixtures("unchecked")
def test_scores_invalid_members(generator: torch.Generator) -> None:
    """[VER-2] [VER-5] [VER-7] [VER-8] [VER-9] too few members, shapes that would broadcast in silence, and no error."""
    for score in (crps_fair, spread_skill, lambda members, _: spread(members)):
        with pytest.raises(ValueError, match="needs at least 2 members, got 1"):
            score(normal(1, 3), normal(3, seed=1))
    for score in (crps_ensemble, crps_fair, rmse, spread_skill):
        with pytest.raises(ValueError, match=r"members \(4, 3, 2\) do not fit truth \(1, 2\)"):
            score(normal(4, 3, 2), normal(1, 2))
    with pytest.raises(ValueError, match="undefined"):
        spread_skill(torch.tensor([[-1.0], [1.0]]), torch.zeros(1))
    with pytest.raises(ValueError, match="NaN at 1 selected points"):
        rank_histogram(normal(3, 2), torch.tensor([1.0, math.nan]), generator)
    with pytest.raises(ValueError, match=r"-90..90 degrees, got"):
        area_weights(torch.tensor([0.0, 120.0]))
