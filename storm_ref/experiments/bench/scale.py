"""Long runs at the paper's scales: histories of up to 20 billion tokens, and single frames larger than memory.

    frames      177,500 frames of 3,584 tokens, the paper's longest history (Table III, 635 M tokens)
    tokens      610,352 frames of 32,768 tokens: 20.0 billion, the paper's largest run (Table III, on 128 GPUs)
    equations   6,000 frames of 32,768 tokens, every token made as the equations are written
    era5        one frame on ERA5's grid, one token a point, out of core: the 10 M network
    domain      one frame of 3,800 x 7,600 points, an eighth of the paper's largest along each axis: the tiny network

Histories end in one tiled denoise. Each run is a process of its own, which can be stopped and started again: it resumes
from its last checkpoint, and keeps its record when it is done.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Storm, count_weights
from storm_ref.experiments import out_of_core
from storm_ref.experiments.bench import history
from storm_ref.experiments.bench.history import Job, peak_bytes, speak
from storm_ref.experiments.bench.timing import generic_network, small, ten_million
from storm_ref.tiling import Tiling, overhead
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.progress import Progress

__all__ = ["JOBS", "PRESETS", "DomainJob", "run", "work"]

PRESETS: Mapping[str, Callable[[], StormConfig]] = {
    "storm_10m": ten_million,
    "tiny": small,
}
_STEPS = 10_000  # into which a domain's work is counted for the bar


@dataclass(frozen=True)
class DomainJob:
    """One frame and one past frame on a globe of one token a point, denoised once from disk to disk.

    core, halo and blend are those of its tiles along both axes, in points. Raises ValueError for an unknown preset and
    for tiles that do not fit.
    """

    grid: tuple[int, int]
    preset: str
    core: int
    halo: int
    blend: int
    tiles_per_batch: int = 16
    threads: int = 2

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"the presets are {', '.join(PRESETS)}; there is no {self.preset!r}")
        self.tiling  # noqa: B018  (raises for tiles that do not fit)

    @property
    def chunk(self) -> int:
        """Points of a chunk of the stores along each axis, such that chunks are few and a tile meets few of them."""
        return 2 * self.core

    @property
    def tiling(self) -> Tiling:
        """The tiles of the denoise."""
        return Tiling.of(self.grid, (self.core,) * 2, (self.halo,) * 2, (self.blend,) * 2, periodic=True)


JOBS: Mapping[str, Job | DomainJob] = {
    "frames": Job(177_500, grid=(56, 64)),
    "tokens": Job(610_352),
    "equations": Job(6000, "equations"),
    "era5": DomainJob((720, 1440), "storm_10m", 32, 8, 4, tiles_per_batch=4),
    "domain": DomainJob((3800, 7600), "tiny", 20, 4, 2),
}


def work(job: DomainJob, folder: Path) -> dict[str, Any]:
    """Do the job in this process; returns its record. All that it needs and leaves lies in `folder`."""
    torch.set_num_threads(job.threads)
    network = generic_network(PRESETS[job.preset]())
    clock = _Clock(folder / "clock.json")
    latitude = torch.linspace(-90, 90, job.grid[0] + 1)[:-1] + 90 / job.grid[0]
    longitude = torch.arange(job.grid[1]) * (360 / job.grid[1])
    arrays = _arrays(job, network.config, folder)
    _fill(arrays["state"], "state", 2 * job.chunk, clock)
    _fill(arrays["static"], "static", 2 * job.chunk, clock)
    static = arrays["static"]

    def past(first: int, last: int, top: int, bottom: int) -> Tensor:
        return torch.from_numpy(np.asarray(arrays["state"][:, top:bottom], np.float32)).roll(1, -1)[None]

    if not clock.done("compress"):
        out_of_core.compress(
            network,
            past,
            static,
            ages=torch.ones(1, dtype=torch.float64),
            latitude=latitude,
            longitude=longitude,
            out=arrays["memory"],
            folder=folder / "compress",
            rows=job.chunk,
            progress=clock.progress("compress", 0.0, 0.05),
        )
        clock.finish("compress")
    domain = out_of_core.Domain(arrays["state"], static, arrays["memory"], latitude, longitude, True)
    if not clock.done("denoise"):
        out_of_core.denoise(
            network,
            domain,
            sigma=1.0,
            tiling=job.tiling,
            out=arrays["out"],
            folder=folder / "denoise",
            tiles_per_batch=job.tiles_per_batch,
            progress=clock.progress("denoise", 0.05, 0.95),
        )
        clock.finish("denoise")
    return _record(job, network, arrays["out"], clock)


def _record(job: DomainJob, network: Storm, out: Any, clock: "_Clock") -> dict[str, Any]:
    tokens = job.grid[0] * job.grid[1]
    for top in range(0, job.grid[0], 100):
        if not np.isfinite(np.asarray(out[:, top : top + 100])).all():
            raise RuntimeError(f"rows {top} to {top + 99} of the denoised frame are not finite: the run is broken")
    compress, denoise = (clock.seconds[name] for name in ("compress", "denoise"))
    return asdict(job) | {
        "points": tokens,
        "tokens": 2 * tokens,
        "weights": count_weights(network),
        "overhead": overhead(job.tiling),
        "seconds_compress": compress,
        "seconds_denoise": denoise,
        "points_per_s": tokens / (compress + denoise),
        "state_bytes": 8 * out.size,
        "peak_bytes": max(clock.peak, peak_bytes()),
    }


def _arrays(job: DomainJob, c: StormConfig, folder: Path) -> dict[str, zarr.Array[Any]]:
    """The stores, made when they do not exist yet."""
    kinds = {
        "state": ((c.channels, *job.grid), "float64"),
        "static": ((c.static_channels, *job.grid), "float32"),
        "memory": ((*job.grid, c.width), "float32"),
        "out": ((c.channels, *job.grid), "float64"),
    }
    arrays = {}
    for name, (shape, dtype) in kinds.items():
        path = folder / f"{name}.zarr"
        chunks = [job.chunk if size in job.grid else size for size in shape]
        exists = path.exists()
        arrays[name] = out_of_core.open_array(path) if exists else out_of_core.create(path, shape, chunks, dtype)
    return arrays


def _fill(array: zarr.Array[Any], name: str, band: int, clock: "_Clock") -> None:
    """Fill a store with standard normal numbers, keyed by array and band of rows."""
    if clock.done(name):
        return
    for top in range(0, array.shape[1], band):
        key = np.array([sum(name.encode()), top], dtype=np.uint64)
        shape = (array.shape[0], min(band, array.shape[1] - top), array.shape[2])
        array[:, top : top + band] = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
    clock.finish(name)


class _Clock:
    """The finished parts of a job, their seconds and the highest peak, in a file that a resumed run reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.since = time.perf_counter()
        kept: dict[str, Any] = {"seconds": {}, "finished": [], "peak": 0}
        if path.exists():
            kept = json.loads(path.read_text())
        self.seconds: dict[str, float] = kept["seconds"]
        self.finished: list[str] = kept["finished"]
        self.peak: int = kept["peak"]

    def done(self, name: str) -> bool:
        """True if this part is finished; if not, its time begins."""
        self.since = time.perf_counter()
        return name in self.finished

    def progress(self, name: str, start: float, share: float) -> Callable[[int, int], None]:
        """A callback for a part that counts its steps: it reports how far the job is, of which the part is a share."""

        def advance(done: int, total: int) -> None:
            self._note(name)
            speak({"frames": int(_STEPS * (start + share * done / total))})

        return advance

    def finish(self, name: str) -> None:
        """Record that this part is finished."""
        self.finished.append(name)
        self._note(name)

    def _note(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now
        self.peak = max(self.peak, peak_bytes())
        with replacing(self.path) as part:
            part.write_text(json.dumps({"seconds": self.seconds, "finished": self.finished, "peak": self.peak}))


def run(name: str, job: Job | DomainJob, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Do one job unless its record is in `folder`; returns the record. A domain's stores are removed when it is done.

    Raises ValueError when the record is that of another job.
    """
    kept = folder / f"{name}.json"
    if kept.exists():
        earlier: dict[str, Any] = json.loads(kept.read_text())
        if history.settings(job).items() <= earlier.items():
            return earlier
        raise ValueError(f"{kept} is the record of another run: delete it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    total = job.frames if isinstance(job, Job) else _STEPS

    def advance(done: int) -> None:
        if progress is not None:
            progress(f"scale: {name}", done, total, "")

    if isinstance(job, Job):
        record = history.run(job, advance, folder / f"{name}.safetensors")
    else:
        arguments = [json.dumps(asdict(job)), str(folder / name)]
        record = history.listen("storm_ref.experiments.bench.scale", arguments, advance)
    with replacing(kept) as part:
        part.write_text(json.dumps(record, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return record


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    speak(work(DomainJob(**given | {"grid": tuple(given["grid"])}), place))
