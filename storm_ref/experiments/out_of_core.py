"""Out of core: the tiled denoiser and the compression of history on a domain larger than memory.

Inputs and outputs lie on disk: Zarr v3 arrays, numpy memory maps, or anything with a shape, a dtype and slices.

    denoise   T[D](x; sigma) of [TILE-6]:  out = sum_i P_i^T ( w_i * D(P_i x; sigma, absolute coordinates) )
              first every batch of tiles is evaluated and w_i * D is written, where w_i > 0, to a file of its own; then
              core by core the few tiles that meet there are read back and added
    compress  m of [NET-2], which is pointwise in location: block after block of grid rows

What is promised:

* `denoise` equals `tiling.tiled_denoiser(network, condition, tiling, tiles_per_batch)(x, sigma)`, evaluated without
  gradients, bit for bit where the network is finite: the batches are the same, and contributions to a point are added
  in the same order. (In memory a tile that is not finite spoils its whole extent; here only where it has weight.)
  `compress` equals `Storm.compress` to rounding.
* Memory holds the tiles in flight and nine files of batches, or one block and `chunk` frames of it; besides only axes:
  coordinates, weights and cuts, O(H + W) numbers, and one index per tile. On disk the batches take about the size of
  the state.
* A run that was interrupted, or killed, goes on when called again with the same arguments, to the same bits: a batch is
  done when its file is there, a row of cores or a block when its checksum is. A damaged file is made again, and parts
  of `out` that no longer hold what was written are written again. Resumed with other arguments it is refused, as far as
  that shows: of large inputs only samples are compared. What a computer had not yet put on disk when it lost power is
  out of reach. One process at a time.
* A finished run leaves nothing in its folder, so that the next one can use it.

Stores are read in pieces of tiles and written in pieces of cores: chunks of the size of a core suit them best.
"""

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import zarr
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import precondition
from storm_ref.memory import MemoryState
from storm_ref.tiling import Axis, Tiling, batches, cores, extents, shapes, weights
from storm_ref.tokenisation import age_features, sphere_position
from storm_ref.workbench.io.atomic import is_temporary, replacing

__all__ = ["ArrayLike", "Domain", "Frames", "Progress", "WritableArray", "compress", "create", "denoise", "open_array"]

# done, total: steps of the run, those of an earlier, interrupted one included.
Progress = Callable[[int, int], None]

# (k0, k1, row0, row1) -> frames k0..k1 of grid rows row0..row1, [k, channels, rows, W].
Frames = Callable[[int, int, int, int], Tensor]

_Runs = tuple[tuple[int, int], ...]  # [start, stop) of neighbouring indices; a tile across the date line has two
_OPEN_FILES = 9  # batches held while blending: a core meets nine tiles at most
_SUMS = "finished.json"
_FINGERPRINT = "fingerprint.json"


