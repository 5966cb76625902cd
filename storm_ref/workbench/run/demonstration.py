"""The demonstration behind `assimilate`: score every fraction observed, then follow a vortex through two cycles.

One-stage analyses at several times, from the true past, for every fraction of points observed: scores, as in the trial.
Then two ensembles from one start, each member living on its own past: one is given observations at every step, the
other none. Where the data have winds, a vortex of the truth is followed in every member (cf. the paper's Figs. 6, 7).
"""

import time as clock
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from storm_ref.workbench.io.data import Fields, targets
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior.model import Model
from storm_ref.workbench.run import vortices
from storm_ref.workbench.run.analysis import (
    DrawSettings,
    analyse,
    check_fractions,
    counter,
    cycle,
    headline,
    observe,
    reductions,
    score_table,
    seen_by,
)
from storm_ref.workbench.run.vortices import Track

__all__ = ["Cycles", "Demonstration", "DemonstrationSettings", "demonstrate"]

# Winds by the names that files give them.
_WINDS = (("u10", "v10"), ("10u", "10v"), ("UGRD_10maboveground", "VGRD_10maboveground"))


@dataclass(frozen=True)
class DemonstrationSettings:
    """What is shown. Raises ValueError for fractions outside [0, 1) or given twice, and for too few times."""

    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5)
    start: np.datetime64 | None = None  # first time scored; None: the first of the record that has a past
    count: int = 6  # times scored, evenly spaced over what is left of the record
    cycle: int = 12  # steps of the two cycles; 0 leaves them out
    drawing: DrawSettings = field(default_factory=DrawSettings)

    def __post_init__(self) -> None:
        check_fractions(self.fractions)
        if self.count < 1 or self.cycle < 0:
            got = f"{self.count} and {self.cycle}"
            raise ValueError(f"need at least one time and a cycle of 0 or more steps, got {got}")


@dataclass(frozen=True, eq=False)
class Cycles:
    """The truth and both ensembles [m, t, c, h, w] by name, and the vortex's tracks where there are winds."""

    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    ensembles: Mapping[str, Float[Tensor, "m t c h w"]]
    true_track: Track | None
    tracks: Mapping[str, list[Track]]


@dataclass(frozen=True, eq=False)
class Demonstration:
    """`scores` is what result.json holds; arrays are by fraction."""

    scores: dict[str, Any]
    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    analyses: Mapping[float, Float[Tensor, "m t c h w"]]
    observed: Mapping[float, Bool[Tensor, "t c h w"]]
    cycles: Cycles | None


def demonstrate(
    model: Model, fields: Fields, settings: DemonstrationSettings, progress: Progress | None = None
) -> Demonstration:
    """Draw, score and follow.

    Raises ValueError when the fields are not of the model's kind, the record has no time after `start` or too few
    frames in a row for the cycles, or a fraction has no point; all that before anything is drawn.
    """
    began, drawing = clock.perf_counter(), settings.drawing
    model.check(fields)
    times = targets(fields.time, model.step, settings.start, None, model.frames)
    when = times[np.unique(np.linspace(0, len(times) - 1, settings.count).round().astype(int))]
    index = np.searchsorted(fields.time, when)
    truth, valid = torch.from_numpy(fields.values[index]), torch.from_numpy(fields.valid[index])
    row = _row(model, fields, times[0], settings.cycle)
    given = {f: [observe(fields, t, f, drawing, k) for k, t in enumerate(when)] for f in settings.fractions}
    analyses, seen, tables = {}, {}, {}
    for fraction, observations in given.items():
        label = f"analyses, {fraction:.0%} observed"
        analyses[fraction] = analyse(model, fields, when, observations, drawing, counter(progress, label, len(when)))
        seen[fraction] = torch.stack([seen_by(o, truth.shape[1:]) for o in observations])
        tables[str(float(fraction))] = score_table(analyses[fraction], truth, valid & ~seen[fraction], fields)
    cycles = _cycles(model, fields, row, settings, progress) if settings.cycle else None
    scores = _scores(tables, fields, settings) | ({"cycle": _cycle_scores(cycles, fields)} if cycles else {})
    scores["wall_s"] = clock.perf_counter() - began
    return Demonstration(scores, when, truth, analyses, seen, cycles)


