"""Analyses with a model: draws about a background, cycles as one-stage analyses in a row, and scores."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import torch

from storm_ref import verification
from storm_ref.workbench.io.data import Fields, history, targets
from storm_ref.workbench.prior.model import Model, Prior
from storm_ref.workbench.run.analysis import (
    GUIDANCE,
    DrawSettings,
    analyse,
    check_fractions,
    counter,
    cycle,
    draw,
    headline,
    observe,
    observed_points,
    reductions,
    score_table,
    without_network,
)
from storm_ref.workbench.run.training import TrainSettings, prepare, train

FIELDS = synthetic.fields()
STEP = synthetic.STEP
SETTINGS = DrawSettings(members=3, seed=5, obs_std=0.3, sampler_steps=6)


@pytest.fixture(scope="module")
def model() -> Model:
    settings = TrainSettings(width=8, depth=1, frames=2, covariance_rank=20, steps=3, batch=4)
    when = targets(FIELDS.time, STEP, None, synthetic.SPLIT, settings.frames)
    trained = train(*prepare(FIELDS, when, STEP, settings), settings)
    with torch.no_grad():  # weights at zero would hide the network: a wrong use of it has to show
        for weight in trained.network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return trained


def _when(count: int) -> np.ndarray:
    return targets(FIELDS.time, STEP, synthetic.SPLIT, None, 2)[:count]


def _several(model: Model, members: int) -> Prior:
    """Return a prior in which every member has its own past, hence its own background and memory."""
    when = _when(1)[0]
    index, _ = history(FIELDS.time, when, model.frames, model.time_step)
    past = torch.from_numpy(FIELDS.values[index]).expand(members, -1, -1, -1, -1)
    apart = torch.randn(past.shape, generator=torch.Generator().manual_seed(1))
    return model.prior(past + 2 * apart, FIELDS.time[index], when)


def _one(model: Model, members: int, m: int) -> Prior:
    """Return the same prior for member m alone."""
    when = _when(1)[0]
    index, _ = history(FIELDS.time, when, model.frames, model.time_step)
    past = torch.from_numpy(FIELDS.values[index]).expand(members, -1, -1, -1, -1)
    apart = torch.randn(past.shape, generator=torch.Generator().manual_seed(1))
    return model.prior((past + 2 * apart)[m : m + 1], FIELDS.time[index], when)


@pytest.mark.parametrize("guidance", [None, "covariance", "pigdm"])
def test_draw_several_backgrounds_equals_each_on_its_own(model: Model, guidance: str | None) -> None:
    """[DA-4] Members with different pasts are the same drawn together and alone, with and without observations."""
    settings = replace(SETTINGS, guidance=guidance or "covariance")
    seen = None if guidance is None else observe(FIELDS, _when(1)[0], 0.3, settings, 0)
    noise = settings.noise(0, FIELDS.values.shape[1:])
    together = draw(_several(model, 3), seen, noise, settings)
    for m in range(3):
        alone = draw(_one(model, 3, m), seen, noise[:, m : m + 1], settings)[0]
        assert (together[m] - alone).abs().max() < 2e-3, f"member {m}: its background or memory is not its own"
    assert (together[0] - together[1]).abs().max() > 0.5


def test_draw_members_do_not_depend_on_how_many(model: Model) -> None:
    """[DA-3] The first three of five members are those of an ensemble of three."""
    prior = model.prior_at(FIELDS, _when(1)[0])
    seen = observe(FIELDS, _when(1)[0], 0.2, SETTINGS, 0)
    three, five = (
        draw(prior, seen, s.noise(0, FIELDS.values.shape[1:]), s) for s in (SETTINGS, replace(SETTINGS, members=5))
    )
    torch.testing.assert_close(three, five[:3], rtol=0, atol=1e-3)
    assert (five[3] - five[0]).abs().max() > 0.1


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_guidance_of_every_name_draws_towards_the_observations(model: Model, guidance: str) -> None:
    """With every method the analysis is nearer to the observations than the forecast is."""
    settings = replace(SETTINGS, guidance=guidance, obs_std=1.0, sampler_steps=20)
    prior, noise = without_network(model.prior_at(FIELDS, _when(1)[0])), SETTINGS.noise(0, FIELDS.values.shape[1:])
    seen = observe(FIELDS, _when(1)[0], 0.2, settings, 0)
    assert seen is not None
    before, after = (seen.apply(draw(prior, y, noise, settings)).mean(0) - seen.value for y in (None, seen))
    assert after.square().mean() < 0.95 * before.square().mean()


def test_without_network_draws_the_gaussian(model: Model) -> None:
    """The sampler's flow for N(0, Sigma) is x_0 = sqrt(Sigma / (Sigma + s^2)) x_s, known in closed form."""
    prior = without_network(model.prior_at(FIELDS, _when(1)[0]))
    settings = replace(SETTINGS, sampler_steps=80, sigma_min=1e-3)
    noise = settings.noise(0, FIELDS.values.shape[1:])
    members = draw(prior, None, noise, settings)
    top = settings.sigma_max
    exact = model.covariance.apply(noise[0], lambda v: top * (v / (v + top**2)).sqrt())
    departure = (members - prior.background) / prior.std[:, None, None]
    assert (departure - exact).abs().max() < 0.02 * exact.abs().max()
    with_it = draw(model.prior_at(FIELDS, _when(1)[0]), None, noise, settings)
    assert (with_it - members).abs().max() > 0.1, "the network has to make a difference, or this test sees nothing"