@runtime_checkable
class ArrayLike(Protocol):
    """Numbers on disk: a zarr.Array, a numpy.memmap, ..."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    @property
    def dtype(self) -> Any:
        """A numpy dtype."""

    def __getitem__(self, key: Any, /) -> Any:
        """Slices, as numpy takes them."""


@runtime_checkable
class WritableArray(ArrayLike, Protocol):
    """Numbers on disk that can be replaced."""

    def __setitem__(self, key: Any, value: Any, /) -> None:
        """Assign to slices."""


@dataclass(frozen=True)
class Domain:
    """What one evaluation reads, of one member. Axes are in memory, all else on disk.

    Positions are those of `tokenisation.sphere_position(latitude, longitude, patch)`, bit for bit, unless `position`
    has others (in a region, or of the latitude alone).
    """

    state: ArrayLike  # x [C, H, W], float64 or float32
    static: ArrayLike  # [S, H, W]
    memory: ArrayLike  # [rows, cols, D] from compress
    latitude: Float[Tensor, " h"]  # degrees
    longitude: Float[Tensor, " w"]  # degrees, contiguous
    periodic: bool = False  # the columns close on themselves
    position: ArrayLike | None = None  # [rows, cols, P]


def create(path: Path, shape: Sequence[int], chunks: Sequence[int], dtype: str) -> zarr.Array[Any]:
    """A new Zarr v3 array of zeros, not compressed: noise does not shrink. Raises ValueError (zarr's) where one is."""
    return zarr.create_array(path, shape=tuple(shape), chunks=tuple(chunks), dtype=dtype, compressors=None)


def open_array(path: Path) -> zarr.Array[Any]:
    """A Zarr array of either version, to read and write."""
    return zarr.open_array(path, mode="r+")


# Denoising


@torch.no_grad()
def denoise(
    network: Storm,
    domain: Domain,
    sigma: float,
    tiling: Tiling,
    out: WritableArray,
    folder: Path,
    tiles_per_batch: int = 16,
    progress: Progress | None = None,
) -> None:
    """D(x; sigma) by tiles into `out` [C, H, W], of the dtype of the state; see the module for what is promised.

    folder: where an unfinished run keeps what it has; new, empty, or left by a run that was interrupted. A step of
    progress is a batch of at most `tiles_per_batch` tiles, then a row of cores. Raises ValueError, before anything is
    evaluated, on sigma <= 0, tiles_per_batch < 1, shapes and dtypes that do not fit, a periodic tiling of a domain that
    is not, and a folder of another run.
    """
    _check_settings(sigma, tiles_per_batch)
    _check_tiling(network, domain, tiling)
    places = _check_domain(network, domain, out)
    _claim(folder, _denoise_fingerprint(network, domain, sigma, tiling, tiles_per_batch))
    run = _Run(network, domain, places, sigma, _Plan(tiling, tiles_per_batch), folder / "batches")
    sums = _still_good(folder, lambda i: run.checksum(out, i))
    step = _Steps(progress, run.plan.count + len(run.plan.y.cuts))
    if len(sums) < len(run.plan.y.cuts):
        _evaluate_all(run, step)
        _blend_all(run, out, folder, sums, step)
    _leave(folder)


def _evaluate_all(run: "_Run", step: "_Steps") -> None:
    run.folder.mkdir(exist_ok=True)
    for n in range(run.plan.count):
        if run.path(n).exists():
            step.skip(1)
        else:
            run.save(n)
            step()


def _blend_all(run: "_Run", out: WritableArray, folder: Path, sums: list[int], step: "_Steps") -> None:
    step.skip(len(sums))
    values = lru_cache(_OPEN_FILES)(run.values)
    for i in range(len(sums), len(run.plan.y.cuts)):
        total = 0
        for rows, cols, block in run.blend_row(i, values):
            out[:, slice(*rows), slice(*cols)] = block
            total = _checksum(block, total)
        sums.append(total)
        _write_json(folder / _SUMS, sums)
        step()


@dataclass(frozen=True)
class _Cut:
    """One tile along one axis."""

    core: tuple[int, int]
    runs: _Runs  # of its extent
    skip: int  # points of the extent before the first with weight
    weight: Float[Tensor, " n"]  # where positive
    first: int  # grid index of the first point with weight; negative when that lies before the start of a circle

    @property
    def length(self) -> int:
        """Points of the extent."""
        return sum(stop - start for start, stop in self.runs)


class _Line:
    """One axis: its tiles, and for each core the tiles with weight there, as (tile, points of core, points of tile)."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        parts = zip(cores(axis), extents(axis), weights(axis), strict=True)
        self.cuts = [_cut(core, extent, weight, axis) for core, extent, weight in parts]
        self.meets = [list(self._meet(i)) for i in range(len(self.cuts))]

    def _meet(self, i: int) -> Iterator[tuple[int, slice, slice]]:
        """Only neighbours meet a core: a blend is at most half a core, and at most the last core, [TILE-1]."""
        n, count, (start, stop) = self.axis.length, len(self.cuts), self.cuts[i].core
        around = {k % count if self.axis.periodic else k for k in (i - 1, i, i + 1)}
        for k in sorted(k for k in around if 0 <= k < count):
            for turn in (-n, 0, n) if self.axis.periodic else (0,):
                first = self.cuts[k].first + turn
                low, high = max(start, first), min(stop, first + len(self.cuts[k].weight))
                if low < high:
                    yield k, slice(low - start, high - start), slice(low - first, high - first)


def _cut(core: tuple[int, int], extent: Tensor, weight: Tensor, axis: Axis) -> _Cut:
    ends = [0, *(torch.nonzero(extent.diff() != 1).flatten() + 1).tolist(), len(extent)]
    runs = tuple((int(extent[a]), int(extent[b - 1]) + 1) for a, b in pairwise(ends))
    positive = torch.nonzero(weight > 0).flatten()
    skip = int(positive[0])
    before = core[0] - axis.halo if axis.periodic else max(core[0] - axis.halo, 0)
    first = skip + (0 if axis.core == axis.length else before)
    return _Cut(core, runs, skip, weight[skip : int(positive[-1]) + 1].clone(), first)


class _Plan:
    """The batches of `tiling.blend_tiles`, in its order."""

    def __init__(self, tiling: Tiling, tiles_per_batch: int) -> None:
        self.y = _Line(tiling.y)
        self.x = _Line(tiling.x)
        self._batches = batches(shapes(tiling), tiles_per_batch)
        self._places = {tile: (n, place) for n, batch in enumerate(self._batches) for place, tile in enumerate(batch)}

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def batch(self, n: int) -> list[tuple[_Cut, _Cut]]:
        """The tiles of batch n."""
        across = len(self.x.cuts)
        return [(self.y.cuts[tile // across], self.x.cuts[tile % across]) for tile in self._batches[n]]

    def find(self, i: int, j: int) -> tuple[int, int]:
        """The batch of tile (i, j), and its place in that batch."""
        return self._places[i * len(self.x.cuts) + j]


@dataclass(frozen=True)
class _Run:
    """Batches of one evaluation: evaluated, kept in files, blended."""

    network: Storm
    domain: Domain
    places: "_Places"
    sigma: float
    plan: _Plan
    folder: Path

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the state and of the result, in the byte order of this machine."""
        return _native(self.domain.state.dtype)

    def evaluate(self, n: int) -> list[np.ndarray]:
        """w_i * D of each tile of batch n where w_i > 0, [C, h, w] in the dtype of the state."""
        batch, network = self.plan.batch(n), self.network
        weight = network.final.weight
        sigma = torch.tensor([self.sigma], dtype=torch.float64, device=weight.device).repeat(len(batch))
        z = torch.stack([_read(self.domain.state, y.runs, x.runs) for y, x in batch]).to(weight.device)
        condition = Condition.stack([self._condition(y, x) for y, x in batch], 1)
        result = precondition(lambda c, s: network(c, s, condition), z, sigma, network.config.sigma_data, weight.dtype)
        return [self._weighed(value.cpu(), y, x) for value, (y, x) in zip(result, batch, strict=True)]

    def _condition(self, y: _Cut, x: _Cut) -> Condition:
        domain, patch, device = self.domain, self.network.config.patch, self.network.final.weight.device
        rows, cols = _patches(y.runs, patch[0]), _patches(x.runs, patch[1])
        return Condition(
            _read(domain.static, y.runs, x.runs)[None].to(device),
            _read(domain.memory, rows, cols, lead=True)[None].to(device),
            self.places(rows, cols)[None].to(device),
            domain.periodic and x.length == domain.longitude.shape[0],
        )

    @staticmethod
    def _weighed(value: Tensor, y: _Cut, x: _Cut) -> np.ndarray:
        inner = value[:, y.skip : y.skip + len(y.weight), x.skip : x.skip + len(x.weight)]
        return ((y.weight[:, None] * x.weight).to(value) * inner).numpy()

    def path(self, n: int) -> Path:
        """The file of batch n: there when the batch is done."""
        return self.folder / f"{n}.npz"

    def save(self, n: int) -> list[np.ndarray]:
        """Evaluate batch n and keep it."""
        values = self.evaluate(n)
        with replacing(self.path(n)) as part, part.open("wb") as file:
            np.savez(file, *values)
        return values

    def values(self, n: int) -> list[np.ndarray]:
        """Batch n from its file; evaluated again when that is missing or damaged, which a Zip file's checksum shows."""
        batch = self.plan.batch(n)
        want = [((self.domain.state.shape[0], len(y.weight), len(x.weight)), self.dtype) for y, x in batch]
        try:
            with self.path(n).open("rb") as file, np.load(file) as arrays:
                found = [arrays[f"arr_{k}"] for k in range(len(batch))]
        except Exception:  # whatever Zip and numpy say of a damaged file
            return self.save(n)
        return found if [(v.shape, v.dtype) for v in found] == want else self.save(n)

    def blend_row(
        self, i: int, values: Callable[[int], list[np.ndarray]]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], np.ndarray]]:
        """Rows, columns and values of core after core of row i of cores."""
        for j, cut in enumerate(self.plan.x.cuts):
            yield self.plan.y.cuts[i].core, cut.core, self._blend(i, j, values)

    def _blend(self, i: int, j: int, values: Callable[[int], list[np.ndarray]]) -> np.ndarray:
        """One core: contributions are added in the order of the batches, as in memory, or the last bits differ."""
        (top, bottom), (left, right) = self.plan.y.cuts[i].core, self.plan.x.cuts[j].core
        block = np.zeros((self.domain.state.shape[0], bottom - top, right - left), self.dtype)
        parts = [
            (self.plan.find(a, b), (rows, cols), (from_rows, from_cols))
            for a, rows, from_rows in self.plan.y.meets[i]
            for b, cols, from_cols in self.plan.x.meets[j]
        ]
        for (n, place), target, source in sorted(parts, key=lambda part: part[0]):
            block[:, *target] += values(n)[place][:, *source]
        return block

    def checksum(self, out: ArrayLike, i: int) -> int:
        """Of row i of cores in `out`."""
        total = 0
        for cut in self.plan.x.cuts:
            total = _checksum(_read(out, (self.plan.y.cuts[i].core,), (cut.core,)).numpy(), total)
        return total


