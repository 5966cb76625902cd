"""[TILE-8] The tiled denoiser equals attention over the whole domain where it must, and differs one patch beyond."""

from dataclasses import replace

import pytest
import torch
from small_problems import CONFIG, EPS, NETWORK, World, integers, world
from torch import Tensor

from storm_ref.denoiser import denoiser
from storm_ref.tiling import Axis, Tiling, blend_tiles, tiled_denoiser


def untiled_gap(w: World, tiling: Tiling) -> float:
    """Largest difference between the tiled and the untiled denoiser, in units of the largest untiled value."""
    want = denoiser(w.network, w.condition)(w.x, w.sigma)
    got = tiled_denoiser(w.network, w.condition, tiling)(w.x, w.sigma)
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("periodic", [False, True])
def test_tiled_equals_untiled_with_one_tile(periodic: bool) -> None:
    """[TILE-8] case (a)"""
    w = world((8, 12), periodic)
    assert untiled_gap(w, Tiling.whole((8, 12), periodic, (2, 2))) <= NETWORK


def test_tiled_equals_untiled_when_extents_cover_the_domain() -> None:
    """[TILE-8] case (b): halo >= length on closed axes; c + 2 h = n on a periodic one. One patch less and it
    differs."""
    w = world((8, 12), False)
    assert untiled_gap(w, Tiling(Axis(8, 4, 8, 2, patch=2), Axis(12, 6, 14, 2, patch=2))) <= NETWORK
    assert untiled_gap(w, Tiling(Axis(8, 4, 4, 2, patch=2), Axis(12, 6, 6, 2, patch=2))) <= NETWORK
    assert untiled_gap(w, Tiling(Axis(8, 4, 4, 2, patch=2), Axis(12, 6, 4, 2, patch=2))) > 1e-4
    w = world((8, 12), True)
    assert untiled_gap(w, Tiling(Axis(8, 8, patch=2), Axis(12, 4, 4, 2, True, 2))) <= NETWORK
    assert untiled_gap(w, Tiling(Axis(8, 8, patch=2), Axis(12, 4, 2, 2, True, 2))) > 1e-4


def test_windowed_tiles_that_cover_the_circle_close_on_themselves() -> None:
    """[TILE-8] case (b) with windowed attention: a tile whose extent is the whole circle wraps inside the tile too."""
    w = world((4, 12), True, config=replace(CONFIG, window=1))
    assert untiled_gap(w, Tiling(Axis(4, 4, patch=2), Axis(12, 4, 4, 4 // 2, True, 2))) <= NETWORK


@pytest.mark.parametrize(
    ("radius", "depth", "halo", "blend"),
    [(1, 2, 4, 0), (1, 2, 6, 2), (2, 1, 4, 0), (1, 1, 4, 2), (0, 2, 2, 2), (2, 2, 8, 0), (1, 3, 6, 0)],
)
@pytest.mark.parametrize("periodic", [False, True])
def test_windowed_attention_equals_untiled_and_the_bound_is_sharp(
    radius: int, depth: int, halo: int, blend: int, periodic: bool
) -> None:
    """[TILE-8] case (c): exact with L r p = h - b; with a halo or a window one patch beyond it, no longer."""
    assert radius * depth * 2 == halo - blend
    grid = (4, 24)
    w = world(grid, periodic, config=replace(CONFIG, window=radius, depth=depth))
    y = Axis(4, 4, patch=2)
    assert untiled_gap(w, Tiling(y, Axis(24, 4, halo, blend, periodic, 2))) <= NETWORK
    wider = world(grid, periodic, config=replace(CONFIG, window=radius + 1, depth=depth))
    assert untiled_gap(wider, Tiling(y, Axis(24, 4, halo, blend, periodic, 2))) > 1e-5
    if halo > blend:
        assert untiled_gap(w, Tiling(y, Axis(24, 4, halo - 2, blend, periodic, 2))) > 1e-5


def test_windowed_attention_equals_untiled_on_both_axes() -> None:
    """[TILE-8] case (c) with tiles cut along latitude and longitude, a short last row of tiles, and patches that
    differ."""
    config = replace(CONFIG, window=1, depth=2, patch=(1, 2))
    w = world((11, 20), True, config=config)
    tiling = Tiling(Axis(11, 4, 3, 1), Axis(20, 4, 6, 2, True, 2))
    assert untiled_gap(w, tiling) <= NETWORK
    assert untiled_gap(w, replace(tiling, y=Axis(11, 4, 3, 2))) > 1e-5


@pytest.mark.parametrize("blend", [0, 1])
def test_pointwise_denoiser_equals_untiled(blend: int) -> None:
    """[TILE-8] case (d): bit for bit on integers under a hard crop, to rounding otherwise."""
    tiling = Tiling(Axis(11, 4, 3, blend), Axis(12, 4, 2, blend, periodic=True))
    x = integers(2, 2, 11, 12)

    def point(z: Tensor) -> Tensor:
        return z**2 - 3 * z * z.flip(1)

    got = blend_tiles(lambda z, sigma, batch: point(z), tiling)(x, torch.ones(2, dtype=torch.float64))
    assert (got - point(x)).abs().max() <= (16 * EPS * 256 if blend else 0.0)
