"""[TOK-1] to [TOK-8]: order bit for bit, positions and codes against loops, refusals."""

import math

import checks_network as checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.tokenisation import (
    age_features,
    fourier_features,
    latitude_position,
    patchify,
    region_position,
    sphere_position,
    unpatchify,
)

small = st.integers(1, 4)
patches = st.tuples(small, small)


# Tokens


@given(small, small, small, patches, small)
def test_patchify_order(channels: int, rows: int, cols: int, patch: tuple[int, int], batch: int) -> None:
    """[TOK-1] [TOK-2]"""
    checks.check_patchify(channels, rows, cols, patch, batch)


@given(small, small, small, patches)
def test_unpatchify_inverse(channels: int, rows: int, cols: int, patch: tuple[int, int]) -> None:
    """[TOK-2] [TOK-3]"""
    checks.check_unpatchify(channels, rows, cols, patch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_patchify_round_trip_keeps_dtype_and_special_values(dtype: torch.dtype) -> None:
    """[TOK-3] bit for bit, infinities and signed zeros included, with any leading dimensions."""
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, 3.0], dtype=dtype).repeat(2, 3, 1, 4, 2)
    back = unpatchify(patchify(x, (2, 3)), (2, 3), 2)
    assert back.dtype == dtype and back.shape == x.shape
    assert torch.equal(back, x) and torch.equal(back.signbit(), x.signbit())


@given(st.integers(1, 12), st.integers(1, 12), patches)
def test_patchify_invalid_patch(height: int, width: int, patch: tuple[int, int]) -> None:
    """[TOK-1]"""
    if height % patch[0] or width % patch[1]:
        checks.check_patch_refused(height, width, patch)
    else:
        assert patchify(torch.zeros(1, height, width), patch).shape[0] == height * width // math.prod(patch)


@pytest.mark.parametrize("patch", [(0, 2), (2, -1)])
def test_patchify_invalid_sizes(patch: tuple[int, int]) -> None:
    """[TOK-1]"""
    checks.check_patch_refused(4, 4, patch)


def test_unpatchify_invalid_rows_or_values() -> None:
    """[TOK-3]"""
    checks.refuses(lambda: unpatchify(torch.zeros(6, 8), (2, 2), 4), "6 tokens", "4 rows")
    checks.refuses(lambda: unpatchify(torch.zeros(6, 8), (2, 2), 0), "0 rows")
    checks.refuses(lambda: unpatchify(torch.zeros(6, 7), (2, 2), 3), "7 values", "2 x 2")


# Positions

shift = st.floats(-360, 360, allow_nan=False)


def test_sphere_position_value() -> None:
    """[TOK-6]"""
    checks.check_sphere_position()


@given(
    st.lists(st.floats(-90, 90), min_size=4, max_size=4),
    st.floats(-360, 180),
    st.floats(0.1, 20),
    st.sampled_from([1, 2, 3, 6]),
)
def test_sphere_position_anywhere(latitude: list[float], start: float, step: float, patch: int) -> None:
    """[TOK-6]"""
    checks.check_sphere_position(latitude, [start + step * i for i in range(6)], (2, patch))


@given(st.floats(-360, 360), st.sampled_from([(4, 1), (8, 2), (12, 3)]))
def test_sphere_position_periodic(start: float, sizes: tuple[int, int]) -> None:
    """[TOK-6]"""
    checks.check_longitude_periodic(start, *sizes)


def test_sphere_position_spacing_even_across_the_date_line() -> None:
    """[TOK-6] neighbours along a parallel are equally far apart, the last and the first too."""
    place = sphere_position(torch.tensor([30.0, 10.0]), torch.arange(12) * 30.0, (1, 2))
    gap = (place - place.roll(1, 1)).norm(dim=-1)
    checks.close(gap, gap[:, :1].expand(-1, 6), 16, "spacing")


def test_region_position_value() -> None:
    """[TOK-6]"""
    checks.check_region_position()


