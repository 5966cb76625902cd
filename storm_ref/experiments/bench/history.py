"""Long histories: K frames through the compressed memory and into one tiled denoise, each K in a process of its own.

    form "folded"      experiments/folded.py: the same memory without its tokens
    form "equations"   Storm.compress_chunk: every token is made, as [TOK-5] and [MEM-1] to [MEM-3] are written
    peak               the most physical memory the process ever held (VmHWM), libraries included

    checkpoint         a long job may save its state from time to time, and resume from it when it is started again

Each job needs its own process because the peak of a process never falls. Frames are taken from a small bank of random
fields and turned along longitude by their number, one an hour: making them costs a copy, which the time includes. Their
values do not matter to time or memory; equality is tested elsewhere.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm
from storm_ref.experiments.bench.timing import BLEND, CORE, HALO, generic_network, ten_million
from storm_ref.experiments.folded import FoldedMemory, FoldedState
from storm_ref.memory import MemoryState
from storm_ref.tiling import Tiling, tiled_denoiser
from storm_ref.tokenisation import sphere_position
from storm_ref.workbench.io.progress import Progress
from storm_ref.workbench.prior.model import read_tensors, write_tensors

__all__ = [
    "FORMS",
    "Checkpoint",
    "History",
    "Job",
    "Streamer",
    "denoise_once",
    "listen",
    "peak_bytes",
    "run",
    "settings",
    "speak",
    "streamer",
    "sweep",
    "work",
]

FORMS = ("folded", "equations")
BANK = 32  # frames
_KIND = "storm-ref history 1"


@dataclass(frozen=True)
class Job:
    """K frames on a grid of one token a point, streamed `chunk` at a time in one of FORMS.

    Raises ValueError for other forms and for a grid that tiles do not fit.
    """

    frames: int
    form: str = "folded"
    grid: tuple[int, int] = (128, 256)
    chunk: int = 32
    threads: int = 2

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"the memory has the forms {', '.join(FORMS)}; there is no {self.form!r}")
        if self.frames < 1 or self.chunk < 1 or self.threads < 1:
            raise ValueError(f"frames, chunk and threads must be at least 1, got {self}")
        self.tiling  # noqa: B018  (raises for a grid that tiles do not fit)

    @property
    def tiling(self) -> Tiling:
        """The tiles of the denoise: 48 x 48 tokens in the interior, where the grid has room for several."""
        core = tuple(min(CORE, n) for n in self.grid)
        if self.grid[1] < CORE + 2 * HALO:
            core = (core[0], self.grid[1])
        return Tiling.of(self.grid, (core[0], core[1]), (HALO, HALO), (BLEND, BLEND), periodic=True)

    @property
    def tokens(self) -> int:
        """The number of tokens of history, K N."""
        return self.frames * self.grid[0] * self.grid[1]


def peak_bytes() -> int:
    """The most physical memory that this process has held so far.

    It is read from the kernel's status page where there is one, since getrusage also counts what the parent held when
    it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(part for part in status.read_text().splitlines() if part.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class History:
    """K frames, the newest first: number k is k + 1 hours old. All share the same constant fields."""

    def __init__(self, c: StormConfig, grid: tuple[int, int], seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.bank = torch.randn(BANK, c.channels, *grid, generator=g)
        self.static = torch.randn(c.static_channels, *grid, generator=g)
        self.latitude = torch.linspace(-89, 89, grid[0])
        self.longitude = torch.arange(grid[1]) * (360 / grid[1])
        self.position = sphere_position(self.latitude, self.longitude, (1, 1))

    def chunk(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Past frames, static fields and ages of the frames `first` to `last` - 1, as a batch of 1."""
        number = torch.arange(first, last)
        turn = number // BANK
        frames = [self.bank[number[turn == t] % BANK].roll(t, -1) for t in range(first // BANK, (last - 1) // BANK + 1)]
        past = torch.cat(frames)[None]
        return past, self.static.expand(1, len(number), *self.static.shape), number[None].double() + 1


@runtime_checkable
class Streamer(Protocol):
    """A memory that takes frames chunk by chunk."""

    state: Any
    kind: type[FoldedState] | type[MemoryState]

    def take(self, past: Tensor, static: Tensor, age: Tensor) -> None:
        """Take some past frames, with their static fields and ages."""

    def finish(self) -> Tensor:
        """The memory tokens of all frames taken."""


class _Folded:
    """The memory without its tokens."""

    kind: type[FoldedState] | type[MemoryState] = FoldedState

    def __init__(self, network: Storm, history: History) -> None:
        self.memory = FoldedMemory(network, history.position)
        self.state: FoldedState = self.memory.start()

    def take(self, past: Tensor, static: Tensor, age: Tensor) -> None:
        self.state = self.memory.update(self.state, past, static, age)

    def finish(self) -> Tensor:
        return self.memory.finish(self.state)


class _Equations:
    """The memory as its equations are written, a few frames at a time: at most their tokens exist at once."""

    kind: type[FoldedState] | type[MemoryState] = MemoryState

    def __init__(self, network: Storm, history: History, frames: int = 4) -> None:
        self.network, self.history, self.frames = network, history, frames
        self.state: MemoryState | None = None

    def take(self, past: Tensor, static: Tensor, age: Tensor) -> None:
        for at in range(0, past.shape[1], self.frames):
            k = slice(at, at + self.frames)
            self.state = self.network.compress_chunk(
                self.state, past[:, k], static[:, k], age[:, k], self.history.position
            )

    def finish(self) -> Tensor:
        assert self.state is not None
        tokens = self.network.memory.finish(self.state)
        return rearrange(tokens, "b (i j) d -> b i j d", i=len(self.history.position))


def streamer(form: str, network: Storm, history: History) -> Streamer:
    """A memory in one of FORMS that is ready to take frames."""
    return _Folded(network, history) if form == "folded" else _Equations(network, history)


def denoise_once(network: Storm, memory: Tensor, history: History, tiling: Tiling) -> float:
    """Seconds of one tiled evaluation of D given the memory. Raises RuntimeError when its result is not finite."""
    start = time.perf_counter()
    condition = Condition(history.static[None], memory, history.position[None], True)
    c = network.config
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, c.channels, tiling.y.length, tiling.x.length, generator=g, dtype=torch.float64)
    with torch.no_grad():
        result = tiled_denoiser(network, condition, tiling, tiles_per_batch=4)(x, torch.ones(1, dtype=torch.float64))
    if not bool(torch.isfinite(result).all()):
        raise RuntimeError("the denoised state is not finite: the memory or the denoiser is broken")
    return time.perf_counter() - start


def settings(job: Any) -> dict[str, Any]:
    """The fields that tell one job from another, as JSON has them: all but the number of threads."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    del fields["threads"]
    return fields


class Checkpoint:
    """A streamed state on disk with its frames, seconds and peak so far. Without a path nothing is kept."""

    def __init__(self, path: Path | None, job: Job) -> None:
        self.path = path
        self.job = settings(job)
        self.every = 30.0
        self.saved = time.perf_counter()

    def load(self, memory: Streamer) -> tuple[int, float, int]:
        """Restore the state; returns frames, seconds and peak bytes so far. Raises ValueError for another job."""
        if self.path is None or not self.path.exists():
            return 0, 0.0, 0
        tensors, about = read_tensors(self.path, _KIND)
        if about["job"] != self.job:
            raise ValueError(f"{self.path} holds {about['job']}, not {self.job}: delete it or choose another folder")
        memory.state = memory.kind(**tensors)
        return about["frames"], about["seconds"], about["peak_bytes"]

    def save(self, memory: Streamer, frames: int, seconds: float, peak: int, always: bool = False) -> None:
        """Write the state, unless the last one is less than `every` seconds old."""
        if self.path is None or (time.perf_counter() - self.saved < self.every and not always):
            return
        about = {"job": self.job, "frames": frames, "seconds": seconds, "peak_bytes": peak}
        write_tensors(self.path, _KIND, vars(memory.state), about)
        self.saved = time.perf_counter()


def _stream(job: Job, memory: Streamer, history: History, checkpoint: Checkpoint) -> tuple[float, int]:
    """Take all frames that the checkpoint lacks; returns seconds and peak of all processes that took part."""
    at, before, peak = checkpoint.load(memory)
    start = time.perf_counter()
    with torch.no_grad():
        while at < job.frames:
            last = min(at + job.chunk, job.frames)
            memory.take(*history.chunk(at, last))
            at = last
            seconds = before + time.perf_counter() - start
            peak = max(peak, peak_bytes())
            checkpoint.save(memory, at, seconds, peak, always=at == job.frames)
            speak({"frames": at})
    return before + time.perf_counter() - start, peak


def work(job: Job, path: Path | None = None) -> dict[str, Any]:
    """Do the job in this process; returns its record."""
    torch.set_num_threads(job.threads)
    network = generic_network(ten_million())
    history = History(network.config, job.grid)
    memory = streamer(job.form, network, history)
    compress, peak = _stream(job, memory, history, Checkpoint(path, job))
    with torch.no_grad():
        tokens = memory.finish()
    peak = max(peak, peak_bytes())
    denoise = denoise_once(network, tokens, history, job.tiling)
    return asdict(job) | {
        "tokens": job.tokens,
        "seconds_compress": compress,
        "seconds_denoise": denoise,
        "peak_bytes_compress": peak,
        "peak_bytes": max(peak, peak_bytes()),
        "tokens_per_s": job.tokens / (compress + denoise),
        "tokens_per_s_compress": job.tokens / compress,
    }


def run(job: Job, progress: Callable[[int], None] | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    """Do the job in a process of its own; returns its record. Raises RuntimeError with its errors when it fails."""
    arguments = [json.dumps(asdict(job)), *([] if checkpoint is None else [str(checkpoint)])]
    return listen("storm_ref.experiments.bench.history", arguments, progress)


def listen(module: str, arguments: list[str], progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Run a module that prints how many frames it has taken, line by line, and at last its record, which has a peak.

    Returns the record. Raises RuntimeError with what it printed on stderr when it fails or prints no record.
    """
    last: dict[str, Any] = {}
    # Errors go to a file: a pipe that nobody reads would fill and stop the process.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            for last in _lines(process.stdout):
                if progress is not None and "peak_bytes" not in last:
                    progress(last["frames"])
        except BaseException:
            process.kill()
            raise
        code = process.wait()
        errors.seek(0)
        error = errors.read().strip() or "it said nothing"
    if code or "peak_bytes" not in last:
        raise RuntimeError(f"{module} {arguments[0]} ended with exit code {code}: {error}")
    return last


def speak(line: dict[str, Any]) -> None:
    """Print one line for the process that listens."""
    print(json.dumps(line), flush=True)


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    for line in stream:
        yield json.loads(line)


def sweep(jobs: list[Job], progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run some jobs, one after another; returns a record of each."""
    records = []
    for job in jobs:
        label = f"history: {job.frames:,} frames, {job.form}"

        def advance(done: int, job: Job = job, label: str = label) -> None:
            if progress is not None:
                progress(label, done, job.frames, "")

        records.append(run(job, advance))
    return records


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    checkpoint_path = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    speak(work(Job(**given | {"grid": tuple(given["grid"])}), checkpoint_path))
