"""Chapters 00 and 10, and the refusals, shapes and dtypes that belong to no equation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from conformance.judging.tolerance import Bound, Exact, Ulp
from storm_ref.assimilation import Sampler, draw_members, member_noise
from storm_ref.attention import layer_norm
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, denoiser, randomise
from storm_ref.edm import (
    Churn,
    Denoise,
    draw_sigma,
    edm_loss,
    loss_weight,
    precondition,
    precondition_coefficients,
    sample,
    schedule,
)
from storm_ref.guidance import Observations, ObservationsLike, OperatorObservations, dps, mmps, pigdm, sda
from storm_ref.memory import memory_finish, memory_start
from storm_ref.tiling import Axis, Tiling, blend_tiles, extents, tiled_denoiser, weights
from storm_ref.tokenisation import (
    age_features,
    fourier_features,
    patchify,
    region_position,
    sphere_position,
    unpatchify,
)
from storm_ref.verification import area_weights, average, rank_histogram
from storm_ref.workbench.io.data import history, read

CONFIG = StormConfig(channels=2, static_channels=1, patch=(2, 2), width=16, heads=2, depth=2)
GRID = (4, 8)
HOURS = torch.tensor([[6.0, 12.0, 30.0]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions() -> Tensor:
    return sphere_position(torch.linspace(60, -60, GRID[0]), torch.arange(GRID[1]) * 45.0, CONFIG.patch)


def network(dtype: torch.dtype = torch.float64, seed: int = 1) -> Storm:
    storm = Storm(CONFIG)
    randomise(storm, torch.Generator().manual_seed(seed))
    return storm.to(dtype)


def condition(storm: Storm, seed: int = 2) -> Condition:
    dtype = storm.final.weight.dtype
    past, static = normal(1, 3, 2, *GRID, seed=seed).to(dtype), normal(1, 3, 1, *GRID, seed=seed + 1).to(dtype)
    return Condition(static[:, 0], storm.compress(past, static, HOURS, positions()), positions()[None], periodic=True)


def halves() -> Tiling:
    return Tiling.of(GRID, core=(4, 4), halo=(0, 2), blend=(0, 2), periodic=True, patch=CONFIG.patch)


def points(value: Tensor, variance: Tensor, at: Tensor, shape: tuple[int, ...]) -> Observations:
    return Observations(value, variance, at[:, None], torch.ones(len(at), 1, dtype=torch.float64), shape)


def gaussian(variance: float) -> Denoise:
    """The exact denoiser of N(0, variance) at every point."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        return x * variance / (variance + s**2)

    return denoise


# 00 Conventions


def test_state_order_is_channel_row_column() -> None:
    """[CONV-1]"""
    shape = (3, 4, 5)
    x = torch.zeros(shape, dtype=torch.float64)
    x[2, 1, 3] = 7.0
    seen = points(torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([(2 * 4 + 1) * 5 + 3]), shape)
    assert seen.apply(x).tolist() == [7.0]


def test_storm_takes_and_gives_the_shapes_of_the_table(unchecked: None) -> None:
    """[CONV-1]"""
    storm = network()
    past, static = normal(1, 3, 2, *GRID), normal(1, 3, 1, *GRID)
    memory = storm.compress(past, static, HOURS, positions())
    assert memory.shape == (1, GRID[0] // 2, GRID[1] // 2, CONFIG.width)
    told = Condition(static[:, 0], memory, positions()[None])
    assert denoiser(storm, told)(normal(5, 2, *GRID), torch.ones(5)).shape == (5, 2, *GRID)
    with pytest.raises(ValueError, match="past frames"):
        storm.compress(past.transpose(1, 2), static, HOURS, positions())
    with pytest.raises(ValueError, match="state"):
        denoiser(storm, told)(normal(5, 2, *GRID[::-1]), torch.ones(5))


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


@pytest.mark.parametrize(
    ("latitude", "longitude", "want"),
    [(90.0, 0.0, (0, 0, 1)), (-90.0, 77.0, (0, 0, -1)), (0.0, 0.0, (1, 0, 0)), (0.0, 90.0, (0, 1, 0))],
)
def test_coordinates_are_degrees_north_and_east(latitude: float, longitude: float, want: tuple[int, ...]) -> None:
    """[CONV-3]"""
    got = sphere_position(torch.tensor([latitude]), torch.tensor([longitude]), (1, 1))[0, 0]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=1e-15)


