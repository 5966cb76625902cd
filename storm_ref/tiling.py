"""Tiling: global attention at linear cost, by denoising tiles and averaging them where they overlap.

Each axis is cut on its own; the two-dimensional tiles are products. With length n, core c, halo h, blend half-width b:

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    "blend_tiles",
    "cores",
    "extents",
    "overhead",
    "seam_bound",
    "tiled_denoiser",
    "tiles",
    "weights",
]


@dataclass(frozen=True)
class Axis:
    """How one axis is cut, in grid points; a core as long as the axis is one tile, which has neither halo nor blend.

    Raises ValueError for what [TILE-1] to [TILE-3] forbid, saying what to change.
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
    """Both axes of the grid. `Tiling.whole` is one tile; `Tiling.of` takes (latitude, longitude) sizes in points."""

    y: Axis
    x: Axis

    @staticmethod
    def whole(grid: tuple[int, int], periodic: bool, patch: tuple[int, int] = (1, 1)) -> "Tiling":
        """One tile: the untiled denoiser."""
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
        """Tiles by size; an axis not longer than its core is one tile."""

        def axis(i: int, wraps: bool) -> Axis:
            if core[i] >= grid[i]:
                return Axis(grid[i], grid[i], periodic=wraps, patch=patch[i])
            return Axis(grid[i], core[i], halo[i], blend[i], wraps, patch[i])

        return Tiling(axis(0, False), axis(1, periodic))


@dataclass(frozen=True)
class Tile:
    """One tile: the grid rows and columns of its extent (absolute indices) and its blending weight, float64."""

    rows: Int[Tensor, " i"]
    cols: Int[Tensor, " j"]
    weight: Float[Tensor, "i j"]


def cores(axis: Axis) -> list[tuple[int, int]]:
    """[start, stop) of each core, [TILE-2]."""
    return [(start, min(start + axis.core, axis.length)) for start in range(0, axis.length, axis.core)]


def extents(axis: Axis) -> list[Int[Tensor, " n"]]:
    """Grid indices that each tile sees, [TILE-3]."""
    if axis.core == axis.length:
        return [torch.arange(axis.length)]
    grown = [torch.arange(start - axis.halo, stop + axis.halo) for start, stop in cores(axis)]
    if axis.periodic:
        return [index % axis.length for index in grown]
    return [index[(index >= 0) & (index < axis.length)] for index in grown]


def weights(axis: Axis) -> list[Float[Tensor, " n"]]:
    """Blending weight of each point of each extent, float64, [TILE-4]."""
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
    """sin^2 rise over the 2 b points around a boundary; `distance` >= 0 is inside the core."""
    k = (distance + blend).clamp(0, max(2 * blend - 1, 0)).double()
    ramp = torch.sin(math.pi * (k + 0.5) / (4 * blend)) ** 2 if blend else torch.ones_like(k)
    ramp = torch.where(distance >= blend, torch.ones_like(ramp), ramp)
    return torch.where(distance < -blend, torch.zeros_like(ramp), ramp)


def tiles(tiling: Tiling) -> list[Tile]:
    """All tiles, row-major; weights are products of the axes' weights."""
    rows = list(zip(extents(tiling.y), weights(tiling.y), strict=True))
    cols = list(zip(extents(tiling.x), weights(tiling.x), strict=True))
    return [Tile(r, c, wr[:, None] * wc) for r, wr in rows for c, wc in cols]


# D on a batch of tiles of one shape: (z [t b, C, h, w], sigma [t b], the t tiles) -> [t b, C, h, w], tile-major.
LocalDenoise = Callable[[Tensor, Tensor, Sequence[Tile]], Tensor]


def blend_tiles(local: LocalDenoise, tiling: Tiling, tiles_per_batch: int = 16) -> Denoise:
    """T[D], [TILE-6]: `local` sees batches of tiles of one shape; blends in the dtype of the state.

    Raises ValueError for tiles_per_batch < 1, and, when evaluated, for a state that is not on the tiling's grid.
    """
    if tiles_per_batch < 1:
        raise ValueError(f"at least one tile must be evaluated at a time, got tiles_per_batch = {tiles_per_batch}")
    groups: dict[tuple[int, ...], list[Tile]] = defaultdict(list)
    for tile in tiles(tiling):
        groups[tuple(tile.weight.shape)].append(tile)
    batches = [
        group[i : i + tiles_per_batch] for group in groups.values() for i in range(0, len(group), tiles_per_batch)
    ]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if x.shape[-2:] != (tiling.y.length, tiling.x.length):
            grid = (tiling.y.length, tiling.x.length)
            raise ValueError(f"the state is on a grid of {tuple(x.shape[-2:])} but the tiling is for {grid}")
        out = torch.zeros_like(x)
        for batch in batches:
            z = torch.cat([x[..., tile.rows[:, None], tile.cols] for tile in batch])
            result = local(z, sigma.repeat(len(batch)), batch)
            for tile, value in zip(batch, torch.split(result, x.shape[0]), strict=True):
                out[..., tile.rows[:, None], tile.cols] += tile.weight.to(value) * value
        return out

    return denoise


def tiled_denoiser(network: Storm, condition: Condition, tiling: Tiling, tiles_per_batch: int = 16) -> Denoise:
    """D(x; sigma) of one analysis by tiles: the driver's default. Each tile keeps its absolute positions, [TILE-6].

    The cropped conditions are kept between evaluations: they depend on neither x nor sigma.
    """
    dtype, patch = network.final.weight.dtype, network.config.patch
    kept: dict[tuple[int, int], Condition] = {}

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        members = z.shape[0] // len(batch)
        key = (id(batch), members)
        if key not in kept:
            kept[key] = Condition.stack([condition.crop(tile.rows, tile.cols, patch) for tile in batch], members)
        return precondition(lambda c, s: network(c, s, kept[key]), z, sigma, network.config.sigma_data, dtype)

    return blend_tiles(local, tiling, tiles_per_batch)


def overhead(tiling: Tiling) -> float:
    """Work of all tiles over that of an untiled pass of linear cost, (1 + 2 h_y / c_y)(1 + 2 h_x / c_x), [TILE-10].

    An axis of one tile has the factor 1. Exact on a periodic axis; on a closed one an upper bound, because the halos of
    its outer tiles are clipped.
    """

    def factor(axis: Axis) -> float:
        return 1.0 if axis.core == axis.length else 1 + 2 * axis.halo / axis.core

    return factor(tiling.y) * factor(tiling.x)


def seam_bound(slope: float, jump: float, blend: int) -> float:
    """Bound on the difference of two neighbours along an axis, for a blend b > 0: slope + sin(pi / (4 b)) jump.

    slope: max |du_i| between neighbours within one tile's output; jump: max |u_i - u_j| of two tiles at a point of
    both. The factor of the jump is the largest step of the weight between neighbours, in the middle of the seam, so
    constant tiles attain the bound. Raises ValueError for a hard crop, where a seam shows the whole jump.
    """
    if blend < 1:
        raise ValueError(f"a hard crop has no bound of this kind: blend must be at least 1, got {blend}")
    return slope + math.sin(math.pi / (4 * blend)) * jump
