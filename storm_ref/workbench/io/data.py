"""Gridded data: CF NetCDF and Zarr files are read into one canonical form, and analyses are written to files.

Rows run from north to south, longitudes increase without a jump, times increase strictly, and every value is finite.

    local solar time  a = 2 pi (t / 1 d + lon / 360)                    t: UTC since midnight, lon in degrees east
    season            b = 2 pi (t - start of year) / (length of year)   by calendar year, so that new year has no jump
    forcings          sin a, cos a, sin b, cos b
    history           slot_k = when - k step, k = 1..K;   i_k = max {i : time_i <= slot_k and i < i_{k-1}}

References: CF conventions 1.11, chapters 4 (coordinates) and 8 (packing); names from the tables of ERA5, GRIB and HRRR.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

from storm_ref.workbench.io.atomic import replacing

__all__ = [
    "Fields",
    "calendar",
    "history",
    "labels",
    "open_file",
    "parse_step",
    "read",
    "resolve",
    "targets",
    "to_dataset",
    "write",
]

# Each line is one quantity in one unit: what a field's name, standard name, GRIB short name or long name may be.
ALIASES = (
    {"t2m", "2t", "2m_temperature", "2_metre_temperature", "tmp_2maboveground"},
    {"u10", "10u", "10m_u_component_of_wind", "10_metre_u_wind_component", "ugrd_10maboveground"},
    {"v10", "10v", "10m_v_component_of_wind", "10_metre_v_wind_component", "vgrd_10maboveground"},
    {"z", "geopotential", "geopotential_at_surface", "surface_geopotential"},
    {"orog", "orography", "surface_altitude", "hgt_surface"},
    {"lsm", "land_sea_mask", "land-sea_mask", "land_binary_mask", "land_area_fraction", "land_surface"},
    {"msl", "mean_sea_level_pressure", "air_pressure_at_mean_sea_level", "prmsl_meansealevel", "mslma_meansealevel"},
)
_UNITS = {"latitude": r"degrees?_?n(orth)?", "longitude": r"degrees?_?e(ast)?", "time": r"(?!)"}
_AXES = {"latitude": "Y", "longitude": "X", "time": "T"}
_NAMES = {
    "latitude": r"lat(itude)?|(g0_)?lat_\d",
    "longitude": r"lon(gitude)?|(g0_)?lon_\d",
    "time": r"(valid_?)?time|initial_time0_hours|forecast_time0",
}
_HOUR = np.timedelta64(1, "h")


@dataclass(frozen=True, eq=False)
class Fields:
    """Time series of fields on a latitude-longitude grid, in the file's physical units.

    time          datetime64[ns], UTC, strictly increasing
    latitude      degrees, decreasing from north to south
    longitude     degrees, increasing without a jump, so that it may leave -180..360
    values        finite everywhere; where `valid` is False the file has no number (the value is then the point's mean
                  over time, or else the channel's mean), or the point is padding
    static        constant fields
    variables     names in the file, as are `static_names`
    attributes    standard_name and long_name of each variable
    periodic      the longitudes close the circle
    padding       rows and columns that grid_mismatch="pad" added in the south and the east
    """

    time: Shaped[np.ndarray, " t"]
    latitude: Float64[np.ndarray, " h"]
    longitude: Float64[np.ndarray, " w"]
    values: Float32[np.ndarray, "t c h w"]
    valid: Bool[np.ndarray, "t c h w"]
    static: Float32[np.ndarray, "s h w"]
    variables: tuple[str, ...]
    static_names: tuple[str, ...]
    units: tuple[str, ...]
    attributes: tuple[dict[str, str], ...]
    periodic: bool
    padding: tuple[int, int] = (0, 0)


def read(
    path: str | Path,
    variables: Sequence[str] | None = None,
    static: Sequence[str] | None = None,
    *,
    patch: tuple[int, int] = (1, 1),
    grid_mismatch: str | None = None,
) -> Fields:
    """Read a NetCDF-4 file or a Zarr directory into the canonical form.

    variables, static: names of the variables and constant fields to read; None for all of them. A name is that in the
    file, a CF standard name or an alias (ERA5 short and long names, GRIB and HRRR names); the static name "latitude"
    is the coordinate itself.

    grid_mismatch: what to do where `patch` does not divide the grid. "pad" repeats the last row and column, marks the
    new points invalid and continues the coordinates linearly; "crop" drops the last rows and columns; None refuses.

    Raises ValueError, naming the file, the fault and the remedy, for a file that cannot be read and for whatever does
    not fit the form: projected grids, further dimensions, unknown or ambiguous names, repeated times or meridians,
    circles of uneven spacing, other calendars, infinite values, variables or constant fields without numbers.
    """
    with open_file(path) as dataset:
        try:
            return _divisible(_canonical(dataset, variables, static), patch, grid_mismatch)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def open_file(path: str | Path) -> xr.Dataset:
    """Open a NetCDF-4 file or a Zarr directory, decoded by the CF conventions, its values still on disk.

    Raises ValueError, naming the file and the remedy, when it cannot be read or counts time in another calendar.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; check the path")
    try:
        if path.is_dir():
            raw = xr.open_zarr(path, chunks=None, consolidated=False, decode_cf=False)
        else:
            raw = xr.open_dataset(path, engine="h5netcdf", decode_cf=False)
    except Exception as error:  # h5py, h5netcdf and zarr raise errors of their own for files they do not understand
        raise ValueError(
            f"{path}: cannot be read as NetCDF-4 or Zarr ({error}); it is truncated, corrupt or of another format: "
            "fetch it again, or convert it, e.g. `nccopy -k nc4 in.nc out.nc`"
        ) from error
    try:
        for name, variable in raw.variables.items():
            calendar_name = str(variable.attrs.get("calendar", "standard")).lower()
            if calendar_name not in ("standard", "gregorian", "proleptic_gregorian"):
                raise ValueError(
                    f"{name} counts in the calendar {calendar_name!r}, convert it with Dataset.convert_calendar"
                )
        return xr.decode_cf(raw, decode_timedelta=False)
    except Exception as error:
        raw.close()
        raise ValueError(f"{path}: cannot be decoded by the CF conventions: {error}; correct its attributes") from error


def _canonical(dataset: xr.Dataset, variables: Sequence[str] | None, static: Sequence[str] | None) -> Fields:
    stored_time = dataset[_coordinate(dataset, "time")]
    stored_latitude = dataset[_coordinate(dataset, "latitude")]
    stored_longitude = dataset[_coordinate(dataset, "longitude")]
    dims = (str(stored_time.dims[0]), str(stored_latitude.dims[0]), str(stored_longitude.dims[0]))
    if len(set(dims)) < 3:
        raise ValueError(
            f"{stored_latitude.name} and {stored_longitude.name} do not span a grid (dimensions {dims}): "
            "interpolate to one"
        )
    time, t = _times(stored_time)
    latitude, h = _latitudes(stored_latitude)
    longitude, w, periodic = _longitudes(stored_longitude)
    chosen, constant = _choose(dataset, dims, variables, static)
    values = np.stack([_numbers(dataset, name, dims)[np.ix_(t, h, w)] for name in chosen], axis=1)
    valid = np.stack([_fill(values[:, c], name) for c, name in enumerate(chosen)], axis=1)
    fields = []
    for name in constant:
        if name in dataset.data_vars:
            fields.append(_constant(dataset, name, dims)[np.ix_(h, w)])
        else:
            fields.append(np.tile(latitude.astype(np.float32)[:, None], w.size))
    attributes = [dataset[name].attrs for name in chosen]
    return Fields(
        time=time,
        latitude=latitude,
        longitude=longitude,
        values=values,
        valid=valid,
        periodic=periodic,
        static=np.stack(fields) if fields else np.zeros((0, h.size, w.size), np.float32),
        variables=tuple(chosen),
        static_names=tuple(constant),
        units=tuple(str(a.get("units", "")) for a in attributes),
        attributes=tuple({k: str(a[k]) for k in ("standard_name", "long_name") if k in a} for a in attributes),
    )


def _coordinate(dataset: xr.Dataset, kind: str) -> str:
    """The name of the 1-D coordinate of this kind, told by its standard name, else its units, axis or name."""
    lines = {str(name): v for name, v in dataset.variables.items() if v.ndim == 1}
    if kind == "time":
        lines = {name: v for name, v in lines.items() if v.dtype.kind == "M"}
    standard = {name: str(v.attrs.get("standard_name", "")) for name, v in lines.items()}
    units = {name: str(v.attrs.get("units", "")) for name, v in lines.items()}
    axis = {name: str(v.attrs.get("axis", "")) for name, v in lines.items()}
    plain = [name for name in lines if not standard[name]]
    for candidates in (
        [name for name in lines if standard[name] == kind],
        [name for name in plain if re.fullmatch(_UNITS[kind], units[name].lower())],
        [name for name in plain if axis[name] == _AXES[kind] and units[name] not in ("m", "km")],
        [name for name in lines if re.fullmatch(_NAMES[kind], name.lower())],
    ):
        best = [name for name in candidates if name in dataset.dims] or candidates
        if len(best) > 1:
            raise ValueError(f"{best} could each be the {kind}: rename or drop all but one")
        if best:
            return best[0]
    planes = [n for n, v in dataset.variables.items() if v.ndim == 2 and re.fullmatch(_NAMES[kind], str(n).lower())]
    if planes or any("projection_" in str(v.attrs.get("standard_name")) for v in dataset.variables.values()):
        raise ValueError(
            f"the grid is projected, it has no 1-D {kind}: interpolate it to latitudes and longitudes first, "
            "e.g. `wgrib2 -new_grid latlon` or `cdo remapbil`"
        )
    raise ValueError(f"no 1-D {kind} (told by CF standard_name or units) in {sorted(map(str, dataset.variables))}")


def _times(coordinate: xr.DataArray) -> tuple[Shaped[np.ndarray, " t"], Int64[np.ndarray, " t"]]:
    """The times in increasing order, and the order that gives them."""
    times = coordinate.values.astype("datetime64[ns]")
    if times.size == 0 or np.isnat(times).any():
        raise ValueError(f"{coordinate.name} is empty or has {int(np.isnat(times).sum())} missing times: drop those")
    unique, first, count = np.unique(times, return_index=True, return_counts=True)
    again = unique[count > 1]
    if again.size:
        keep = f"keep one of each, e.g. dataset.drop_duplicates({coordinate.name!r})"
        raise ValueError(f"{again.size} times occur more than once (such as {_text(again[0])}): {keep}")
    return unique, first


def _latitudes(coordinate: xr.DataArray) -> tuple[Float64[np.ndarray, " h"], Int64[np.ndarray, " h"]]:
    """The latitudes from north to south, and the order that gives them."""
    degrees = coordinate.values.astype(np.float64)
    steps = np.diff(degrees)
    if degrees.size == 0 or not (np.abs(degrees) <= 90).all():
        raise ValueError(f"{coordinate.name} must hold degrees in -90..90, got {degrees}")
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"{coordinate.name} must rise or fall strictly: sort it and drop repeated rows")
    order = np.argsort(-degrees)
    return degrees[order], order