def test_age_is_hours_into_the_past() -> None:
    """[CONV-4] An age of 1 hour has s = 1/8; a day is 24."""
    times = np.datetime64("2000-01-01T00", "ns") + np.arange(5) * np.timedelta64(24, "h")
    index, ages = history(times, times[4], 2, np.timedelta64(24, "h"))
    assert index.tolist() == [3, 2] and ages.tolist() == [24.0, 48.0]
    assert age_features(torch.tensor([1.0]).double(), 1)[0, 0].item() == pytest.approx(np.sin(np.pi / 16), abs=1e-16)


@pytest.mark.parametrize("age", [0.0, -6.0, float("nan"), float("inf")])
def test_age_invalid_when_not_past(age: float) -> None:
    """[CONV-4]"""
    with pytest.raises(ValueError, match="ages are hours before the analysis time and must be positive"):
        age_features(torch.tensor([6.0, age]), 2)


GUIDES: dict[str, Callable[[float], Callable[[Denoise, ObservationsLike], Denoise]]] = {
    "dps": lambda unit: dps,
    "pigdm": lambda unit: partial(pigdm, sigma_data=unit),
    "sda": lambda unit: partial(sda, gamma=0.5),
    "mmps": lambda unit: partial(mmps, steps=8),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_sampler_and_guidance_add_no_unit(guide: str) -> None:
    """[CONV-5] Another unit, here 1024 times smaller, gives other numbers and the same state."""

    def draw(unit: float) -> Tensor:
        at = torch.tensor([0, 3, 5])
        seen = points(unit * normal(3), unit**2 * torch.tensor([1.0, 2.0, 4.0]).double(), at, (1, 2, 3))
        guided = GUIDES[guide](unit)(gaussian(1.5 * unit**2), seen)
        churn = Churn(s_churn=8.0, s_min=unit * 0.1, s_max=unit * 30)
        return sample(guided, normal(2, 1, 2, 3), unit * schedule(12), churn, normal(12, 2, 1, 2, 3, seed=5))

    torch.testing.assert_close(draw(1024.0) / 1024, draw(1.0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_observation_error_is_a_variance(variance: float) -> None:
    """[CONV-6] [GUIDE-6] Prior N(0, 1) at sigma = 1: V = 1/2 and gain V / (V + R)."""
    seen = points(torch.tensor([3.0]).double(), torch.tensor([variance]).double(), torch.tensor([0]), (1, 1, 1))
    got = mmps(gaussian(1.0), seen, steps=4)(torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1))
    assert got.item() == pytest.approx(3.0 * 0.5 / (0.5 + variance), rel=1e-14)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_observations_invalid_variance(variance: float) -> None:
    """[CONV-6] [GUIDE-6]"""
    with pytest.raises(ValueError, match=r"observation 1 is .*positive, finite variance"):
        OperatorObservations(torch.zeros(2), torch.tensor([1.0, variance]), lambda x: x.flatten(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_observations_invalid_missing_value(value: float) -> None:
    """[CONV-7] [GUIDE-7]"""
    with pytest.raises(ValueError, match=r"observation 1 is .*leave missing ones out"):
        points(torch.tensor([1.0, value]), torch.ones(2), torch.tensor([0, 1]), (1, 1, 2))


def test_missing_values_do_not_enter() -> None:
    """[CONV-7] [NUM-11] NaN outside the mask leaves value and gradient as they were."""
    score = normal(4, 5).requires_grad_()
    mask = normal(4, 5, seed=1) > 0
    holes = torch.where(mask, 0.0, torch.nan)
    got, want = average(score + holes, mask=mask), score.detach()[mask].mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-14)
    (gradient,) = torch.autograd.grad(got, score)
    assert torch.equal(gradient != 0, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoisers_keep_the_dtype_of_the_state_and_the_sampler_gives_float64(dtype: torch.dtype) -> None:
    """[CONV-9]"""
    x, sigma = normal(2, 2, *GRID).to(dtype), torch.tensor([0.5, 2.0])
    for storm in (network(torch.float32), network(torch.float64)):
        for denoise in (denoiser(storm, condition(storm)), tiled_denoiser(storm, condition(storm), halves())):
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
    "gamma": (lambda: sda(gaussian(1.0), OperatorObservations(torch.ones(1), torch.ones(1), abs), -0.5), "got -0.5"),
    "latitude": (lambda: area_weights(torch.tensor([95.0])), "-90..90 degrees, got 95.0"),
    "seed": (lambda: member_noise(0, -1, 0, (2,)), "0, -1, 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name_and_value(case: str) -> None:
    """[CONV-10]"""
    call, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"heads": 3}, "3 does not divide 16"),
        ({"patch": (0, 2)}, "patch.*0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"channels": 0}, "channels.*got 0"),
        ({"static_channels": -1}, "static_channels.*-1"),
        ({"position_features": 4}, "position_features.*got 4"),
        ({"noise_features": 5}, "noise_features.*got 5"),
        ({"window": -1}, "window.*got -1"),
        ({"sigma_data": 0.0}, "sigma_data.*got 0.0"),
        ({"sigma_data": float("nan")}, "sigma_data.*got nan"),
    ],
)
def test_config_invalid_contradiction(change: dict[str, Any], told: str) -> None:
    """[CONV-12]"""
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **change)


def test_config_takes_the_smallest_sizes() -> None:
    """[CONV-12]"""
    assert StormConfig(1, 0, (1, 1), 1, 1, 1, 1, 1, 1, 2, 0).window == 0


# Refusals and dtypes of single chapters


def test_codes_are_computed_in_float64_and_rounded_once() -> None:
    """[TOK-9] What the embeddings of position and age are given, in a float32 network."""
    storm = network(torch.float32)
    given: dict[str, Tensor] = {}
    storm.embed_position.register_forward_pre_hook(lambda m, a: given.update(position=a[0]))
    storm.embed_age.register_forward_pre_hook(lambda m, a: given.update(age=a[0]))
    condition(storm)
    octaves = CONFIG.position_octaves
    assert positions().dtype == torch.float64
    for name, fine, coarse in (
        ("position", fourier_features(positions(), octaves), fourier_features(positions().float(), octaves)),
        ("age", age_features(HOURS.double(), octaves), age_features(HOURS, octaves)),
    ):
        assert torch.equal(given[name].flatten(), fine.float().flatten())
        assert not torch.equal(coarse, fine.float()), "the test sees no difference between the two ways"


def test_memory_invalid_without_frame() -> None:
    """[MEM-7]"""
    with pytest.raises(ValueError, match="no frame"):
        memory_finish(memory_start(torch.float32, (1, 2, 2, 3)))
    with pytest.raises(ValueError, match="at least one past frame"):
        network().compress(normal(1, 0, 2, *GRID), normal(1, 0, 1, *GRID), torch.zeros(1, 0), positions())


def test_edm_loss_leaves_out_points_that_are_not_valid() -> None:
    """[EDM-11] The loss is that of the valid points alone, and an error at another point has no gradient."""
    x, noise, sigma = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.5, 1.0, 2.0]).double()
    valid = normal(3, 4, seed=2) > -0.3
    shift = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    got = edm_loss(lambda z, s: gaussian(1.0)(z, s) + shift, x, noise, sigma, 1.0, valid)
    error = gaussian(1.0)(x + sigma[:, None] * noise, sigma) - x
    want = sum(
        (1 + s**2) / s**2 * error[i, j].item() ** 2
        for i, s in enumerate(sigma.tolist())
        for j in range(4)
        if valid[i, j]
    ) / int(valid.sum())
    assert 0 < int(valid.sum()) < 12 and got.item() == pytest.approx(want, rel=1e-14)
    (gradient,) = torch.autograd.grad(got, shift)
    assert torch.equal(gradient != 0, valid)


