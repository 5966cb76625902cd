"""The demonstration behind `assimilate`: score every fraction observed, then follow a vortex through two cycles.

One-stage analyses at several times are drawn given the true past, for every fraction of points observed, and scored as
in the trial. Then two ensembles start from the same past, and each member goes on from its own analyses: one ensemble
is given observations at every time step, the other none. Where the data have winds, a vortex of the truth is followed
in every member (cf. the paper's Figs. 6, 7).
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
    observed_points,
    reductions,
    score_table,
)
from storm_ref.workbench.run.vortices import Track

__all__ = ["Cycles", "Demonstration", "DemonstrationSettings", "demonstrate"]

# Names that files give to the two components of the wind at 10 m.
_WINDS = (("u10", "v10"), ("10u", "10v"), ("UGRD_10maboveground", "VGRD_10maboveground"))


@dataclass(frozen=True)
class DemonstrationSettings:
    """The settings of a demonstration.

    Raises ValueError for fractions outside [0, 1) or given twice, and for no time or a negative number of steps.
    """

    fractions: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5)
    start: np.datetime64 | None = None  # first time scored; None: the first of the record that has a past
    count: int = 6  # times scored, evenly spaced over the rest of the record
    cycle: int = 12  # steps of the two cycles; 0 leaves them out
    drawing: DrawSettings = field(default_factory=DrawSettings)

    def __post_init__(self) -> None:
        check_fractions(self.fractions)
        if self.count < 1 or self.cycle < 0:
            got = f"{self.count} and {self.cycle}"
            raise ValueError(f"need at least one time and a cycle of 0 or more steps, got {got}")


@dataclass(frozen=True, eq=False)
class Cycles:
    """The truth and both ensembles by name, in physical units, with the vortex's tracks where there are winds."""

    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    ensembles: Mapping[str, Float[Tensor, "m t c h w"]]
    true_track: Track | None
    tracks: Mapping[str, list[Track]]  # of each member


@dataclass(frozen=True, eq=False)
class Demonstration:
    """The scores of a demonstration, and the fields behind them in physical units."""

    scores: dict[str, Any]  # the content of result.json
    time: np.ndarray
    truth: Float[Tensor, "t c h w"]
    analyses: Mapping[float, Float[Tensor, "m t c h w"]]  # by fraction
    observed: Mapping[float, Bool[Tensor, "t c h w"]]  # by fraction
    cycles: Cycles | None


def demonstrate(
    model: Model, fields: Fields, settings: DemonstrationSettings, progress: Progress | None = None
) -> Demonstration:
    """Draw and score the analyses, then run both cycles and follow the vortex.

    Raises ValueError, before anything is drawn, when the fields do not match the model, when the record has no time
    after `start` or too few frames in a row for the cycles, or when a fraction comes to no point.
    """
    began = clock.perf_counter()
    drawing = settings.drawing
    model.check(fields)
    times = targets(fields.time, model.time_step, settings.start, None, model.frames)
    when = times[np.unique(np.linspace(0, len(times) - 1, settings.count).round().astype(int))]
    index = np.searchsorted(fields.time, when)
    truth = torch.from_numpy(fields.values[index])
    valid = torch.from_numpy(fields.valid[index])
    cycle_frames = _cycle_frames(model, fields, times[0], settings.cycle)
    given = {f: [observe(fields, t, f, drawing, k) for k, t in enumerate(when)] for f in settings.fractions}
    analyses = {}
    observed = {}
    tables = {}
    for fraction, observations in given.items():
        report = counter(progress, f"analyses, {fraction:.0%} observed", len(when))
        analyses[fraction] = analyse(model, fields, when, observations, drawing, report)
        observed[fraction] = torch.stack([observed_points(o, truth.shape[1:]) for o in observations])
        tables[str(float(fraction))] = score_table(analyses[fraction], truth, valid & ~observed[fraction], fields)
    scores = _scores(tables, fields, settings)
    cycles = None
    if settings.cycle:
        cycles = _cycles(model, fields, cycle_frames, settings, progress)
        scores["cycle"] = _cycle_scores(cycles, fields)
    scores["wall_s"] = clock.perf_counter() - began
    return Demonstration(scores, when, truth, analyses, observed, cycles)


