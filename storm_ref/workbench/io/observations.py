"""Observations for guidance, in physical units: random grid points, the points of a mask, or stations from a file.

model       y = H x + e,  e ~ N(0, R), R diagonal: one variance for each observation
grid point  one index of weight 1
bilinear    weights (1-a)(1-b), (1-a) b, a (1-b), a b on the four points around a station, which lies the fraction a
            of their cell southward and b eastward; a periodic axis has a cell across its seam, but there is none
            beyond a pole or a closed edge
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

__all__ = [
    "Report",
    "Stations",
    "bilinear",
    "from_mask",
    "from_stations",
    "observed",
    "random_points",
    "read_stations",
    "scale",
]

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
    """Point observations: times in UTC (datetime64[ns]), places in degrees, values and error_std in physical units.

    error_std is the standard deviation of the error. NaN in value or error_std marks a missing one; the variable ""
    stands for the only one of the data.
    """

    time: Shaped[np.ndarray, " n"]
    latitude: Float64[np.ndarray, " n"]
    longitude: Float64[np.ndarray, " n"]
    value: Float64[np.ndarray, " n"]
    error_std: Float64[np.ndarray, " n"]
    variable: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The number of observations given and used, and (reason, number) for those left out, each counted once."""

    total: int
    used: int
    dropped: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        left = ", ".join(f"{count} {reason}" for reason, count in self.dropped)
        return f"{self.used} of {self.total} observations are used" + (f"; left out: {left}" if left else "")


def observed(observations: Observations) -> Bool[Tensor, "c h w"]:
    """The grid points that observations read with a weight above zero, for scores at and away from them."""
    points = observations.index[observations.weight > 0]
    mask = torch.zeros(torch.Size(observations.shape).numel(), dtype=torch.bool)
    mask[points.cpu()] = True
    return mask.reshape(observations.shape)