@pytest.mark.parametrize("levels", [[1.0, 0.5], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [0.0], [1.0, float("nan"), 0.0]])
def test_sample_invalid_levels(levels: list[float]) -> None:
    """[EDM-12]"""
    with pytest.raises(ValueError, match="decrease strictly to 0"):
        sample(gaussian(1.0), normal(1, 2), torch.tensor(levels).double())


def test_observations_invalid_reading() -> None:
    """[GUIDE-11] Outside the state, through a weight that is no number, or of another state."""
    one, shape = torch.ones(1).double(), (1, 2, 3)
    for outside in (-1, 6):
        with pytest.raises(ValueError, match=f"{outside}.*outside the state"):
            points(one, one, torch.tensor([outside]), shape)
    with pytest.raises(ValueError, match="weight of an observation is not finite"):
        Observations(one, one, torch.tensor([[0]]), one[:, None] * torch.nan, shape)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 3, 2\)"):
        points(one, one, torch.tensor([5]), shape).apply(normal(1, 3, 2))


def test_draw_members_invalid_observations_without_guidance() -> None:
    """[DA-7]"""
    seen = points(torch.ones(1).double(), torch.ones(1).double(), torch.tensor([0]), (1, 1, 1))
    with pytest.raises(ValueError, match="observations need a guidance method"):
        draw_members(gaussian(1.0), normal(1, 2, 1, 1, 1), Sampler(schedule(2)), seen)


