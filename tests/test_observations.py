"""Observations: the points and weights of H, the errors drawn, and the reports of what is left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.guidance import Observations
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.io.observations import (
    Stations,
    bilinear,
    from_mask,
    from_stations,
    observed,
    random_points,
    read_stations,
    scale,
)

WHEN = np.datetime64("2020-01-01T06", "ns")
HOUR = np.timedelta64(1, "h")
VALID = np.ones((2, 5, 6), bool)
TRUTH = np.random.default_rng(7).normal(size=(2, 5, 6))
HEADER = "time,latitude,longitude,value,error_std\n"


def _fields(
    latitude: Any = (54, 53, 51, 50), longitude: Any = (-2, -1, 0, 1, 2), periodic: bool = False, channels: int = 1
) -> Fields:
    latitude, longitude = np.asarray(latitude, float), np.asarray(longitude, float)
    shape = (2, channels, latitude.size, longitude.size)
    return Fields(
        time=WHEN + np.arange(2) * HOUR,
        latitude=latitude,
        longitude=longitude,
        values=np.zeros(shape, np.float32),
        valid=np.ones(shape, bool),
        static=np.zeros((0, *shape[2:]), np.float32),
        variables=("t2m", "u10", "v10")[:channels],
        static_names=(),
        units=("K",) * channels,
        attributes=({},) * channels,
        periodic=periodic,
    )


GLOBE = _fields(np.arange(80.0, -81, -20), np.arange(30.0, 390, 20), periodic=True)


def _stations(latitude: Any, longitude: Any, **columns: Any) -> Stations:
    latitude = np.atleast_1d(latitude).astype(float)
    longitude = np.atleast_1d(longitude).astype(float)
    count = latitude.size
    table = Stations(
        time=np.repeat(WHEN, count),
        latitude=latitude,
        longitude=longitude,
        value=np.full(count, 280.0),
        error_std=np.full(count, 0.5),
        variable=("",) * count,
    )
    return replace(table, **columns)


def _at(fields: Fields, *place: Any) -> Observations:
    return from_stations(_stations(*place), fields, WHEN, HOUR)[0]


def _field(fields: Fields, function: Any) -> torch.Tensor:
    plane = function(fields.latitude[:, None], fields.longitude[None, :])
    return torch.from_numpy(np.broadcast_to(plane, fields.values.shape[1:]).copy())


# Points of the grid itself


def test_random_points_counts_values_and_noise() -> None:
    valid = VALID.copy()
    valid[1, 0, :3] = False  # no longer valid in every channel
    sd = np.array([0.5, 2.0])
    ours = random_points(TRUTH, valid, 0.5, sd, np.random.default_rng(3))
    assert len(ours.value) == 2 * round(0.5 * 27) and ours.index.shape[1] == 1 and ours.shape == (2, 5, 6)
    seen = observed(ours)
    assert seen.sum() == len(ours.value), "no point twice"
    assert torch.equal(seen[0], seen[1]), "the same points in all channels"
    assert not seen[:, 0, :3].any()
    truth = ours.apply(torch.from_numpy(TRUTH))
    twice = random_points(TRUTH, valid, 0.5, 2 * sd, np.random.default_rng(3))
    torch.testing.assert_close(twice.value - truth, 2 * (ours.value - truth))
    unit = (ours.value - truth) / ours.variance.sqrt()
    assert set(ours.variance.tolist()) == {0.25, 4.0} and 0.5 < unit.std() < 1.5
    assert (ours.index.flatten() // 30 == 0).eq(ours.variance == 0.25).all(), "each channel has its own std"


def test_random_points_noise_is_standard_normal() -> None:
    """The mean and variance of 20,000 draws lie within 5 standard errors, and channels are independent."""
    truth, valid = np.zeros((2, 100, 100)), np.ones((2, 100, 100), bool)
    noise = random_points(truth, valid, 1.0, 3.0, np.random.default_rng(0)).value.reshape(-1, 2) / 3
    assert abs(noise.mean()) < 5 / 20_000**0.5 and abs(noise.var() - 1) < 5 * (2 / 20_000) ** 0.5
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 5 / 10_000**0.5


@given(st.integers(0, 2**32), st.floats(0.1, 1), st.floats(0.1, 1))
def test_random_points_nest(seed: int, one: float, other: float) -> None:
    few, many = (random_points(TRUTH, VALID, f, 0.1, np.random.default_rng(seed)) for f in sorted((one, other)))
    assert len(many.value) == 2 * round(max(one, other) * 30)
    assert torch.equal(few.index, many.index[: len(few.index)]) and torch.equal(few.value, many.value[: len(few.value)])


def test_random_points_follow_the_generator() -> None:
    a, b, c = (random_points(TRUTH, VALID, 0.5, 0.1, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.value, b.value) and not torch.equal(a.index, c.index)


@pytest.mark.parametrize("fraction", [0.0, 0.01, -0.1, 1.1, float("nan")])
def test_random_points_invalid_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"empty observations: .* of 30 valid points"):
        random_points(TRUTH, VALID, fraction, 0.1, np.random.default_rng(0))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_random_points_invalid_std(std: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        random_points(TRUTH, VALID, 0.5, std, np.random.default_rng(0))


def test_from_mask_values() -> None:
    mask = np.zeros((2, 5, 6), bool)
    mask[0, 1, 2] = mask[1, 4, 5] = True
    ours = from_mask(TRUTH, mask, np.array([0.5, 3.0]))
    assert ours.value.tolist() == [TRUTH[0, 1, 2], TRUTH[1, 4, 5]] and ours.variance.tolist() == [0.25, 9.0]
    assert torch.equal(observed(ours), torch.from_numpy(mask))
    torch.testing.assert_close(ours.apply(torch.from_numpy(TRUTH)), ours.value)
    assert torch.equal(observed(from_mask(TRUTH, mask[0], 1.0)), torch.from_numpy(mask[:1]).repeat(2, 1, 1))


def test_from_mask_invalid() -> None:
    with pytest.raises(ValueError, match="empty observations"):
        from_mask(TRUTH, ~VALID, 1.0)
    holes = np.where(np.arange(6) < 2, np.nan, TRUTH)
    with pytest.raises(ValueError, match="20 of the 60 points in the mask have no finite value"):
        from_mask(holes, VALID, 1.0)
    assert len(from_mask(holes, np.isfinite(holes), 1.0).value) == 40


# The bilinear operator

INSIDE = st.tuples(st.floats(50, 54), st.floats(-2, 2))
ROUND = st.tuples(st.floats(-80, 80), st.floats(-720, 720))


@given(st.lists(INSIDE, min_size=1, max_size=9), st.tuples(*[st.floats(-3, 3)] * 3))
def test_bilinear_exact_on_linear_functions(places: list[tuple[float, float]], c: tuple[float, ...]) -> None:
    """The rows of the grid are uneven, so that weights which ignore the distances, or are transposed, would fail."""
    fields = _fields()
    lat, lon = np.array(places).T
    state = _field(fields, lambda y, x: c[0] + c[1] * y + c[2] * x)
    expected = torch.from_numpy(c[0] + c[1] * lat + c[2] * lon)
    torch.testing.assert_close(_at(fields, lat, lon).apply(state), expected, rtol=0, atol=1e-10)


@given(st.lists(ROUND, min_size=1, max_size=9), st.integers(0, 2**32))
def test_bilinear_weights_and_adjoint(places: list[tuple[float, float]], seed: int) -> None:
    lat, lon = np.array(places).T
    ours = _at(GLOBE, lat, lon)
    assert (ours.weight >= 0).all() and ours.weight.shape == (len(lat), 4)
    torch.testing.assert_close(ours.weight.sum(-1), torch.ones(len(lat), dtype=torch.float64), rtol=0, atol=1e-14)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    d = torch.randn(len(lat), generator=generator, dtype=torch.float64)
    torch.testing.assert_close((ours.apply(x) * d).sum(), (x * ours.adjoint(d)).sum(), rtol=1e-12, atol=1e-12)


@given(st.tuples(st.floats(-80, 80), st.floats(0, 360)), st.integers(-3, 3))
def test_bilinear_longitude_conventions_agree(place: tuple[float, float], turns: int) -> None:
    state = _field(GLOBE, lambda y, x: np.sin(np.deg2rad(x)) * y)
    for fields, lon in ((GLOBE, place[1]), (_fields(), place[1] / 90 - 2)):
        lat = place[0] if fields is GLOBE else place[0] / 41 + 52
        here, there = (_at(fields, lat, lon + 360 * k) for k in (0, turns))
        x = state if fields is GLOBE else _field(fields, lambda y, x: y * x)
        torch.testing.assert_close(here.apply(x), there.apply(x), rtol=0, atol=1e-9)


def test_bilinear_wraps_across_the_seam() -> None:
    """The last meridian is 370 = 10 E, the first 30 E: 25 E lies a quarter of the way back."""
    state = torch.zeros(GLOBE.values.shape[1:], dtype=torch.float64)
    state[0, 0, -1], state[0, 0, 0] = 1, 5
    for lon in (25, -335, 385):
        assert _at(GLOBE, 80, lon).apply(state).tolist() == [4.0]


def test_bilinear_on_grid_points_reads_them_alone() -> None:
    fields = _fields(channels=1)
    lat, lon = (x.ravel() for x in np.meshgrid(fields.latitude, fields.longitude, indexing="ij"))
    ours, numbers = _at(fields, lat, lon), torch.arange(20, dtype=torch.float64)
    assert torch.equal(ours.apply(numbers.reshape(1, 4, 5)), numbers) and observed(ours).all()
    assert observed(_at(fields, 53, 0)).sum() == 1 and observed(_at(fields, 52, 0.5)).sum() == 4


@pytest.mark.parametrize("place", [(54.01, 0), (49.99, 0), (52, 2.01), (52, -2.01), (52, 180), (91, 0), (np.nan, 0)])
def test_bilinear_closed_edges(place: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"empty observations: 0 of 1 .*1 outside the domain"):
        _at(_fields(), *place)


@pytest.mark.parametrize("latitude", [80.5, -80.5, 90])
def test_bilinear_nothing_beyond_the_last_row_of_a_globe(latitude: float) -> None:
    with pytest.raises(ValueError, match="1 outside the domain"):
        _at(GLOBE, latitude, 0)


def test_bilinear_edge_survives_rounding() -> None:
    """-0.3 and 359.7 are the same meridian, although 359.7 - 360 is not -0.3 in floating point."""
    fields = _fields(longitude=[-0.3, -0.2, -0.1, 0.0, 0.1])
    for lon in (-0.3, 359.7, 0.1, 360.1, -359.9, 720.1):
        assert _at(fields, 52, lon).weight.sum() == 1


def test_bilinear_invalid_grid() -> None:
    with pytest.raises(ValueError, match="1 x 3 points has no cells"):
        bilinear(np.ones(1), np.arange(3.0), False, np.ones(1), np.ones(1))


# Stations


def test_from_stations_value_variance_and_channel() -> None:
    fields = _fields(channels=3)
    names = ("10v", "t2m", "10m_u_component_of_wind")
    columns = {"value": np.array([1.0, 2, 3]), "error_std": np.array([0.5, 2, 1]), "variable": names}
    table = _stations([53, 53, 50], [0, 0, 1], **columns)
    ours, report = from_stations(table, fields, WHEN, HOUR)
    assert ours.value.tolist() == [1, 2, 3] and ours.variance.tolist() == [0.25, 4, 1] and ours.shape == (3, 4, 5)
    state = torch.zeros(3, 4, 5, dtype=torch.float64)
    state[2, 1, 2], state[0, 1, 2], state[1, 3, 3] = 7, 8, 9
    assert ours.apply(state).tolist() == [7, 8, 9]
    assert str(report) == "3 of 3 observations are used"


def test_from_stations_several_at_one_point() -> None:
    ours = _at(_fields(), [52, 52, 52], [0.5, 0.5, 0.5])
    assert len(ours.value) == 3
    assert ours.adjoint(torch.ones(3, dtype=torch.float64)).sum() == 3


def test_from_stations_report() -> None:
    """Each observation is counted once, under the first reason, and the used ones keep their own values."""
    nan = float("nan")
    table = _stations(
        [52, 52, 52, 52, 52, 52, 70, 52, 51],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
        value=np.array([1, nan, nan, 4, 5, 6, 7, 8, 9.0]),
        error_std=np.array([1, 1, -1, 0, nan, 1, 1, 1, 3]),
        time=WHEN + np.array([0, 0, 0, 0, 0, -3, 0, 0, 2]) * HOUR,
        variable=("t2m",) * 7 + ("humidity", "t2m"),
    )
    ours, report = from_stations(table, _fields(), WHEN, 2 * HOUR)
    assert ours.value.tolist() == [1, 9] and ours.variance.tolist() == [1, 9]
    assert (report.total, report.used) == (9, 2) and report.used + sum(n for _, n in report.dropped) == report.total
    assert str(report) == (
        "2 of 9 observations are used; left out: 2 without a finite value, 2 without a positive, finite error_std, "
        "1 not within 2 h of 2020-01-01T06:00:00.000000000, 1 without a single matching variable among t2m, "
        "1 outside the domain, or beside points without data"
    )


def test_from_stations_invalid_empty() -> None:
    with pytest.raises(ValueError, match=r"empty observations: 0 of 2 .*1 without a finite value, 1 outside"):
        from_stations(_stations([52, 70], [0, 0], value=np.array([np.nan, 1.0])), _fields(), WHEN, HOUR)
    with pytest.raises(ValueError, match="empty observations: 0 of 0"):
        from_stations(_stations([], []), _fields(), WHEN, HOUR)
    with pytest.raises(ValueError, match="1 without a single matching variable among t2m, u10"):
        from_stations(_stations(52, 0), _fields(channels=2), WHEN, HOUR)


def test_from_stations_padding_is_no_domain() -> None:
    fields = _fields()
    fields.valid[..., 3, :] = False
    fields.valid[..., 4] = False
    padded = replace(fields, padding=(1, 1))
    ours, report = from_stations(_stations([51, 50.9, 52, 52], [0, 0, 1, 1.1]), padded, WHEN, HOUR)
    assert report.used == 2 and ours.shape == (1, 4, 5)
    assert not observed(ours)[:, 3].any() and not observed(ours)[..., 4].any()


def test_from_stations_beside_points_without_data() -> None:
    fields = _fields()
    fields.valid[0, 0, 1, 2] = False  # missing once, so there is a state
    fields.valid[:, 0, 2, 3] = False  # missing always
    ours, report = from_stations(_stations([53.5, 51.5], [0.1, 0.9]), fields, WHEN, HOUR)
    assert report.used == 1 and observed(ours)[0, 1, 2] and not observed(ours)[0, 2, 3]


# Tables


def test_read_stations_csv(tmp_path: Path) -> None:
    path = tmp_path / "stations.csv"
    path.write_text(
        "\ufeffLat, lon, Time, obs, std, variable, remark\n"
        "51.5, -0.1, 2020-01-01T06:00:00Z, 280.5, 0.5, t2m, a\n"
        "\n"
        "51.5, 359.9, 2020-01-01 08:30+02:00, , 1, 10u, b\n"
        "50, 1, 2020-01-01, nan, NA,, c\n",
        encoding="utf-8",
    )
    table = read_stations(path)
    assert (table.time == WHEN + np.array([0, 30, -360]) * np.timedelta64(1, "m")).all()
    assert table.time.dtype == "datetime64[ns]"
    assert table.latitude.tolist() == [51.5, 51.5, 50] and table.longitude.tolist() == [-0.1, 359.9, 1]
    np.testing.assert_array_equal(table.value, [280.5, np.nan, np.nan])
    np.testing.assert_array_equal(table.error_std, [0.5, 1, np.nan])
    assert table.variable == ("t2m", "10u", "")


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_read_stations_dataset_equals_csv(tmp_path: Path, suffix: str) -> None:
    rows = ["2020-01-01T06:00,51.5,-0.1,280.5,0.5,t2m", "2020-01-01T07:00,50.5,1.5,,0.25,u10"]
    (tmp_path / "s.csv").write_text("time,lat,lon,value,error_std,variable\n" + "\n".join(rows))
    numbers = {"lat": [51.5, 50.5], "lon": [-0.1, 1.5], "value": [280.5, np.nan], "error_std": [0.5, 0.25]}
    dataset = xr.Dataset({name: ("station", values) for name, values in numbers.items()})
    dataset["time"] = ("station", WHEN + np.arange(2) * HOUR)
    dataset["variable"] = ("station", np.array(["t2m", "u10"], "S3" if suffix == "zarr" else object))
    if suffix == "nc":
        dataset.to_netcdf(tmp_path / "s.nc", engine="h5netcdf")
    else:
        dataset.to_zarr(tmp_path / "s.zarr", zarr_format=2)
    ours, theirs = read_stations(tmp_path / f"s.{suffix}"), read_stations(tmp_path / "s.csv")
    for name in ("time", "latitude", "longitude", "value", "error_std"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.variable == theirs.variable == ("t2m", "u10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "2020-01-01,51,0,280,1\n2020-01-01,51,east,280,1\n", "line 3: longitude 'east' is not a number"),
        (HEADER + "2020-01-01,51,0,warm,1\n", "line 2: value 'warm' is not a number"),
        (HEADER + "2020-01-01,,0,280,1\n", "line 2: latitude '' is not a number"),
        (HEADER + "yesterday,51,0,280,1\n", "line 2: time 'yesterday' is not ISO 8601"),
        (HEADER + "2020-01-01,51,0,280\n", "line 2: not as many cells"),
        (HEADER + "2020-01-01,51,0,280,1,2\n", "line 2: not as many cells"),
        ("time,latitude,longitude,value\n", "there is no column for error_std.*std.*in the header"),
        ("lat,latitude,lon,time,value,std\n", r"\['lat', 'latitude'\] could each be latitude"),
        ("", "there is no column for time"),
    ],
)
def test_read_stations_invalid_csv(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stations.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_stations(path)
    assert str(path) in str(caught.value)


def test_read_stations_invalid_file(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.nc"):
        with pytest.raises(ValueError, match=f"{name}.*check the path"):
            read_stations(tmp_path / name)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="cannot be read as a CSV table"):
        read_stations(tmp_path / "binary.csv")
    uneven = xr.Dataset({"value": ("a", np.zeros(3)), "std": ("b", np.ones(2))})
    uneven = uneven.assign(time=("a", np.repeat(WHEN, 3)), lat=("a", np.zeros(3)), lon=("a", np.zeros(3)))
    uneven.to_netcdf(tmp_path / "uneven.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="must be numbers of one length"):
        read_stations(tmp_path / "uneven.nc")


# Normalised units


def test_scale_observes_the_normalised_state() -> None:
    """If y = H x + e in physical units, then y' = H z + e / s for z = (x - m) / s."""
    fields, generator = _fields(channels=3), torch.Generator().manual_seed(1)
    names = ("t2m", "u10", "v10")
    ours = from_stations(_stations([53.2, 50.1, 52], [0.3, 1.7, -1.1], variable=names), fields, WHEN, HOUR)[0]
    x, m = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    s = torch.tensor([2.0, 0.5, 10.0], dtype=torch.float64)
    scaled = scale(ours, m, s)
    z = (x - m) / s[:, None, None]
    torch.testing.assert_close((scaled.value - scaled.apply(z)) * s, ours.value - ours.apply(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.variance * s**2, ours.variance, rtol=1e-14, atol=0)
    assert torch.equal(scaled.index, ours.index) and torch.equal(scaled.weight, ours.weight)


def test_scale_accepts_float32_statistics() -> None:
    ours = random_points(TRUTH, VALID, 0.5, 1.0, np.random.default_rng(0))
    scaled = scale(ours, torch.zeros(2, 5, 6), torch.tensor([2.0, 2.0]))
    assert torch.equal(scaled.value * 2, ours.value) and scaled.value.dtype == torch.float64


def test_scale_invalid() -> None:
    mixed = Observations(torch.zeros(1), torch.ones(1), torch.tensor([[0, 30]]), torch.full((1, 2), 0.5), (2, 5, 6))
    with pytest.raises(ValueError, match="reads several channels"):
        scale(mixed, torch.zeros(2, 5, 6), torch.ones(2))
    ours = random_points(TRUTH, VALID, 0.5, 1.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"std must be positive and finite, got \[1.0, 0.0\]"):
        scale(ours, torch.zeros(2, 5, 6), torch.tensor([1.0, 0.0]))
