"""One evaluation of the tiled denoiser from disk to disk."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import precondition
from storm_ref.experiments.out_of_core.arrays import (
    ArrayLike,
    Runs,
    WritableArray,
    checksum,
    expect,
    native_dtype,
    read_piece,
)
from storm_ref.experiments.out_of_core.plan import Cut, Plan
from storm_ref.experiments.out_of_core.positions import Positions, positions_of
from storm_ref.experiments.out_of_core.unfinished import (
    Progress,
    Steps,
    claim,
    clear,
    digest,
    digest_of_samples,
    intact_checksums,
    network_fingerprint,
    save_checksums,
)
from storm_ref.tiling import Tiling
from storm_ref.workbench.io.atomic import replacing

__all__ = ["Domain", "denoise"]

_OPEN_FILES = 9  # batches held while blending: a core meets nine tiles at most


@dataclass(frozen=True)
class Domain:
    """The inputs of one evaluation for one member. The axes are in memory, everything else is on disk.

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

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of latitudes and of longitudes."""
        return self.latitude.shape[0], self.longitude.shape[0]


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
    """Write D(x; sigma) by tiles to `out` [C, H, W], in the dtype of the state; the package states the guarantees.

    `folder` is where an unfinished run keeps what it has: new, empty, or left by a run that was interrupted. A step of
    progress is a batch of at most `tiles_per_batch` tiles, or a row of cores.

    Raises ValueError, before anything is evaluated, for sigma <= 0, tiles_per_batch < 1, shapes and dtypes that do not
    fit, a periodic tiling of a domain that is not, and a folder of another run.
    """
    _check_settings(sigma, tiles_per_batch)
    _check_tiling(network, domain, tiling)
    positions = _check_domain(network, domain, out)
    claim(folder, _fingerprint(network, domain, sigma, tiling, tiles_per_batch))
    run = _Run(network, domain, positions, sigma, Plan(tiling, tiles_per_batch), folder / "batches")
    finished = intact_checksums(folder, lambda i: run.row_checksum(out, i))
    rows = len(run.plan.y.cuts)
    step = Steps(progress, run.plan.count + rows)
    if len(finished) < rows:
        _evaluate_batches(run, step)
        _blend_rows(run, out, folder, finished, step)
    clear(folder)


def _evaluate_batches(run: "_Run", step: Steps) -> None:
    run.folder.mkdir(exist_ok=True)
    for n in range(run.plan.count):
        if run.path(n).exists():
            step.skip(1)
        else:
            run.save(n)
            step()


def _blend_rows(run: "_Run", out: WritableArray, folder: Path, finished: list[int], step: Steps) -> None:
    step.skip(len(finished))
    values = lru_cache(_OPEN_FILES)(run.values)
    for i in range(len(finished), len(run.plan.y.cuts)):
        total = 0
        for rows, cols, block in run.blend_row(i, values):
            out[:, slice(*rows), slice(*cols)] = block
            total = checksum(block, total)
        finished.append(total)
        save_checksums(folder, finished)
        step()


@dataclass(frozen=True)
class _Run:
    """Batches of one evaluation: evaluated, kept in files, blended."""

    network: Storm
    domain: Domain
    positions: Positions
    sigma: float
    plan: Plan
    folder: Path

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the state and of the result, in the byte order of this machine."""
        return native_dtype(self.domain.state)

    def evaluate(self, n: int) -> list[np.ndarray]:
        """w_i * D of each tile of batch n where w_i > 0, [C, h, w] in the dtype of the state."""
        batch = self.plan.batch(n)
        network = self.network
        weight = network.final.weight
        sigma = torch.tensor([self.sigma], dtype=torch.float64, device=weight.device).repeat(len(batch))
        z = torch.stack([read_piece(self.domain.state, y.runs, x.runs) for y, x in batch]).to(weight.device)
        condition = Condition.stack([self._condition(y, x) for y, x in batch], 1)
        result = precondition(lambda c, s: network(c, s, condition), z, sigma, network.config.sigma_data, weight.dtype)
        return [self._weighted(value.cpu(), y, x) for value, (y, x) in zip(result, batch, strict=True)]

    def _condition(self, y: Cut, x: Cut) -> Condition:
        domain = self.domain
        patch = self.network.config.patch
        device = self.network.final.weight.device
        rows = _in_patches(y.runs, patch[0])
        cols = _in_patches(x.runs, patch[1])
        return Condition(
            static=read_piece(domain.static, y.runs, x.runs)[None].to(device),
            memory=read_piece(domain.memory, rows, cols, grid_first=True)[None].to(device),
            position=self.positions(rows, cols)[None].to(device),
            periodic=domain.periodic and x.length == domain.grid[1],
        )

    @staticmethod
    def _weighted(value: Tensor, y: Cut, x: Cut) -> np.ndarray:
        inner = value[:, y.skip : y.skip + len(y.weight), x.skip : x.skip + len(x.weight)]
        return ((y.weight[:, None] * x.weight).to(value) * inner).numpy()

    def path(self, n: int) -> Path:
        """The file of batch n, which exists when the batch is finished."""
        return self.folder / f"{n}.npz"

    def save(self, n: int) -> list[np.ndarray]:
        """Evaluate batch n and keep it in its file."""
        values = self.evaluate(n)
        with replacing(self.path(n)) as part, part.open("wb") as file:
            np.savez(file, *values)
        return values

    def values(self, n: int) -> list[np.ndarray]:
        """Batch n from its file, evaluated again when that is missing or damaged, as a Zip file's checksum shows."""
        batch = self.plan.batch(n)
        channels = self.domain.state.shape[0]
        wanted = [((channels, len(y.weight), len(x.weight)), self.dtype) for y, x in batch]
        try:
            with self.path(n).open("rb") as file, np.load(file) as arrays:
                values = [arrays[f"arr_{k}"] for k in range(len(batch))]
        except Exception:  # whatever Zip and numpy say of a damaged file
            return self.save(n)
        return values if [(v.shape, v.dtype) for v in values] == wanted else self.save(n)

    def blend_row(
        self, i: int, values: Callable[[int], list[np.ndarray]]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], np.ndarray]]:
        """Rows, columns and values of each core of row i of cores."""
        for j, cut in enumerate(self.plan.x.cuts):
            yield self.plan.y.cuts[i].core, cut.core, self._blend(i, j, values)

    def _blend(self, i: int, j: int, values: Callable[[int], list[np.ndarray]]) -> np.ndarray:
        """One core. Contributions are added in the order of the batches, as in memory, lest the last bits differ."""
        top, bottom = self.plan.y.cuts[i].core
        left, right = self.plan.x.cuts[j].core
        block = np.zeros((self.domain.state.shape[0], bottom - top, right - left), self.dtype)
        contributions = [
            (self.plan.find(a, b), (rows, cols), (from_rows, from_cols))
            for a, rows, from_rows in self.plan.y.meets[i]
            for b, cols, from_cols in self.plan.x.meets[j]
        ]
        for (n, place), target, source in sorted(contributions, key=lambda contribution: contribution[0]):
            block[:, *target] += values(n)[place][:, *source]
        return block

    def row_checksum(self, out: ArrayLike, i: int) -> int:
        """The checksum of row i of cores in `out`."""
        total = 0
        for cut in self.plan.x.cuts:
            total = checksum(read_piece(out, (self.plan.y.cuts[i].core,), (cut.core,)).numpy(), total)
        return total