def _scores(tables: Mapping[str, Any], fields: Fields, settings: DemonstrationSettings) -> dict[str, Any]:
    std = {n: float(fields.values[:, c].astype(np.float64).std()) for c, n in enumerate(fields.variables)}
    fractions = {f: headline(table, std) for f, table in tables.items()}
    drawing = settings.drawing
    return {
        "fractions": fractions,
        "crps_reduction": reductions(fractions),
        "by_variable": dict(tables),
        "unit": fields.units[0] if len(std) == 1 else "standard deviations of each variable",
        "standard_deviations": std,
        "guidance": drawing.guidance,
        "members": drawing.members,
        "steps": drawing.sampler_steps,
        "seed": drawing.seed,
    }


def _winds(fields: Fields) -> tuple[int, int] | None:
    for u, v in _WINDS:
        if u in fields.variables and v in fields.variables:
            return fields.variables.index(u), fields.variables.index(v)
    return None


def _row(model: Model, fields: Fields, first: np.datetime64, steps: int) -> Int64[np.ndarray, " t"]:
    """Where the frames of a cycle are. Raises ValueError unless they and the past of the first are all there."""
    wanted = first + model.step * np.arange(-model.frames, steps)
    index = np.searchsorted(fields.time, wanted)
    if steps and (index[-1] >= len(fields.time) or not np.array_equal(fields.time[index], wanted)):
        hours, start = model.step / np.timedelta64(1, "h"), np.datetime_as_string(first, unit="m")
        raise ValueError(
            f"a cycle of {steps} steps from {start} needs {steps} frames {hours:g} h apart and {model.frames} before "
            "them, without a gap: ask for fewer steps (0 for none) or another start"
        )
    return np.asarray(index[model.frames :], np.int64)


def _cycles(
    model: Model,
    fields: Fields,
    index: Int64[np.ndarray, " t"],
    settings: DemonstrationSettings,
    progress: Progress | None,
) -> Cycles:
    """Two ensembles through the frames `index`: without observations, and with the middle one of the fractions."""
    drawing, when = settings.drawing, fields.time[index]
    given = sorted(f for f in settings.fractions if f > 0)
    fractions = {"forecast only": 0.0}
    if given:
        fractions[f"{given[len(given) // 2]:.0%} observed"] = given[len(given) // 2]
    ensembles = {}
    for name, fraction in fractions.items():
        # The counter of analyses goes on from those scored: no noise is used twice.
        observations = [observe(fields, t, fraction, drawing, settings.count + k) for k, t in enumerate(when)]
        tell = counter(progress, f"cycle, {name}", len(when))
        ensembles[name] = cycle(model, fields, when, observations, drawing, tell, settings.count)
    truth = torch.from_numpy(fields.values[index])
    true_track, tracks = _follow(fields, truth, ensembles)
    return Cycles(when, truth, ensembles, true_track, tracks)


def _follow(
    fields: Fields, truth: Tensor, ensembles: Mapping[str, Tensor]
) -> tuple[Track | None, dict[str, list[Track]]]:
    winds = _winds(fields)
    if winds is None:
        return None, {}
    latitude, longitude, periodic = fields.latitude, fields.longitude, fields.periodic

    def wind(state: Tensor) -> list[np.ndarray]:
        return [state[:, c].double().numpy() for c in winds]

    u, v = wind(truth)
    start = vortices.choose(u, v, latitude, longitude, periodic)

    def track(state: Tensor) -> Track:
        u, v = wind(state)
        return vortices.follow(u, v, latitude, longitude, start, periodic)

    return track(truth), {name: [track(member) for member in members] for name, members in ensembles.items()}


def _cycle_scores(cycles: Cycles, fields: Fields) -> dict[str, Any]:
    """Scores of each cycle over all times and all points that have a truth, observed or not, and of its vortex."""
    valid = torch.from_numpy(fields.valid[np.searchsorted(fields.time, cycles.time)])
    result: dict[str, Any] = {}
    for name, members in cycles.ensembles.items():
        result[name] = {"by_variable": score_table(members, cycles.truth, valid, fields)}
        if cycles.true_track is not None:
            result[name]["vortex"] = _track_scores(cycles.true_track, cycles.tracks[name])
    return result


def _track_scores(truth: Track, members: list[Track]) -> dict[str, float]:
    """Mean distance from the true track (great-circle degrees), and the wind at its end (m/s)."""
    away = []
    for track in members:
        pairs = zip(track.latitude, track.longitude, truth.latitude, truth.longitude, strict=True)
        away.append([vortices.separation(*pair) for pair in pairs])
    last = np.array([t.intensity[-1] for t in members])
    return {
        "track_error_deg": float(np.mean(away)),
        "last_track_error_deg": float(np.mean([a[-1] for a in away])),
        "last_wind_mean": float(last.mean()),
        "last_wind_std": float(last.std(ddof=1)),
        "last_wind_true": float(truth.intensity[-1]),
    }
