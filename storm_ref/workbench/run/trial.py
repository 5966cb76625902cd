"""The trial: train on the first part of a record, analyse the last part, and score every fraction of points observed.

For each analysis time k of the test part and each fraction f, M members of p(x_k | true past, y_k) with y_k at randomly
chosen points: a fraction f of all points, every variable; f = 0 is the forecast alone. Beside them, with the same
observations: the Gaussian prior alone (the network off), and optimal interpolation; and persistence. Scores as
analysis.py has them, always at points not observed.
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
    reductions,
    score_table,
    seen_by,
)
from storm_ref.workbench.run.training import TrainSettings, prepare, train

__all__ = ["TrialResult", "TrialSettings", "run_trial"]


@dataclass(frozen=True)
class TrialSettings:
    """What is tried. Raises ValueError for fractions outside [0, 1) or given twice."""

    split: np.datetime64  # the test part begins here
    step: np.timedelta64
    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5)
    stop: np.datetime64 | None = None  # the test part ends before this
    drawing: DrawSettings = field(default_factory=DrawSettings)
    training: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        check_fractions(self.fractions)


@dataclass(frozen=True, eq=False)
class TrialResult:
    """`scores` is what result.json holds; the arrays are for pictures: analyses [m, t, c, h, w] by fraction."""

    model: Model
    scores: dict[str, Any]
    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    analyses: Mapping[float, Float[Tensor, "m t c h w"]]
    observed: Mapping[float, Bool[Tensor, "t c h w"]]


def run_trial(fields: Fields, settings: TrialSettings, progress: Progress | None = None) -> TrialResult:
    """Train, analyse and score. Raises ValueError when a part of the record is too short, or a grid cannot be cut."""
    began, drawing = clock.perf_counter(), settings.drawing
    first = targets(fields.time, settings.step, None, settings.split, settings.training.frames)
    later = targets(fields.time, settings.step, settings.split, settings.stop, settings.training.frames)
    when = later[(later - later[0]) % settings.step == np.timedelta64(0, "ns")]
    given = {f: [observe(fields, t, f, drawing, k) for k, t in enumerate(when)] for f in settings.fractions}
    model = train(*prepare(fields, first, settings.step, settings.training), settings.training, progress)
    trained = clock.perf_counter()
    rival = _rival(fields, first, settings.step)
    index = np.searchsorted(fields.time, when)
    truth, valid = torch.from_numpy(fields.values[index]), torch.from_numpy(fields.valid[index])
    analyses, seen = {}, {}
    tables: dict[str, dict[str, Any]] = {"fractions": {}, "gaussian": {}, "optimal_interpolation": {}}
    for fraction, observations in given.items():
        tell = counter(progress, f"analyses, {fraction:.0%} observed", len(when))
        methods = {
            "fractions": analyse(model, fields, when, observations, drawing, tell),
            "gaussian": analyse(model, fields, when, observations, drawing, network=False),
            "optimal_interpolation": _interpolate(rival, fields, when, observations, settings),
        }
        analyses[fraction] = methods["fractions"]
        seen[fraction] = torch.stack([seen_by(o, truth.shape[1:]) for o in observations])
        for name, members in methods.items():
            tables[name][str(float(fraction))] = score_table(members, truth, valid & ~seen[fraction], fields)
    last = torch.from_numpy(fields.values[[history(fields.time, t, 1, settings.step)[0][0] for t in when]])
    scores = _summary(tables, score_table(last[None], truth, valid, fields), settings, model, fields)
    scores |= {"train_s": trained - began, "wall_s": clock.perf_counter() - began}
    return TrialResult(model, scores, when, truth, analyses, seen)


def _rival(fields: Fields, when: Shaped[np.ndarray, " t"], step: np.timedelta64) -> optimal_interpolation.Background:
    now = np.searchsorted(fields.time, when)
    before = np.array([history(fields.time, t, 1, step)[0][0] for t in when])
    return optimal_interpolation.fit(fields.values[before], fields.values[now], _hours(when))


def _hours(when: Shaped[np.ndarray, " t"]) -> np.ndarray:
    return np.asarray((when - when.astype("datetime64[D]")) // np.timedelta64(1, "h"), np.int64)


def _interpolate(
    rival: optimal_interpolation.Background,
    fields: Fields,
    when: Shaped[np.ndarray, " t"],
    observations: list[Observations | None],
    settings: TrialSettings,
) -> Float[Tensor, "m t c h w"]:
    members = []
    for k, (t, hour, seen) in enumerate(zip(when, _hours(when), observations, strict=True)):
        before = fields.values[history(fields.time, t, 1, settings.step)[0][0]]
        generator = np.random.default_rng([settings.drawing.seed, k, 1])
        drawn = rival.ensemble(before, int(hour), seen, settings.drawing.members, generator)
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
    head = {which: {f: headline(t, std) for f, t in table.items()} for which, table in tables.items()}
    ours, rival, drawing = head["fractions"], head["optimal_interpolation"], settings.drawing
    return {
        "fractions": ours,
        "crps_reduction": reductions(ours),
        "gaussian": {"fractions": head["gaussian"], "crps_reduction": reductions(head["gaussian"])},
        "optimal_interpolation": {"fractions": rival, "crps_reduction": reductions(rival)},
        "ratio_to_optimal_interpolation": {f: ours[f]["crps"] / rival[f]["crps"] for f in ours},
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
