"""The demonstration: the content of result.json, the points that are scored, and the vortex that is followed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic
import torch

from storm_ref.workbench.io.data import Fields, targets
from storm_ref.workbench.prior.model import Model
from storm_ref.workbench.run import demonstration
from storm_ref.workbench.run.analysis import DrawSettings, analyse, cycle, observe, score_table
from storm_ref.workbench.run.demonstration import DemonstrationSettings, demonstrate
from storm_ref.workbench.run.training import TrainSettings, prepare, train

FIELDS = synthetic.fields(gaps=True)
DRAWING = DrawSettings(members=2, seed=3, obs_std=0.5, sampler_steps=4)
SETTINGS = DemonstrationSettings((0.0, 0.1, 0.5), synthetic.SPLIT, count=2, cycle=3, drawing=DRAWING)


def _model(fields: Fields) -> Model:
    settings = TrainSettings(width=8, depth=1, frames=2, covariance_rank=10, steps=2, batch=4)
    when = targets(fields.time, synthetic.STEP, None, synthetic.SPLIT, settings.frames)
    return train(*prepare(fields, when, synthetic.STEP, settings), settings)


@pytest.fixture(scope="module")
def model() -> Model:
    return _model(FIELDS)


def test_demonstrate_holds_what_is_promised(model: Model) -> None:
    """Scores have the names of result.json; data without winds have cycles and scores but no tracks."""
    told: set[str] = set()
    result = demonstrate(model, FIELDS, SETTINGS, lambda label, done, total, note: told.add(label))
    scores = result.scores
    assert list(scores["fractions"]) == ["0.0", "0.1", "0.5"] and list(scores["crps_reduction"]) == ["0.1", "0.5"]
    for row in scores["fractions"].values():
        assert set(row) == {"crps", "rmse", "spread", "spread_skill"} and all(map(math.isfinite, row.values()))
    saved = 1 - scores["fractions"]["0.5"]["crps"] / scores["fractions"]["0.0"]["crps"]
    assert scores["crps_reduction"]["0.5"] == pytest.approx(saved)
    assert scores["guidance"] == "covariance"
    assert (scores["members"], scores["steps"], scores["seed"]) == (2, 4, 3)
    assert scores["wall_s"] > 0 and set(scores["cycle"]) == {"forecast only", "50% observed"}
    assert all(set(row) == {"by_variable"} for row in scores["cycle"].values())
    assert result.cycles is not None and result.cycles.true_track is None and result.cycles.tracks == {}
    assert told == {
        "analyses, 0% observed",
        "analyses, 10% observed",
        "analyses, 50% observed",
        "cycle, forecast only",
        "cycle, 50% observed",
    }


def test_demonstrate_scores_are_of_points_neither_observed_nor_missing(model: Model) -> None:
    """Scores recomputed from the arrays are the same: of analyses where not observed, of cycles at all valid points."""
    result = demonstrate(model, FIELDS, SETTINGS)
    times = targets(FIELDS.time, synthetic.STEP, synthetic.SPLIT, None, 2)
    np.testing.assert_array_equal(result.time, times[[0, -1]])
    index = np.searchsorted(FIELDS.time, result.time)
    truth, valid = torch.from_numpy(FIELDS.values[index]), torch.from_numpy(FIELDS.valid[index])
    seen = [observe(FIELDS, t, 0.5, DRAWING, k) for k, t in enumerate(result.time)]
    members = analyse(model, FIELDS, result.time, seen, DRAWING)
    torch.testing.assert_close(result.analyses[0.5], members, rtol=0, atol=0)
    for k, observations in enumerate(seen):
        assert observations is not None
        reads = torch.zeros(truth[k].numel(), dtype=torch.bool)
        reads[observations.index.flatten()] = True
        assert torch.equal(result.observed[0.5][k].flatten(), reads)
    table = score_table(members, truth, valid & ~result.observed[0.5], FIELDS)
    assert result.scores["by_variable"]["0.5"] == table
    std = result.scores["standard_deviations"]
    crps = np.mean([table[name]["crps"] / std[name] for name in "ab"])
    assert result.scores["fractions"]["0.5"]["crps"] == pytest.approx(crps)
    assert not result.observed[0.0].any()
    cycles = result.cycles
    assert cycles is not None
    k = np.searchsorted(FIELDS.time, cycles.time)
    free = score_table(cycles.ensembles["forecast only"], cycles.truth, torch.from_numpy(FIELDS.valid[k]), FIELDS)
    assert result.scores["cycle"]["forecast only"]["by_variable"] == free
    assert not FIELDS.valid[k].all(), "without gaps this test sees nothing"


@pytest.mark.slow
def test_demonstrate_cycles_go_on_from_the_first_time(model: Model) -> None:
    """Both ensembles start from one past, with noise and observations that no scored analysis has used."""
    cycles = demonstrate(model, FIELDS, SETTINGS).cycles
    assert cycles is not None
    np.testing.assert_array_equal(np.diff(cycles.time), [synthetic.STEP] * 2)
    assert cycles.time[0] == synthetic.SPLIT
    free = cycle(model, FIELDS, cycles.time, [None] * 3, DRAWING, first=2)
    torch.testing.assert_close(cycles.ensembles["forecast only"], free, rtol=0, atol=0)
    seen = [observe(FIELDS, t, 0.5, DRAWING, 2 + k) for k, t in enumerate(cycles.time)]
    given = cycle(model, FIELDS, cycles.time, seen, DRAWING, first=2)
    torch.testing.assert_close(cycles.ensembles["50% observed"], given, rtol=0, atol=0)


@pytest.mark.parametrize(("fractions", "names"), [((0.0,), {"forecast only"}), ((0.1, 0.2, 0.5), {"20% observed"})])
def test_demonstrate_follows_the_middle_fraction(model: Model, fractions: tuple[float, ...], names: set[str]) -> None:
    result = demonstrate(model, FIELDS, replace(SETTINGS, fractions=fractions, count=1))
    assert set(result.scores["cycle"]) == names | {"forecast only"}
    assert result.scores["crps_reduction"] == {}


def test_demonstrate_without_cycles(model: Model) -> None:
    result = demonstrate(model, FIELDS, replace(SETTINGS, cycle=0, count=1))
    assert result.cycles is None and "cycle" not in result.scores


@pytest.mark.slow
def test_demonstrate_follows_a_vortex() -> None:
    """Data with winds give tracks of the truth and of every member, and scores of the last position and wind."""
    plain = synthetic.fields()
    east, north = np.arange(16) - 8.0, 6.0 - np.arange(12)
    bump = np.exp(-(east[None] ** 2 + north[:, None] ** 2) / 18)
    wind = np.stack([-10 * north[:, None] * bump, 10 * east[None] * bump]).astype(np.float32)
    fields = replace(plain, values=0.3 * (plain.values - 280) + wind, variables=("u10", "v10"), units=("m s-1",) * 2)
    result = demonstrate(_model(fields), fields, replace(SETTINGS, count=1))
    cycles = result.cycles
    assert cycles is not None and cycles.true_track is not None
    assert {name: len(members) for name, members in cycles.tracks.items()} == {"forecast only": 2, "50% observed": 2}
    assert len(cycles.true_track.latitude) == 3
    last = [track.intensity[-1] for track in cycles.tracks["50% observed"]]
    vortex = result.scores["cycle"]["50% observed"]["vortex"]
    assert vortex["last_wind_mean"] == pytest.approx(np.mean(last))
    assert vortex["last_wind_std"] == pytest.approx(np.std(last, ddof=1))
    assert vortex["last_wind_true"] == pytest.approx(cycles.true_track.intensity[-1])
    truth, members = cycles.true_track, cycles.tracks["50% observed"]
    ends = [
        demonstration.vortices.separation(t.latitude[-1], t.longitude[-1], truth.latitude[-1], truth.longitude[-1])
        for t in members
    ]
    assert vortex["last_track_error_deg"] == pytest.approx(np.mean(ends))


def test_demonstrate_invalid_is_refused_before_anything_is_drawn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn before it was refused")

    monkeypatch.setattr(demonstration, "analyse", never)
    short = replace(FIELDS, time=FIELDS.time[:62], values=FIELDS.values[:62], valid=FIELDS.valid[:62])
    holed = np.delete(np.arange(80), 61)
    gap = replace(FIELDS, time=FIELDS.time[holed], values=FIELDS.values[holed], valid=FIELDS.valid[holed])
    for fields in (short, gap):
        with pytest.raises(ValueError, match=r"cycle of 3 steps from 2001-03-16T00:00 needs 3 frames.*fewer steps"):
            demonstrate(model, fields, SETTINGS)
    holed = np.delete(np.arange(80), 58)
    past = replace(FIELDS, time=FIELDS.time[holed], values=FIELDS.values[holed], valid=FIELDS.valid[holed])
    with pytest.raises(ValueError, match="and 2 before them, without a gap"):
        demonstrate(model, past, SETTINGS)
    with pytest.raises(ValueError, match="empty observations"):
        demonstrate(model, FIELDS, replace(SETTINGS, fractions=(0.0, 0.001)))
    with pytest.raises(ValueError, match=r"the model is of \('a', 'b'\)"):
        demonstrate(model, replace(FIELDS, variables=("a", "c")), SETTINGS)
    with pytest.raises(ValueError, match="nothing can be analysed from 2002"):
        demonstrate(model, FIELDS, replace(SETTINGS, start=np.datetime64("2002-01-01")))


@pytest.mark.parametrize("wrong", [{"count": 0}, {"cycle": -1}, {"fractions": (1.0,)}])
def test_demonstration_settings_invalid(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"at least one time|fractions observed"):
        replace(SETTINGS, **wrong)