# 10 Numerics


def whole(*shape: int, below: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-below, below + 1, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


EXACT = {torch.bfloat16: 2**6, torch.float32: 2**22, torch.float64: 2**51}


@pytest.mark.parametrize("dtype", EXACT)
def test_indexing_is_exact_on_whole_numbers(dtype: torch.dtype) -> None:
    """[NUM-1] Patches, tiles and the adjoint of H: two terms a point, in any order, within the dtype's integers."""
    x = whole(2, 3, 4, 8, below=EXACT[dtype], dtype=dtype)
    assert torch.equal(unpatchify(patchify(x, (2, 2)), (2, 2), 2), x)
    crop = Tiling.of((4, 8), core=(2, 4), halo=(1, 2), blend=(0, 0), periodic=True)
    for tiles_per_batch in (1, 3, 16):
        assert torch.equal(blend_tiles(lambda z, s, t: z, crop, tiles_per_batch)(x, torch.ones(2)), x)
    at = torch.tensor([5, 7, 5, 95, 0])
    weight = torch.tensor([[1.0], [-1.0], [1.0], [0.0], [1.0]]).to(dtype)
    d = whole(2, 5, below=EXACT[dtype], dtype=dtype)
    order = torch.tensor([3, 2, 4, 0, 1])
    want = torch.zeros(2, 96, dtype=torch.float64)
    for place, (index, factor) in enumerate(zip(at.tolist(), weight[:, 0].tolist(), strict=True)):
        want[:, index] += factor * d[:, place].double()
    for use in (torch.arange(5), order):
        seen = Observations(torch.ones(5), torch.ones(5), at[use, None], weight[use], (3, 4, 8))
        assert torch.equal(seen.adjoint(d[:, use]).flatten(1).double(), want)


def ulps(got: float, want: Any) -> float:
    return float(abs(mpmath.mpf(got) - want) / mpmath.mpf(float(np.spacing(abs(float(want))))))


@pytest.fixture
def digits() -> Iterator[None]:
    with mpmath.workdps(50):
        yield


@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 0.3])
def test_coefficients_are_within_4_ulp(sigma_data: float, digits: None) -> None:
    """[NUM-2] [EDM-2] [EDM-3]"""
    sigma = torch.exp(torch.linspace(-7, 5, 301, dtype=torch.float64))
    got = (*precondition_coefficients(sigma, sigma_data), loss_weight(sigma, sigma_data))
    d = mpmath.mpf(sigma_data)
    for row in zip(*(g.tolist() for g in (sigma, *got)), strict=True):
        s = mpmath.mpf(row[0])
        root = mpmath.sqrt(s**2 + d**2)
        want = (d**2 / root**2, s * d / root, 1 / root, mpmath.log(s) / 4, root**2 / (s * d) ** 2)
        assert max(ulps(g, w) for g, w in zip(row[1:], want, strict=True)) <= 4