def _in_patches(runs: Runs, patch: int) -> Runs:
    return tuple((start // patch, stop // patch) for start, stop in runs)


def _check_settings(sigma: float, tiles_per_batch: int) -> None:
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}; the sampler's final 0 is never denoised")
    if tiles_per_batch < 1:
        raise ValueError(f"at least one tile must be evaluated at a time, got tiles_per_batch = {tiles_per_batch}")


def _check_tiling(network: Storm, domain: Domain, tiling: Tiling) -> None:
    grid = (tiling.y.length, tiling.x.length)
    if domain.grid != grid:
        raise ValueError(f"latitude and longitude are a grid of {domain.grid} but the tiling is for {grid}")
    if tiling.x.periodic and tiling.x.core < tiling.x.length and not domain.periodic:
        raise ValueError("a periodic tiling joins the two ends of a domain that is not; make one or the other periodic")
    for axis, patch in zip((tiling.y, tiling.x), network.config.patch, strict=True):
        sizes = (axis.length,) if axis.core == axis.length else (axis.length, axis.core, axis.halo)
        if any(size % patch for size in sizes):
            raise ValueError(f"the network's patch {patch} must divide length, core and halo of {axis}")


def _check_domain(network: Storm, domain: Domain, out: ArrayLike) -> Positions:
    config = network.config
    positions = positions_of(config, domain.latitude, domain.longitude, domain.position)
    expect("state", domain.state, (config.channels, *domain.grid), {"float32", "float64"})
    expect("static fields", domain.static, (config.static_channels, *domain.grid))
    expect("memory", domain.memory, (positions.rows, positions.cols, config.width))
    expect("out", out, (config.channels, *domain.grid), {native_dtype(domain.state).name})
    return positions


def _fingerprint(network: Storm, domain: Domain, sigma: float, tiling: Tiling, tiles_per_batch: int) -> dict[str, Any]:
    given = {} if domain.position is None else {"position": digest_of_samples(domain.position, grid_first=True)}
    return {
        "kind": "denoise",
        "sigma": sigma,
        "tiling": asdict(tiling),
        "tiles_per_batch": tiles_per_batch,
        "periodic": domain.periodic,
        "coordinates": digest(domain.latitude, domain.longitude),
        "state": digest_of_samples(domain.state),
        "static": digest_of_samples(domain.static),
        "memory": digest_of_samples(domain.memory, grid_first=True),
        **given,
        **network_fingerprint(network),
    }
