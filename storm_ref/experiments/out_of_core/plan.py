"""The tiled denoiser's partition of a domain: tiles along each axis, their batches, and the tiles that meet a core."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.experiments.out_of_core.arrays import Runs
from storm_ref.tiling import Axis, Tiling, batches, cores, extents, shapes, weights

__all__ = ["AxisPlan", "Cut", "Plan"]


@dataclass(frozen=True)
class Cut:
    """One tile along one axis."""

    core: tuple[int, int]
    runs: Runs  # of its extent
    skip: int  # points of the extent before the first with weight
    weight: Float[Tensor, " n"]  # where positive
    first: int  # grid index of the first point with weight; negative when that lies before the start of a circle

    @property
    def length(self) -> int:
        """The number of points of the extent."""
        return sum(stop - start for start, stop in self.runs)


class AxisPlan:
    """The tiles of one axis, and for each core those with weight there, as (tile, points of core, points of tile)."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        parts = zip(cores(axis), extents(axis), weights(axis), strict=True)
        self.cuts = [_cut_of(core, extent, weight, axis) for core, extent, weight in parts]
        self.meets = [list(self._meet(i)) for i in range(len(self.cuts))]

    def _meet(self, i: int) -> Iterator[tuple[int, slice, slice]]:
        """The tiles that meet core i: neighbours alone, for a blend is at most half a core and the last, [TILE-1]."""
        length = self.axis.length
        count = len(self.cuts)
        start, stop = self.cuts[i].core
        around = {k % count if self.axis.periodic else k for k in (i - 1, i, i + 1)}
        for k in sorted(k for k in around if 0 <= k < count):
            for turn in (-length, 0, length) if self.axis.periodic else (0,):
                first = self.cuts[k].first + turn
                low = max(start, first)
                high = min(stop, first + len(self.cuts[k].weight))
                if low < high:
                    yield k, slice(low - start, high - start), slice(low - first, high - first)


def _cut_of(core: tuple[int, int], extent: Tensor, weight: Tensor, axis: Axis) -> Cut:
    ends = [0, *(torch.nonzero(extent.diff() != 1).flatten() + 1).tolist(), len(extent)]
    runs = tuple((int(extent[a]), int(extent[b - 1]) + 1) for a, b in pairwise(ends))
    positive = torch.nonzero(weight > 0).flatten()
    skip = int(positive[0])
    before = core[0] - axis.halo if axis.periodic else max(core[0] - axis.halo, 0)
    first = skip + (0 if axis.core == axis.length else before)
    return Cut(core, runs, skip, weight[skip : int(positive[-1]) + 1].clone(), first)


class Plan:
    """The batches of `tiling.blend_tiles`, in its order."""

    def __init__(self, tiling: Tiling, tiles_per_batch: int) -> None:
        self.y = AxisPlan(tiling.y)
        self.x = AxisPlan(tiling.x)
        self._batches = batches(shapes(tiling), tiles_per_batch)
        self._places = {tile: (n, place) for n, batch in enumerate(self._batches) for place, tile in enumerate(batch)}

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def batch(self, n: int) -> list[tuple[Cut, Cut]]:
        """The tiles of batch n."""
        across = len(self.x.cuts)
        return [(self.y.cuts[tile // across], self.x.cuts[tile % across]) for tile in self._batches[n]]

    def find(self, i: int, j: int) -> tuple[int, int]:
        """The batch of tile (i, j), and its place in that batch."""
        return self._places[i * len(self.x.cuts) + j]