def _scores(tables: Mapping[str, Any], fields: Fields, settings: DemonstrationSettings) -> dict[str, Any]:
    std = {name: float(fields.values[:, c].astype(np.float64).std()) for c, name in enumerate(fields.variables)}
    fractions = {fraction: headline(table, std) for fraction, table in tables.items()}
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


def _wind_channels(fields: Fields) -> tuple[int, int] | None:
    for u, v in _WINDS:
        if u in fields.variables and v in fields.variables:
            return fields.variables.index(u), fields.variables.index(v)
    return None


def _cycle_frames(model: Model, fields: Fields, first: np.datetime64, steps: int) -> Int64[np.ndarray, " t"]:
    """Return the indices of a cycle's frames. Raises ValueError unless they and the past of the first all exist."""
    wanted = first + model.time_step * np.arange(-model.frames, steps)
    index = np.searchsorted(fields.time, wanted)
    if steps and (index[-1] >= len(fields.time) or not np.array_equal(fields.time[index], wanted)):
        hours = model.time_step / np.timedelta64(1, "h")
        start = np.datetime_as_string(first, unit="m")
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
    """Run two ensembles through the frames `index`: without observations, and with the middle one of the fractions."""
    drawing = settings.drawing
    when = fields.time[index]
    positive = sorted(f for f in settings.fractions if f > 0)
    fractions = {"forecast only": 0.0}
    if positive:
        middle = positive[len(positive) // 2]
        fractions[f"{middle:.0%} observed"] = middle
    ensembles = {}
    for name, fraction in fractions.items():
        # Numbers of analyses go on from those scored, so that no noise is used twice.
        observations = [observe(fields, t, fraction, drawing, settings.count + k) for k, t in enumerate(when)]
        report = counter(progress, f"cycle, {name}", len(when))
        ensembles[name] = cycle(model, fields, when, observations, drawing, report, first=settings.count)
    truth = torch.from_numpy(fields.values[index])
    true_track, tracks = _follow(fields, truth, ensembles)
    return Cycles(when, truth, ensembles, true_track, tracks)


def _follow(
    fields: Fields, truth: Tensor, ensembles: Mapping[str, Tensor]
) -> tuple[Track | None, dict[str, list[Track]]]:
    """Choose a vortex of the truth and track it in the truth and in every member; no tracks without winds."""
    channels = _wind_channels(fields)
    if channels is None:
        return None, {}

    def winds(state: Tensor) -> tuple[np.ndarray, np.ndarray]:
        u, v = (state[:, c].double().numpy() for c in channels)
        return u, v

    start = vortices.choose(*winds(truth), fields.latitude, fields.longitude, fields.periodic)

    def track(state: Tensor) -> Track:
        return vortices.follow(*winds(state), fields.latitude, fields.longitude, start, fields.periodic)

    return track(truth), {name: [track(member) for member in members] for name, members in ensembles.items()}


def _cycle_scores(cycles: Cycles, fields: Fields) -> dict[str, Any]:
    """Score each cycle over all times and all valid points, observed or not, and its vortex."""
    valid = torch.from_numpy(fields.valid[np.searchsorted(fields.time, cycles.time)])
    result: dict[str, Any] = {}
    for name, members in cycles.ensembles.items():
        result[name] = {"by_variable": score_table(members, cycles.truth, valid, fields)}
        if cycles.true_track is not None:
            result[name]["vortex"] = _track_scores(cycles.true_track, cycles.tracks[name])
    return result


def _track_scores(truth: Track, members: list[Track]) -> dict[str, float]:
    """Return mean distances from the true track in great-circle degrees, and winds at its end in m/s."""
    errors = []
    for track in members:
        positions = zip(track.latitude, track.longitude, truth.latitude, truth.longitude, strict=True)
        errors.append([vortices.separation(*position) for position in positions])
    last = np.array([track.intensity[-1] for track in members])
    return {
        "track_error_deg": float(np.mean(errors)),
        "last_track_error_deg": float(np.mean([error[-1] for error in errors])),
        "last_wind_mean": float(last.mean()),
        "last_wind_std": float(last.std(ddof=1)),
        "last_wind_true": float(truth.intensity[-1]),
    }