def random_points(
    truth: Float[np.ndarray, "c h w"],
    valid: Bool[np.ndarray, "c h w"],
    fraction: float,
    std: float | Float[np.ndarray, " c"],
    generator: np.random.Generator,
) -> Observations:
    """Observe all channels at round(fraction n) random points of the n that are valid in all channels.

    Errors of standard deviation `std` are added. With generators of the same seed, the points and errors of a smaller
    fraction are the first of those of a larger one. Raises ValueError for a fraction outside 0..1 and for one that
    leaves no point.
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
    """Observe the field, without adding errors, wherever the mask, [C, H, W] or [H, W], is True.

    Raises ValueError when that is nowhere, and when a value there is not finite.
    """
    index = np.flatnonzero(np.broadcast_to(mask, field.shape))
    if not index.size:
        raise ValueError("empty observations: the mask is False everywhere")
    missing = int((~np.isfinite(field.flat[index])).sum())
    if missing:
        raise ValueError(f"{missing} of the {index.size} points in the mask have no finite value: leave them out of it")
    spread = np.broadcast_to(np.reshape(std, (-1, 1, 1)), field.shape)
    return _points(field.flat[index], index, spread.flat[index], field.shape)


def _points(value: np.ndarray, index: np.ndarray, std: np.ndarray, shape: tuple[int, ...]) -> Observations:
    """Observations of single grid points, by their flat index in a state of this shape."""
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
    """Read the columns time, latitude, longitude, value, error_std and, if there, variable from CSV, NetCDF or Zarr.

    Times are ISO 8601, in UTC unless they say otherwise. Raises ValueError, naming the file and the column, and for CSV
    the line.
    """
    path = Path(path)
    if path.suffix.lower() in (".nc", ".nc4", ".zarr"):
        return _read_arrays(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            column = _columns(path, reader.fieldnames or [])
            rows = [_row(row, column, f"{path}, line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a CSV table ({error}); check the path and the format") from error
    table = np.array([numbers for _, numbers, _ in rows], np.float64).reshape(-1, 4)
    return Stations(
        time=np.array([time for time, _, _ in rows], "datetime64[ns]"),
        latitude=table[:, 0],
        longitude=table[:, 1],
        value=table[:, 2],
        error_std=table[:, 3],
        variable=tuple(name for _, _, name in rows),
    )


def _read_arrays(path: Path) -> Stations:
    with open_file(path) as dataset:
        column = _columns(path, [str(name) for name in dataset.variables])
        arrays = [dataset[name].values for name in column.values()]
    try:
        values = {key: x.ravel() for key, x in zip(column, np.broadcast_arrays(*arrays), strict=True)}
        count = values["time"].size
        return Stations(
            time=values["time"].astype("datetime64[ns]"),
            latitude=values["latitude"].astype(np.float64),
            longitude=values["longitude"].astype(np.float64),
            value=values["value"].astype(np.float64),
            error_std=values["error_std"].astype(np.float64),
            variable=tuple(values["variable"].astype(str).tolist()) if "variable" in values else ("",) * count,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {list(column.values())} must be numbers of one length ({error})") from error


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """The name in the header of each column that is read, by the name it has here."""
    column = {}
    for key, aliases in _COLUMNS.items():
        matches = [name for name in header if name.strip().lower() in aliases]
        if len(matches) > 1 or not (matches or key == "variable"):
            what = f"{matches} could each be" if matches else "there is no column for"
            raise ValueError(f"{path}: {what} {key} (known names {', '.join(aliases)}) in the header {list(header)}")
        if matches:
            column[key] = matches[0]
    return column


def _row(row: Mapping[str, str], column: Mapping[str, str], place: str) -> tuple[np.datetime64, list[float], str]:
    """Time in UTC, (latitude, longitude, value, error_std) and variable of a line; `place` names it in errors."""
    if None in row or None in row.values():
        raise ValueError(f"{place}: not as many cells as the header has columns")
    text = row[column["time"]].strip()
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{place}: time {text!r} is not ISO 8601, such as 2019-03-01T06:00") from None
    utc = np.datetime64(when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when, "ns")
    numbers = []
    for key in ("latitude", "longitude", "value", "error_std"):
        numbers.append(_number(row[column[key]].strip(), f"{place}: {key}", may_miss=key in ("value", "error_std")))
    return utc, numbers, row[column["variable"]].strip() if "variable" in column else ""


def _number(text: str, place: str, may_miss: bool) -> float:
    if may_miss and text.lower() in ("", "nan", "na"):
        return float("nan")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{place} {text!r} is not a number") from None


def bilinear(
    latitude: Float64[np.ndarray, " h"],
    longitude: Float64[np.ndarray, " w"],
    periodic: bool,
    at_latitude: Float64[np.ndarray, " n"],
    at_longitude: Float64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, "n 4"], Int64[np.ndarray, "n 4"], Float64[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Rows, columns and weights of the four grid points around each place, and which places lie inside the grid.

    Places are in degrees, in any longitude convention; the grid is as in `Fields`, from north to south and eastward.
    Raises ValueError for a grid without cells.
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
    weights = np.stack([(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b], -1)
    return rows, cols, weights, inside & between


def _cell(
    axis: Float64[np.ndarray, " k"], at: Float64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """For each point, the interval of an increasing axis that holds it, the fraction of it before the point, and
    whether there is one. The ends of the axis are inside.
    """
    cell = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, axis.size - 2)
    fraction = (at - axis[cell]) / (axis[cell + 1] - axis[cell])
    return cell, np.clip(fraction, 0, 1), (fraction > -1e-9) & (fraction < 1 + 1e-9)


def from_stations(
    stations: Stations, fields: Fields, when: np.datetime64, tolerance: np.timedelta64
) -> tuple[Observations, Report]:
    """Observe with the stations within `tolerance` of `when`, interpolated bilinearly on the grid of `fields`.

    Values stay in the units of the fields. Observations that cannot be used are left out and reported. Raises
    ValueError, with the reasons, when none is left.
    """
    _, channels, height, width = fields.values.shape
    known = {name: labels(name, also) for name, also in zip(fields.variables, fields.attributes, strict=True)}
    channel = np.array([_channel(name, known) for name in stations.variable], np.int64)
    rows, cols, weight, inside = bilinear(
        fields.latitude, fields.longitude, fields.periodic, stations.latitude, stations.longitude
    )
    # Padding and points that never have a value in the file hold no state to compare an observation with.
    covered = np.asarray(fields.valid.any(0))[channel[:, None], rows, cols]
    inside &= (covered | (weight < 1e-9)).all(-1)
    keep = np.ones(len(channel), bool)
    dropped = []
    for reason, bad in {
        "without a finite value": ~np.isfinite(stations.value),
        "without a positive, finite error_std": ~(np.isfinite(stations.error_std) & (stations.error_std > 0)),
        f"not within {tolerance / np.timedelta64(1, 'h'):g} h of {when}": ~(np.abs(stations.time - when) <= tolerance),
        f"without a single matching variable among {', '.join(fields.variables)}": channel < 0,
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
    """The channel of a station's variable, or -1 when none or several match."""
    if not name:
        return 0 if len(known) == 1 else -1
    try:
        return list(known).index(resolve(name, known))
    except ValueError:
        return -1


def scale(observations: Observations, offset: Float[Tensor, "c h w"], std: Float[Tensor, " c"]) -> Observations:
    """Turn observations of x into observations of the normalised state z = (x - offset) / std.

    Raises ValueError when an observation reads several channels or a std is not positive.
    """
    channels = observations.index // offset[0].numel()
    if not bool((channels == channels[:, :1]).all()):
        raise ValueError("an observation reads several channels, whose scales differ: observe one channel at a time")
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(f"every channel's std must be positive and finite, got {std.tolist()}")
    std_of_each = std.to(observations.value)[channels[:, 0]]
    value = (observations.value - observations.apply(offset.to(observations.value))) / std_of_each
    return replace(observations, value=value, variance=observations.variance / std_of_each**2)
