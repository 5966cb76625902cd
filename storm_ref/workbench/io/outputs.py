"""Everything a command leaves behind: result.json, NetCDF and pictures, each whole or as it was before."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from storm_ref.workbench.io import data, figures
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.run.demonstration import Cycles, Demonstration
from storm_ref.workbench.run.trial import TrialResult

__all__ = ["write_demonstration", "write_json", "write_trial"]

Arrays = Mapping[float, Float[Tensor, "m t c h w"]]
Masks = Mapping[float, Bool[Tensor, "t c h w"]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that any reader takes. Raises ValueError for NaN in it, and OSError naming the path when writing fails."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text)


def write_demonstration(
    result: Demonstration, fields: Fields, about: Mapping[str, str], folder: Path, where_from: str
) -> list[Path]:
    """result.json, analysis.nc (the most observed fraction), forecast.nc and the pictures; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = _fields(result.analyses, result.time, fields, about, folder)
    written += _pictures(result.analyses, result.truth, result.observed, result.time, fields, folder)
    curves = {"STORM": {float(f): row["crps"] for f, row in result.scores["fractions"].items()}}
    written.append(_save(folder, "crps.png", figures.crps_by_fraction(curves, result.scores["unit"], "Analyses")))
    if result.cycles is not None and result.cycles.true_track is not None:
        written += _vortex(result.cycles, folder)
    write_json(folder / "result.json", {**result.scores, "data": where_from})
    return [folder / "result.json", *written]


def write_trial(
    result: TrialResult, fields: Fields, about: Mapping[str, str], folder: Path, where_from: str
) -> list[Path]:
    """result.json, analysis.nc, forecast.nc and the pictures; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = result.scores
    written = _fields(result.analyses, result.time, fields, about, folder)
    written += _pictures(result.analyses, result.truth, result.observed, result.time, fields, folder)
    tables = {
        "STORM": scores["fractions"],
        "Gaussian prior alone": scores["gaussian"]["fractions"],
        "optimal interpolation": scores["optimal_interpolation"]["fractions"],
    }
    curves = {name: {float(f): row["crps"] for f, row in table.items()} for name, table in tables.items()}
    crps = figures.crps_by_fraction(curves, scores["unit"], "Test part of the record")
    written.append(_save(folder, "crps.png", crps))
    losses, held = result.model.training["losses"], result.model.training["held_back"]
    if losses:
        mean = [float(np.mean(part)) for part in np.array_split(losses, min(len(losses), 100))]
        curve = {
            "training (means of 1 % of the steps)": (np.linspace(1, len(losses), len(mean)).tolist(), mean),
            "held back (averaged weights)": ([float(s) for s, _ in held], [float(v) for _, v in held]),
        }
        written.append(_save(folder, "training.png", figures.training(curve, "Training")))
    write_json(folder / "result.json", {**scores, "data": where_from})
    return [folder / "result.json", *written]


def _save(folder: Path, name: str, figure: Any) -> Path:
    figures.save(figure, folder / name)
    return folder / name


def _fields(analyses: Arrays, time: np.ndarray, fields: Fields, about: Mapping[str, str], folder: Path) -> list[Path]:
    """The ensembles of the most observed fraction, and of none if that was asked for."""
    names = {"analysis.nc": max(analyses)} | ({"forecast.nc": 0.0} if 0.0 in analyses and len(analyses) > 1 else {})
    for name, fraction in names.items():
        attributes = {**about, "fraction_observed": f"{fraction:g}"}
        data.write(data.to_dataset(analyses[fraction].numpy(), fields, time, attributes), folder / name)
    return [folder / name for name in names]


def _middle(analyses: Arrays) -> float:
    given = sorted(f for f in analyses if f > 0)
    return given[len(given) // 2] if given else 0.0


def _pictures(
    analyses: Arrays, truth: Tensor, observed: Masks, time: np.ndarray, fields: Fields, folder: Path
) -> list[Path]:
    fraction, k = _middle(analyses), len(time) // 2
    c = next((c for c, unit in enumerate(fields.units) if unit == "K"), 0)
    inner = tuple(slice(None, n - pad) for n, pad in zip(truth.shape[-2:], fields.padding, strict=True))
    one = {f: analyses[f][:, k, c].double().mean(0).numpy()[inner] for f in (min(analyses), fraction)}
    maps = figures.maps(
        fields.latitude[inner[0]],
        fields.longitude[inner[1]],
        truth[k, c].double().numpy()[inner],
        one[min(analyses)],
        one[fraction],
        observed[fraction][k, c].numpy()[inner],
        f"{fields.variables[c]} ({fields.units[c]})",
        f"{np.datetime_as_string(time[k], unit='m')} UTC",
    )
    unit, scale = fields.units[0], torch.ones(1)
    if len(fields.variables) > 1:
        unit, scale = "standard deviations", torch.from_numpy(fields.values.astype(np.float64).std((0, 2, 3)))
    valid, pairs = torch.from_numpy(fields.valid[np.searchsorted(fields.time, time)]), {}
    for f, members in analyses.items():
        unseen = ~observed[f] & valid
        factor = np.sqrt(1 + 1 / len(members)) / scale[:, None, None]
        spread, error = members.double().std(0) * factor, (members.double().mean(0) - truth) / scale[:, None, None]
        pairs[f"{f:.0%} observed" if f else "forecast only"] = (spread[unseen].numpy(), error[unseen].numpy())
    spread = figures.spread_against_error(pairs, unit, "Does the spread tell the error?")
    return [_save(folder, "maps.png", maps), _save(folder, "spread.png", spread)]


def _vortex(cycles: Cycles, folder: Path) -> list[Path]:
    assert cycles.true_track is not None
    hours = int((cycles.time[-1] - cycles.time[0]) / np.timedelta64(1, "h"))
    start = np.datetime_as_string(cycles.time[0], unit="h")
    tracks = figures.tracks(cycles.true_track, cycles.tracks, f"Vortex followed for {hours} h from {start} UTC")
    last = {name: np.array([t.intensity[-1] for t in members]) for name, members in cycles.tracks.items()}
    wind = figures.intensity(float(cycles.true_track.intensity[-1]), last, f"Intensity after {hours} h")
    return [_save(folder, "tracks.png", tracks), _save(folder, "intensity.png", wind)]
