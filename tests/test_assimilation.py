"""[DA-1] to [DA-6]: noise and batching, and a linear cycle drawn by the sampler against its recursion, exactly."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from checks_sampling import (
    EPS,
    LinearCycle,
    check_linear_cycle,
    check_member_noise,
    flow,
    linear_cycle_problem,
    naive_cycle,
    normal,
    pointwise,
    problem,
    world,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storm_ref.assimilation import Sampler, cycle, draw_members, linear_cycle, member_noise
from storm_ref.denoiser import denoiser
from storm_ref.edm import Churn, NotFiniteError, sample, schedule
from storm_ref.guidance import Observations, ObservationsLike, OperatorObservations, dps, mmps


def noise(count: int, shape: Sequence[int], draws: int = 1, analysis: int = 0) -> Tensor:
    return torch.stack([member_noise(4, analysis, m, shape, draws) for m in range(count)], 1)


# Noise


def test_member_noise_value() -> None:
    """[DA-3]"""
    check_member_noise(member_noise)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 95))
def test_member_noise_every_bit_of_its_numbers_counts(seed: int, analysis: int, member: int, bit: int) -> None:
    """[DA-3] one bit flipped in any of the three, and no number is left as it was."""
    flipped = [seed, analysis, member]
    if bit < 32:
        flipped[1] ^= 1 << bit
    elif bit < 64:
        flipped[2] ^= 1 << (bit - 32)
    else:
        flipped[0] ^= 1 << (2 * (bit - 64))
    assert not bool((member_noise(seed, analysis, member, (9,)) == member_noise(*flipped, (9,))).any())


def test_member_noise_does_not_change_between_releases() -> None:
    """[DA-3] numbers written down once: ensembles can be made again. Philox with key (seed, analysis 2^32 + member)."""
    want = [-0.2417312, -0.78625513, -0.63017798]
    assert (member_noise(1, 0, 2, (3,))[0] - torch.tensor(want, dtype=torch.float64)).abs().max() <= 5e-9


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_member_noise_draws_are_nested(size: int, few: int, more: int) -> None:
    """[DA-3] asking for more draws leaves the first as they were, whatever the size of a field."""
    assert torch.equal(member_noise(1, 2, 3, (size,), few), member_noise(1, 2, 3, (size,), few + more)[:few])


def test_member_noise_leaves_global_generators_alone() -> None:
    """[DA-3]"""
    before = torch.get_rng_state()
    member_noise(1, 2, 3, (4,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**32, 0), (0, 0, -1), (0, 0, 2**32)])
def test_member_noise_invalid(numbers: tuple[int, int, int]) -> None:
    """[DA-3] numbers that do not fit their part of the key would run into the next."""
    with pytest.raises(ValueError, match=f"got {numbers[0]}, {numbers[1]}, {numbers[2]}"):
        member_noise(*numbers, (2,))


# One analysis


@given(st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=15)
def test_draw_members_batching_is_irrelevant(members: int, members_per_batch: int) -> None:
    """[DA-3] how many are evaluated at a time: bit for bit where points do not mix."""
    sigmas = schedule(4, 0.05, 10.0)
    for churn in (Churn(), Churn(2.0)):
        every = Sampler(sigmas, churn, 99)
        fields = noise(members, (2, 3), every.draws)
        want = draw_members(pointwise, fields, every)
        assert want.shape == (members, 2, 3) and want.dtype == torch.float64
        assert torch.equal(draw_members(pointwise, fields, Sampler(sigmas, churn, members_per_batch)), want)


def test_draw_members_of_a_network_with_guidance_batching_is_irrelevant() -> None:
    """[DA-3] the same with a network and mmps, to rounding; member m does not depend on how many members there are."""
    w = world((4, 8), True, batch=1)
    denoise = denoiser(w.network, w.condition)
    index, weight = torch.tensor([[3], [60], [3]]), torch.ones(3, 1, dtype=torch.float64)
    o = Observations(normal(3), torch.full((3,), 0.5).double(), index, weight, (2, 4, 8))
    guide: Callable[..., Callable[[Tensor, Tensor], Tensor]] = lambda d, obs: dps(d, obs)  # noqa: E731
    fields = noise(5, (2, 4, 8))
    want = draw_members(denoise, fields, Sampler(schedule(6), members_per_batch=5), o, guide)
    size = want.abs().max()
    for members_per_batch in (1, 2, 3):
        got = draw_members(denoise, fields, Sampler(schedule(6), members_per_batch=members_per_batch), o, guide)
        assert (got - want).abs().max() <= 1e5 * EPS * size
    fewer = draw_members(denoise, fields[:, :3], Sampler(schedule(6)), o, guide)
    assert (fewer - want[:3]).abs().max() <= 1e5 * EPS * size


def test_draw_members_value() -> None:
    """[DA-1] [DA-2] the sampler on the guided denoiser; without observations on the denoiser itself, guide or not."""
    p, sampler = problem(), Sampler(schedule(6), Churn(2.0))
    fields = noise(3, (2, 2, 2), sampler.draws)

    def guide(d: Callable[[Tensor, Tensor], Tensor], o: ObservationsLike) -> Callable[[Tensor, Tensor], Tensor]:
        return mmps(d, o, 20)

    got = draw_members(p.denoise, fields, sampler, p.observations, guide)
    want = sample(guide(p.denoise, p.observations), fields[0], sampler.sigmas, sampler.churn, fields[1:])
    assert torch.equal(got, want)
    forecast = sample(p.denoise, fields[0], sampler.sigmas, sampler.churn, fields[1:])
    assert torch.equal(draw_members(p.denoise, fields, sampler), forecast)
    assert torch.equal(draw_members(p.denoise, fields, sampler, None, guide), forecast)
    assert (got - forecast).abs().max() > 0.1


def test_draw_members_are_independent_draws() -> None:
    """[DA-3] every member is a function of its own noise alone."""
    sampler = Sampler(schedule(4), Churn(3.0))
    fields = noise(3, (5,), sampler.draws)
    want = draw_members(pointwise, fields, sampler)
    changed = fields.clone()
    changed[:, 1] += 1
    got = draw_members(pointwise, changed, sampler)
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and not bool((got[1] == want[1]).any())


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
        out = x / 2
        return torch.where((x > 1e6) & (sigma[:, None] < 5), math.nan, out)

    fields = noise(7, (2,))
    fields[0, 5] = 1e9
    with pytest.raises(NotFiniteError, match=r"members \[5\] stopped being finite at step 2 of 4") as caught:
        draw_members(denoise, fields, Sampler(torch.tensor([20.0, 6.0, 1.0, 0.5, 0.0]).double(), members_per_batch=3))
    assert caught.value.members == [5]


def test_draw_members_invalid_observations_without_guide() -> None:
    with pytest.raises(ValueError, match="observations need a guidance method"):
        draw_members(pointwise, noise(1, (2, 2, 2)), Sampler(schedule(3)), problem().observations)


def test_draw_members_invalid_no_member() -> None:
    with pytest.raises(ValueError, match="no member to draw"):
        draw_members(pointwise, torch.zeros(1, 0, 3).double(), Sampler(schedule(3)))


def test_draw_members_invalid_too_few_draws() -> None:
    """[DA-3] churn wants one field a step."""
    with pytest.raises(ValueError, match="churn needs one noise field per step"):
        draw_members(pointwise, noise(2, (3,), 1), Sampler(schedule(3), Churn(1.0)))


def test_sampler_invalid_together() -> None:
    with pytest.raises(ValueError, match="members_per_batch must be at least 1, got 0"):
        Sampler(schedule(3), members_per_batch=0)


# Cycles


def test_cycle_feeds_back_each_members_own_states() -> None:
    """[DA-4] K = 2 frames, newest last; observations and their number arrive with the analysis."""
    seen: list[tuple[list[list[float]], ObservationsLike | None, int]] = []

    def draw(frames: Sequence[Tensor], observations: ObservationsLike | None, k: int) -> Tensor:
        seen.append(([f.flatten().tolist() for f in frames], observations, k))
        return 10 * frames[-1] + frames[0]

    o = problem().observations
    first, second = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [4.0]]).double()
    got = [state.flatten().tolist() for state in cycle([first, second], [None, o, None], draw)]
    assert got == [[31.0, 42.0], [313.0, 424.0], [3161.0, 4282.0]]
    assert seen == [
        ([[1.0, 2.0], [3.0, 4.0]], None, 0),
        ([[3.0, 4.0], [31.0, 42.0]], o, 1),
        ([[31.0, 42.0], [313.0, 424.0]], None, 2),
    ]


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
        next(cycle([], [None], lambda frames, o, k: torch.zeros(1)))


def test_linear_cycle_value() -> None:
    """[DA-5] the recursion, and that it is not the Kalman filter."""
    check_linear_cycle(linear_cycle)


def test_linear_cycle_is_the_kalman_filter_of_a_known_state() -> None:
    """[DA-5] with A P A^T = 0 the two agree in the first analysis; afterwards the state is not known and they part."""
    c = linear_cycle_problem()
    known = LinearCycle(
        c.model, c.model_error, c.operator, c.error, c.mean, torch.zeros_like(c.covariance), c.observations
    )
    ours, filtered = linear_cycle(*known.arguments()), naive_cycle(known, kalman=True)
    assert (ours[0][0] - filtered[0][0]).abs().max() <= 64 * EPS
    assert (ours[0][1] - filtered[0][1]).abs().max() <= 64 * EPS
    assert (ours[1][1] - filtered[1][1]).abs().max() > 1e-3
    # The filter is the best linear estimate: no other gain has a smaller error variance.
    for (_, p), (_, best) in zip(ours, filtered, strict=True):
        assert torch.linalg.eigvalsh(p - best).min() >= -64 * EPS


def conditional_denoiser(c: LinearCycle, state: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """[EDM-10] for x_k given x_{k-1} = state, member by member: N(A x_{k-1}, Q)."""
    values, vectors = torch.linalg.eigh(c.model_error)
    mean = state @ c.model.T

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        gain = values / (values + sigma[:, None] ** 2)
        return mean + (((x - mean) @ vectors) * gain) @ vectors.T

    return denoise


def probed_cycle(c: LinearCycle, sigmas: Tensor, observed: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of every analysis that `cycle` and `draw_members` with mmps draw, exactly: the whole cycle is
    an affine map of the first state and of the noise of each analysis, and every member probes one direction."""
    size, analyses = len(c.mean), len(c.observations)
    root = torch.linalg.cholesky(c.covariance)
    unit = torch.eye(size * (analyses + 1), dtype=torch.float64)
    probes = torch.cat([torch.zeros(1, len(unit), dtype=torch.float64), unit]).reshape(-1, analyses + 1, size)
    sampler = Sampler(sigmas, members_per_batch=len(probes))

    def draw(frames: Sequence[Tensor], observations: ObservationsLike | None, k: int) -> Tensor:
        denoise = conditional_denoiser(c, frames[-1])
        return draw_members(denoise, probes[None, :, k + 1], sampler, observations, lambda d, o: mmps(d, o, 20))

    seen = [OperatorObservations(y, c.error.diagonal(), lambda x: x @ c.operator.T) for y in c.observations]
    analysed = cycle([c.mean + probes[:, 0] @ root.T], seen if observed else [None] * analyses, draw)
    return [(x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])) for x in analysed]


