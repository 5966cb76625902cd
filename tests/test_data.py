"""Gridded data: every convention becomes one canonical form, all else is refused, and files are written whole."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.workbench.io import data
from storm_ref.workbench.io.data import calendar, history, parse_step, read, resolve, targets, to_dataset, write

HOURS = np.arange("2020-01-01T00", "2020-01-01T06", dtype="datetime64[h]").astype("datetime64[ns]")
HOUR = np.timedelta64(1, "h")


def _smooth(latitude: np.ndarray, longitude: np.ndarray, count: int = len(HOURS)) -> np.ndarray:
    """A field whose value tells time and place, whatever the order and convention of the coordinates."""
    angle = np.deg2rad(longitude)
    place = 10 * np.sin(angle) + np.cos(angle) + latitude[:, None] / 10
    return (280 + np.arange(count)[:, None, None] + place).astype(np.float32)


def _grid(
    latitude: Any = (52, 51, 50), longitude: Any = (-2, -1, 0, 1), time: Any = HOURS, name: str = "t2m"
) -> xr.Dataset:
    latitude, longitude = np.asarray(latitude, float), np.asarray(longitude, float)
    values = _smooth(latitude, longitude, len(time))
    dataset = xr.Dataset(coords={"time": time, "latitude": latitude, "longitude": longitude})
    dataset[name] = (("time", "latitude", "longitude"), values, {"units": "K", "long_name": "2 metre temperature"})
    dataset["latitude"].attrs = {"standard_name": "latitude", "units": "degrees_north"}
    dataset["longitude"].attrs = {"standard_name": "longitude", "units": "degrees_east"}
    return dataset


def _save(dataset: xr.Dataset, path: Path, **encoding: Any) -> Path:
    dataset.to_netcdf(path, engine="h5netcdf", encoding=encoding)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fields.nc"


def _refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read(path, **options)
    assert str(path) in str(caught.value), "a refusal must name the file"


# the canonical form


def test_read_values_and_names(file: Path) -> None:
    dataset = _grid()
    dataset["lsm"] = (("latitude", "longitude"), np.eye(3, 4))
    dataset["time_bnds"] = (("time", "bnds"), np.zeros((6, 2)))
    dataset["crs"] = ((), 0)
    fields = read(_save(dataset, file))
    np.testing.assert_array_equal(fields.values[:, 0], dataset.t2m.values)
    np.testing.assert_array_equal(fields.static[0], np.eye(3, 4))
    assert fields.variables == ("t2m",) and fields.static_names == ("lsm",) and fields.units == ("K",)
    assert fields.attributes == ({"long_name": "2 metre temperature"},)
    assert fields.time.dtype == "datetime64[ns]" and (fields.time == HOURS).all()
    assert fields.valid.all() and not fields.periodic and fields.padding == (0, 0)
    assert fields.latitude.tolist() == [52, 51, 50] and fields.longitude.tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_read_zarr_equals_netcdf(tmp_path: Path, zarr_format: int) -> None:
    dataset = _grid()
    dataset.to_zarr(tmp_path / "fields.zarr", zarr_format=zarr_format, consolidated=zarr_format == 2)
    ours, theirs = read(tmp_path / "fields.zarr"), read(_save(dataset, tmp_path / "fields.nc"))
    np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(ours.time, theirs.time)


def test_read_latitude_direction_is_irrelevant(tmp_path: Path) -> None:
    down, up = _grid([52.0, 51.0, 49.5]), _grid([49.5, 51.0, 52.0])
    for dataset in (down, up):
        dataset["lsm"] = dataset.t2m[0].drop_vars("time")
    a, b = read(_save(down, tmp_path / "a.nc")), read(_save(up, tmp_path / "b.nc"))
    np.testing.assert_array_equal(a.latitude, [52, 51, 49.5])
    np.testing.assert_array_equal(b.latitude, a.latitude)
    np.testing.assert_array_equal(b.values, a.values)
    np.testing.assert_array_equal(b.static, a.static)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([-2, -1, 0, 1], [-2, -1, 0, 1]),
        ([358, 359, 0, 1], [358, 359, 360, 361]),
        ([0, 1, 358, 359], [358, 359, 360, 361]),
        ([1, 0, -1, -2], [-2, -1, 0, 1]),
        ([178, 179, -180, -179], [178, 179, 180, 181]),
        ([-180, -179, 178, 179], [178, 179, 180, 181]),
        ([178, 179, 180, 181], [178, 179, 180, 181]),
        ([10, 11, 13, 17], [10, 11, 13, 17]),  # a region may be uneven
        ([0, 0.25], [0, 0.25]),
    ],
)
def test_read_region_is_contiguous(file: Path, stored: list[float], expected: list[float]) -> None:
    dataset = _grid(longitude=stored)
    dataset["skin"] = dataset.t2m[0].drop_vars("time")
    fields = read(_save(dataset, file))
    assert fields.longitude.tolist() == expected and not fields.periodic
    np.testing.assert_allclose(fields.values[:, 0], _smooth(fields.latitude, fields.longitude), rtol=1e-6)
    np.testing.assert_array_equal(fields.static[0], fields.values[0, 0])


@pytest.mark.parametrize("start", [0, -180, 90, -5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_read_globe_starts_anywhere(file: Path, start: float, dtype: str) -> None:
    stored = np.mod(start + np.arange(60) * 6 + 180, 360) - 180 if start < 0 else np.mod(start + np.arange(60) * 6, 360)
    fields = read(_save(_grid(longitude=stored.astype(dtype)), file))
    assert fields.periodic
    np.testing.assert_allclose(fields.longitude, start + np.arange(60) * 6)
    np.testing.assert_allclose(fields.values[:, 0], _smooth(fields.latitude, fields.longitude), rtol=1e-6)


def test_read_globe_short_of_a_meridian_is_closed(file: Path) -> None:
    assert not read(_save(_grid(longitude=np.arange(0, 350, 10)), file)).periodic


def test_read_globe_float32_spacing_is_even(file: Path) -> None:
    longitude = (np.arange(1440) / 4).astype(np.float32) + np.float32(1e-5)
    assert read(_save(_grid(longitude=longitude), file)).periodic


@pytest.mark.parametrize("longitude", [np.arange(0, 361, 10), np.arange(-180, 181, 10), [-10, 0, 10, 350]])
def test_read_invalid_repeated_meridian(file: Path, longitude: Any) -> None:
    _refused(_save(_grid(longitude=longitude), file), "twice.*drop the copy.*isel")


def test_read_invalid_uneven_circle(file: Path) -> None:
    stretched = np.cumsum(10 + np.sin(np.arange(36)))
    _refused(_save(_grid(longitude=stretched), file), "round the globe in uneven steps.*interpolate")


def test_read_invalid_latitudes(file: Path) -> None:
    _refused(_save(_grid([50.0, 52.0, 51.0]), file), "rise or fall strictly")
    _refused(_save(_grid([95.0, 52.0, 51.0]), file), "-90..90")


@pytest.mark.parametrize(
    ("names", "attributes"),
    [
        (("valid_time", "lat", "lon"), ({}, {}, {})),
        (("time", "g0_lat_1", "g0_lon_2"), ({}, {}, {})),
        (("t", "p", "q"), ({"standard_name": "time"}, {"standard_name": "latitude"}, {"standard_name": "longitude"})),
        (("t", "p", "q"), ({"axis": "T"}, {"units": "degree_N"}, {"units": "degreesE"})),
        (("t", "p", "q"), ({"axis": "T"}, {"axis": "Y"}, {"axis": "X"})),
    ],
)
def test_read_finds_coordinates(file: Path, names: tuple[str, ...], attributes: tuple[dict[str, str], ...]) -> None:
    dataset = _grid()
    for old, new, attrs in zip(("time", "latitude", "longitude"), names, attributes, strict=True):
        dataset[old].attrs = attrs
        dataset = dataset.rename({old: new}) if old != new else dataset
    fields = read(_save(dataset.transpose(*reversed(names)), file))
    np.testing.assert_array_equal(fields.values, read(_save(_grid(), file)).values)


def test_read_prefers_valid_time_to_reference_time(file: Path) -> None:
    dataset = _grid().assign_coords(valid_time=("time", HOURS + 3 * HOUR, {"standard_name": "time"}))
    dataset["time"].attrs["standard_name"] = "forecast_reference_time"
    assert (read(_save(dataset, file)).time == HOURS + 3 * HOUR).all()


def test_read_prefers_the_dimension_coordinate(file: Path) -> None:
    dataset = _grid().assign_coords(edge=("latitude", [52.5, 51.5, 50.5], {"standard_name": "latitude"}))
    assert read(_save(dataset, file)).latitude.tolist() == [52, 51, 50]


def test_read_accepts_one_dimensional_coordinates_of_other_dimensions(file: Path) -> None:
    """A file with dimensions y, x and 1-D latitude(y), longitude(x) is a latitude-longitude grid."""
    dataset = _grid().drop_indexes(["latitude", "longitude"]).rename_dims({"latitude": "y", "longitude": "x"})
    np.testing.assert_array_equal(read(_save(dataset, file)).longitude, [-2, -1, 0, 1])


def test_read_invalid_coordinates(file: Path) -> None:
    _refused(_save(_grid().rename(latitude="p").assign_coords(p=("p", [1.0, 2, 3], {})), file), "no 1-D latitude.*'p'")
    _refused(_save(_grid().assign_coords(time=np.arange(6)), file), "no 1-D time")
    two = _grid().rename(latitude="rows").drop_vars("rows")
    for name in ("a", "b"):
        two[name] = ("rows", [3.0, 2, 1], {"standard_name": "latitude"})
    _refused(_save(two, file), r"\['a', 'b'\] could each be the latitude")
    points = xr.Dataset({"t2m": (("time", "n"), np.zeros((6, 3)))}, {"time": HOURS})
    points["lat"], points["lon"] = ("n", [1.0, 2, 3]), ("n", [1.0, 2, 3])
    _refused(_save(points, file), "do not span a grid")


def test_read_invalid_projected(file: Path) -> None:
    grid = xr.Dataset({"TMP_2maboveground": (("time", "y", "x"), np.zeros((6, 3, 4)))}, {"time": HOURS})
    plane = np.add.outer(np.arange(3.0), np.arange(4.0))
    grid = grid.assign_coords(latitude=(("y", "x"), plane), longitude=(("y", "x"), plane))
    _refused(_save(grid, file), "projected.*interpolate.*wgrib2")
    metres = {"units": "m", "axis": "Y"}, {"units": "m", "axis": "X"}
    unnamed = grid.assign_coords(y=("y", np.arange(3.0), metres[0]), x=("x", np.arange(4.0), metres[1]))
    _refused(_save(unnamed, file), "projected.*interpolate.*wgrib2")
    grid = grid.drop_vars(["latitude", "longitude"])
    for name in "yx":
        attributes = {"standard_name": f"projection_{name}_coordinate", "units": "m", "axis": name.upper()}
        grid[name] = (name, np.arange(grid.sizes[name]) * 3e3, attributes)
    _refused(_save(grid, file), "projected.*interpolate.*wgrib2")


# choosing variables


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("t2m", "2m_temperature"),
        ("t2m", "2t"),
        ("2t", "t2m"),
        ("TMP_2maboveground", "t2m"),
        ("t2m", "TMP_2maboveground"),
        ("UGRD_10maboveground", "u10"),
        ("u10", "10m_u_component_of_wind"),
        ("10v", "VGRD_10maboveground"),
        ("z", "geopotential"),
        ("orog", "HGT_surface"),
        ("lsm", "land_sea_mask"),
        ("LAND_surface", "lsm"),
    ],
)
def test_read_aliases(file: Path, stored: str, asked: str) -> None:
    dataset = _grid(name=stored)
    dataset[stored].attrs = {}
    dataset["other"] = dataset[stored] + 1
    fields = read(_save(dataset, file), variables=[asked])
    assert fields.variables == (stored,), "Fields keeps the file's own names"
    np.testing.assert_array_equal(fields.values[:, 0], dataset[stored].values)


def test_read_by_attributes_and_in_the_order_asked(file: Path) -> None:
    dataset = _grid(name="a")
    dataset["b"] = (dataset.a.dims, dataset.a.values + 1, {"standard_name": "eastward_wind", "GRIB_shortName": "10u"})
    path = _save(dataset, file)
    assert read(path, ["eastward_wind", "t2m"]).variables == ("b", "a")
    assert read(path, ["u10"]).variables == ("b",)
    np.testing.assert_array_equal(read(path, ["b", "a"]).values[:, ::-1], read(path, ["a", "b"]).values)


def test_resolve_prefers_the_exact_name() -> None:
    known = {"t2m": {"t2m"}, "2t": {"2t"}}
    assert resolve("2t", known) == "2t" and resolve("t2m", known) == "t2m"
    assert resolve("t", {"t": {"t"}, "other": {"other", "t"}}) == "t"
    with pytest.raises(ValueError, match=r"'2m_temperature' is ambiguous.*\['t2m', '2t'\]"):
        resolve("2m_temperature", known)


def test_resolve_geopotential_is_not_height() -> None:
    """Their units are m2 s-2 and m: taking one for the other would be wrong by a factor of g."""
    with pytest.raises(ValueError, match="no field 'orog'"):
        resolve("orog", {"z": {"z", "geopotential"}})


def test_read_invalid_names(file: Path) -> None:
    dataset = _grid()
    dataset["lsm"] = (("latitude", "longitude"), np.ones((3, 4)))
    path = _save(dataset, file)
    _refused(path, r"no field 't2'; there are \['lsm', 't2m'\] \(close: \['t2m'\]\)", variables=["t2"])
    _refused(path, "lsm does not depend on time: ask for it in `static`", variables=["lsm"])
    _refused(path, "asked for twice", variables=["t2m", "2t"])
    _refused(path, "asked for twice", variables=["t2m"], static=["t2m"])
    _refused(_save(_grid().drop_vars("t2m"), file), "no field with dimensions")


def test_read_static(file: Path) -> None:
    dataset = _grid([50.0, 51.0, 52.0])
    dataset["lsm"] = (("latitude", "longitude"), np.arange(12.0).reshape(3, 4))
    dataset["z"] = (dataset.t2m.dims, np.broadcast_to(np.arange(12.0).reshape(3, 4), (6, 3, 4)))
    path = _save(dataset, file)
    assert read(path, ["t2m"]).static_names == ("lsm",)
    assert read(path, ["t2m"], []).static.shape == (0, 3, 4)
    fields = read(path, static=["latitude", "geopotential"])
    assert fields.variables == ("t2m",) and fields.static_names == ("latitude", "z")
    np.testing.assert_array_equal(fields.static[0], np.repeat([[52], [51], [50]], 4, axis=1))
    np.testing.assert_array_equal(fields.static[1], np.arange(12).reshape(3, 4)[::-1])
    _refused(path, "t2m changes with time", variables=["z"], static=["t2m"])


def test_read_invalid_static_without_values(file: Path) -> None:
    dataset = _grid()
    dataset["sea"] = (("latitude", "longitude"), np.full((3, 4), np.nan))
    _refused(_save(dataset, file), "static sea lacks 12 of its values.*leave it out")
    assert read(file, static=()).static_names == ()


def test_read_squeezes_single_dimensions(file: Path) -> None:
    dataset = _grid()
    expected = dataset.t2m.values
    dataset["t2m"] = dataset.t2m.expand_dims({"height": [2.0], "number": [0]}, axis=(1, 3))
    np.testing.assert_array_equal(read(_save(dataset, file)).values[:, 0], expected)


def test_read_invalid_further_dimension(file: Path) -> None:
    dataset = _grid()
    dataset["t2m"] = dataset.t2m.expand_dims({"number": [0], "level": [500, 850]})
    _refused(_save(dataset, file), r"t2m has further dimensions.*'level': 2.*isel\(level=0\)")


# values and times


def test_read_packed_roundtrip(file: Path) -> None:
    dataset = _grid()
    dataset.t2m[2, 1, 1] = np.nan
    packing = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768}
    fields = read(_save(dataset, file, t2m=packing))
    expected = dataset.t2m.values
    assert not fields.valid[2, 0, 1, 1] and fields.valid.sum() == fields.valid.size - 1
    assert np.abs(fields.values[:, 0] - expected)[fields.valid[:, 0]].max() <= 0.005 + 1e-4, "half a packing step"


def test_read_fills_missing_values(file: Path) -> None:
    dataset = _grid()
    dataset.t2m[2, 0, 1] = np.nan  # once: the mean over time at the point
    dataset.t2m[:, 1, 2] = np.nan  # always: the mean of the channel
    dataset["u10"] = (dataset.t2m.dims, np.ones((6, 3, 4)))
    fields = read(_save(dataset, file))
    given_values = dataset.t2m.values.astype(np.float64)
    assert np.isfinite(fields.values).all() and fields.valid[:, 1].all()
    np.testing.assert_array_equal(fields.valid[:, 0], np.isfinite(given_values))
    np.testing.assert_allclose(fields.values[2, 0, 0, 1], np.nanmean(given_values[:, 0, 1]), rtol=1e-6)
    np.testing.assert_allclose(fields.values[:, 0, 1, 2], np.nanmean(given_values), rtol=1e-6)
    seen = fields.valid[:, 0]
    np.testing.assert_array_equal(fields.values[:, 0][seen], given_values[seen])


def test_read_invalid_values(file: Path) -> None:
    dataset = _grid()
    dataset.t2m[0, 0, :2] = np.inf
    _refused(_save(dataset, file), "t2m has 2 infinite values")
    _refused(_save(_grid().assign(t2m=lambda d: d.t2m.astype(float) * 1e37), file), "72 infinite values.*float32")
    dataset.t2m[:] = np.nan
    _refused(_save(dataset, file), "t2m has no number at all")


def test_read_sorts_times(file: Path) -> None:
    fields = read(_save(_grid().isel(time=[3, 0, 5, 1, 4, 2]), file))
    np.testing.assert_array_equal(fields.time, HOURS)
    np.testing.assert_array_equal(fields.values[:, 0], _grid().t2m.values)


def test_read_invalid_times(file: Path) -> None:
    repeated = _grid(time=HOURS[[0, 1, 1, 2, 2, 3]])
    _refused(_save(repeated, file), "2 times occur more than once.*2020-01-01T01:00.*drop_duplicates")
    _refused(_save(_grid().isel(time=[]), file), "time is empty")
    late = HOURS.copy()
    late[1] = np.datetime64("NaT")
    _refused(_save(_grid(time=late), file), "1 missing times")


@pytest.mark.parametrize("name", ["360_day", "noleap", "julian"])
def test_read_invalid_calendar(file: Path, name: str) -> None:
    dataset = _grid().assign_coords(time=("time", np.arange(6), {"units": "days since 2000-01-01", "calendar": name}))
    _refused(_save(dataset, file), f"calendar '{name}'.*convert_calendar")


def test_read_invalid_time_units(file: Path) -> None:
    dataset = _grid().assign_coords(time=("time", np.arange(6), {"units": "fortnights since the flood"}))
    _refused(_save(dataset, file), "cannot be decoded")


def test_read_invalid_files(tmp_path: Path) -> None:
    _refused(tmp_path / "absent.nc", "there is no such file")
    (tmp_path / "text.nc").write_text("t2m, 280 K")
    _refused(tmp_path / "text.nc", "cannot be read as NetCDF-4 or Zarr.*fetch it again")
    whole = _save(_grid(), tmp_path / "whole.nc").read_bytes()
    (tmp_path / "short.nc").write_bytes(whole[: len(whole) // 2])
    _refused(tmp_path / "short.nc", "cannot be read as NetCDF-4 or Zarr.*truncated")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "cannot be read as NetCDF-4 or Zarr")


def test_read_invalid_damaged_chunk(tmp_path: Path) -> None:
    dataset = _grid(np.linspace(60, 40, 40), np.linspace(0, 40, 40))
    dataset["t2m"] = (dataset.t2m.dims, np.random.default_rng(0).normal(size=(6, 40, 40)))
    path = _save(dataset, tmp_path / "damaged.nc", t2m={"zlib": True, "fletcher32": True})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8] = b"\xff" * 8
    path.write_bytes(content)
    _refused(path, "t2m cannot be read.*corrupt")


# Grids that the patch does not divide


def test_read_pad(file: Path) -> None:
    dataset = _grid([52.0, 51.0, 50.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    dataset["lsm"] = (("latitude", "longitude"), np.arange(15.0).reshape(3, 5))
    fields, bare = read(_save(dataset, file), patch=(4, 4), grid_mismatch="pad"), read(file)
    assert fields.padding == (1, 3) and fields.values.shape == (6, 1, 4, 8) and fields.static.shape == (1, 4, 8)
    assert fields.latitude.tolist() == [52, 51, 50, 49]
    assert fields.longitude.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    np.testing.assert_array_equal(fields.values[..., :3, :5], bare.values)
    np.testing.assert_array_equal(fields.values[..., 3, :5], bare.values[..., 2, :])
    np.testing.assert_array_equal(fields.values[..., :3, 5:], np.repeat(bare.values[..., -1:], 3, axis=-1))
    np.testing.assert_array_equal(fields.static[0, 3, 5:], 14)
    assert fields.valid[..., :3, :5].all() and not fields.valid[..., 3:, :].any() and not fields.valid[..., 5:].any()


def test_read_crop(file: Path) -> None:
    dataset = _grid([52.0, 51.0, 50.0], [0.0, 0.5, 1.0, 1.5, 2.0])
    dataset["lsm"] = (("latitude", "longitude"), np.arange(15.0).reshape(3, 5))
    fields, bare = read(_save(dataset, file), patch=(2, 2), grid_mismatch="crop"), read(file)
    assert fields.latitude.tolist() == [52, 51] and fields.longitude.tolist() == [0, 0.5, 1, 1.5]
    assert fields.padding == (0, 0)
    np.testing.assert_array_equal(fields.values, bare.values[..., :2, :4])
    np.testing.assert_array_equal(fields.static, bare.static[..., :2, :4])
    assert fields.valid.shape == fields.values.shape


def test_read_divides_each_axis_by_its_own_patch(file: Path) -> None:
    path = _save(_grid([52.0, 51.0, 50.0], [0.0, 0.5, 1.0, 1.5, 2.0]), file)
    assert read(path, patch=(3, 5)).values.shape == (6, 1, 3, 5)
    assert read(path, patch=(2, 5), grid_mismatch="pad").padding == (1, 0)
    assert read(path, patch=(3, 2), grid_mismatch="crop").values.shape == (6, 1, 3, 4)
    _refused(path, r"patch 3 x 2 .* 3 x 5 points: choose grid mismatch 'pad' \(to 3 x 6\)", patch=(3, 2))


@pytest.mark.parametrize("mismatch", [None, "pad", "crop"])
def test_read_grid_mismatch_changes_nothing_that_is_divisible(file: Path, mismatch: str | None) -> None:
    fields = read(_save(_grid([52.0, 51.0]), file), patch=(2, 2), grid_mismatch=mismatch)
    assert fields.values.shape == (6, 1, 2, 4) and fields.padding == (0, 0) and fields.valid.all()


def test_read_invalid_patch(file: Path) -> None:
    path = _save(_grid(), file)
    _refused(
        path, r"patch 2 .* 3 x 4 points: choose grid mismatch 'pad' \(to 4 x 4\) or 'crop' \(to 2 x 4", patch=(2, 2)
    )
    _refused(path, "patch 7 .* 3 x 4 points", patch=(7, 7), grid_mismatch="crop")
    _refused(path, "patch must be at least 1 x 1", patch=(0, 0))
    _refused(path, "grid_mismatch='stretch'", patch=(2, 2), grid_mismatch="stretch")
    _refused(_save(_grid([50.0]), file), "one row or column has no spacing", patch=(2, 2), grid_mismatch="pad")


@pytest.mark.parametrize("mismatch", [None, "pad", "crop"])
def test_read_invalid_patch_on_a_circle(file: Path, mismatch: str | None) -> None:
    path = _save(_grid([52.0, 51.0, 50.0, 49.0], np.arange(0, 360, 10)), file)
    _refused(
        path, r"patch 8 .* 36 longitudes of a circle.*\[1, 2, 3, 4, 6, 9, 12\]", patch=(8, 8), grid_mismatch=mismatch
    )


def test_read_pad_rows_of_a_globe(file: Path) -> None:
    globe = _save(_grid([60.0, 30, 0], np.arange(0, 360, 10)), file)
    fields = read(globe, patch=(2, 2), grid_mismatch="pad")
    assert fields.periodic and fields.padding == (1, 0) and fields.latitude[-1] == -30


def test_read_invalid_padding_beyond_the_pole(file: Path) -> None:
    path = _save(_grid([90.0, 0.0, -90.0], np.arange(0, 360, 10)), file)
    _refused(
        path,
        "padding would reach latitude -180, beyond the pole: choose grid mismatch 'crop'",
        patch=(2, 2),
        grid_mismatch="pad",
    )
    assert read(path, patch=(2, 2), grid_mismatch="crop").latitude.tolist() == [90, 0]


# calendar


def test_calendar_values() -> None:
    time = np.array(["2021-01-01T00", "2021-07-02T12", "2020-07-02T00"], "datetime64[ns]")
    waves = calendar(time, np.array([10.0, 0.0]), np.array([0.0, 90.0]))
    assert waves.shape == (3, 4, 2, 2) and waves.dtype == np.float32
    expected = [[0, 1, 0, 1], [0, -1, 0, -1], [0, 1, 0, -1]]  # noon and midnight; both are the middle of their years
    np.testing.assert_allclose(waves[:, :, 0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(waves[0, :2, :, 1], [[1, 1], [0, 0]], atol=1e-6)  # 90 E is a quarter of a day ahead


@given(st.integers(0, 10**6), st.floats(-180, 360), st.integers(-23, 23))
def test_calendar_is_bounded_periodic_and_follows_the_sun(minutes: int, longitude: float, hours: int) -> None:
    time, row, east = HOURS[:1] + np.timedelta64(minutes, "m"), np.zeros(1), np.array([longitude])
    waves = calendar(time, row, east)
    np.testing.assert_allclose(waves[:, 0] ** 2 + waves[:, 1] ** 2, 1, rtol=1e-6)
    np.testing.assert_allclose(waves[:, 2] ** 2 + waves[:, 3] ** 2, 1, rtol=1e-6)
    np.testing.assert_allclose(calendar(time, row, east + 360), waves, atol=1e-6)
    np.testing.assert_allclose(calendar(time + hours * HOUR, row, east - 15 * hours)[:, :2], waves[:, :2], atol=1e-6)


@pytest.mark.parametrize("edge", ["2021-01-01T00", "2020-03-01T00", "2020-12-31T00", "2021-06-01T12"])
def test_calendar_is_continuous(edge: str) -> None:
    time = np.datetime64(edge, "ns") + np.array([-1, 1]) * np.timedelta64(30, "s")
    before, after = calendar(time, np.zeros(1), np.array([0.0, 123.0]))
    assert np.abs(after - before).max() < 0.005, "a minute turns the day by 2 pi / 1440"


# history and targets


@pytest.mark.parametrize(("text", "minutes"), [("6h", 360), ("1d", 1440), ("90min", 90), (" 12 h ", 720), ("06h", 360)])
def test_parse_step_values(text: str, minutes: int) -> None:
    step = parse_step(text)
    assert step == np.timedelta64(minutes, "m") and step.dtype == "timedelta64[ns]"


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "-6h", "1.5h", "6 hours", "1h30min", "6H", "10000000d"])
def test_parse_step_invalid(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) + " is not a time step.*90min"):
        parse_step(text)


@pytest.mark.parametrize(
    ("present", "when", "frames", "step", "expected"),
    [
        (range(24), 20, 1, 1, [19]),
        (range(24), 20, 3, 6, [14, 8, 2]),
        (range(24), 30, 2, 6, [23, 18]),  # the analysis may lie after the data
        ([0, 1, 2, 3, 5, 6], 6, 3, 1, [5, 3, 2]),  # a gap at 4: 3 takes its place, 2 the place of 3
        ([0, 1, 2, 3, 8], 9, 4, 1, [8, 3, 2, 1]),
        ([0, 6, 12, 18, 30, 36], 36, 3, 6, [30, 18, 12]),
        ([0, 6, 12, 17, 30, 36], 36, 3, 6, [30, 17, 12]),
    ],
)
def test_history_frames(present: Any, when: int, frames: int, step: int, expected: list[int]) -> None:
    present = np.array(list(present))
    indices, ages = history(HOURS[0] + present * HOUR, HOURS[0] + when * HOUR, frames, step * HOUR)
    assert present[indices].tolist() == expected
    np.testing.assert_array_equal(ages, when - np.array(expected, float))


@given(st.sets(st.integers(0, 60), min_size=2), st.integers(0, 70), st.integers(1, 6), st.integers(1, 8))
def test_history_matches_its_definition(present: set[int], when: int, frames: int, step: int) -> None:
    """A search for the newest unused frame at or before each slot finds the same; none for a slot is a refusal."""
    left = sorted(present)
    expected = []
    for k in range(1, frames + 1):
        left = [t for t in left if t <= when - k * step]
        expected += [left.pop()] if left else []
    time = HOURS[0] + np.array(sorted(present)) * HOUR
    arguments = time, HOURS[0] + when * HOUR, frames, step * HOUR, 1000 * HOUR
    if step < np.diff(sorted(present)).min():
        with pytest.raises(ValueError, match="finer than the data"):
            history(*arguments)
    elif len(expected) < frames:
        with pytest.raises(ValueError, match=f"needs {frames} past frames.*only {len(expected)} are"):
            history(*arguments)
    else:
        assert [sorted(present)[i] for i in history(*arguments)[0]] == expected


def test_history_invalid() -> None:
    with pytest.raises(ValueError, match=r"step of 0\.5 h is finer than the data: take at least 1 h"):
        history(HOURS, HOURS[5], 1, np.timedelta64(30, "m"))
    with pytest.raises(ValueError, match="needs 3 past frames in steps of 2 h, but only 2 are old enough: start later"):
        history(HOURS, HOURS[5], 3, 2 * HOUR)
    with pytest.raises(ValueError, match="at least one frame"):
        history(HOURS, HOURS[5], 0, HOUR)
    with pytest.raises(ValueError, match="positive step"):
        history(HOURS, HOURS[5], 1, -HOUR)


def test_history_invalid_age() -> None:
    history(HOURS, HOURS[-1] + 4 * HOUR, 2, HOUR)
    with pytest.raises(ValueError, match=r"newest frame.*is 5 h old, more than 4 h.*raise max_age"):
        history(HOURS, HOURS[-1] + 5 * HOUR, 2, HOUR)
    assert history(HOURS, HOURS[-1] + 5 * HOUR, 2, HOUR, max_age=5 * HOUR)[1].tolist() == [5, 6]


def test_targets_have_histories() -> None:
    assert targets(HOURS, 2 * HOUR, None, None, 2).tolist() == HOURS[4:].tolist()
    assert targets(HOURS, HOUR, HOURS[3], HOURS[5], 2).tolist() == HOURS[3:5].tolist(), "start is in, stop is not"
    gap_times = np.concatenate([HOURS[:3], HOURS[:3] + 20 * HOUR])
    assert targets(gap_times, HOUR, None, None, 1).tolist() == gap_times[[1, 2, 4, 5]].tolist(), "20 h old is too old"


def test_targets_since_the_epoch() -> None:
    """1970-01-01 is zero nanoseconds, which must not be taken for no start."""
    time = np.arange(-3, 3).astype("datetime64[h]").astype("datetime64[ns]")
    assert targets(time, HOUR, time[3], None, 1).tolist() == time[3:].tolist()
    assert targets(time, HOUR, None, time[3], 1).tolist() == time[1:3].tolist()


def test_targets_invalid_empty() -> None:
    with pytest.raises(ValueError, match=r"from 2020-01-01T00:00 until before.*needs 9 past frames"):
        targets(HOURS, HOUR, None, None, 9)
    with pytest.raises(ValueError, match="no time of the data lies there"):
        targets(HOURS, HOUR, HOURS[-1] + HOUR, None, 1)


# writing


def _analysis(file: Path) -> tuple[xr.Dataset, data.Fields]:
    dataset = _grid([52.0, 51.0, 50.0], [178.0, 179, -180, -179, -178])
    dataset["u10"] = (dataset.t2m.dims, dataset.t2m.values / 100)
    fields = read(_save(dataset, file), patch=(4, 4), grid_mismatch="pad")
    assert fields.padding == (1, 3)
    members = np.stack([fields.values[:2], fields.values[:2] + 1]).astype(np.float64)
    return to_dataset(members, fields, fields.time[:2], {"title": "analysis"}), fields


@pytest.mark.parametrize("name", ["out.nc", "out.zarr"])
def test_write_roundtrip(file: Path, name: str) -> None:
    dataset, _ = _analysis(file)
    for _ in range(2):  # the second replaces the first
        write(dataset, file.with_name(name))
    with data.open_file(file.with_name(name)) as back:
        assert back.t2m.dims == ("member", "time", "latitude", "longitude") and back.t2m.dtype == np.float32
        xr.testing.assert_equal(back, dataset)
        assert back.t2m.attrs == {"units": "K", "long_name": "2 metre temperature"} and not back.u10.attrs
        assert back.attrs["Conventions"].startswith("CF-") and back.attrs["title"] == "analysis"
        names = [back[d].attrs["standard_name"] for d in back.t2m.dims]
        assert names == ["realization", "time", "latitude", "longitude"]
        assert back.latitude.attrs["units"] == "degrees_north" and back.longitude.attrs["units"] == "degrees_east"
    before = read(file)
    again = read(_save(dataset.isel(member=1), file))
    np.testing.assert_array_equal(again.values, before.values[:2] + 1)
    assert again.longitude.tolist() == [178, 179, 180, 181, 182] and again.latitude.tolist() == [52, 51, 50]
    np.testing.assert_array_equal(again.time, HOURS[:2])
    assert sorted(p.name for p in file.parent.iterdir()) == ["fields.nc", name], "no temporary is left"


def test_write_compresses(file: Path) -> None:
    dataset, _ = _analysis(file)
    write(dataset, file.with_name("out.nc"))
    with data.open_file(file.with_name("out.nc")) as back:
        assert back.t2m.encoding["zlib"]


def test_to_dataset_invalid_shape(file: Path) -> None:
    _, fields = _analysis(file)
    with pytest.raises(ValueError, match=r"the analysis is \(1, 2, 2, 3, 5\).*\(2, 2, 4, 8\)"):
        to_dataset(np.zeros((1, 2, 2, 3, 5)), fields, fields.time[:2])


def _raise(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _fail_after_writing(path: Path) -> Any:
    def fail(self: xr.Dataset, part: Path, *_: Any, **__: Any) -> None:
        if path.suffix == ".zarr":
            part.mkdir()
            (part / "half").write_text("half a store")
        else:
            part.write_text("half a file")
        _raise()

    return fail


@pytest.mark.parametrize("name", ["out.nc", "out.zarr"])
@pytest.mark.parametrize("stage", ["writing", "renaming"])
def test_write_invalid_full_disk(file: Path, name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = _analysis(file)
    path = file.with_name(name)
    write(dataset, path)
    if stage == "writing":
        method = "to_netcdf" if path.suffix == ".nc" else "to_zarr"
        monkeypatch.setattr(xr.Dataset, method, _fail_after_writing(path))
    else:
        rename = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: _raise() if str(a).endswith(".part") else rename(a, b))
    with pytest.raises(OSError, match=f"{name} could not be written.*No space left.*unchanged: free space"):
        write(dataset + 1, path)
    monkeypatch.undo()
    with data.open_file(path) as back:
        np.testing.assert_array_equal(back.t2m.values, dataset.t2m.values)
    assert sorted(p.name for p in file.parent.iterdir()) == ["fields.nc", name]


def test_write_invalid_path(file: Path) -> None:
    dataset, _ = _analysis(file)
    with pytest.raises(ValueError, match=r"out.csv: the name must end in .nc \(NetCDF-4\) or .zarr"):
        write(dataset, file.with_name("out.csv"))
    with pytest.raises(OSError, match=r"could not be written.*folder exists"):
        write(dataset, file.parent / "absent" / "out.nc")
    precious = file.with_name("mine.zarr")
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a Zarr store, so it is not replaced"):
        write(dataset, precious)
    assert (precious / "thesis.txt").read_text() == "years"