# Compression


@torch.no_grad()
def compress(
    network: Storm,
    past: ArrayLike | Frames,
    static: ArrayLike | Frames,
    ages: Float[Tensor, " k"],
    latitude: Float[Tensor, " h"],
    longitude: Float[Tensor, " w"],
    out: WritableArray,
    folder: Path,
    rows: int = 4,
    chunk: int = 16,
    progress: Progress | None = None,
    position: ArrayLike | None = None,
) -> None:
    """K past frames [K, C, H, W] to memory `out` [H / p_y, W / p_x, D], `rows` rows of patches and `chunk` frames at a
    time; see the module for what is promised.

    static: each frame's own fields [K, S, H, W], or [S, H, W] for all of them. Past frames and static fields may be
    functions that make or read them when asked, `Frames`. ages: hours before the analysis. `out` has the dtype of the
    network, float32 where that is shorter. folder, position: as of `denoise` and `Domain`. A step of progress is a
    block. Raises ValueError on no frame, ages that are not positive, rows or chunk < 1, shapes and dtypes that do not
    fit, and a folder of another run.
    """
    if len(ages) == 0 or rows < 1 or chunk < 1:
        raise ValueError(f"rows, chunk and frames are at least 1, got rows {rows}, chunk {chunk}, {len(ages)} frames")
    age_features(ages.double(), 1)  # refuses what is not past
    c, grid = network.config, (latitude.shape[0], longitude.shape[0])
    frames = _frames("past frames", past, (len(ages), c.channels, *grid))
    fields = _frames("static fields of the past", static, (len(ages), c.static_channels, *grid), one_serves_all=True)
    places = _places(latitude, longitude, c.patch, position)
    _check_position(network, places)
    _expect("out", out, (places.rows, places.cols, c.width), {_kept_dtype(network)})
    prints = _compress_fingerprint(network, frames, fields, ages, places, {"rows": rows, "chunk": chunk, "grid": grid})
    _claim(folder, prints)
    blocks = [(at, min(at + rows, places.rows)) for at in range(0, places.rows, rows)]
    sums = _still_good(folder, lambda n: _checksum(_read(out, (blocks[n],), ((0, places.cols),), lead=True).numpy()))
    step = _Steps(progress, len(blocks))
    step.skip(len(sums))
    for block in blocks[len(sums) :]:
        value = _compress_block(network, frames, fields, ages, places, block, chunk).cpu().numpy()
        out[slice(*block)] = value
        sums.append(_checksum(value))
        _write_json(folder / _SUMS, sums)
        step()
    _leave(folder)


