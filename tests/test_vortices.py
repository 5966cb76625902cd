"""Vortex tracks: the vorticity of known flows, and the paths of vortices that move in a known way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm_ref.workbench.run.vortices import EARTH_RADIUS, choose, follow, smooth, strongest, vorticity

LATITUDE = np.linspace(78.75, 1.25, 32)
LONGITUDE = np.arange(64) * 5.625


def _vortex(centres: list[tuple[float, float]], sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return winds [T, H, W] about moving centres that fall off as a Gaussian of 8 degrees, periodic in longitude."""
    u, v = [], []
    for lat, lon in centres:
        dy = (LATITUDE - lat)[:, None]
        dx = ((LONGITUDE - lon + 180) % 360 - 180)[None] * np.cos(np.deg2rad(lat))
        strength = sign * 3 * np.exp(-(dx**2 + dy**2) / (2 * 8.0**2))
        u.append(-strength * dy)
        v.append(strength * dx)
    return np.array(u), np.array(v)


def test_vorticity_solid_body_rotation() -> None:
    """u = U cos(lat) has zeta = 2 U sin(lat) / a: the value, the sign and the factor two."""
    latitude = np.linspace(80, -80, 321)
    u = 20 * np.cos(np.deg2rad(latitude))[:, None] * np.ones(64)
    zeta = vorticity(u, np.zeros_like(u), latitude, LONGITUDE, periodic=True)
    want = 2 * 20 * np.sin(np.deg2rad(latitude))[:, None] / EARTH_RADIUS
    step = np.deg2rad(0.5)  # centred differences: the third derivative of U cos^2 is at most 4 U
    bound = 4 * 20 * step**2 / 6 / (EARTH_RADIUS * np.cos(np.deg2rad(80)))
    assert np.abs(zeta - want)[1:-1].max() <= bound


def test_vorticity_meridional_wave_is_periodic() -> None:
    """v = sin(k lon): zeta = k cos(k lon) / (a cos lat), the seam like any other column."""
    v = np.sin(3 * np.deg2rad(LONGITUDE))[None] * np.ones((32, 1))
    zeta = vorticity(np.zeros_like(v), v, LATITUDE, LONGITUDE, periodic=True)
    step = np.deg2rad(5.625)
    want = (
        np.sin(3 * step)
        / step
        * np.cos(3 * np.deg2rad(LONGITUDE))
        / (EARTH_RADIUS * np.cos(np.deg2rad(LATITUDE)))[:, None]
    )
    np.testing.assert_allclose(zeta, want, rtol=0, atol=1e-13)


@given(st.floats(25, 55), st.floats(0, 359), st.floats(-3, 3), st.floats(-6, 6), st.sampled_from([1, -1]))
def test_follow_finds_the_way(lat: float, lon: float, dlat: float, dlon: float, sign: int) -> None:
    """A vortex moving steadily, also across the seam, is followed to within one grid cell, longitudes unwrapped."""
    centres = [(lat + dlat * t, lon + dlon * t) for t in range(5)]
    u, v = _vortex(centres, sign)
    track = follow(u, v, LATITUDE, LONGITUDE, (lat, lon, sign), periodic=True, radius=12.0)
    true_lat, true_lon = np.array(centres).T
    assert np.abs(track.latitude - true_lat).max() < 2.5
    assert np.abs(track.longitude - true_lon).max() < 5.625
    assert np.abs(np.diff(track.longitude)).max() < 20


def test_follow_intensity_is_the_largest_wind_near() -> None:
    u, v = _vortex([(40.0, 100.0)] * 2)
    track = follow(u, v, LATITUDE, LONGITUDE, (40.0, 100.0, 1), periodic=True, radius=15.0)
    np.testing.assert_allclose(track.intensity, np.hypot(u, v).max((1, 2)))


@pytest.mark.parametrize("sign", [1, -1])
def test_strongest_finds_the_sign_and_place(sign: int) -> None:
    u, v = _vortex([(41.25, 112.5)], sign)
    i, j, strongest_sign = strongest(vorticity(u, v, LATITUDE, LONGITUDE, True)[0], LATITUDE)
    assert strongest_sign == sign
    assert abs(LATITUDE[i] - 41.25) <= 2.5
    assert abs(LONGITUDE[j] - 112.5) <= 5.625


def test_follow_invalid_radius() -> None:
    u, v = _vortex([(40.0, 100.0)])
    with pytest.raises(ValueError, match="use a larger radius"):
        follow(u, v, LATITUDE, LONGITUDE, (-60.0, 100.0, 1), periodic=True, radius=1.0)


def test_choose_prefers_the_vortex_that_lasts_and_travels() -> None:
    """A moving vortex is chosen before a stronger one that stands still, and before a stronger one that dies."""
    moving, standing = [(45.0, 60.0 + 6 * t) for t in range(5)], [(30.0, 200.0)] * 5
    u, v = (a + 1.3 * b for a, b in zip(_vortex(moving), _vortex(standing), strict=True))
    lat, lon, sign = choose(u, v, LATITUDE, LONGITUDE, periodic=True)
    assert sign == 1 and abs(lat - 45) < 3 and abs(lon - 60) < 6
    decay = np.array([1, 0.5, 0.2, 0.1, 0.05])[:, None, None]
    dying = _vortex([(30.0, 200.0 + 9 * t) for t in range(5)])
    u, v = (a + 2 * decay * b for a, b in zip(_vortex(moving), dying, strict=True))
    assert abs(choose(u, v, LATITUDE, LONGITUDE, periodic=True)[1] - 60) < 6


def test_choose_invalid_calm() -> None:
    with pytest.raises(ValueError, match="no vortex to follow"):
        choose(np.zeros((2, 32, 64)), np.zeros((2, 32, 64)), LATITUDE, LONGITUDE, periodic=True)


def test_track_length_is_along_the_great_circle() -> None:
    """Ten degrees along a meridian, and the cosine of the latitude along a parallel."""
    u, v = _vortex([(40.0, 100.0), (45.0, 100.0), (50.0, 100.0)])
    assert follow(u, v, LATITUDE, LONGITUDE, (40.0, 100.0, 1), periodic=True).length == pytest.approx(10, abs=2)


def test_smooth_keeps_constants_and_weighs_one_two_one() -> None:
    assert np.array_equal(smooth(np.full((2, 5, 6), 3.0), True), np.full((2, 5, 6), 3.0))
    point = np.zeros((5, 6))
    point[2, 0] = 16.0
    want = np.zeros((5, 6))
    want[1:4, [5, 0, 1]] = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert np.array_equal(smooth(point, True), want)
    want[:, 5], want[1:4, 0] = 0, [3, 6, 3]
    assert np.array_equal(smooth(point, False), want)
