"""[DA-1] to [DA-7]: batches, progress and refusals of an analysis, and noise that stays the same between releases."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from small_problems import EPS, normal, pointwise, problem, world
from torch import Tensor

from storm_ref.assimilation import Sampler, cycle, draw_members, member_noise
from storm_ref.denoiser import denoiser
from storm_ref.edm import Churn, NotFiniteError, schedule
from storm_ref.guidance import Observations, ObservationsLike, dps


def noise(count: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    return torch.stack([member_noise(4, 0, m, shape, draws) for m in range(count)], 1)


# Noise


def test_member_noise_does_not_change_between_releases() -> None:
    """[DA-3] numbers written down once: ensembles can be made again. Philox with key (seed, analysis 2^32 + member)."""
    want = [-0.2417312, -0.78625513, -0.63017798]
    assert (member_noise(1, 0, 2, (3,))[0] - torch.tensor(want, dtype=torch.float64)).abs().max() <= 5e-9


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**32, 0), (0, 0, -1), (0, 0, 2**32)])
def test_member_noise_invalid(numbers: tuple[int, int, int]) -> None:
    """[DA-3] numbers that do not fit their part of the key would run into the next."""
    with pytest.raises(ValueError, match=f"got {numbers[0]}, {numbers[1]}, {numbers[2]}"):
        member_noise(*numbers, (2,))


# One analysis


@pytest.mark.parametrize("churn", [Churn(), Churn(2.0)], ids=["plain", "churn"])
def test_draw_members_batching_is_irrelevant(churn: Churn) -> None:
    """[DA-3] how many are evaluated at a time: bit for bit where points do not mix."""
    sigmas = schedule(4, 0.05, 10.0)
    fields = noise(7, (2, 3), Sampler(sigmas, churn).draws)
    want = draw_members(pointwise, fields, Sampler(sigmas, churn, 99))
    assert want.shape == (7, 2, 3) and want.dtype == torch.float64
    for members_per_batch in (1, 3, 6, 7):
        assert torch.equal(draw_members(pointwise, fields, Sampler(sigmas, churn, members_per_batch)), want)


def test_draw_members_of_a_network_with_guidance_batching_is_irrelevant() -> None:
    """[DA-3] the same with a network and dps, to rounding; member m does not depend on how many members there are."""
    w = world((4, 8), True, batch=1)
    denoise = denoiser(w.network, w.condition)
    index, weight = torch.tensor([[3], [60], [3]]), torch.ones(3, 1, dtype=torch.float64)
    observations = Observations(normal(3), torch.full((3,), 0.5).double(), index, weight, (2, 4, 8))
    draw = partial(draw_members, denoise, observations=observations, guide=dps)
    fields = noise(5, (2, 4, 8))
    want = draw(fields, sampler=Sampler(schedule(4), members_per_batch=5))
    limit = 1e5 * EPS * want.abs().max()
    for members_per_batch in (1, 3):
        got = draw(fields, sampler=Sampler(schedule(4), members_per_batch=members_per_batch))
        assert (got - want).abs().max() <= limit
    assert (draw(fields[:, :3], sampler=Sampler(schedule(4))) - want[:3]).abs().max() <= limit


def test_sampler_draws() -> None:
    """[DA-3] the latent, and one field a step with churn."""
    assert Sampler(schedule(7)).draws == 1
    assert Sampler(schedule(7), Churn(1.0)).draws == 8


def test_draw_members_reports_progress() -> None:
    """One call for each step of each batch."""
    calls: list[int] = []
    draw_members(pointwise, noise(5, (2,)), Sampler(schedule(3), members_per_batch=2), progress=lambda: calls.append(1))
    assert len(calls) == 3 * 3


def test_draw_members_invalid_state_names_member_and_step() -> None:
    """[DA-6] members are counted over the ensemble, not within a batch of it."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where((x > 1e6) & (sigma[:, None] < 5), math.nan, x / 2)

    fields = noise(7, (2,))
    fields[0, 5] = 1e9
    with pytest.raises(NotFiniteError, match=r"members \[5\] stopped being finite at step 2 of 4") as caught:
        draw_members(denoise, fields, Sampler(torch.tensor([20.0, 6.0, 1.0, 0.5, 0.0]).double(), members_per_batch=3))
    assert caught.value.members == [5]


def test_draw_members_invalid_arguments() -> None:
    """[DA-3] [DA-7]"""
    with pytest.raises(ValueError, match="observations need a guidance method"):
        draw_members(pointwise, noise(1, (2, 2, 2)), Sampler(schedule(3)), problem().observations)
    with pytest.raises(ValueError, match="no member to draw"):
        draw_members(pointwise, torch.zeros(1, 0, 3).double(), Sampler(schedule(3)))
    with pytest.raises(ValueError, match="churn needs one noise"):
        draw_members(pointwise, noise(2, (3,), 1), Sampler(schedule(3), Churn(1.0)))
    with pytest.raises(ValueError, match=r"members_per_batch.* 0"):
        Sampler(schedule(3), members_per_batch=0)


# Cycles


def test_cycle_is_lazy() -> None:
    """[DA-4] an analysis is drawn when asked for, so that it can be written before the next begins."""
    calls: list[int] = []

    def draw(frames: Sequence[Tensor], observations: ObservationsLike | None, k: int) -> Tensor:
        calls.append(k)
        return frames[-1]

    states = cycle([torch.zeros(1, 2).double()], [None, None], draw)
    next(states)
    assert calls == [0]


def test_cycle_invalid_history() -> None:
    with pytest.raises(ValueError, match="at least one past frame"):
        next(cycle([], [None], lambda frames, observations, k: torch.zeros(1)))
