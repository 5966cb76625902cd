"""Tiling: global attention at linear cost, by denoising tiles and averaging them where they overlap.

Each axis is cut independently, and the two-dimensional tiles are products of intervals. For an axis of length n, with
core c, halo h and blend half-width b:

[TILE-1] n, c, h, b are multiples of the patch; 0 <= b <= h; 2 b <= c, and b <= the last core where that is shorter;
         tiles are given by size, never by count
[TILE-2] cores are [i c, min((i+1) c, n)); on a periodic axis c divides n
[TILE-3] extents are cores grown by h on both sides: clipped on a closed axis, modulo n on a periodic one, where either
         there is one tile (extent = the axis) or c + 2 h <= n: a halo that wraps onto itself would show the network a
         point twice
[TILE-4] weights across a boundary between cores, over the 2 b points around it: sin^2(pi (k + 1/2) / (4 b)) rising,
         cos^2 of the same falling, k = 0..2b-1; 1 inside, 0 beyond; no taper at a closed edge; b = 0 is a hard crop
[TILE-5] weights of all tiles sum to one at every point
[TILE-6] T[D](z) = sum_i P_i^T ( w_i * D(P_i z; sigma, absolute coordinates, P_i conditioning) )
[TILE-7] T is applied at every evaluation of the sampler, on the blended state; noise is drawn once for the whole domain
[TILE-8] T[D] = D when there is one tile, when every extent covers the domain, for pointwise D, and for windowed
         attention of radius r and depth L tokens with L r p <= h - b on every cut axis
[TILE-9] with 0 < h + b <= c and dense attention in the tile, context travels exactly one tile an evaluation: let I be
         the tiles with positive weight at a point (two of them near a boundary); after m evaluations the value there
         depends on the extents of the tiles within m - 1 of I and on nothing else. "Global" means that cone.
[TILE-10] with sizes fixed the cost is affine in the number of tiles; overhead (1 + 2 h_y / c_y)(1 + 2 h_x / c_x), less
          what clipping saves at the ends of a closed axis

The paper averages denoised outputs in the overlaps with Hanning weights and feeds the result to the next step (Fig.
3a); the formulas, the axis rules and the absolute coordinates are our interpretation. Plain numpy.hanning weights do
not sum to one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise, precondition

__all__ = [
    "Axis",
    "LocalDenoise",
    "Tile",
    "Tiling",
    "batches",
    "blend_tiles",
    "cores",
    "extents",
    "once_per_batch",
    "overhead",
    "seam_bound",
    "shapes",
    "spans",
    "tile_conditions",
    "tiled_denoiser",
    "tiles",
    "weights",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """The cut of one axis, in grid points. A core as long as the axis makes one tile, without halo or blend.

    Raises ValueError for sizes that [TILE-1] to [TILE-3] forbid; the message says what to change.
    """

    length: int
    core: int
    halo: int = 0
    blend: int = 0
    periodic: bool = False
    patch: int = 1

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"the patch must be at least 1, got {self.patch}")
        for name in ("length", "core", "halo", "blend"):
            if getattr(self, name) % self.patch:
                raise ValueError(f"{name} {getattr(self, name)} is not a multiple of the patch {self.patch}")
        if not 1 <= self.core <= self.length:
            raise ValueError(f"the core must be between 1 and the length {self.length}, got {self.core}")
        if not 0 <= self.blend <= self.halo:
            raise ValueError(f"need 0 <= blend <= halo, got blend {self.blend} and halo {self.halo}")
        if self.core < self.length:
            self._check_several()

    def _check_several(self) -> None:
        last = self.length % self.core or self.core
        if 2 * self.blend > self.core or self.blend > last:
            raise ValueError(
                f"blend {self.blend} is too wide for cores of {self.core} with a last core of {last}: need 2 blend <= "
                "core and blend <= last core; make blend smaller or choose a core that divides the length"
            )
        if self.periodic and self.length % self.core:
            raise ValueError(
                f"on a periodic axis the core must divide the length, and {self.core} does not divide {self.length}; "
                "choose a core that does"
            )
        if self.periodic and self.core + 2 * self.halo > self.length:
            raise ValueError(
                f"a tile of core {self.core} and halo {self.halo} wraps onto itself on a periodic axis of "
                f"{self.length}; make the halo smaller, or use one tile"
            )


@dataclass(frozen=True)
class Tiling:
    """The cuts of both axes of the grid: latitude `y` and longitude `x`."""

    y: Axis
    x: Axis

    @staticmethod
    def whole(grid: tuple[int, int], periodic: bool, patch: tuple[int, int] = (1, 1)) -> "Tiling":
        """One tile that covers the grid: the untiled denoiser."""
        return Tiling(Axis(grid[0], grid[0], patch=patch[0]), Axis(grid[1], grid[1], periodic=periodic, patch=patch[1]))

    @staticmethod
    def of(
        grid: tuple[int, int],
        core: tuple[int, int],
        halo: tuple[int, int],
        blend: tuple[int, int],
        periodic: bool,
        patch: tuple[int, int] = (1, 1),
    ) -> "Tiling":
        """Tiles of the given (latitude, longitude) sizes in points; an axis not longer than its core is one tile."""

        def axis(i: int, wraps: bool) -> Axis:
            if core[i] >= grid[i]:
                return Axis(grid[i], grid[i], periodic=wraps, patch=patch[i])
            return Axis(grid[i], core[i], halo[i], blend[i], wraps, patch[i])

        return Tiling(axis(0, False), axis(1, periodic))

    @property
    def grid(self) -> tuple[int, int]:
        """The number of points along latitude and longitude."""
        return self.y.length, self.x.length


@dataclass(frozen=True)
class Tile:
    """One tile: the grid rows and columns of its extent (absolute indices) and its blending weights in float64."""

    rows: Int[Tensor, " i"]
    cols: Int[Tensor, " j"]
    weight: Float[Tensor, "i j"]

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and columns of the extent."""
        return len(self.rows), len(self.cols)

    @cached_property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows and columns of the extent as a hashable key."""
        return tuple(self.rows.tolist()), tuple(self.cols.tolist())


def cores(axis: Axis) -> list[tuple[int, int]]:
    """The interval [start, stop) of each core, [TILE-2]."""
    return [(start, min(start + axis.core, axis.length)) for start in range(0, axis.length, axis.core)]


def extents(axis: Axis) -> list[Int[Tensor, " n"]]:
    """The grid indices of each tile's extent, [TILE-3]."""
    if axis.core == axis.length:
        return [torch.arange(axis.length)]
    grown = [torch.arange(start - axis.halo, stop + axis.halo) for start, stop in cores(axis)]
    if axis.periodic:
        return [index % axis.length for index in grown]
    return [index[(index >= 0) & (index < axis.length)] for index in grown]