Moments = list[tuple[Tensor, Tensor]]


def started_cycle(c: LinearCycle, sigmas: Tensor, observed: bool) -> Moments:
    """The recursion of [DA-5] with samplers that follow the flow exactly but start from N(0, s_max^2): in each mode of
    the conditional covariance V the mean, and with it what the history carries, shrinks by 1 - sqrt(v / (v + s_max^2)).
    """
    m, p, found = c.mean, c.covariance, []
    h, q, eye = c.operator, c.model_error, torch.eye(3, dtype=torch.float64)
    for y in c.observations:
        gain = q @ h.T @ torch.linalg.inv(h @ q @ h.T + c.error) * observed
        keep = eye - gain @ h
        factor = flow(torch.zeros(3, dtype=torch.float64), keep @ q, sigmas)[1]
        shrink = eye - factor / sigmas[0]
        carry = shrink @ keep @ c.model
        m, p = carry @ m + shrink @ gain @ y, carry @ p @ carry.T + factor @ factor.T
        found.append((m, p))
    return found


def distances(found: Moments, want: Moments) -> Tensor:
    """Of each analysis: error of the mean, relative error of the covariance."""
    norm = torch.linalg.matrix_norm
    return torch.tensor(
        [((m - wm).norm(), norm(p - wp) / norm(wp)) for (m, p), (wm, wp) in zip(found, want, strict=True)]
    )