def test_without_network_posterior_is_the_kalman_update(model: Model) -> None:
    """The sampler is affine in its noise, so that zero noise gives the posterior mean."""
    prior = without_network(model.prior_at(FIELDS, _when(1)[0]))
    settings = replace(SETTINGS, sampler_steps=80, sigma_min=1e-3, sigma_max=300.0)
    seen = observe(FIELDS, _when(1)[0], 0.3, settings, 0)
    assert seen is not None
    zero = torch.zeros(1, 1, *FIELDS.values.shape[1:], dtype=torch.float64)
    members = draw(prior, seen, zero, settings)[0]
    sigma = model.covariance.apply(torch.eye(zero.numel()).double().reshape(-1, *zero.shape[2:]), lambda v: v)
    scale = prior.std.repeat_interleave(zero[0, 0, 0].numel())
    covariance = scale[:, None] * sigma.flatten(1) * scale
    h = seen.apply(torch.eye(zero.numel()).double().reshape(-1, *zero.shape[2:])).T
    innovation = seen.value - seen.apply(prior.background[0])
    gain = torch.linalg.solve(h @ covariance @ h.T + seen.variance.diag(), h @ covariance).T
    exact = prior.background[0] + (gain @ innovation).reshape(zero.shape[2:])
    assert (members - exact).abs().max() < 0.02 * (exact - prior.background[0]).abs().max()


def test_observe_share_errors_and_nesting() -> None:
    """Every variable is observed at a share of the points, with errors, and smaller shares are part of larger ones."""
    std = (0.5, 1e-6)
    settings = replace(SETTINGS, obs_std=std)
    when = _when(1)[0]
    truth = torch.from_numpy(FIELDS.values[np.searchsorted(FIELDS.time, when)]).double()
    few, many = (observe(FIELDS, when, f, settings, 4) for f in (0.1, 0.5))
    assert few is not None and many is not None
    assert len(few.value) == 2 * round(0.1 * 192) and len(many.value) == 2 * 96
    assert set(few.index.flatten().tolist()) < set(many.index.flatten().tolist())
    error = many.value - many.apply(truth)
    first = many.index[:, 0] < 192
    assert 0.3 < float(error[first].std()) < 0.7 and float(error[~first].abs().max()) < 1e-4
    torch.testing.assert_close(many.variance[first], torch.full((96,), 0.25).double())
    assert observe(FIELDS, when, 0.0, settings, 4) is None
    other = observe(FIELDS, when, 0.5, settings, 5)
    assert other is not None and not torch.equal(other.index, many.index)
    assert observed_points(many, truth.shape).sum() == 192 and not observed_points(None, truth.shape).any()


def test_observe_leaves_out_what_is_not_valid() -> None:
    """Values that were filled in are not observed."""
    fields = synthetic.fields(gaps=True)
    seen = observed_points(observe(fields, fields.time[7], 0.9, SETTINGS, 0), fields.values.shape[1:])
    assert seen.any() and not (seen & ~torch.from_numpy(fields.valid[7])).any()