def _compress_block(
    network: Storm,
    frames: Frames,
    static: Frames,
    ages: Tensor,
    places: "_Places",
    block: tuple[int, int],
    chunk: int,
) -> Float[Tensor, "rows cols d"]:
    """The streaming of `Storm.compress`, on some rows of patches, with frames that come as they are needed."""
    device, patch = network.final.weight.device, network.config.patch[0]
    position = places((block,), ((0, places.cols),)).to(device)
    top, bottom = block[0] * patch, block[1] * patch
    state: MemoryState | None = None
    for at in range(0, len(ages), chunk):
        end = min(at + chunk, len(ages))
        past, fields = (read(at, end, top, bottom)[None].to(device) for read in (frames, static))
        state = network.compress_chunk(state, past, fields, ages[None, at:end].to(device), position)
    assert state is not None
    tokens = rearrange(network.memory.finish(state)[0], "(i j) d -> i j d", j=places.cols)
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).contiguous()


def _frames(name: str, source: ArrayLike | Frames, shape: tuple[int, ...], one_serves_all: bool = False) -> Frames:
    if not isinstance(source, ArrayLike):
        return _checked(name, source, shape)
    array, cols = source, ((0, shape[-1]),)
    if one_serves_all and tuple(array.shape) == shape[1:]:
        return lambda k0, k1, row0, row1: _read(array, ((row0, row1),), cols).expand(k1 - k0, -1, -1, -1)
    _expect(name, array, shape)
    return lambda k0, k1, row0, row1: _read(array, ((row0, row1),), cols, (slice(k0, k1),))


