"""The files that a command writes: result.json, CF NetCDF and figures, each replaced atomically."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from storm_ref.workbench.io import data, figures
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.run.demonstration import Cycles, Demonstration
from storm_ref.workbench.run.trial import TrialResult
from storm_ref.workbench.run.vortices import Track

__all__ = ["write_demonstration", "write_json", "write_trial"]

# By the fraction of points observed.
Ensembles = Mapping[float, Float[Tensor, "m t c h w"]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that every reader accepts.

    Raises ValueError for NaN or infinity in it, and OSError, naming the path, when writing fails.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text)


def write_demonstration(
    result: Demonstration, fields: Fields, attributes: Mapping[str, str], folder: Path, source: str
) -> list[Path]:
    """Write result.json, analysis.nc (of the largest fraction observed), forecast.nc and the figures.

    attributes: global attributes of the NetCDF files. source: where the data came from. Returns the files written.
    Raises OSError, naming the file, when writing fails; what was there before is intact then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = _write_ensembles(result.analyses, result.time, fields, attributes, folder)
    written += _draw_analyses(result, fields, folder)
    curves = {"STORM": _crps(result.scores["fractions"])}
    written.append(_save(folder, "crps.png", figures.crps_by_fraction(curves, result.scores["unit"], "Analyses")))
    if result.cycles is not None and result.cycles.true_track is not None:
        written += _draw_vortex(result.cycles, result.cycles.true_track, folder)
    write_json(folder / "result.json", {**result.scores, "data": source})
    return [folder / "result.json", *written]


def write_trial(
    result: TrialResult, fields: Fields, attributes: Mapping[str, str], folder: Path, source: str
) -> list[Path]:
    """Write result.json, analysis.nc, forecast.nc and the figures of a trial, as `write_demonstration` does."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = result.scores
    written = _write_ensembles(result.analyses, result.time, fields, attributes, folder)
    written += _draw_analyses(result, fields, folder)
    tables = {
        "STORM": scores["fractions"],
        "Gaussian prior alone": scores["gaussian"]["fractions"],
        "optimal interpolation": scores["optimal_interpolation"]["fractions"],
    }
    curves = {name: _crps(table) for name, table in tables.items()}
    crps = figures.crps_by_fraction(curves, scores["unit"], "Test part of the record")
    written.append(_save(folder, "crps.png", crps))
    if result.model.training["losses"]:
        written.append(_draw_training(result.model.training, folder))
    write_json(folder / "result.json", {**scores, "data": source})
    return [folder / "result.json", *written]


def _crps(table: Mapping[str, Mapping[str, float]]) -> dict[float, float]:
    return {float(fraction): row["crps"] for fraction, row in table.items()}


def _save(folder: Path, name: str, figure: Figure) -> Path:
    figures.save(figure, folder / name)
    return folder / name


def _write_ensembles(
    analyses: Ensembles, time: np.ndarray, fields: Fields, attributes: Mapping[str, str], folder: Path
) -> list[Path]:
    """Write the ensemble of the largest fraction observed, and of none where that was asked for."""
    fractions = {"analysis.nc": max(analyses)}
    if 0.0 in analyses and len(analyses) > 1:
        fractions["forecast.nc"] = 0.0
    for name, fraction in fractions.items():
        described = {**attributes, "fraction_observed": f"{fraction:g}"}
        data.write(data.to_dataset(analyses[fraction].numpy(), fields, time, described), folder / name)
    return [folder / name for name in fractions]


def _median_fraction(analyses: Ensembles) -> float:
    """The middle one of the fractions above 0, or 0 when there is none."""
    observed = sorted(fraction for fraction in analyses if fraction > 0)
    return observed[len(observed) // 2] if observed else 0.0


def _draw_analyses(result: Demonstration | TrialResult, fields: Fields, folder: Path) -> list[Path]:
    """Draw maps of the middle time, and the spread against the error over all times."""
    unit = fields.units[0]
    scale = torch.ones(1)
    if len(fields.variables) > 1:
        unit = "standard deviations"
        scale = torch.from_numpy(fields.values.astype(np.float64).std((0, 2, 3)))
    pairs = _spreads_and_errors(result, fields, scale[:, None, None])
    spread = figures.spread_against_error(pairs, unit, "Does the spread tell the error?")
    return [_save(folder, "maps.png", _maps(result, fields)), _save(folder, "spread.png", spread)]


def _maps(result: Demonstration | TrialResult, fields: Fields) -> Figure:
    """Maps without the padding: the first temperature, else the first variable, at the middle time."""
    frame = len(result.time) // 2
    channel = next((c for c, unit in enumerate(fields.units) if unit == "K"), 0)
    grid = result.truth.shape[-2:]
    inner = tuple(slice(None, size - pad) for size, pad in zip(grid, fields.padding, strict=True))

    def mean_of(fraction: float) -> np.ndarray:
        return np.asarray(result.analyses[fraction][:, frame, channel].double().mean(0).numpy()[inner])

    fraction = _median_fraction(result.analyses)
    return figures.maps(
        latitude=fields.latitude[inner[0]],
        longitude=fields.longitude[inner[1]],
        truth=result.truth[frame, channel].double().numpy()[inner],
        forecast=mean_of(min(result.analyses)),
        analysis=mean_of(fraction),
        observed=result.observed[fraction][frame, channel].numpy()[inner],
        label=f"{fields.variables[channel]} ({fields.units[channel]})",
        title=f"{np.datetime_as_string(result.time[frame], unit='m')} UTC",
    )


def _spreads_and_errors(
    result: Demonstration | TrialResult, fields: Fields, scale: Float[Tensor, "c 1 1"]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By fraction, the spread and the error of the mean at valid points not observed, in units of `scale`."""
    valid = torch.from_numpy(fields.valid[np.searchsorted(fields.time, result.time)])
    pairs = {}
    for fraction, members in result.analyses.items():
        unseen = ~result.observed[fraction] & valid
        spread = members.double().std(0) * (np.sqrt(1 + 1 / len(members)) / scale)
        error = (members.double().mean(0) - result.truth) / scale
        name = f"{fraction:.0%} observed" if fraction else "forecast only"
        pairs[name] = (spread[unseen].numpy(), error[unseen].numpy())
    return pairs


