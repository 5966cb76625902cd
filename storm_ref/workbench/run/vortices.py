"""Tracks of vortices: follow one from frame to frame in 10 m winds, with its intensity (cf. the paper's Figs. 6, 7).

    zeta = (1 / a cos lat) (dv/dlon - d(u cos lat)/dlat)        relative vorticity

is computed by centred differences and smoothed by (1, 2, 1) / 4 along both axes, since differences amplify the smallest
scales. The centre is the extremum of zeta near the last position, refined to the centroid of its 3 x 3 neighbourhood;
the intensity is the largest wind nearby.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Track", "choose", "follow", "separation", "smooth", "strongest", "vorticity"]

EARTH_RADIUS = 6.371e6  # m
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """The path of one vortex: arrays [T] with one value per frame."""

    latitude: Array  # of the centre, degrees
    longitude: Array  # of the centre, degrees, unwrapped
    intensity: Array  # largest wind nearby, m/s
    vorticity: Array  # at the centre, 1/s

    @property
    def length(self) -> float:
        """The distance travelled, in great-circle degrees."""
        return sum(separation(*a, *b) for a, b in pairwise(zip(self.latitude, self.longitude, strict=True)))


def vorticity(u: Array, v: Array, latitude: Array, longitude: Array, periodic: bool) -> Array:
    """Return the relative vorticity in 1/s of winds [..., H, W] in m/s, with one-sided differences at closed edges."""
    lat = np.deg2rad(latitude)
    step = np.deg2rad(longitude[1] - longitude[0])
    cos = np.maximum(np.cos(lat), 0.05)[:, None]  # the poles: the metric term, not the flow, is singular there
    dv = (np.roll(v, -1, -1) - np.roll(v, 1, -1)) / (2 * step) if periodic else np.gradient(v, step, axis=-1)
    return np.asarray((dv - np.gradient(u * cos, lat, axis=-2)) / (EARTH_RADIUS * cos))


def smooth(zeta: Array, periodic: bool) -> Array:
    """Smooth [..., H, W] by (1, 2, 1) / 4 along both axes; beyond a closed edge its own value is repeated."""
    for axis, wraps in ((-1, periodic), (-2, False)):
        pad = [(0, 0)] * zeta.ndim
        pad[axis] = (1, 1)
        wide = np.pad(zeta, pad, "wrap" if wraps else "edge")
        n = zeta.shape[axis]
        before, here, after = (np.take(wide, np.arange(k, k + n), axis) for k in range(3))
        zeta = (before + 2 * here + after) / 4
    return zeta


def _distance(lat: float, lon: float, latitude: Array, longitude: Array) -> Array:
    """Return the distance of every grid point from one point, in great-circle degrees."""
    own = np.deg2rad(lat)
    other = np.deg2rad(latitude)[:, None]
    meridians = np.cos(np.deg2rad(longitude - lon))[None]
    cosine = np.sin(own) * np.sin(other) + np.cos(own) * np.cos(other) * meridians
    return np.asarray(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))))


def separation(lat: float, lon: float, other_lat: float, other_lon: float) -> float:
    """Return the distance between two points in great-circle degrees."""
    return float(_distance(lat, lon, np.array([other_lat]), np.array([other_lon])).item())


def _refine(zeta: Array, i: int, j: int, latitude: Array, longitude: Array, periodic: bool) -> tuple[float, float]:
    """Return the centroid of the vorticity above half its peak in the 3 x 3 neighbourhood."""
    rows = np.clip(np.arange(i - 1, i + 2), 0, len(latitude) - 1)
    cols = np.arange(j - 1, j + 2)
    cols = cols % len(longitude) if periodic else np.clip(cols, 0, len(longitude) - 1)
    weight = np.maximum(zeta[np.ix_(rows, cols)] - zeta[i, j] / 2, 0)
    offset = (longitude[cols] - longitude[j] + 180) % 360 - 180
    total = weight.sum()
    return (
        float((weight.sum(1) * latitude[rows]).sum() / total),
        float(longitude[j] + (weight.sum(0) * offset).sum() / total),
    )


def strongest(zeta: Array, latitude: Array, margin: int = 3) -> tuple[int, int, int]:
    """Return row, column and sign (+1 or -1) of the strongest vortex of zeta [H, W], away from poles and edges."""
    inner = np.abs(zeta) * (np.cos(np.deg2rad(latitude)) > 0.2)[:, None]
    inner[:margin] = 0
    inner[-margin:] = 0
    i, j = np.unravel_index(int(np.argmax(inner)), inner.shape)
    return int(i), int(j), int(np.sign(zeta[i, j]))


def follow(
    u: Array,
    v: Array,
    latitude: Array,
    longitude: Array,
    start: tuple[float, float, int],
    periodic: bool,
    radius: float = 7.0,
) -> Track:
    """Follow one vortex through winds [T, H, W] in m/s from `start` (latitude, longitude, sign).

    From one frame to the next it is looked for within `radius` degrees. Raises ValueError when no grid point lies
    there.
    """
    lat, lon, sign = start
    zeta = sign * smooth(vorticity(u, v, latitude, longitude, periodic), periodic)
    speed = np.hypot(u, v)
    rows = []
    for frame, wind in zip(zeta, speed, strict=True):
        near = _distance(lat, lon, latitude, longitude) <= radius
        if not near.any():
            raise ValueError(f"no grid point within {radius} degrees of ({lat:.1f}, {lon:.1f}); use a larger radius")
        i, j = np.unravel_index(int(np.argmax(np.where(near, frame, -np.inf))), frame.shape)
        if frame[i, j] > 0:  # a vortex that has died leaves its track where it was
            before = lon
            lat, lon = _refine(frame, int(i), int(j), latitude, longitude, periodic)
            lon = before + (lon - before + 180) % 360 - 180
        around = _distance(lat, lon, latitude, longitude) <= radius
        rows.append((lat, lon, wind[around].max(), frame[i, j]))
    latitudes, longitudes, intensity, peak = np.array(rows).T
    return Track(latitudes, longitudes, intensity, sign * peak)


def choose(
    u: Array, v: Array, latitude: Array, longitude: Array, periodic: bool, candidates: int = 8, radius: float = 7.0
) -> tuple[float, float, int]:
    """Return the start (latitude, longitude, sign) of the vortex worth following through winds [T, H, W] in m/s.

    Of the strongest few in the first frame it is the one that travels farthest while it keeps half its vorticity; when
    none does, the strongest. Raises ValueError for winds without vorticity.
    """
    whole = smooth(vorticity(u[0], v[0], latitude, longitude, periodic), periodic)
    zeta = whole
    starts: list[tuple[float, float, int]] = []
    for _ in range(candidates):
        i, j, sign = strongest(zeta, latitude)
        near = _distance(float(latitude[i]), float(longitude[j]), latitude, longitude) <= radius
        # Next to a vortex already taken, the largest value left is on its flank and no centre of its own.
        if sign != 0 and (sign * whole[near]).max() == sign * whole[i, j]:
            starts.append((float(latitude[i]), float(longitude[j]), sign))
        zeta = np.where(near, 0, zeta)
    if not starts:
        raise ValueError("the wind has no vorticity: there is no vortex to follow")
    paths = [follow(u, v, latitude, longitude, start, periodic, radius) for start in starts]
    lasting = [bool((np.abs(path.vorticity) >= abs(path.vorticity[0]) / 2).all()) for path in paths]
    best = max(range(len(starts)), key=lambda n: (lasting[n], paths[n].length if lasting[n] else 0.0, -n))
    return starts[best]