@pytest.mark.parametrize(
    ("steps", "low", "high", "rho"),
    [
        (1, 0.002, 80.0, 7.0),
        (18, 0.002, 80.0, 7.0),
        (256, 0.002, 80.0, 7.0),
        (40, 0.01, 50.0, 5.0),
        (9, 0.1, 10.0, 1.0),
    ],
)
def test_schedule_is_within_its_ulps(steps: int, low: float, high: float, rho: float, digits: None) -> None:
    """[NUM-2] [EDM-5]"""
    top, bottom = mpmath.mpf(high) ** (1 / mpmath.mpf(rho)), mpmath.mpf(low) ** (1 / mpmath.mpf(rho))
    got, limit = schedule(steps, low, high, rho).tolist(), 2 * rho * (high / low) ** (1 / rho)
    assert len(got) == steps + 1 and got[-1] == 0
    for i, level in enumerate(got[:-1]):
        share = mpmath.mpf(i) / (steps - 1) if steps > 1 else 0
        assert ulps(level, (top + share * (bottom - top)) ** mpmath.mpf(rho)) <= limit


@pytest.mark.parametrize("blend", [1, 2, 3, 8, 17])
def test_blending_weights_are_within_4_ulp(blend: int, digits: None) -> None:
    """[NUM-2] [TILE-4] [TILE-5]"""
    axis = Axis(8 * blend, 4 * blend, halo=2 * blend, blend=blend)
    boundary, total = 4 * blend, torch.zeros(8 * blend, dtype=torch.float64)
    for number, (index, weight) in enumerate(zip(extents(axis), weights(axis), strict=True)):
        total[index] += weight
        for place, got in zip(index.tolist(), weight.tolist(), strict=True):
            k = place - boundary + blend
            rise = mpmath.sin(mpmath.pi * (2 * min(max(k, 0), 2 * blend - 1) + 1) / (8 * blend)) ** 2
            rise = mpmath.mpf(0) if k < 0 else mpmath.mpf(1) if k >= 2 * blend else rise
            want = rise if number else 1 - rise
            assert got == float(want) if want in (0, 1) else ulps(got, want) <= 4
    assert float((total - 1).abs().max()) <= 4 * np.finfo(np.float64).eps


def test_generic_weights_show_the_whole_model() -> None:
    """[NUM-6] With `randomise` every weight has a gradient; a fresh network hides most of them."""

    def seen(storm: Storm) -> set[str]:
        told = condition(storm)
        out = denoiser(storm, told)(normal(2, 2, *GRID), torch.tensor([0.3, 3.0]))
        names, values = zip(*storm.named_parameters(), strict=True)
        gradients = torch.autograd.grad((out * normal(2, 2, *GRID, seed=9)).sum(), values, allow_unused=True)
        return {n for n, g in zip(names, gradients, strict=True) if g is not None and float(g.abs().max()) > 1e-9}

    storm, fresh = network(), Storm(CONFIG).double()
    everything = {name for name, _ in storm.named_parameters()}
    assert all(bool((p != 0).all()) for p in storm.parameters())
    assert seen(storm) == everything
    assert seen(fresh) <= {name for name in everything if name.startswith("final")}


