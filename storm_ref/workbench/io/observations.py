"""Observations for guidance, in physical units: a share of the grid's points, a mask, or stations from a file.

model       y = H x + e,  e ~ N(0, R), R diagonal: one variance an observation
grid point  one index of weight 1
bilinear    weights (1-a)(1-b), (1-a) b, a (1-b), a b on the four points around a station, a and b its share of the
            cell southward and eastward; across the seam on a periodic axis, nothing beyond a pole or a closed edge
normalised  z = (x - m) / s:  y' = (y - H m) / s_c,  R' = R / s_c^2   (every observation lies in one channel c)
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from storm_ref.guidance import Observations
from storm_ref.workbench.io.data import Fields, labels, open_file, resolve

__all__ = ["Report", "Stations", "bilinear", "from_mask", "from_stations", "observed", "random_points", "read_stations"]
__all__ += ["scale"]

_COLUMNS = {
    "time": ("time", "valid_time", "date", "datetime"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
    "value": ("value", "observation", "obs"),
    "error_std": ("error_std", "std", "error"),
    "variable": ("variable", "parameter"),
}


@dataclass(frozen=True, eq=False)
class Stations:
    """Point observations: UTC times (datetime64[ns]), degrees, physical values, standard deviations of their errors.

    NaN in value or error_std means missing; variable "" means the only one there is.
    """

    time: Shaped[np.ndarray, " n"]
    latitude: Float64[np.ndarray, " n"]
    longitude: Float64[np.ndarray, " n"]
    value: Float64[np.ndarray, " n"]
    error_std: Float64[np.ndarray, " n"]
    variable: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """How many observations there were and are used, and why the others are not: (reason, count), each counted once."""

    total: int
    used: int
    dropped: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        left = ", ".join(f"{count} {reason}" for reason, count in self.dropped)
        return f"{self.used} of {self.total} observations are used" + (f"; left out: {left}" if left else "")


def observed(observations: Observations) -> Bool[Tensor, "c h w"]:
    """The grid points that an observation reads (with a weight above zero), for scores at and away from them."""
    reads = observations.index[observations.weight > 0]
    seen = torch.zeros(torch.Size(observations.shape).numel(), dtype=torch.bool)
    seen[reads.cpu()] = True
    return seen.reshape(observations.shape)


def random_points(
    truth: Float[np.ndarray, "c h w"],
    valid: Bool[np.ndarray, "c h w"],
    fraction: float,
    std: float | Float[np.ndarray, " c"],
    generator: np.random.Generator,
) -> Observations:
    """Every channel of round(fraction n) of the n points valid in all channels, plus noise of standard deviation `std`.

    With generators of one seed a smaller fraction's points and noise are the first of a larger one's. Raises ValueError
    for a fraction outside 0..1 and when no point results.
    """
    points = np.flatnonzero(valid.all(0))
    count = round(fraction * points.size) if 0 <= fraction <= 1 else -1
    if count < 1:
        raise ValueError(f"empty observations: {fraction} of {points.size} valid points; choose a fraction in (0, 1]")
    points = generator.permutation(points)[:count]
    noise = generator.standard_normal((count, len(truth)))
    values = truth.reshape(len(truth), -1)[:, points].T + noise * std
    index = points[:, None] + np.arange(len(truth)) * truth[0].size
    return _points(values, index, np.broadcast_to(std, values.shape), truth.shape)


def from_mask(
    field: Float[np.ndarray, "c h w"], mask: Bool[np.ndarray, "*c h w"], std: float | Float[np.ndarray, " c"]
) -> Observations:
    """The field's values wherever the mask, [C, H, W] or [H, W], is True; ValueError if nowhere, or if one is NaN."""
    index = np.flatnonzero(np.broadcast_to(mask, field.shape))
    if not index.size:
        raise ValueError("empty observations: the mask is False everywhere")
    missing = int((~np.isfinite(field.flat[index])).sum())
    if missing:
        raise ValueError(f"{missing} of the {index.size} points in the mask have no finite value: leave them out of it")
    spread = np.broadcast_to(np.reshape(std, (-1, 1, 1)), field.shape)
    return _points(field.flat[index], index, spread.flat[index], field.shape)