def _longitudes(coordinate: xr.DataArray) -> tuple[Float64[np.ndarray, " w"], Int64[np.ndarray, " w"], bool]:
    """The longitudes without a jump, the order that gives them, and whether they are evenly spaced around the circle.

    The seam of a region lies in the largest gap, wherever its file begins; a circle begins where its file begins.
    """
    degrees = coordinate.values.astype(np.float64)
    if degrees.size == 0 or not np.isfinite(degrees).all():
        raise ValueError(f"{coordinate.name} is empty or not finite: {degrees}")
    if degrees.size == 1:
        return degrees, np.zeros(1, np.int64), False
    circle = np.mod(degrees, 360)
    order = np.argsort(circle)
    gaps = np.diff(circle[order], append=circle[order[0]] + 360)
    if (gaps < 1e-4).any():  # degrees: 10 m, more than the rounding of float32
        raise ValueError(
            f"{coordinate.name} holds the meridian {circle[order][gaps < 1e-4][0]:g} twice (0 and 360 are one, so are "
            f"-180 and 180): drop the copy, e.g. dataset.isel({coordinate.name}=slice(0, -1))"
        )
    even = bool((np.abs(gaps * gaps.size / 360 - 1) < 0.01).all())
    second_largest, largest = np.sort(gaps)[-2:]
    if not even and largest < 1.5 * second_largest:
        steps = f"uneven steps of {gaps.min():g} to {gaps.max():g} degrees"
        raise ValueError(f"{coordinate.name} goes round the globe in {steps}: interpolate it to even steps")
    start = int(np.argmin(order)) if even else int(np.argmax(gaps)) + 1
    order = np.roll(order, -start)
    return degrees[order[0]] + np.mod(circle[order] - circle[order[0]], 360), order, even


