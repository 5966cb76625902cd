"""Tiles of chapter 5 in plain NumPy: each axis is cut for itself, and every index is written out.

[TILE-2]  cores [i c, min((i + 1) c, n))          [TILE-3]  extents: cores grown by h, clipped, or taken modulo n
[TILE-4]  weights sin^2(pi (k + 1/2) / (4 b)) up and cos^2 down over the 2 b points around a boundary
[TILE-6]  T[D](z) = sum_i P_i^T (w_i D(P_i z))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.adapters.numpy import checks as check
from conformance.adapters.numpy.network import Condition, Network, denoise

__all__ = ["Axis", "TileDenoiser", "axis_of", "blend", "blended_network", "check_patches", "dense_denoiser"]

TileDenoiser = Callable[[Array, Array, Array], Array]  # z on the tile, its rows, its columns


@dataclass(frozen=True)
class Axis:
    """An axis and how it is cut, in grid points, [TILE-1] to [TILE-3]."""

    length: int
    core: int
    halo: int
    blend: int
    periodic: bool
    patch: int

    def __post_init__(self) -> None:
        for name, least in (("patch", 1), ("length", 1), ("core", 1), ("halo", 0), ("blend", 0)):
            size = check.integer(name, getattr(self, name), least)
            if size % self.patch:
                raise ValueError(f"{name} {size} is no multiple of the patch {self.patch}; cut between patches")
        n, c, h, b = self.length, self.core, self.halo, self.blend
        if c > n:
            raise ValueError(f"core {c} is larger than the axis of {n} points; give at most its length")
        if b > h or 2 * b > c:
            raise ValueError(f"blend {b} exceeds the halo {h} or half the core {c}; give a smaller one")
        if b > self.cores[-1][1] - self.cores[-1][0]:
            raise ValueError(f"blend {b} exceeds the last core {self.cores[-1]}; give a smaller one or another core")
        if self.periodic and n % c:
            raise ValueError(f"core {c} does not divide the periodic axis of {n} points; give one that does")
        if self.periodic and c < n < c + 2 * h:
            raise ValueError(f"the halo {h} of core {c} wraps onto itself on {n} points; give core + 2 halo <= {n}")

    @property
    def cores(self) -> list[tuple[int, int]]:
        """Start and end of each core, [TILE-2]."""
        return [(start, min(start + self.core, self.length)) for start in range(0, self.length, self.core)]

    def extent(self, core: tuple[int, int]) -> Array:
        """The extent of a tile, as points that may leave [0, n) on a periodic axis, [TILE-3]."""
        start, end = core[0] - self.halo, core[1] + self.halo
        if not self.periodic or len(self.cores) == 1:
            start, end = max(0, start), min(self.length, end)
        return np.arange(start, end)

    @property
    def extents(self) -> list[Array]:
        """The extent of each tile, as indices of the axis."""
        return [self.extent(core) % self.length for core in self.cores]

    def weight(self, core: tuple[int, int]) -> Array:
        """The weight of a tile at the points of its extent, [TILE-4].

        A falling weight is the rising one of the mirrored point, k' = 2 b - 1 - k: the cosine's square near a right
        angle would lose digits. A closed edge, and the one tile of a circle, have no boundary.
        """
        rises = len(self.cores) > 1 and (self.periodic or core[0] > 0)
        falls = len(self.cores) > 1 and (self.periodic or core[1] < self.length)
        points = self.extent(core)
        up = self._rise(points - (core[0] - self.blend)) if rises else np.ones(len(points))
        down = self._rise(core[1] + self.blend - 1 - points) if falls else np.ones(len(points))
        return up * down

    def _rise(self, k: Array) -> Array:
        """0 below k = 0, sin^2(pi (k + 1/2) / (4 b)) up to k = 2 b - 1, then 1."""
        if self.blend == 0:
            return (k >= 0).astype(np.float64)
        inside = np.clip(k, 0, 2 * self.blend - 1)
        wave = np.sin(np.pi * (inside + 0.5) / (4 * self.blend)) ** 2
        return np.where(k < 0, 0.0, np.where(k >= 2 * self.blend, 1.0, wave))

    @property
    def weights(self) -> list[Array]:
        return [self.weight(core) for core in self.cores]


def axis_of(given: Mapping[str, Any]) -> Axis:
    """An axis of the params of a case."""
    names = ("length", "core", "halo", "blend", "periodic", "patch")
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"the axis lacks {', '.join(missing)}; give {', '.join(names)}")
    return Axis(**{name: given[name] for name in names})


def check_patches(patch: tuple[int, int], y: Axis, x: Axis) -> None:
    """Refuse axes that are cut by another patch than the network's, [TILE-1]."""
    if (y.patch, x.patch) != patch:
        raise ValueError(f"the axes have patches {y.patch}, {x.patch}, the network {list(patch)}; give the network's")


def blend(z: Array, y: Axis, x: Axis, on_tile: TileDenoiser) -> Array:
    """T[D](z) of z [b, C, H, W], tile by tile, [TILE-6]. `on_tile` knows sigma and the condition."""
    check.shape("x", z, None, None, y.length, x.length)
    total = np.zeros(z.shape, z.dtype)
    for rows, w_y in zip(y.extents, y.weights, strict=True):
        for cols, w_x in zip(x.extents, x.weights, strict=True):
            part = z[:, :, rows][..., cols]
            total[:, :, rows[:, None], cols] += w_y[:, None] * w_x * on_tile(part, rows, cols)
    return total


def dense_denoiser(sigma: Array, own: float, mean: float, field: Array) -> TileDenoiser:
    """D(z) = (own z + mean * average of z over the tile + field) / (1 + sigma^2): dense in its tile."""
    scale = 1 + sigma[:, None, None, None] ** 2

    def on_tile(z: Array, rows: Array, cols: Array) -> Array:
        average = z.mean(axis=(2, 3), keepdims=True)
        return (own * z + mean * average + field[:, rows][:, :, cols]) / scale  # type: ignore[no-any-return]

    return on_tile


def blended_network(z: Array, sigma: Array, condition: Condition, network: Network, y: Axis, x: Axis) -> Array:
    """T[D](z; sigma) with the network as D.

    A tile's columns close where the network's do and the tile spans the circle.
    """
    patch = network.config.patch
    check_patches(patch, y, x)

    def on_tile(part: Array, rows: Array, cols: Array) -> Array:
        own = network if len(cols) == x.length else network.closed()
        return denoise(part, sigma, condition.crop(rows, cols, patch), own)

    grid = {"static": condition.static.shape[-2:], "position": tuple(np.multiply(condition.position.shape[:2], patch))}
    for name, size in {**grid, "memory": tuple(np.multiply(condition.memory.shape[1:3], patch))}.items():
        if tuple(size) != (y.length, x.length):
            raise ValueError(f"{name} covers {list(size)} points, the axes {y.length} x {x.length}; give one grid")
    return blend(z, y, x, on_tile)