def _checked(name: str, source: Frames, shape: tuple[int, ...]) -> Frames:
    def frames(k0: int, k1: int, row0: int, row1: int) -> Tensor:
        found, want = source(k0, k1, row0, row1), (k1 - k0, shape[1], row1 - row0, shape[3])
        if tuple(found.shape) != want:
            raise ValueError(
                f"{name} {k0}..{k1}, rows {row0}..{row1}: shape {tuple(found.shape)}, but {want} is wanted"
            )
        return found

    return frames


def _kept_dtype(network: Storm) -> str:
    return str(torch.promote_types(network.final.weight.dtype, torch.float32)).removeprefix("torch.")


# Positions


@dataclass(frozen=True)
class _Places:
    """Positions of patch centres, made for the part that is asked for from cosines and sines of the axes."""

    lat: Float[Tensor, "rows 3"]  # cos, 0, sin
    lon: Float[Tensor, "cols 3"]  # cos, sin, 0
    given: ArrayLike | None

    @property
    def rows(self) -> int:
        """Patches along a meridian."""
        return self.lat.shape[0]

    @property
    def cols(self) -> int:
        """Patches along a parallel."""
        return self.lon.shape[0]

    def __call__(self, rows: _Runs, cols: _Runs) -> Float[Tensor, "r c p"]:
        """Of these patches."""
        if self.given is not None:
            return _read(self.given, rows, cols, lead=True)
        lat = torch.cat([self.lat[a:b] for a, b in rows])[:, None]
        lon = torch.cat([self.lon[a:b] for a, b in cols])[None]
        x, y = lat[..., 0] * lon[..., 0], lat[..., 0] * lon[..., 1]
        return torch.stack([x, y, lat[..., 2].expand_as(x)], -1)


