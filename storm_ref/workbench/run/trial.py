"""The trial: train on the first part of a record, analyse the last part, and score every fraction of points observed.

At each analysis time k of the test part and for each fraction f, M members are drawn from p(x_k | true past, y_k). y_k
observes every variable at a random fraction f of the points; f = 0 is the forecast alone. The Gaussian prior alone
(the network off) and optimal interpolation are given the same observations; persistence is scored as well. Scores are
those of analysis.py, always at points not observed.
"""

import time as clock
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from storm_ref.guidance import Observations
from storm_ref.workbench.io.data import Fields, history, targets
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior import optimal_interpolation
from storm_ref.workbench.prior.model import Model
from storm_ref.workbench.run.analysis import (
    DrawSettings,
    analyse,
    check_fractions,
    counter,
    headline,
    observe,
    observed_points,
    reductions,
    score_table,
)
from storm_ref.workbench.run.training import TrainSettings, prepare, train

__all__ = ["TrialResult", "TrialSettings", "run_trial"]


@dataclass(frozen=True)
class TrialSettings:
    """The settings of a trial. Raises ValueError for fractions outside [0, 1) or given twice."""

    split: np.datetime64  # the test part begins here
    time_step: np.timedelta64
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5)
    stop: np.datetime64 | None = None  # the test part ends before this
    drawing: DrawSettings = field(default_factory=DrawSettings)
    training: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_fractions(self.fractions)


@dataclass(frozen=True, eq=False)
class TrialResult:
    """The trained model, its scores, and the fields behind them in physical units."""

    model: Model
    scores: dict[str, Any]  # the content of result.json
    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    analyses: Mapping[float, Float[Tensor, "m t c h w"]]  # by fraction
    observed: Mapping[float, Bool[Tensor, "t c h w"]]  # by fraction


def run_trial(fields: Fields, settings: TrialSettings, progress: Progress | None = None) -> TrialResult:
    """Train, analyse and score.

    Raises ValueError when a part of the record is too short, or the patch does not divide the grid.
    """
    began = clock.perf_counter()
    drawing = settings.drawing
    time_step = settings.time_step
    frames = settings.training.frames
    training_times = targets(fields.time, time_step, None, settings.split, frames)
    test_times = targets(fields.time, time_step, settings.split, settings.stop, frames)
    when = test_times[(test_times - test_times[0]) % time_step == np.timedelta64(0, "ns")]
    given = {f: [observe(fields, t, f, drawing, k) for k, t in enumerate(when)] for f in settings.fractions}
    model = train(*prepare(fields, training_times, time_step, settings.training), settings.training, progress)
    trained = clock.perf_counter()
    baseline = _fit_baseline(fields, training_times, time_step)
    index = np.searchsorted(fields.time, when)
    truth = torch.from_numpy(fields.values[index])
    valid = torch.from_numpy(fields.valid[index])
    analyses = {}
    observed = {}
    tables: dict[str, dict[str, Any]] = {"fractions": {}, "gaussian": {}, "optimal_interpolation": {}}
    for fraction, observations in given.items():
        report = counter(progress, f"analyses, {fraction:.0%} observed", len(when))
        methods = {
            "fractions": analyse(model, fields, when, observations, drawing, report),
            "gaussian": analyse(model, fields, when, observations, drawing, network=False),
            "optimal_interpolation": _interpolate(baseline, fields, when, observations, settings),
        }
        analyses[fraction] = methods["fractions"]
        observed[fraction] = torch.stack([observed_points(o, truth.shape[1:]) for o in observations])
        for name, members in methods.items():
            tables[name][str(float(fraction))] = score_table(members, truth, valid & ~observed[fraction], fields)
    previous = torch.from_numpy(_previous(fields, when, time_step))
    scores = _summary(tables, score_table(previous[None], truth, valid, fields), settings, model, fields)
    scores |= {"train_s": trained - began, "wall_s": clock.perf_counter() - began}
    return TrialResult(model, scores, when, truth, analyses, observed)


def _previous(fields: Fields, when: Shaped[np.ndarray, " t"], time_step: np.timedelta64) -> np.ndarray:
    """Return the newest past frame of each time."""
    return fields.values[[history(fields.time, t, 1, time_step)[0][0] for t in when]]


def _fit_baseline(
    fields: Fields, when: Shaped[np.ndarray, " t"], time_step: np.timedelta64
) -> optimal_interpolation.OptimalInterpolation:
    now = fields.values[np.searchsorted(fields.time, when)]
    return optimal_interpolation.fit(_previous(fields, when, time_step), now, _hours(when))


def _hours(when: Shaped[np.ndarray, " t"]) -> np.ndarray:
    return np.asarray((when - when.astype("datetime64[D]")) // np.timedelta64(1, "h"), np.int64)


def _interpolate(
    baseline: optimal_interpolation.OptimalInterpolation,
    fields: Fields,
    when: Shaped[np.ndarray, " t"],
    observations: list[Observations | None],
    settings: TrialSettings,
) -> Float[Tensor, "m t c h w"]:
    """Draw the ensembles of optimal interpolation at the times `when`."""
    previous = _previous(fields, when, settings.time_step)
    members = []
    for k, (hour, given) in enumerate(zip(_hours(when), observations, strict=True)):
        generator = np.random.default_rng([settings.drawing.seed, k, 1])
        drawn = baseline.ensemble(previous[k], int(hour), given, settings.drawing.members, generator)
        members.append(torch.from_numpy(drawn).float())
    return torch.stack(members, 1)


def _summary(
    tables: Mapping[str, Mapping[str, Any]],
    persistence: Mapping[str, Mapping[str, float]],
    settings: TrialSettings,
    model: Model,
    fields: Fields,
) -> dict[str, Any]:
    past = fields.values[fields.time < settings.split].astype(np.float64)
    std = {name: float(past[:, c].std()) for c, name in enumerate(fields.variables)}
    headlines = {method: {f: headline(row, std) for f, row in table.items()} for method, table in tables.items()}
    model_scores = headlines["fractions"]
    gaussian = headlines["gaussian"]
    baseline = headlines["optimal_interpolation"]
    drawing = settings.drawing
    return {
        "fractions": model_scores,
        "crps_reduction": reductions(model_scores),
        "gaussian": {"fractions": gaussian, "crps_reduction": reductions(gaussian)},
        "optimal_interpolation": {"fractions": baseline, "crps_reduction": reductions(baseline)},
        "ratio_to_optimal_interpolation": {f: row["crps"] / baseline[f]["crps"] for f, row in model_scores.items()},
        "persistence": headline(persistence, std),
        "by_variable": {**tables, "persistence": persistence},
        "unit": fields.units[0] if len(std) == 1 else "training standard deviations of each variable",
        "training_std": std,
        "guidance": drawing.guidance,
        "members": drawing.members,
        "steps": drawing.sampler_steps,
        "seed": drawing.seed,
        "held_back_loss": model.training["held_back"],
    }