def _choose(
    dataset: xr.Dataset, dims: tuple[str, ...], variables: Sequence[str] | None, static: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Names in the file of the time-dependent and of the constant fields that are asked for."""
    numeric = {str(name): v for name, v in dataset.data_vars.items() if v.dtype.kind in "fiub"}
    fields = {name: v for name, v in numeric.items() if set(dims[1:]) <= set(v.dims)}
    known = {name: labels(name, v.attrs) for name, v in fields.items()}
    timeless = [name for name, v in fields.items() if dims[0] not in v.dims]
    constant = list(timeless)
    if static is not None:
        given_by_grid = {"latitude"} - fields.keys()
        constant = [name if name in given_by_grid else resolve(name, known) for name in static]
    varying = [name for name in fields if name not in timeless and name not in constant]
    chosen = varying if variables is None else [resolve(name, known) for name in variables]
    for name in set(chosen) & set(timeless):
        raise ValueError(f"{name} does not depend on time: ask for it in `static`; these do: {varying}")
    if len({*chosen, *constant}) < len(chosen) + len(constant):
        raise ValueError(f"a field is asked for twice: variables {chosen}, static {constant}")
    if not chosen:
        raise ValueError(f"no field with dimensions {dims}; the file has {sorted(map(str, dataset.data_vars))}")
    return chosen, constant


def labels(name: str, attributes: Mapping[Any, Any]) -> set[str]:
    """Every label that the name and attributes of a field give it, in lower case with underscores."""
    keys = ("standard_name", "GRIB_shortName", "GRIB_cfVarName", "long_name")
    return {label.lower().replace(" ", "_") for label in (name, *(str(attributes.get(k, name)) for k in keys))}


def resolve(name: str, known: Mapping[str, Iterable[str]]) -> str:
    """Find the field that a user means by `name`: itself, else one with this label, else one with an alias of it.

    known: the `labels` of each field. Raises ValueError, listing the fields, when none or several match.
    """
    if name in known:
        return name
    lower = name.lower()
    for wanted in ({lower}, next((group for group in ALIASES if lower in group), set())):
        matches = [key for key, labels_of in known.items() if wanted & set(labels_of)]
        if len(matches) > 1:
            raise ValueError(f"{name!r} is ambiguous, it fits each of {matches}: use one of these names")
        if matches:
            return matches[0]
    near = difflib.get_close_matches(lower, {label for labels_of in known.values() for label in labels_of}, 3)
    raise ValueError(f"no field {name!r}; there are {sorted(known)}" + (f" (close: {near})" if near else ""))


def _numbers(dataset: xr.Dataset, name: str, dims: tuple[str, ...]) -> Float32[np.ndarray, "..."]:
    """The values of a field with exactly these dimensions, in the order of the file; NaN where it has no value."""
    field = dataset[name]
    further = {str(dim): size for dim, size in field.sizes.items() if dim not in dims}
    if any(size != 1 for size in further.values()):
        pick = next(dim for dim, size in further.items() if size != 1)
        raise ValueError(f"{name} has further dimensions {further}: choose one of each, e.g. dataset.isel({pick}=0)")
    try:
        numbers = field.squeeze(list(further)).transpose(*dims).values
    except Exception as error:  # a damaged chunk is noticed only here, by whatever error its decoder raises
        raise ValueError(f"{name} cannot be read ({error}): truncated or corrupt, fetch the file again") from error
    with np.errstate(over="ignore"):
        numbers = np.asarray(numbers, np.float32)
    infinite = int(np.isinf(numbers).sum())
    if infinite:
        raise ValueError(f"{name} has {infinite} infinite values (or beyond float32): replace them by NaN")
    return numbers


def _constant(dataset: xr.Dataset, name: str, dims: tuple[str, ...]) -> Float32[np.ndarray, "h w"]:
    """The values of a field that does not change with time."""
    field = _numbers(dataset, name, dims if dims[0] in dataset[name].dims else dims[1:])
    if field.ndim == 3 and (field != field[:1]).any():
        raise ValueError(f"{name} changes with time (or lacks values), so it is not static: ask for it in `variables`")
    if np.isnan(field).any():
        raise ValueError(f"static {name} lacks {int(np.isnan(field).sum())} of its values: fill them, or leave it out")
    return np.asarray(field[0] if field.ndim == 3 else field)


def _fill(channel: Float32[np.ndarray, "t h w"], name: str) -> Bool[np.ndarray, "t h w"]:
    """Fill NaN in place by the point's mean over time, or else the mean of all, and return where there was a number."""
    valid: Bool[np.ndarray, "t h w"] = ~np.isnan(channel)
    count = valid.sum(0)
    if not count.any():
        raise ValueError(f"{name} has no number at all, every value is missing: leave it out")
    if not valid.all():
        total = np.where(valid, channel, 0).sum(0, dtype=np.float64)
        means = np.where(count > 0, total / np.maximum(count, 1), total.sum() / count.sum())
        channel[...] = np.where(valid, channel, means)
    return valid


def _divisible(fields: Fields, patch: tuple[int, int], grid_mismatch: str | None) -> Fields:
    """The same fields on a grid that the patch divides, padded or cropped as `read` describes."""
    if min(patch) < 1 or grid_mismatch not in (None, "pad", "crop"):
        raise ValueError(
            'patch must be at least 1 x 1 and grid_mismatch "pad", "crop" or None, '
            f"got patch={patch}, grid_mismatch={grid_mismatch!r}"
        )
    height = fields.latitude.size
    width = fields.longitude.size
    rows = -height % patch[0]
    cols = -width % patch[1]
    name = f"{patch[0]} x {patch[1]}"
    if not rows and not cols:
        return fields
    if cols and fields.periodic:
        raise ValueError(
            f"patch {name} does not divide the {width} longitudes of a circle, which padding or cropping would open: "
            f"choose another patch, such as one of {[p for p in range(1, 17) if width % p == 0]}"
        )
    if grid_mismatch == "pad":
        return _padded(fields, rows, cols)
    kept_height = height - height % patch[0]
    kept_width = width - width % patch[1]
    if grid_mismatch is None or 0 in (kept_height, kept_width):
        raise ValueError(
            f"patch {name} does not divide the grid of {height} x {width} points: choose grid mismatch 'pad' (to "
            f"{height + rows} x {width + cols}) or 'crop' (to {kept_height} x {kept_width}; 0 leaves nothing)"
        )
    cut = np.s_[..., :kept_height, :kept_width]
    return replace(
        fields,
        latitude=fields.latitude[:kept_height],
        longitude=fields.longitude[:kept_width],
        values=fields.values[cut],
        valid=fields.valid[cut],
        static=fields.static[cut],
    )


def _padded(fields: Fields, rows: int, cols: int) -> Fields:
    latitude = _extended(fields.latitude, rows)
    longitude = _extended(fields.longitude, cols)
    if latitude[-1] < -90:
        raise ValueError(f"padding would reach latitude {latitude[-1]:g}, beyond the pole: choose grid mismatch 'crop'")
    around = ((0, rows), (0, cols))
    return replace(
        fields,
        latitude=latitude,
        longitude=longitude,
        padding=(rows, cols),
        values=np.pad(fields.values, ((0, 0), (0, 0), *around), "edge"),
        valid=np.pad(fields.valid, ((0, 0), (0, 0), *around)),
        static=np.pad(fields.static, ((0, 0), *around), "edge"),
    )


def _extended(axis: Float64[np.ndarray, " n"], count: int) -> Float64[np.ndarray, " m"]:
    """The axis and `count` more coordinates at its last spacing."""
    if not count:
        return axis
    if axis.size < 2:
        raise ValueError("one row or column has no spacing to pad with: choose patch 1 or a larger region")
    return np.append(axis, axis[-1] + np.arange(1, count + 1) * (axis[-1] - axis[-2]))


def calendar(
    time: Shaped[np.ndarray, " t"], latitude: Float[np.ndarray, " h"], longitude: Float[np.ndarray, " w"]
) -> Float32[np.ndarray, "t 4 h w"]:
    """Forcings that the time alone determines: sin and cos of the local solar time of day, then of the season.

    time in UTC (datetime64), coordinates in degrees; equations at the head of this module. The values are continuous
    across midnight, new year and the 0/360 meridian.
    """
    now = time.astype("datetime64[ns]")
    day_fraction = (now - now.astype("datetime64[D]")) / np.timedelta64(1, "D")
    year = now.astype("datetime64[Y]")
    year_length = (year + 1).astype("datetime64[ns]") - year.astype("datetime64[ns]")
    solar = 2 * np.pi * (day_fraction[:, None, None] + longitude.astype(np.float64) / 360)
    season = 2 * np.pi * ((now - year) / year_length)[:, None, None]
    waves = (np.sin(solar), np.cos(solar), np.sin(season), np.cos(season))
    shape = (time.size, latitude.size, longitude.size)
    return np.stack([np.broadcast_to(wave, shape) for wave in waves], axis=1).astype(np.float32)


def parse_step(text: str) -> np.timedelta64:
    """Read a time step such as "6h", "1d" or "90min" as timedelta64[ns].

    Raises ValueError for anything else, zero included.
    """
    match = re.fullmatch(r"\s*0*([1-9]\d{0,4})\s*(min|h|d)\s*", text)
    if not match:
        raise ValueError(
            f'{text!r} is not a time step: write a whole number above 0 and min, h or d: "90min", "6h", "1d"'
        )
    return np.timedelta64(int(match[1]) * {"min": 60, "h": 3600, "d": 86400}[match[2]] * 10**9, "ns")


def history(
    time: Shaped[np.ndarray, " t"],
    when: np.datetime64,
    frames: int,
    step: np.timedelta64,
    max_age: np.timedelta64 | None = None,
) -> tuple[Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Indices of the K past frames of an analysis at `when`, newest first, and their ages in hours.

    Slot k is at when - k step. Where the data have a gap, the slot takes the newest frame that is older than it and not
    yet used, with its true age. `time` is increasing; `when` need not be in it.

    Raises ValueError when too few frames are old enough, when the newest is older than `max_age` (default: 4 steps),
    and when the step is shorter than the spacing of `time`.
    """
    if frames < 1 or not step > np.timedelta64(0, "ns"):
        raise ValueError(f"at least one frame and a positive step are needed, got {frames} and {step}")
    spacing = np.diff(time).min() if time.size > 1 else step
    if step < spacing:
        raise ValueError(f"a step of {step / _HOUR:g} h is finer than the data: take at least {spacing / _HOUR:g} h")
    k = np.arange(frames)
    newest = np.searchsorted(time, when - step * (k + 1), side="right") - 1
    # i_k = min(newest_k, i_{k-1} - 1): adding k turns the recursion into a running minimum.
    indices = np.minimum.accumulate(newest + k) - k
    if indices[-1] < 0:
        raise ValueError(
            f"the analysis at {_text(when)} needs {frames} past frames in steps of {step / _HOUR:g} h, but only "
            f"{int((indices >= 0).sum())} are old enough: start later, or take fewer frames"
        )
    ages: Float64[np.ndarray, " k"] = np.asarray(when - time[indices], "timedelta64[ns]") / _HOUR
    oldest = (4 * step if max_age is None else max_age) / _HOUR
    if ages[0] > oldest:
        raise ValueError(
            f"the newest frame for the analysis at {_text(when)} is {ages[0]:g} h old, more than {oldest:g} h: "
            "fill the gap in the data, or raise max_age"
        )
    return indices, ages


def targets(
    time: Shaped[np.ndarray, " t"],
    step: np.timedelta64,
    start: np.datetime64 | None,
    stop: np.datetime64 | None,
    frames: int,
    max_age: np.timedelta64 | None = None,
) -> Shaped[np.ndarray, " n"]:
    """Times of the data, start <= t < stop, at which an analysis has its `history`; None leaves an end open.

    Raises ValueError, with the last reason, when there is no such time.
    """
    start = time[0] if start is None else start
    stop = time[-1] + 1 if stop is None else stop
    analysable = []
    reason = "no time of the data lies there"
    for when in time[(time >= start) & (time < stop)]:
        try:
            history(time, when, frames, step, max_age)
            analysable.append(when)
        except ValueError as error:
            reason = str(error)
    if not analysable:
        raise ValueError(f"nothing can be analysed from {_text(start)} until before {_text(stop)}: {reason}")
    return np.array(analysable)


def _text(when: np.datetime64) -> str:
    return str(np.datetime_as_string(when, unit="m"))


def to_dataset(
    analysis: Float[np.ndarray, "member t c h w"],
    fields: Fields,
    time: Shaped[np.ndarray, " t"],
    attributes: Mapping[str, str] | None = None,
) -> xr.Dataset:
    """Turn analyses on the grid of `fields`, padding included, into a CF Dataset without the padding.

    analysis is in physical units, and so is the Dataset: one variable for each channel, with dimensions (member, time,
    latitude, longitude). `attributes` become global attributes beside its own. Raises ValueError for other shapes.
    """
    expected = (time.size, len(fields.variables), *fields.static.shape[1:])
    if analysis.shape[1:] != expected:
        raise ValueError(f"the analysis is {analysis.shape}, these fields and times need (members, *{expected})")
    height = expected[2] - fields.padding[0]
    width = expected[3] - fields.padding[1]
    dims = ("member", "time", "latitude", "longitude")
    north = {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}
    east = {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}
    member = {"standard_name": "realization", "units": "1", "axis": "E"}
    coordinates = {
        "member": ("member", np.arange(len(analysis)), member),
        "time": ("time", time.astype("datetime64[ns]"), {"standard_name": "time", "axis": "T"}),
        "latitude": ("latitude", fields.latitude[:height], north),
        "longitude": ("longitude", fields.longitude[:width], east),
    }
    dataset = xr.Dataset(coords=coordinates, attrs={"Conventions": "CF-1.11", **(attributes or {})})
    for c, (name, units, named) in enumerate(zip(fields.variables, fields.units, fields.attributes, strict=True)):
        described = {**named, "units": units} if units else named
        dataset[name] = (dims, analysis[:, :, c, :height, :width].astype(np.float32), described)
    dataset["time"].encoding = {"units": "seconds since 1970-01-01", "calendar": "standard", "dtype": "int64"}
    return dataset


def write(dataset: xr.Dataset, path: str | Path) -> None:
    """Write a Dataset to `path`, a .nc file or a .zarr store, atomically.

    Raises ValueError for another suffix and for a folder that is not a Zarr store, and OSError, naming the path and the
    remedy, when writing fails; the old file is intact then.
    """
    path = Path(path)
    if path.suffix not in (".nc", ".zarr"):
        raise ValueError(f"{path}: the name must end in .nc (NetCDF-4) or .zarr")
    if path.is_dir() and not any((path / name).exists() for name in (".zgroup", "zarr.json")):
        raise ValueError(f"{path} is a folder but not a Zarr store, so it is not replaced: choose another name")
    with replacing(path) as part:
        if path.suffix == ".nc":
            packing = {name: {"zlib": True, "complevel": 4} for name in dataset.data_vars}
            dataset.to_netcdf(part, engine="h5netcdf", encoding=packing)
        else:
            dataset.to_zarr(part, mode="w", zarr_format=2, consolidated=True)