def weights(axis: Axis) -> list[Float[Tensor, " n"]]:
    """The blending weights of each tile on its extent, in float64, [TILE-4]."""
    if axis.core == axis.length:
        return [torch.ones(axis.length, dtype=torch.float64)]
    result = []
    for (start, stop), index in zip(cores(axis), extents(axis), strict=True):
        first = start - axis.halo if axis.periodic else max(start - axis.halo, 0)
        place = torch.arange(first, first + len(index))
        weight = torch.ones(len(index), dtype=torch.float64)
        if start > 0 or axis.periodic:
            weight *= _rise(place - start, axis.blend)
        if stop < axis.length or axis.periodic:
            weight *= _rise(stop - 1 - place, axis.blend)
        result.append(weight)
    return result


def _rise(distance: Int[Tensor, " n"], blend: int) -> Float[Tensor, " n"]:
    """The rising weight of [TILE-4] at signed distances from a boundary; a distance >= 0 is inside the core.

    The angle grows from 0 to pi / 2 over the 2 b points around the boundary; for b = 0 it jumps.
    """
    angle = math.pi * (distance.double() + blend + 0.5) / (4 * blend)
    return torch.sin(angle.clamp(0, math.pi / 2)) ** 2


def tiles(tiling: Tiling) -> list[Tile]:
    """List the tiles in row-major order; their weights are products of the axes' weights."""
    rows = list(zip(extents(tiling.y), weights(tiling.y), strict=True))
    cols = list(zip(extents(tiling.x), weights(tiling.x), strict=True))
    return [Tile(r, c, wr[:, None] * wc) for r, wr in rows for c, wc in cols]


def spans(axis: Axis) -> list[int]:
    """The length of each tile's extent, without the indices of `extents`."""
    if axis.core == axis.length:
        return [axis.length]
    ends = ((start - axis.halo, stop + axis.halo) for start, stop in cores(axis))
    if axis.periodic:
        return [stop - start for start, stop in ends]
    return [min(stop, axis.length) - max(start, 0) for start, stop in ends]


def shapes(tiling: Tiling) -> list[tuple[int, int]]:
    """The number of rows and columns of each tile's extent, in row-major order of the tiles."""
    return list(product(spans(tiling.y), spans(tiling.x)))


def batches(shapes: Sequence[Hashable], tiles_per_batch: int = 16) -> list[list[int]]:
    """The tiles that are evaluated together, as indices into `shapes`: tiles of one shape, at most so many at a time.

    Shapes come in the order of their first tile, and the tiles of a shape in their own order. Contributions to a point
    are added in this order, so results that promise equal bits depend on it. Raises ValueError for tiles_per_batch < 1.
    """
    if tiles_per_batch < 1:
        raise ValueError(f"at least one tile must be evaluated at a time, got tiles_per_batch = {tiles_per_batch}")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    return [
        group[first : first + tiles_per_batch]
        for group in groups.values()
        for first in range(0, len(group), tiles_per_batch)
    ]