def check_drawn(c: LinearCycle, want: Moments, observed: bool) -> None:
    """The drawn moments tend at Heun's second order to those of the exact flow, and these to `want` as 1 / s_max: each
    of the four analyses costs at most sqrt(q) / s_max of the mean and twice that of the covariance."""
    coarse, fine = (probed_cycle(c, schedule(n, 0.002, 2000.0), observed) for n in (60, 120))
    started = started_cycle(c, schedule(60, 0.002, 2000.0), observed)
    ratio = distances(coarse, started)[:, 1] / distances(fine, started)[:, 1]
    assert bool(((ratio > 3.5) & (ratio < 5)).all()), f"second order, got {ratio.tolist()}"
    limit = [((4 * b - a) / 3, (4 * q - p) / 3) for (a, p), (b, q) in zip(coarse, fine, strict=True)]
    assert distances(limit, started).max() <= 5e-4
    for sigma_max in (2e3, 2e5):
        left = distances(started_cycle(c, schedule(60, 0.002, sigma_max), observed), want)
        assert left.max() <= 4 * 2 * torch.linalg.eigvalsh(c.model_error).max().sqrt() / sigma_max


def test_linear_cycle_is_drawn_by_the_sampler() -> None:
    """[DA-1] [DA-4] [DA-5] four analyses with mmps have the moments of the recursion, and not those of the Kalman
    filter."""
    c = linear_cycle_problem()
    want = linear_cycle(*c.arguments())
    check_drawn(c, want, observed=True)
    assert distances(want, naive_cycle(c, kalman=True)).min() > 0.2


def test_linear_forecast_is_drawn_by_the_sampler() -> None:
    """[DA-2] without observations the cycle is m = A m, P = A P A^T + Q."""
    c = linear_cycle_problem()
    m, p, want = c.mean, c.covariance, []
    for _ in c.observations:
        m, p = c.model @ m, c.model @ p @ c.model.T + c.model_error
        want.append((m, p))
    check_drawn(c, want, observed=False)