def test_analyse_is_a_draw_at_each_time(model: Model) -> None:
    """Each time is drawn given the true past with its own noise, in float32, and progress counts the times."""
    when, seen = _when(3), [None] * 3
    told: list[int] = []
    members = analyse(model, FIELDS, when, seen, SETTINGS, told.append)
    assert told == [1, 2, 3] and members.dtype == torch.float32 and members.shape == (3, 3, *FIELDS.values.shape[1:])
    for k, t in enumerate(when):
        noise = SETTINGS.noise(k, FIELDS.values.shape[1:])
        torch.testing.assert_close(
            members[:, k], draw(model.prior_at(FIELDS, t), None, noise, SETTINGS).float(), rtol=0, atol=0
        )
    off = analyse(model, FIELDS, when, seen, SETTINGS, network=False)
    alone = draw(without_network(model.prior_at(FIELDS, when[1])), None, SETTINGS.noise(1, members.shape[2:]), SETTINGS)
    torch.testing.assert_close(off[:, 1], alone.float(), rtol=0, atol=0)


def test_noise_is_distinct_and_repeatable() -> None:
    """[DA-3] Members, analyses and seeds differ in their noise, which repeats."""
    shape = FIELDS.values.shape[1:]
    every = [*SETTINGS.noise(0, shape)[0], *SETTINGS.noise(1, shape)[0], *replace(SETTINGS, seed=6).noise(0, shape)[0]]
    flat = torch.stack(every).flatten(1)
    off = torch.corrcoef(flat) - torch.eye(len(flat)).double()
    assert off.abs().max() < 0.3, "two noises are one"
    assert torch.equal(SETTINGS.noise(1, shape), SETTINGS.noise(1, shape))


def test_cycle_first_analysis_is_one_stage(model: Model) -> None:
    """[DA-4] The first analysis has the true past; the second has the first as its newest frame."""
    when = _when(3)
    seen = [observe(FIELDS, t, 0.2, SETTINGS, k) for k, t in enumerate(when)]
    told: list[int] = []
    cycled = cycle(model, FIELDS, when, seen, SETTINGS, told.append)
    once = analyse(model, FIELDS, when, seen, SETTINGS)
    assert told == [1, 2, 3]
    torch.testing.assert_close(cycled[:, 0], once[:, 0], rtol=0, atol=2e-3)
    assert (cycled[:, 1] - once[:, 1]).abs().max() > 0.05
    index, _ = history(FIELDS.time, when[0], 1, STEP)
    frame = torch.from_numpy(FIELDS.values[index[0]]).expand(3, -1, -1, -1)
    times = when[1] - STEP * np.arange(1, 3)
    own = model.prior(torch.stack([cycled[:, 0], frame], 1), times, when[1])
    second = draw(own, seen[1], SETTINGS.noise(1, cycled.shape[2:]), SETTINGS).float()
    torch.testing.assert_close(cycled[:, 1], second, rtol=0, atol=2e-3)


def test_cycle_noise_is_that_of_its_number(model: Model) -> None:
    """`first` selects the noise, so that two cycles of one seed need not share any."""
    when = _when(2)
    cycled = cycle(model, FIELDS, when[1:], [None], SETTINGS, first=1)
    torch.testing.assert_close(
        cycled[:, 0], analyse(model, FIELDS, when, [None] * 2, SETTINGS)[:, 1], rtol=0, atol=2e-3
    )
    assert (cycle(model, FIELDS, when[1:], [None], SETTINGS, first=7) - cycled).abs().max() > 0.1


def _without(fields: Fields, hole: int) -> Fields:
    keep = np.delete(np.arange(len(fields.time)), hole)
    return replace(fields, time=fields.time[keep], values=fields.values[keep], valid=fields.valid[keep])


def test_cycle_invalid_times(model: Model) -> None:
    when = _when(4)
    with pytest.raises(ValueError, match=r"must be the model's time step of 6 h apart"):
        cycle(model, FIELDS, when[::2], [None] * 2, SETTINGS)
    with pytest.raises(ValueError, match="at least one time"):
        cycle(model, FIELDS, when[:0], [], SETTINGS)
    hole = int(np.searchsorted(FIELDS.time, when[0])) - 2
    with pytest.raises(
        ValueError, match=r"past of the cycle's first analysis at 2001-03-16T00:00 has a gap.*elsewhere"
    ):
        cycle(model, _without(FIELDS, hole), when, [None] * 4, SETTINGS)