# D on a batch of tiles of one shape: (z [t b, C, h, w], sigma [t b], the t tiles) -> [t b, C, h, w], tile-major.
LocalDenoise = Callable[[Tensor, Tensor, Sequence[Tile]], Tensor]


def blend_tiles(denoise_batch: LocalDenoise, tiling: Tiling, tiles_per_batch: int = 16) -> Denoise:
    """T[D], [TILE-6]: denoises the tiles batch by batch and blends them in the dtype of the state.

    Raises ValueError for tiles_per_batch < 1, and, when evaluated, for a state that is not on the tiling's grid.
    """
    every = tiles(tiling)
    parts = [[every[i] for i in batch] for batch in batches([tile.shape for tile in every], tiles_per_batch)]

    def denoise_by_tiles(x: Tensor, sigma: Tensor) -> Tensor:
        if x.shape[-2:] != tiling.grid:
            raise ValueError(f"the state is on a grid of {tuple(x.shape[-2:])} but the tiling is for {tiling.grid}")
        out = torch.zeros_like(x)
        for batch in parts:
            z = torch.cat([x[..., tile.rows[:, None], tile.cols] for tile in batch])
            result = denoise_batch(z, sigma.repeat(len(batch)), batch)
            for tile, value in zip(batch, torch.split(result, x.shape[0]), strict=True):
                out[..., tile.rows[:, None], tile.cols] += tile.weight.to(value) * value
        return out

    return denoise_by_tiles


def once_per_batch(make: Callable[[Sequence[Tile], int], T]) -> Callable[[Sequence[Tile], int], T]:
    """`make(tiles, members)` with its results cached by the places of the tiles and the number of members.

    For values that depend on neither x nor sigma, such as cropped conditions.
    """
    cache: dict[Hashable, T] = {}

    def cached(batch: Sequence[Tile], members: int) -> T:
        key = (members, *(tile.place for tile in batch))
        if key not in cache:
            cache[key] = make(batch, members)
        return cache[key]

    return cached


def tile_conditions(condition: Condition, patch: tuple[int, int]) -> Callable[[Sequence[Tile], int], Condition]:
    """The condition of each batch of tiles, cropped once: a function of the tiles and the number of members."""

    def crop_batch(batch: Sequence[Tile], members: int) -> Condition:
        return Condition.stack([condition.crop(tile.rows, tile.cols, patch) for tile in batch], members)

    return once_per_batch(crop_batch)


def tiled_denoiser(network: Storm, condition: Condition, tiling: Tiling, tiles_per_batch: int = 16) -> Denoise:
    """D(x; sigma) of one analysis by tiles, which keep their absolute positions, [TILE-6].

    Cropped conditions are kept between evaluations. Raises ValueError as `blend_tiles` does.
    """
    dtype = network.final.weight.dtype
    condition_of = tile_conditions(condition, network.config.patch)

    def denoise_batch(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        cropped = condition_of(batch, z.shape[0] // len(batch))

        def evaluate_network(scaled: Tensor, level: Tensor) -> Tensor:
            return network(scaled, level, cropped)  # type: ignore[no-any-return]

        return precondition(evaluate_network, z, sigma, network.config.sigma_data, dtype)

    return blend_tiles(denoise_batch, tiling, tiles_per_batch)


def overhead(tiling: Tiling) -> float:
    """The points of all tiles over those of the domain, (1 + 2 h_y / c_y)(1 + 2 h_x / c_x), [TILE-10].

    An axis of one tile has the factor 1. The value is exact on a periodic axis, and an upper bound on a closed one,
    because the halos of its outer tiles are clipped.
    """

    def factor(axis: Axis) -> float:
        return 1.0 if axis.core == axis.length else 1 + 2 * axis.halo / axis.core

    return factor(tiling.y) * factor(tiling.x)


def seam_bound(slope: float, jump: float, blend: int) -> float:
    """Bound on the difference of two neighbouring points along an axis: slope + sin(pi / (4 b)) jump for a blend b > 0.

    slope: max |du_i| between neighbours within one tile's output. jump: max |u_i - u_j| of two tiles at a point that
    both cover. Its factor is the largest step of the weight between neighbours, in the middle of the seam, so that
    constant tiles attain the bound. Raises ValueError for a hard crop, where a seam shows the whole jump.
    """
    if blend < 1:
        raise ValueError(f"a hard crop has no bound of this kind: blend must be at least 1, got {blend}")
    return slope + math.sin(math.pi / (4 * blend)) * jump
