"""Chapters 00 and 10, and the refusals, shapes and dtypes that belong to no equation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from small_problems import CONFIG, normal, pointwise, world
from torch import Tensor

from conformance.judging.tolerance import Bound, Exact, Ulp
from storm_ref.assimilation import Sampler, draw_members, member_noise
from storm_ref.config import StormConfig
from storm_ref.denoiser import denoiser, randomise
from storm_ref.edm import Churn, draw_sigma, edm_loss, precondition_coefficients, sample, schedule
from storm_ref.guidance import Observations, OperatorObservations, mmps, sda
from storm_ref.tiling import Axis, Tiling, blend_tiles, tiled_denoiser
from storm_ref.tokenisation import age_features, patchify, region_position, unpatchify
from storm_ref.verification import area_weights, rank_histogram
from storm_ref.workbench.io.data import history, read

GRID = (4, 8)
HALVES = Tiling.of(GRID, core=(4, 4), halo=(0, 2), blend=(0, 2), periodic=True, patch=CONFIG.patch)


def three_points() -> Observations:
    """Three observed points of a state of two channels."""
    index = torch.tensor([[0], [17], [40]])
    weight = torch.ones(3, 1, dtype=torch.float64)
    return Observations(normal(3), torch.ones(3, dtype=torch.float64), index, weight, (2, *GRID))


# 00 Conventions


def written(path: Path, latitude: list[float], longitude: list[float], calendar: str = "standard") -> Path:
    """A file of one variable, t2m = 1000 latitude + longitude in 0..360."""
    north, east = np.asarray(latitude), np.asarray(longitude)
    values = np.broadcast_to(1000 * north[:, None] + east % 360, (2, north.size, east.size))
    data = xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values.astype(np.float32), {"units": "K"})},
        {
            "time": ("time", np.array([0.0, 6.0]), {"units": "hours since 2000-01-01", "calendar": calendar}),
            "latitude": ("latitude", north, {"units": "degrees_north"}),
            "longitude": ("longitude", east, {"units": "degrees_east"}),
        },
    )
    data.to_netcdf(path, engine="h5netcdf")
    return path


def test_read_brings_rows_north_to_south_and_longitudes_eastward(tmp_path: Path) -> None:
    """[CONV-2] From south to north, and a region across Greenwich that its file cuts in two."""
    fields = read(written(tmp_path / "a.nc", [10.0, 20.0, 30.0], [0.0, 5.0, 350.0, 355.0]))
    assert fields.latitude.tolist() == [30.0, 20.0, 10.0]
    assert (np.diff(fields.longitude) == 5.0).all() and fields.longitude[0] % 360 == 350.0
    want = 1000 * fields.latitude[:, None] + fields.longitude % 360
    np.testing.assert_array_equal(fields.values[0, 0], want.astype(np.float32))


def test_read_invalid_meridian_twice(tmp_path: Path) -> None:
    """[CONV-2] [CONV-10]"""
    with pytest.raises(ValueError, match="meridian 0 twice"):
        read(written(tmp_path / "a.nc", [30.0, 20.0], [0.0, 90.0, 180.0, 270.0, 360.0]))


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "julian"])
def test_read_invalid_calendar(tmp_path: Path, calendar: str) -> None:
    """[CONV-8]"""
    with pytest.raises(ValueError, match=f"time counts in the calendar '{calendar}'"):
        read(written(tmp_path / "a.nc", [30.0, 20.0], [0.0, 90.0], calendar))


@pytest.mark.parametrize("calendar", ["standard", "gregorian", "proleptic_gregorian"])
def test_read_takes_the_gregorian_calendar(tmp_path: Path, calendar: str) -> None:
    """[CONV-8]"""
    fields = read(written(tmp_path / "a.nc", [30.0, 20.0], [0.0, 90.0], calendar))
    assert fields.time.tolist() == np.array(["2000-01-01T00", "2000-01-01T06"], "M8[ns]").tolist()


def test_age_is_hours_into_the_past() -> None:
    """[CONV-4] An age of 1 hour has s = 1/8; a day is 24."""
    times = np.datetime64("2000-01-01T00", "ns") + np.arange(5) * np.timedelta64(24, "h")
    index, ages = history(times, times[4], 2, np.timedelta64(24, "h"))
    assert index.tolist() == [3, 2] and ages.tolist() == [24.0, 48.0]
    assert age_features(torch.tensor([1.0]).double(), 1)[0, 0].item() == pytest.approx(np.sin(np.pi / 16), abs=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoisers_keep_the_dtype_of_the_state_and_the_sampler_gives_float64(dtype: torch.dtype) -> None:
    """[CONV-9]"""
    x, sigma = normal(2, 2, *GRID).to(dtype), torch.tensor([0.5, 2.0])
    w = world(GRID, True, batch=1)
    for network in (w.network, world(GRID, True, batch=1).network.float()):
        for denoise in (denoiser(network, w.condition), tiled_denoiser(network, w.condition, HALVES)):
            got = denoise(x, sigma)
            assert got.dtype == dtype and got.shape == x.shape
            assert sample(denoise, x, schedule(2)).dtype == torch.float64


IDENTITY = blend_tiles(lambda z, sigma, batch: z, Tiling.whole((4, 4), True))

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "patch": (lambda: patchify(torch.zeros(1, 3, 8), (2, 2)), "patch 2 x 2 does not divide the grid 3 x 8"),
    "rows": (lambda: unpatchify(torch.zeros(7, 4), (2, 2), 2), "7 tokens do not fill 2 rows"),
    "region": (lambda: region_position(torch.ones(2), torch.ones(2), (1, 1), 0.0), "length must be positive.*got 0.0"),
    "sigma": (lambda: precondition_coefficients(torch.tensor([1.0, 0.0]), 1.0), "sigma must be positive, got 0.0"),
    "steps": (lambda: schedule(0), "at least one step, got 0"),
    "levels": (lambda: schedule(4, 2.0, 1.0), "sigma_min < sigma_max, got 2.0 and 1.0"),
    "churn": (lambda: Churn(s_churn=-1.0), "must not be negative, got -1.0"),
    "core": (lambda: Axis(8, 12), "between 1 and the length 8, got 12"),
    "halo": (lambda: Axis(16, 8, halo=2, blend=4), "blend 4 and halo 2"),
    "wrap": (lambda: Axis(16, 8, halo=6, periodic=True), "core 8 and halo 6 wraps onto itself"),
    "grid": (lambda: IDENTITY(torch.zeros(1, 1, 4, 6), torch.ones(1)), r"\(4, 6\)"),
    "gamma": (lambda: sda(pointwise, OperatorObservations(torch.ones(1), torch.ones(1), abs), -0.5), "got -0.5"),
    "latitude": (lambda: area_weights(torch.tensor([95.0])), "-90..90 degrees, got 95.0"),
    "seed": (lambda: member_noise(0, -1, 0, (2,)), "0, -1, 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name_and_value(case: str) -> None:
    """[CONV-10]"""
    call, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        call()


def test_config_takes_the_smallest_sizes() -> None:
    """[CONV-12]"""
    assert StormConfig(1, 0, (1, 1), 1, 1, 1, 1, 1, 1, 2, 0).window == 0


# 10 Numerics


def test_chain_is_float64_throughout() -> None:
    """[NUM-8] Guided, tiled and sampled: the second difference of a smooth chain vanishes unless something rounds.

    Steps of 1e-6 in the latents leave a second difference of order 1e-12 times the chain's curvature; one rounding to
    float32 anywhere in it leaves 1e-8 or more.
    """
    w = world(GRID, True, batch=1)
    denoise = mmps(tiled_denoiser(w.network, w.condition, HALVES), three_points(), steps=5)
    start, change = normal(1, 2, *GRID, seed=4), 1e-6 * normal(1, 2, *GRID, seed=5)
    low, middle, high = (sample(denoise, start + k * change, schedule(4, 0.01, 2.0)) for k in (-1, 0, 1))
    assert float((high - middle).abs().max()) > 1e-7, "the latents must matter"
    assert float((high - 2 * middle + low).abs().max()) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_passes_no_comparison(bad: float) -> None:
    """[NUM-11] Not even against itself."""
    got, expected = np.array([1.0, bad]), np.array([1.0, 2.0])
    for tolerance in (Exact("w"), Ulp(1e300, "w"), Bound(1e300, "w")):
        assert tolerance.measure(expected, expected, "float64", "y").passed
        assert not tolerance.measure(got, expected, "float64", "y").passed
    for tolerance in (Ulp(1e300, "w"), Bound(1e300, "w", scale=1.0)):
        with np.errstate(invalid="ignore"):
            assert not tolerance.measure(got, got, "float64", "y").passed


def global_states() -> tuple[Any, ...]:
    """States of the global generators of torch and NumPy; beartype moves Python's own with every signature."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, np.asarray(keys).tolist(), *rest


def test_nothing_draws_from_a_global_generator_and_the_same_inputs_give_the_same_bits() -> None:
    """[NUM-12] [EDM-8]"""

    def everything() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        w = world(GRID, True, batch=1)
        randomise(w.network, generator)
        sampler = Sampler(schedule(3), Churn(s_churn=2.0))
        noise = torch.stack([member_noise(1, 2, m, (2, *GRID), sampler.draws) for m in range(3)], 1)
        denoise = tiled_denoiser(w.network, w.condition, HALVES)
        drawn = draw_members(denoise, noise, sampler, three_points(), partial(mmps, steps=3))
        loss = edm_loss(denoiser(w.network, w.condition), drawn, noise[0], draw_sigma(3, generator), 1.0)
        ranks = rank_histogram(drawn, drawn[0], torch.Generator().manual_seed(7))
        return [noise, drawn, loss, ranks]

    before = global_states()
    first, second = everything(), everything()
    assert global_states() == before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