def _places(latitude: Tensor, longitude: Tensor, patch: tuple[int, int], given: ArrayLike | None) -> _Places:
    """The axes' cosines and sines are positions on the meridian and on the equator, where the other factor is 1."""
    greenwich, equator = torch.zeros(patch[1]), torch.zeros(patch[0])
    lat = sphere_position(latitude, greenwich, patch)[:, 0]
    return _Places(lat, sphere_position(equator, longitude, patch)[0], given)


# Arrays


def _native(dtype: Any) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    return found


def _checksum(values: np.ndarray, before: int = 0) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data, before)


def _read(array: ArrayLike, rows: _Runs, cols: _Runs, before: tuple[slice, ...] = (), lead: bool = False) -> Tensor:
    """A copy of array[*before, ..., rows, cols], or of array[rows, cols] when the grid's axes `lead`."""
    axes = (0, 1) if lead else (-2, -1)
    index: tuple[Any, ...] = () if lead else (*before, ...)
    parts = [np.concatenate([np.asarray(array[(*index, slice(*r), slice(*c))]) for c in cols], axes[1]) for r in rows]
    whole = np.concatenate(parts, axes[0], dtype=_native(array.dtype))
    return torch.from_numpy(np.ascontiguousarray(whole))


def _patches(runs: _Runs, patch: int) -> _Runs:
    return tuple((start // patch, stop // patch) for start, stop in runs)


# What is refused


def _check_settings(sigma: float, tiles_per_batch: int) -> None:
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}; the sampler's final 0 is never denoised")
    if tiles_per_batch < 1:
        raise ValueError(f"at least one tile must be evaluated at a time, got tiles_per_batch = {tiles_per_batch}")


def _check_tiling(network: Storm, domain: Domain, tiling: Tiling) -> None:
    grid = (domain.latitude.shape[0], domain.longitude.shape[0])
    if grid != (tiling.y.length, tiling.x.length):
        want = (tiling.y.length, tiling.x.length)
        raise ValueError(f"latitude and longitude are a grid of {grid} but the tiling is for {want}")
    if tiling.x.periodic and tiling.x.core < tiling.x.length and not domain.periodic:
        raise ValueError("a periodic tiling joins the two ends of a domain that is not; make one or the other periodic")
    for axis, patch in zip((tiling.y, tiling.x), network.config.patch, strict=True):
        cut = () if axis.core == axis.length else (axis.core, axis.halo)
        if any(size % patch for size in (axis.length, *cut)):
            raise ValueError(f"the network's patch {patch} must divide length, core and halo of {axis}")


def _check_domain(network: Storm, domain: Domain, out: ArrayLike) -> _Places:
    c, grid = network.config, (domain.latitude.shape[0], domain.longitude.shape[0])
    places = _places(domain.latitude, domain.longitude, c.patch, domain.position)
    _check_position(network, places)
    _expect("state", domain.state, (c.channels, *grid), {"float32", "float64"})
    _expect("static fields", domain.static, (c.static_channels, *grid))
    _expect("memory", domain.memory, (places.rows, places.cols, c.width))
    _expect("out", out, (c.channels, *grid), {_native(domain.state.dtype).name})
    return places


def _check_position(network: Storm, places: _Places) -> None:
    features = network.config.position_features
    if places.given is not None:
        _expect("position", places.given, (places.rows, places.cols, features))
    elif features != 3:
        raise ValueError(f"the network wants {features} coordinates of a point and a sphere has 3; give a position")


def _expect(name: str, array: ArrayLike, shape: tuple[int, ...], dtypes: set[str] | None = None) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(array.shape)}, but the network on this grid wants {shape}")
    got = _native(array.dtype).name
    if dtypes is not None and got not in dtypes:
        raise ValueError(f"{name}: dtype {got}, but it must be {' or '.join(sorted(dtypes))}; convert it, or make anew")