@given(shift)
def test_region_position_depends_on_differences_of_longitude(by: float) -> None:
    """[TOK-6] a region moved east or west has the same codes; its middle is the origin."""
    latitude, longitude = torch.tensor([52.0, 50.0]).double(), torch.tensor([-3.0, -1.0, 1.0, 3.0]).double()
    here = region_position(latitude, longitude, (1, 1), 10.0)
    checks.close(region_position(latitude, longitude + by, (1, 1), 10.0), here, 8, "region moved", 400 / 10)
    checks.close(here.mean((0, 1)), torch.zeros(2).double(), 8, "middle of the region", 10.0)


@pytest.mark.parametrize("length", [0.0, -1.0, math.nan])
def test_region_position_invalid_length(length: float) -> None:
    """[TOK-6]"""
    axis = torch.tensor([1.0, 2.0])
    checks.refuses(lambda: region_position(axis, axis, (1, 1), length), "length", str(length))


def test_latitude_position_value() -> None:
    """[TOK-6]"""
    checks.check_latitude_position()


def test_positions_invalid_jump() -> None:
    """[TOK-6] wrapped longitudes would put a patch on the other side of the Earth."""
    latitude, longitude = torch.tensor([1.0, 0.0]), torch.tensor([358.0, 359.0, 0.0, 1.0])
    checks.refuses(lambda: sphere_position(latitude, longitude, (1, 4)), "longitudes", "unwrap")
    checks.refuses(lambda: region_position(latitude, longitude, (1, 4), 1.0), "longitudes", "unwrap")


def test_positions_invalid_patch() -> None:
    """[TOK-1] [TOK-6]"""
    axis = torch.arange(4.0)
    checks.refuses(lambda: sphere_position(axis, axis, (3, 1)), "patch 3", "4 coordinates")
    checks.refuses(lambda: region_position(axis, axis, (1, 3), 1.0), "patch 3", "4 coordinates")
    checks.refuses(lambda: latitude_position(axis, 2, (3, 1)), "patch 3", "4 coordinates")


# Codes

coordinate = st.floats(-1, 1, allow_subnormal=False)


@given(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=1, max_size=4), st.integers(1, 7))
def test_fourier_features_value(r: list[tuple[float, ...]], octaves: int) -> None:
    """[TOK-7]"""
    checks.check_fourier(r, octaves)


@given(st.lists(coordinate, min_size=1, max_size=8))
def test_fourier_features_distinct(values: list[float]) -> None:
    """[TOK-7]"""
    checks.check_codes_distinct(values)


def test_fourier_features_poles_and_date_line_distinct() -> None:
    """[TOK-7] the poles differ, and so do Greenwich and the date line: by 2 in the sine of the longest wave."""
    opposite = fourier_features(torch.eye(3).double(), 6) - fourier_features(-torch.eye(3).double(), 6)
    checks.close(opposite.abs().amax(-1), torch.full((3,), 2.0).double(), 2, "codes of opposite points")


def test_age_features_value() -> None:
    """[TOK-8]"""
    checks.check_age_features()


@given(st.lists(st.floats(1 / 64, 1e9), min_size=1, max_size=6), st.integers(1, 7))
def test_age_features_any_gaps(ages: list[float], octaves: int) -> None:
    """[TOK-8] any number of frames, any gaps; the code of a frame depends on its own age alone."""
    checks.check_age_features(ages, octaves)


@given(st.lists(st.floats(0.5, 4e9), min_size=1, max_size=6))
def test_age_features_distinct(ages: list[float]) -> None:
    """[TOK-8]"""
    checks.check_ages_distinct(ages)


@pytest.mark.parametrize("age", [0.0, -0.0, -6.0, math.nan, math.inf])
def test_age_features_invalid_age(age: float) -> None:
    """[TOK-8]"""
    checks.check_age_refused(age)


def test_age_features_in_order_of_frames() -> None:
    """[TOK-8] frames keep their places."""
    ages = torch.tensor([[6.0, 12.0, 48.0]]).double()
    assert torch.equal(age_features(ages.flip(1), 4), age_features(ages, 4).flip(1))


# Tokens of the network


@pytest.mark.parametrize("features", [1, 2, 3])
def test_state_tokens_value(features: int) -> None:
    """[TOK-4]"""
    checks.check_state_tokens(features)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_history_tokens_value(frames: int) -> None:
    """[TOK-5] [TOK-8]"""
    checks.check_history_tokens(frames)