def _points(value: np.ndarray, index: np.ndarray, std: np.ndarray, shape: tuple[int, ...]) -> Observations:
    if not (np.isfinite(std) & (std > 0)).all():
        raise ValueError(f"the error's std must be positive and finite, got {np.unique(std)}")
    return Observations(
        value=torch.from_numpy(value.astype(np.float64).ravel()),
        variance=torch.from_numpy(np.square(std, dtype=np.float64).ravel()),
        index=torch.from_numpy(index.astype(np.int64).reshape(-1, 1)),
        weight=torch.ones(index.size, 1, dtype=torch.float64),
        shape=shape,
    )


def read_stations(path: str | Path) -> Stations:
    """Read columns time, latitude, longitude, value, error_std and perhaps variable from CSV, or from NetCDF or Zarr.

    Times are ISO 8601, UTC unless they say otherwise. Raises ValueError naming the column, and in CSV the line.
    """
    path = Path(path)
    if path.suffix.lower() in (".nc", ".nc4", ".zarr"):
        with open_file(path) as dataset:
            column = _columns(path, [str(name) for name in dataset.variables])
            data = [dataset[name].values for name in column.values()]
        try:
            time, *rest = (x.ravel() for x in np.broadcast_arrays(*data))
            latitude, longitude, value, std = (x.astype(np.float64) for x in rest[:4])
            names = tuple(rest[4].astype(str).tolist()) if len(rest) > 4 else ("",) * time.size
            return Stations(time.astype("datetime64[ns]"), latitude, longitude, value, std, names)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {list(column.values())} must be numbers of one length ({error})") from error
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            column = _columns(path, reader.fieldnames or [])
            rows = [_row(row, column, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV table ({error}); check the path and the format") from error
    table = np.array([numbers for _, numbers, _ in rows], np.float64).reshape(-1, 4)
    return Stations(
        np.array([time for time, _, _ in rows], "datetime64[ns]"),
        table[:, 0],
        table[:, 1],
        table[:, 2],
        table[:, 3],
        tuple(name for _, _, name in rows),
    )


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """The header's name for each of our columns."""
    column = {}
    for key, aliases in _COLUMNS.items():
        found = [name for name in header if name.strip().lower() in aliases]
        if len(found) > 1 or not (found or key == "variable"):
            what = f"{found} could each be" if found else "there is no column for"
            raise ValueError(f"{path}: {what} {key} (known names {', '.join(aliases)}) in the header {list(header)}")
        if found:
            column[key] = found[0]
    return column


def _row(row: Mapping[str, str], column: Mapping[str, str], place: str) -> tuple[np.datetime64, list[float], str]:
    def number(key: str, missing: bool) -> float:
        text = row[column[key]].strip()
        if missing and text.lower() in ("", "nan", "na"):
            return float("nan")
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{place}: {key} {text!r} is no number") from None

    if None in row or None in row.values():
        raise ValueError(f"{place}: not as many cells as the header has columns")
    text = row[column["time"]].strip()
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{place}: time {text!r} is not ISO 8601, such as 2019-03-01T06:00") from None
    utc = np.datetime64(when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when, "ns")
    numbers = [number(key, key in ("value", "error_std")) for key in ("latitude", "longitude", "value", "error_std")]
    return utc, numbers, row[column["variable"]].strip() if "variable" in column else ""


def bilinear(
    latitude: Float64[np.ndarray, " h"],
    longitude: Float64[np.ndarray, " w"],
    periodic: bool,
    at_latitude: Float64[np.ndarray, " n"],
    at_longitude: Float64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, "n 4"], Int64[np.ndarray, "n 4"], Float64[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Rows, columns and weights of the four grid points around each place, and which places lie inside the grid.

    Degrees, places in any longitude convention; the grid as in `Fields` (north to south, longitude rising).
    """
    if min(latitude.size, longitude.size) < 2:
        raise ValueError(f"a grid of {latitude.size} x {longitude.size} points has no cells to interpolate in")
    east = np.mod(at_longitude - longitude[0], 360)
    east = np.where(east > 360 - 1e-9, 0, east)  # on the first meridian, but for rounding
    meridians = longitude - longitude[0]
    row, a, inside = _cell(-latitude, -at_latitude)
    col, b, between = _cell(np.append(meridians, 360) if periodic else meridians, east)
    rows = np.stack([row, row, row + 1, row + 1], -1)
    cols = np.stack([col, col + 1, col, col + 1], -1) % longitude.size
    return rows, cols, np.stack([(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b], -1), inside & between


def _cell(
    axis: Float64[np.ndarray, " k"], at: Float64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The interval of a rising axis that holds each point, how far into it, and whether any does (ends included)."""
    cell = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, axis.size - 2)
    share = (at - axis[cell]) / (axis[cell + 1] - axis[cell])
    return cell, np.clip(share, 0, 1), (share > -1e-9) & (share < 1 + 1e-9)


def from_stations(
    stations: Stations, fields: Fields, when: np.datetime64, tolerance: np.timedelta64
) -> tuple[Observations, Report]:
    """Stations within `tolerance` of `when`, bilinear on the grid of `fields`, in the units of the fields.

    What cannot be used is left out and reported; raises ValueError, with the reasons, when nothing is left.
    """
    _, channels, height, width = fields.values.shape
    known = {name: labels(name, also) for name, also in zip(fields.variables, fields.attributes, strict=True)}
    channel = np.array([_channel(name, known) for name in stations.variable], np.int64)
    place = stations.latitude, stations.longitude
    rows, cols, weight, inside = bilinear(fields.latitude, fields.longitude, fields.periodic, *place)
    # Padding, and points of which the file never has a value, hold no state that an observation could be compared with.
    covered = np.asarray(fields.valid.any(0))[channel[:, None], rows, cols]
    inside &= (covered | (weight < 1e-9)).all(-1)
    keep, dropped = np.ones(len(channel), bool), []
    for reason, bad in {
        "without a finite value": ~np.isfinite(stations.value),
        "without a positive, finite error_std": ~(np.isfinite(stations.error_std) & (stations.error_std > 0)),
        f"not within {tolerance / np.timedelta64(1, 'h'):g} h of {when}": ~(np.abs(stations.time - when) <= tolerance),
        f"of no single variable among {', '.join(fields.variables)}": channel < 0,
        "outside the domain, or beside points without data": ~inside,
    }.items():
        if (keep & bad).any():
            dropped.append((reason, int((keep & bad).sum())))
        keep &= ~bad
    report = Report(len(keep), int(keep.sum()), tuple(dropped))
    if not report.used:
        raise ValueError(f"empty observations: {report}")
    return Observations(
        value=torch.from_numpy(stations.value[keep]),
        variance=torch.from_numpy(stations.error_std[keep] ** 2),
        index=torch.from_numpy(((channel[:, None] * height + rows) * width + cols)[keep]),
        weight=torch.from_numpy(weight[keep]),
        shape=(channels, height, width),
    ), report


def _channel(name: str, known: Mapping[str, set[str]]) -> int:
    """Channel of a station's variable, -1 when there is none or more than one."""
    if not name:
        return 0 if len(known) == 1 else -1
    try:
        return list(known).index(resolve(name, known))
    except ValueError:
        return -1


def scale(observations: Observations, offset: Float[Tensor, "c h w"], std: Float[Tensor, " c"]) -> Observations:
    """The same observations of z = (x - offset) / std, for a network that works on normalised fields.

    Raises ValueError when an observation mixes channels or a std is not positive.
    """
    channels = observations.index // offset[0].numel()
    if not bool((channels == channels[:, :1]).all()):
        raise ValueError("an observation reads several channels, whose scales differ: observe one channel at a time")
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(f"every channel's std must be positive and finite, got {std.tolist()}")
    unit = std.to(observations.value)[channels[:, 0]]
    value = (observations.value - observations.apply(offset.to(observations.value))) / unit
    return replace(observations, value=value, variance=observations.variance / unit**2)