def test_cycle_takes_a_step_that_is_no_whole_hour(model: Model) -> None:
    """A third of an hour is rounded in binary, but times are exact: a step of 20 minutes has no gap."""
    fields = replace(FIELDS, time=FIELDS.time[0] + np.arange(len(FIELDS.time)) * np.timedelta64(20, "m"))
    odd = dataclasses.replace(model, time_step=np.timedelta64(20 * 60 * 10**9, "ns"), frames=5)
    regression = model.background.regression.repeat(1, 3, 1)[:, :5]
    odd = replace(odd, background=replace(model.background, regression=regression))
    assert cycle(odd, fields, fields.time[20:22], [None] * 2, SETTINGS).shape[1] == 2


def test_score_table_counts_the_mask_alone(model: Model) -> None:
    """Scores ignore points outside the mask, are weighted by area, and are separate for each variable."""
    draw_ = torch.Generator().manual_seed(2)
    truth = torch.randn(2, 2, 12, 16, generator=draw_)
    members = truth + torch.tensor([1.0, 3.0])[:, None, None] * torch.randn(4, 2, 2, 12, 16, generator=draw_)
    mask = torch.rand(truth.shape, generator=draw_) > 0.4
    table = score_table(members, truth, mask, FIELDS)
    spoilt = torch.where(mask, members, 1e6)
    assert score_table(spoilt, truth, mask, FIELDS) == table
    weight = (torch.from_numpy(FIELDS.latitude).deg2rad().cos()[:, None] * mask[:, 1]).double()
    error = (members[:, :, 1].double().mean(0) - truth[:, 1].double()) ** 2
    assert table["b"]["rmse"] == pytest.approx(float((weight * error).sum() / weight.sum()) ** 0.5, rel=1e-6)
    crps = verification.crps_fair(members[:, :, 0], truth[:, 0])
    weight = (torch.from_numpy(FIELDS.latitude).deg2rad().cos()[:, None] * mask[:, 0]).double()
    assert table["a"]["crps"] == pytest.approx(float((weight * crps).sum() / weight.sum()), rel=1e-6)
    assert set(table["a"]) == {"rmse", "crps", "spread", "spread_skill"}
    assert set(score_table(members[:1], truth, mask, FIELDS)["a"]) == {"rmse"}


def test_headline_is_the_mean_in_standard_deviations() -> None:
    table = {"a": {"crps": 2.0, "spread_skill": 0.5}, "b": {"crps": 30.0, "spread_skill": 1.5}}
    assert headline(table, {"a": 4.0, "b": 10.0}) == {"crps": (0.5 + 3.0) / 2, "spread_skill": 1.0}
    assert headline({"a": table["a"]}, {"a": 4.0}) == table["a"]


def test_reductions_are_shares_of_the_forecast() -> None:
    rows = {"0.0": {"crps": 2.0}, "0.1": {"crps": 1.5}, "0.5": {"crps": 3.0}}
    assert reductions(rows) == {"0.1": 0.25, "0.5": -0.5}
    assert reductions({"0.1": {"crps": 1.0}}) == {}


@pytest.mark.parametrize("fractions", [(), (0.1, 0.1), (1.0,), (-0.1, 0.2), (float("nan"),)])
def test_check_fractions_invalid(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"must differ and lie in \[0, 1\)"):
        check_fractions(fractions)
    check_fractions((0.0, 0.999))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": 1}, "at least 2 members, got 1"),
        ({"guidance": "3dvar"}, "no guidance '3dvar'; there are covariance, mmps"),
        ({"obs_std": 0.0}, "positive and finite, got 0"),
        ({"obs_std": (0.1, -1.0)}, "positive and finite"),
        ({"obs_std": float("nan")}, "positive and finite"),
        ({"seed": -1}, "seed must be in"),
        ({"sampler_steps": 0}, "at least one step"),
        ({"sigma_min": 90.0}, "sigma_min < sigma_max"),
    ],
)
def test_draw_settings_invalid(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **wrong)


def test_counter_labels_the_work() -> None:
    told: list[tuple[str, int, int, str]] = []
    tell = counter(lambda *words: told.append(words), "cycle", 4)
    assert tell is not None and counter(None, "cycle", 4) is None
    tell(2)
    assert told == [("cycle", 2, 4, "")]