def test_nearly_constant_tokens_show_the_epsilon_of_the_layer_norm() -> None:
    """[NUM-6] [ATT-2] On others 1e-6 and 1e-5 agree to the fifth digit."""
    x = normal(4, 16)
    for scale, told in ((1.0, False), (1e-3, True)):
        other = nn.functional.layer_norm(scale * x, (16,), eps=1e-5)
        assert bool((layer_norm(scale * x) - other).abs().max() > 1e-2) is told


def test_chain_is_float64_throughout() -> None:
    """[NUM-8] Guided, tiled and sampled: the second difference of a smooth chain vanishes unless something rounds.

    Steps of 1e-6 in the latents leave a second difference of order 1e-12 times the chain's curvature; one rounding to
    float32 anywhere in it leaves 1e-8 or more.
    """
    storm = network()
    seen = points(normal(3), torch.ones(3).double(), torch.tensor([0, 17, 40]), (2, *GRID))
    denoise = mmps(tiled_denoiser(storm, condition(storm), halves()), seen, steps=5)
    start, change = normal(1, 2, *GRID, seed=4), 1e-6 * normal(1, 2, *GRID, seed=5)
    low, middle, high = (sample(denoise, start + k * change, schedule(4, 0.01, 2.0)) for k in (-1, 0, 1))
    assert float((high - middle).abs().max()) > 1e-7, "the latents must matter"
    assert float((high - 2 * middle + low).abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_network_is_narrow(dtype: torch.dtype) -> None:
    """[NUM-9] [EDM-9] A fresh network has F = 0, so that D = c_skip x, with all bits of x."""
    storm = Storm(CONFIG).to(dtype)
    x, sigma = normal(2, 2, *GRID), torch.tensor([0.37, 5.3], dtype=torch.float64)
    want = precondition_coefficients(sigma, CONFIG.sigma_data)[0].reshape(-1, 1, 1, 1) * x
    assert torch.equal(denoiser(storm, condition(storm))(x, sigma), want)
    blend = tiled_denoiser(storm, condition(storm), halves())(x, sigma)
    torch.testing.assert_close(blend, want, rtol=1e-15, atol=0)
    exact = sample(lambda z, s: precondition(lambda c, _: 0 * c, z, s, CONFIG.sigma_data), x, schedule(3))
    assert torch.equal(sample(denoiser(storm, condition(storm)), x, schedule(3)), exact)


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


def test_sampler_stops_at_the_first_value_that_is_not_finite() -> None:
    """[NUM-11] [EDM-12] [DA-6]"""
    calls = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        bad = torch.tensor([0.0, 0.0, torch.nan if len(calls) == 3 else 0.0]).double()
        return x / 2 + bad[:, None]

    with pytest.raises(ValueError, match=r"members \[2\] stopped being finite at step 2 of 9"):
        sample(denoise, normal(3, 4), schedule(9))
    assert len(calls) == 4


def states() -> tuple[Any, ...]:
    """Of torch's and NumPy's global generators; that of Python moves with every signature that beartype checks."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, np.asarray(keys).tolist(), *rest


def test_nothing_draws_from_a_global_generator_and_the_same_inputs_give_the_same_bits() -> None:
    """[NUM-12] [EDM-8]"""

    def everything() -> list[Tensor]:
        storm_noise = torch.Generator().manual_seed(1)
        randomise(storm, storm_noise)
        told = condition(storm)
        sampler = Sampler(schedule(3), Churn(s_churn=2.0))
        noise = torch.stack([member_noise(1, 2, m, (2, *GRID), sampler.draws) for m in range(3)], 1)
        seen = points(normal(3), torch.ones(3).double(), torch.tensor([0, 17, 40]), (2, *GRID))
        drawn = draw_members(tiled_denoiser(storm, told, halves()), noise, sampler, seen, partial(mmps, steps=3))
        loss = edm_loss(denoiser(storm, told), drawn, noise[0], draw_sigma(3, storm_noise), 1.0)
        ranks = rank_histogram(drawn, drawn[0], torch.Generator().manual_seed(7))
        return [noise, drawn, loss, ranks]

    storm = network()
    before = states()
    first, second = everything(), everything()
    assert states() == before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