# The folder of an unfinished run


class _Steps:
    """Counts steps and tells of those taken now."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def skip(self, count: int) -> None:
        """Steps that an earlier run took."""
        self._done += count

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _claim(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder this run's, or find that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, path = json.loads(json.dumps(fingerprint)), folder / _FINGERPRINT
    if not path.exists():
        if any(not is_temporary(file) for file in folder.iterdir()):
            raise ValueError(f"{folder} holds something else than an unfinished run: choose another folder")
        _write_json(path, wanted)
        return
    found = _read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: choose another folder, or delete this one to start again")
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        what = "; ".join(f"{name} {found.get(name)}, now {wanted.get(name)}" for name in names)
        raise ValueError(
            f"{folder} holds an unfinished run with other arguments ({what}): choose another folder, or delete this "
            "one to start again"
        )


def _leave(folder: Path) -> None:
    """Remove what the run kept; checksums go after the batches, so that a run killed here is known to be finished."""
    if (folder / "batches").exists():
        shutil.rmtree(folder / "batches")
    for name in (_SUMS, _FINGERPRINT):
        (folder / name).unlink(missing_ok=True)
    for file in folder.iterdir():
        if is_temporary(file):
            file.unlink()


def _still_good(folder: Path, checksum: Callable[[int], int]) -> list[int]:
    """Recorded checksums of the leading parts of the output that still have them."""
    found = _read_json(folder / _SUMS)
    recorded: list[int] = found if isinstance(found, list) else []
    for n, total in enumerate(recorded):
        if checksum(n) != total:
            return recorded[:n]
    return recorded


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value))


def _denoise_fingerprint(
    network: Storm, domain: Domain, sigma: float, tiling: Tiling, tiles_per_batch: int
) -> dict[str, Any]:
    arrays = {"state": domain.state, "static": domain.static}
    leading = {"memory": domain.memory} | ({} if domain.position is None else {"position": domain.position})
    return {
        "kind": "denoise",
        "sigma": sigma,
        "tiling": asdict(tiling),
        "tiles_per_batch": tiles_per_batch,
        "periodic": domain.periodic,
        "coordinates": _digest(domain.latitude, domain.longitude),
        **{name: _sampled(array, False) for name, array in arrays.items()},
        **{name: _sampled(array, True) for name, array in leading.items()},
        **_network_fingerprint(network),
    }


def _compress_fingerprint(
    network: Storm, frames: Frames, static: Frames, ages: Tensor, places: _Places, settings: dict[str, Any]
) -> dict[str, Any]:
    last, height, patch = len(ages), settings["grid"][0], network.config.patch[0]
    ends = ((0, 1, 0, patch), (last - 1, last, height - patch, height))
    given = {} if places.given is None else {"position": _sampled(places.given, True)}
    return {
        "kind": "compress",
        **settings,
        "ages": _digest(ages),
        "coordinates": _digest(places.lat, places.lon),
        "past": _digest(*(frames(*end) for end in ends)),
        "static": _digest(*(static(*end) for end in ends)),
        **given,
        **_network_fingerprint(network),
    }


def _network_fingerprint(network: Storm) -> dict[str, Any]:
    """Torch's version too: another one may round otherwise."""
    return {
        "config": asdict(network.config),
        "dtype": str(network.final.weight.dtype),
        "weights": _digest(*network.state_dict().values()),
        "torch": torch.__version__,
    }


def _sampled(array: ArrayLike, lead: bool) -> str:
    """Shape, dtype and a digest of five points: the corners and the middle."""
    height, width = array.shape[:2] if lead else array.shape[-2:]
    points = [*product((0, height - 1), (0, width - 1)), (height // 2, width // 2)]
    read = [_read(array, ((i, i + 1),), ((j, j + 1),), lead=lead) for i, j in points]
    return f"{tuple(array.shape)} {_native(array.dtype).name} {_digest(*read)}"


def _digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
