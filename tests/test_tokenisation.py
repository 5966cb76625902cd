"""[TOK-1] to [TOK-8]: every dtype and value survives the way into tokens and back, and refusals name what was seen."""

import math

import pytest
import torch
from small_problems import refuses

from storm_ref.tokenisation import (
    age_features,
    latitude_position,
    patchify,
    region_position,
    sphere_position,
    unpatchify,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_patchify_round_trip_keeps_dtype_and_special_values(dtype: torch.dtype) -> None:
    """[TOK-3] bit for bit, infinities and signed zeros included, with any leading dimensions."""
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, 3.0], dtype=dtype).repeat(2, 3, 1, 4, 2)
    back = unpatchify(patchify(x, (2, 3)), (2, 3), 2)
    assert back.dtype == dtype and back.shape == x.shape
    assert torch.equal(back, x) and torch.equal(back.signbit(), x.signbit())


def test_patchify_invalid_patch() -> None:
    """[TOK-1]"""
    refuses(lambda: patchify(torch.zeros(1, 5, 6), (2, 3)), "patch 2 x 3", "grid 5 x 6")
    refuses(lambda: patchify(torch.zeros(1, 4, 4), (0, 2)), "0 x 2")
    refuses(lambda: patchify(torch.zeros(1, 4, 4), (2, -1)), "2 x -1")


def test_unpatchify_invalid_rows_or_values() -> None:
    """[TOK-3]"""
    refuses(lambda: unpatchify(torch.zeros(6, 8), (2, 2), 4), "6 tokens", "4 rows")
    refuses(lambda: unpatchify(torch.zeros(6, 8), (2, 2), 0), "0 rows")
    refuses(lambda: unpatchify(torch.zeros(6, 7), (2, 2), 3), "7 values", "2 x 2")


@pytest.mark.parametrize("length", [0.0, -1.0, math.nan])
def test_region_position_invalid_length(length: float) -> None:
    """[TOK-6]"""
    axis = torch.tensor([1.0, 2.0])
    refuses(lambda: region_position(axis, axis, (1, 1), length), "length", str(length))


def test_positions_invalid_jump_or_patch() -> None:
    """[TOK-1] [TOK-6] wrapped longitudes would put a patch on the other side of the Earth."""
    latitude, longitude = torch.tensor([1.0, 0.0]), torch.tensor([358.0, 359.0, 0.0, 1.0])
    refuses(lambda: sphere_position(latitude, longitude, (1, 4)), "longitudes", "unwrap")
    refuses(lambda: region_position(latitude, longitude, (1, 4), 1.0), "longitudes", "unwrap")
    axis = torch.arange(4.0)
    refuses(lambda: sphere_position(axis, axis, (3, 1)), "patch 3", "4 coordinates")
    refuses(lambda: region_position(axis, axis, (1, 3), 1.0), "patch 3", "4 coordinates")
    refuses(lambda: latitude_position(axis, 2, (3, 1)), "patch 3", "4 coordinates")


@pytest.mark.parametrize("age", [0.0, -0.0, -6.0, math.nan, math.inf])
def test_age_features_invalid_age(age: float) -> None:
    """[TOK-8] [CONV-4]"""
    refuses(lambda: age_features(torch.tensor([[6.0, age]], dtype=torch.float64), 2), "hours before", str(age))
