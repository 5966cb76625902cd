"""The trial on synthetic weather, whose scores must come out in the right order."""

from dataclasses import replace

import numpy as np
import pytest
import synthetic
import torch

from storm_ref import verification
from storm_ref.tiling import Tiling
from storm_ref.workbench.run.analysis import DrawSettings
from storm_ref.workbench.run.training import TrainSettings
from storm_ref.workbench.run.trial import TrialResult, TrialSettings, run_trial

pytestmark = pytest.mark.slow

SETTINGS = TrialSettings(
    split=synthetic.SPLIT,
    time_step=synthetic.STEP,
    fractions=(0.0, 0.2, 0.5),
    drawing=DrawSettings(members=6, obs_std=0.1, sampler_steps=12),
    training=TrainSettings(
        patch=(3, 4), width=16, heads=2, depth=1, frames=2, covariance_rank=40, steps=10, batch=4, warmup=5
    ),
)


@pytest.fixture(scope="module")
def result() -> TrialResult:
    """Run a trial with two variables and gaps, 15 days for training and 5 for the test."""
    return run_trial(synthetic.fields(gaps=True), SETTINGS)


def test_run_trial_analyses_the_test_part_every_step(result: TrialResult) -> None:
    assert result.time[0] == synthetic.SPLIT
    assert (np.diff(result.time) == synthetic.STEP).all()
    assert len(result.time) == 20
    assert result.analyses[0.2].shape == (6, 20, 2, 12, 16)


def test_run_trial_observes_the_fraction_at_valid_points(result: TrialResult) -> None:
    """Both variables are observed at 0.2 of the points that are valid in both, and none for the forecast."""
    f = synthetic.fields(gaps=True)
    for k, t in enumerate(result.time):
        valid = f.valid[np.searchsorted(f.time, t)].all(0)
        seen = result.observed[0.2][k].numpy()
        assert (seen[0] == seen[1]).all()
        assert seen[0].sum() == round(0.2 * valid.sum())
        assert not (seen[0] & ~valid).any()
    assert not result.observed[0.0].any()


def test_run_trial_scores_are_those_of_its_arrays(result: TrialResult) -> None:
    """Scores recomputed from the arrays, at valid points not observed and weighted by area, are the same."""
    f = synthetic.fields(gaps=True)
    valid = torch.from_numpy(f.valid[np.searchsorted(f.time, result.time)])
    weight = np.cos(np.deg2rad(f.latitude))[:, None] * np.ones((20, 12, 16))
    for fraction in (0.0, 0.2, 0.5):
        where = (valid & ~result.observed[fraction]).numpy()
        x, y = result.analyses[fraction].double(), result.truth.double()
        crps = verification.crps_fair(x, y).numpy()
        error = (x.mean(0) - y).square().numpy()
        for c, name in enumerate("ab"):
            row = result.scores["by_variable"]["fractions"][str(fraction)][name]
            w = weight * where[:, c]
            assert row["crps"] == pytest.approx((w * crps[:, c]).sum() / w.sum(), rel=1e-9)
            assert row["rmse"] == pytest.approx(((w * error[:, c]).sum() / w.sum()) ** 0.5, rel=1e-9)


def test_run_trial_headline_is_in_training_deviations(result: TrialResult) -> None:
    f = synthetic.fields(gaps=True)
    std = f.values[f.time < synthetic.SPLIT].astype(float).std((0, 2, 3))
    rows = result.scores["by_variable"]["fractions"]["0.2"]
    want = np.mean([rows["a"]["crps"] / std[0], rows["b"]["crps"] / std[1]])
    assert result.scores["fractions"]["0.2"]["crps"] == pytest.approx(want, rel=1e-9)
    assert result.scores["fractions"]["0.2"]["spread_skill"] == pytest.approx(
        np.mean([rows["a"]["spread_skill"], rows["b"]["spread_skill"]]), rel=1e-9
    )