def _draw_training(record: Mapping[str, Any], folder: Path) -> Path:
    """Draw the losses of the training batches, averaged in at most 100 groups, and of the held-back part."""
    losses = record["losses"]
    held_back = record["held_back"]
    means = [float(np.mean(part)) for part in np.array_split(losses, min(len(losses), 100))]
    curves = {
        "training (means of 1 % of the steps)": (np.linspace(1, len(losses), len(means)).tolist(), means),
        "held back (averaged weights)": (
            [float(step) for step, _ in held_back],
            [float(loss) for _, loss in held_back],
        ),
    }
    return _save(folder, "training.png", figures.training(curves, "Training"))


def _draw_vortex(cycles: Cycles, true_track: Track, folder: Path) -> list[Path]:
    """Draw the tracks of the vortex in both cycles, and its wind at their end."""
    hours = int((cycles.time[-1] - cycles.time[0]) / np.timedelta64(1, "h"))
    start = np.datetime_as_string(cycles.time[0], unit="h")
    tracks = figures.tracks(
        (true_track.longitude, true_track.latitude),
        {name: [(t.longitude, t.latitude) for t in members] for name, members in cycles.tracks.items()},
        f"Vortex followed for {hours} h from {start} UTC",
    )
    last = {name: np.array([t.intensity[-1] for t in members]) for name, members in cycles.tracks.items()}
    wind = figures.intensity(float(true_track.intensity[-1]), last, f"Intensity after {hours} h")
    return [_save(folder, "tracks.png", tracks), _save(folder, "intensity.png", wind)]