def test_run_trial_order_of_the_methods(result: TrialResult) -> None:
    """More observations help more; the model beats persistence and optimal interpolation, and is calibrated."""
    scores = result.scores
    ours = scores["fractions"]
    assert ours["0.5"]["crps"] < ours["0.2"]["crps"] < 0.8 * ours["0.0"]["crps"]
    assert ours["0.0"]["rmse"] < 0.8 * scores["persistence"]["rmse"]
    for fraction, row in ours.items():
        assert scores["ratio_to_optimal_interpolation"][fraction] < 1
        assert 0.6 < row["spread_skill"] < 1.4, fraction
        rival = scores["optimal_interpolation"]["fractions"][fraction]["crps"]
        assert scores["ratio_to_optimal_interpolation"][fraction] == pytest.approx(row["crps"] / rival)
        if fraction != "0.0":
            assert scores["crps_reduction"][fraction] == pytest.approx(1 - row["crps"] / ours["0.0"]["crps"])


def test_run_trial_repeats_with_its_seeds(result: TrialResult) -> None:
    again = run_trial(synthetic.fields(gaps=True), SETTINGS)
    for fraction in SETTINGS.fractions:
        assert torch.equal(again.analyses[fraction], result.analyses[fraction])
    for key in set(result.scores) - {"wall_s", "train_s"}:
        assert again.scores[key] == result.scores[key], key
    drawn = replace(SETTINGS, fractions=(0.2,), drawing=replace(SETTINGS.drawing, seed=1))
    other = run_trial(synthetic.fields(gaps=True), drawn)
    assert not torch.equal(other.analyses[0.2], result.analyses[0.2])
    assert not torch.equal(other.observed[0.2], result.observed[0.2])


def test_run_trial_does_not_look_at_what_it_scores(result: TrialResult) -> None:
    """The truth at the last time enters its analysis only at observed points."""
    f = synthetic.fields(gaps=True)
    moved = f.values.copy()
    hidden = (~result.observed[0.2][-1]).numpy()
    moved[-1][hidden] += 50
    other = run_trial(replace(f, values=moved), replace(SETTINGS, fractions=(0.0, 0.2)))
    for fraction in (0.0, 0.2):
        assert torch.equal(other.analyses[fraction], result.analyses[fraction])


def test_run_trial_network_off_is_reported(result: TrialResult) -> None:
    """Ten steps of training change the analysis a little, and the Gaussian's scores not at all."""
    ours, alone = result.scores["fractions"]["0.2"]["crps"], result.scores["gaussian"]["fractions"]["0.2"]["crps"]
    assert ours == pytest.approx(alone, rel=0.2)
    assert ours != alone
    untrained = replace(SETTINGS, fractions=(0.2,), training=replace(SETTINGS.training, steps=0))
    plain = run_trial(synthetic.fields(gaps=True), untrained).scores
    assert plain["fractions"]["0.2"]["crps"] == pytest.approx(plain["gaussian"]["fractions"]["0.2"]["crps"], rel=1e-9)
    assert plain["gaussian"]["fractions"]["0.2"]["crps"] == alone, "the network's training moved the Gaussian's scores"


def test_run_trial_on_a_globe_by_tiles() -> None:
    """A trial runs on a periodic grid with one variable and four tiles."""
    tiling = Tiling.of((12, 16), (6, 8), (3, 4), (3, 4), True, (3, 4))
    s = replace(SETTINGS, fractions=(0.0, 0.2), drawing=replace(SETTINGS.drawing, tiling=tiling))
    scores = run_trial(synthetic.fields(1, periodic=True), s).scores
    assert scores["fractions"]["0.2"]["crps"] < scores["fractions"]["0.0"]["crps"] < 1
    assert scores["unit"] == "K"


@pytest.mark.parametrize("fractions", [(), (0.1, 0.1), (1.0,), (-0.1,)])
def test_settings_invalid_fractions(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fractions"):
        replace(SETTINGS, fractions=fractions)


def test_run_trial_invalid_split() -> None:
    with pytest.raises(ValueError, match="2001-02-01"):
        run_trial(synthetic.fields(), replace(SETTINGS, split=np.datetime64("2001-02-01")))
    with pytest.raises(ValueError, match="2002-01-01"):
        run_trial(synthetic.fields(), replace(SETTINGS, split=np.datetime64("2002-01-01")))
