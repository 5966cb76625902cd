"""python -m storm_ref.experiments.scaling: strong scaling as a cost model predicts it, beside the paper's figure.

One step is fixed, B samples of one domain, and the number P of accelerators grows. Of a rank, [PAR-1] to [PAR-16]:

    step       t = c + exposed(ddp, fsdp) + w_tile + w_tp + fixed
    compute    c = (1 + s sqrt(2 ln P)) sum over batches of tiles of max(products / rate, bytes / bandwidth, issue)
    products   [COST-2] and [COST-3], the part that tp shares out divided by its size; backwards twice as much again
    exposed    w - min(share w, c), w = w_ddp + w_fsdp: what compute can hide is hidden
    wire       messages of `cost`, M of them with n bytes in all over q ranks, bandwidth b, latency a:
               all-reduce      2 (q - 1)/q n / b + 2 ceil(log2 q) a M     (ring for bytes, trees for latency)
               all-gather      (q - 1) n / b     +   ceil(log2 q) a M     (n: the rank's own part)
               reduce-scatter  (q - 1)/q n / b   +   ceil(log2 q) a M
               all-to-all      n / b             +   ceil(log2 q) a M     (n: for other ranks)
    level      an axis whose q ranks, a stride r apart, lie in one node of G has its a and b; any other has the
               network's, where a ring with m = min(q, G/r) ranks a node goes out once for them all: m times b, at most
               the node's
    efficiency E(P) = t(P_0) P_0 / (t(P) P), each with the mesh that the model finds fastest

The slowest tile rank counts: tiles that ranks do not divide are in c. Numbers of the machine are assumptions, round
public figures of one like Frontier; the paper gives none, and says neither batch nor tiles. docs/scale.md tells more.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from storm_ref import cost
from storm_ref.config import StormConfig, storm_10b, storm_10m
from storm_ref.cost import Cost, Ledger, Traffic
from storm_ref.parallel.mesh import AXES, Mesh, share
from storm_ref.tiling import Tiling, cores, extents
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.figures import COLOURS, MARKERS, TRUTH, save
from storm_ref.workbench.io.progress import plain_console

__all__ = ["Level", "Machine", "Step", "Workload", "best", "efficiency", "ideal", "main", "step", "wire"]

SIZES = tuple(2**k for k in range(9, 16))  # 512 ... 32,768 accelerators
BATCHES = tuple(2**k for k in range(8, 16))  # samples of a step
PAPER = (0.61, 0.64)  # at 32,768 against 512, for 10 M and for 10 B
PRESETS = {"10 M": storm_10m(), "10 B": storm_10b()}
PARTS = ("compute", "tp", "tile", "fsdp", "ddp", "fixed")  # of a step


@dataclass(frozen=True)
class Level:
    """A kind of link: bytes/s of an accelerator when all use it at once, and seconds of a hop."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """Assumptions, not the paper's: an accelerator is half an MI250X, eight are a node, four 25 GB/s links leave it.

    Raises ValueError for a number that is not positive, or a share outside 0 to 1.
    """

    peak: float = 95.8e12  # multiply-adds/s in bfloat16
    attained: float = 0.4  # share of the peak that products of matrices reach
    memory_bandwidth: float = 1.6e12  # bytes/s
    capacity: float = 64e9  # bytes; half of it is for weights, gradients and moments
    node: int = 8  # accelerators
    inside: Level = Level(50e9, 5e-6)
    between: Level = Level(10e9, 10e-6)  # 80 % of 12.5 GB/s
    issue: float = 0.5e-3  # s to launch a block's kernels forwards, whatever its size
    fixed: float = 5e-3  # s of a step that nothing shares out: optimiser, host
    jitter: float = 0.01  # s: standard deviation of a rank's compute; sqrt(2 ln P) s is the worst of P
    overlap: float = 0.8  # share of ddp's and fsdp's messages that compute can hide

    def __post_init__(self) -> None:
        links = (self.inside.bandwidth, self.between.bandwidth)
        if min(self.peak, self.memory_bandwidth, self.capacity, self.node, *links) <= 0:
            raise ValueError(f"rates, bandwidths, memory and size of a node must be positive, got {self}")
        if not (0 < self.attained <= 1 and 0 <= self.overlap <= 1):
            raise ValueError(f"shares lie in 0 to 1, got attained {self.attained} and overlap {self.overlap}")
        if min(self.issue, self.fixed, self.jitter, self.inside.latency, self.between.latency) < 0:
            raise ValueError(f"times must not be negative, got {self}")


def era5(core: int = 60) -> Tiling:
    """The paper's grid, 720 x 1440 points, in 12 x 24 cores of 60 x 60; halo 16, blend 8, patches of 2 x 2."""
    return Tiling.of((720, 1440), (core, core), (16, 16), (8, 8), periodic=True, patch=(2, 2))


@dataclass(frozen=True)
class Workload:
    """What is fixed in strong scaling. Raises ValueError for less than one sample, frame or tile at a time."""

    config: StormConfig
    tiling: Tiling = field(default_factory=era5)
    samples: int = 512  # B of a training step, or members of an ensemble; one for each accelerator of the baseline
    frames: int = 8  # K
    chunk: int = 16  # frames compressed at a time
    tiles: int = 64  # of a rank, evaluated at a time
    itemsize: int = 2  # bytes of weights and tokens: bfloat16
    wide: int = 4  # bytes of gradients and states: float32
    training: bool = True  # else one evaluation of the sampler, whose memory is there

    def __post_init__(self) -> None:
        for name in ("samples", "frames", "chunk", "tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(cores(self.tiling.y)) * len(cores(self.tiling.x))


@dataclass(frozen=True)
class Step:
    """Seconds of one step on a mesh: what compute takes, and what it waits for along each axis of the mesh."""

    mesh: Mesh
    compute: float
    tp: float
    tile: float
    fsdp: float
    ddp: float
    fixed: float

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.tile + self.fsdp + self.ddp + self.fixed


def wire(machine: Machine, mesh: Mesh, axis: str, kind: str, traffic: Traffic) -> float:
    """Seconds of some collectives of one kind along one axis: the module's formulas."""
    q: int = getattr(mesh, axis)
    hops, stride = math.ceil(math.log2(q)), math.prod(mesh.shape[AXES.index(axis) + 1 :])
    link = machine.inside if q * stride <= machine.node else machine.between
    bandwidth = link.bandwidth
    if link is machine.between and kind != "all-to-all":
        rings = max(min(q, machine.node // stride), 1)
        bandwidth = max(min(rings * bandwidth, machine.inside.bandwidth), bandwidth)
    factor, times = {
        "all-reduce": (2 * (q - 1) / q, 2),
        "all-gather": (q - 1, 1),
        "reduce-scatter": ((q - 1) / q, 1),
        "all-to-all": (1, 1),
    }[kind]
    return factor * traffic.bytes / bandwidth + times * hops * link.latency * traffic.messages


@dataclass(frozen=True)
class _Part:
    """What the ranks of one tile coordinate do, whatever the machine: products of batches of tiles, tp's messages."""

    batches: tuple[Cost, ...]
    memory: Cost
    tensor: Ledger


def _divided(whole: Cost, shared: Cost, tp: int) -> Cost:
    """The rank's own of a cost of which tp shares out a part."""
    return Cost(*(a - b + -(-b // tp) for a, b in zip(_pair(whole), _pair(shared), strict=True)))


def _pair(c: Cost) -> tuple[int, int]:
    return c.multiply_adds, c.numbers


@cache
def _parts(work: Workload, samples: int, ranks: int, tp: int) -> tuple[_Part, ...]:
    """The different ones among the tile ranks, each with `samples` samples."""
    c, patch, mesh = work.config, work.config.patch, Mesh(tp=tp)
    seen = [len(i) * len(j) // math.prod(patch) for i in extents(work.tiling.y) for j in extents(work.tiling.x)]
    own = [(b - a) * (f - e) // math.prod(patch) for a, b in cores(work.tiling.y) for e, f in cores(work.tiling.x)]
    runs = [share(work.count, ranks, rank) for rank in range(ranks)]
    kinds = {(tuple(sorted(Counter(seen[i] for i in run).items())), sum(own[i] for i in run)) for run in runs}
    parts = []
    for shapes, tokens in sorted(kinds):
        sizes = [(n, min(work.tiles, m - k)) for n, m in shapes for k in range(0, m, work.tiles)]
        batches, ledgers = [], []
        for n, tiles in sizes:
            b = samples * tiles
            block = 2 * cost.multi_head(b, n, n, c.width) + cost.mlp(b * n, c.width, c.mlp_ratio)
            batches.append(_divided(cost.evaluation(c, n, b, b), c.depth * block, tp))
            ledgers.append(cost.tensor_traffic(c, n, b, work.itemsize, mesh, 4 if work.training else 0))
        memory = Cost()
        if work.training:
            rows = samples * tokens
            heads = 2 * cost.linear(work.frames * rows, c.width, c.width) + cost.linear(rows, c.width, c.width)
            memory = _divided(cost.memory(c, tokens, work.frames, work.chunk, samples), heads, tp)
            ledgers.append(
                cost.memory_traffic(c, tokens, work.frames, work.chunk, samples, work.itemsize, mesh, backward=True)
            )
        parts.append(_Part(tuple(batches), memory, cost.added(*ledgers)))
    return tuple(parts)


@cache
def _exchange(tiling: Tiling, ranks: int, training: bool) -> tuple[Traffic, int]:
    """As cost.exchange_traffic for one byte a row, of the tile rank with most; and most memory tokens of a rank.

    Tokens are gathered as points are, p_y p_x of them in one. Here since the tables are the same for all ranks.
    """

    def sent(table: list[list[int]]) -> list[int]:
        out = [sum(row) - row[r] for r, row in enumerate(table)]
        back = [sum(column) - column[r] for r, column in enumerate(zip(*table, strict=True))]
        return [a + b for a, b in zip(out, back, strict=True)] if training else out

    gathered, blended = sent(cost.exchanged(tiling, ranks)), sent(cost.exchanged(tiling, ranks, blend=True))
    most = max(a + b for a, b in zip(gathered, blended, strict=True))
    return Traffic(4 if training else 2, most), max(gathered) // (tiling.y.patch * tiling.x.patch)


@cache
def _messages(work: Workload, mesh: Mesh, calls: int) -> Ledger:
    """Of everything but tp's sums: tile's exchanges and gradients, fsdp's and ddp's weights and gradients."""
    c, samples = work.config, -(-work.samples // mesh.data)
    rows, tokens = _exchange(work.tiling, mesh.tile, work.training) if mesh.tile > 1 else (Traffic(), 0)
    states = Traffic(rows.messages, samples * c.channels * work.wide * rows.bytes)
    found: list[Ledger] = [{("tile", "all-to-all"): states}]
    weights = cost.weight_traffic(c, mesh, work.itemsize, calls, work.training)
    found.append({key: traffic for key, traffic in weights.items() if key[1] == "all-gather"})
    if work.training:
        memory = Traffic(2 if mesh.tile > 1 else 0, samples * c.width * work.itemsize * tokens)  # there and back
        gradients = cost.weight_traffic(c, mesh, work.wide, calls, backward=True)
        found.append({("tile", "all-to-all"): memory})
        found.append({key: traffic for key, traffic in gradients.items() if key[1] != "all-gather"})
        found.append(cost.gradient_traffic(c, mesh, work.wide))
    return cost.added(*found)


def _seconds(machine: Machine, once: Cost, work: Workload, issue: float = 0.0) -> float:
    passes = 3 if work.training else 1  # backwards is twice forwards
    rate = machine.attained * machine.peak
    return passes * max(
        once.multiply_adds / rate, once.bytes_moved(work.itemsize) / machine.memory_bandwidth, issue * work.config.depth
    )


def step(machine: Machine, work: Workload, mesh: Mesh) -> Step:
    """One training step, or one evaluation of the sampler. Raises ValueError for a mesh that does not fit, [PAR-4]."""
    mesh.check(work.config, work.count, work.samples)
    parts = _parts(work, -(-work.samples // mesh.data), mesh.tile, mesh.tp)
    late = 1 + machine.jitter * math.sqrt(2 * math.log(mesh.size))
    worst = 0.0, 0.0
    for part in parts:
        once = sum((_seconds(machine, batch, work, machine.issue) for batch in part.batches), 0.0)
        compute = late * (once + _seconds(machine, part.memory, work))
        sums = sum((wire(machine, mesh, *key, traffic) for key, traffic in part.tensor.items()), 0.0)
        worst = max(worst, (compute, sums), key=sum)
    compute, waits = worst[0], dict.fromkeys(AXES, 0.0) | {"tp": worst[1]}
    for (axis, kind), traffic in _messages(work, mesh, max(len(part.batches) for part in parts)).items():
        waits[axis] += wire(machine, mesh, axis, kind, traffic)
    weights = waits["ddp"] + waits["fsdp"]
    seen = 1 - min(machine.overlap, compute / weights) if weights else 1.0
    waits |= {axis: seen * waits[axis] for axis in ("ddp", "fsdp")}
    return Step(mesh, compute, fixed=machine.fixed, **waits)


def held(work: Workload, mesh: Mesh) -> int:
    """Bytes of a rank's weights; in training `wide` ones with their gradients and two moments."""
    c = work.config
    numbers = c.depth * cost.part(cost.block_shapes(c, mesh.tp), mesh.fsdp)
    numbers += cost.part(cost.root_shapes(c, mesh.tp), mesh.fsdp)
    return numbers * (4 * work.wide if work.training else work.itemsize)


@cache
def meshes(capacity: float, work: Workload, size: int) -> tuple[Mesh, ...]:
    """All of `size` ranks that [PAR-4] allows and whose weights take at most half of so many bytes."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    found = [
        Mesh(size // (tp * tile * fsdp), fsdp, tile, tp)
        for tp in divisors
        if work.config.heads % tp == 0
        for tile in divisors
        if size % (tp * tile) == 0 and tile <= work.count and size // (tp * tile) <= work.samples
        for fsdp in divisors
        if size % (tp * tile * fsdp) == 0
    ]
    return tuple(mesh for mesh in found if held(work, mesh) <= capacity / 2)


def best(machine: Machine, work: Workload, size: int) -> Step:
    """The fastest of all meshes. Raises ValueError when none fits."""
    found = meshes(machine.capacity, work, size)
    if not found:
        raise ValueError(
            f"no mesh of {size} accelerators fits {work.samples} samples, {work.count} tiles and {work.config.heads} "
            "heads, or memory: take more samples, smaller tiles, or another number of accelerators"
        )
    return min((step(machine, work, mesh) for mesh in found), key=lambda s: (s.total, s.mesh.shape))


def ideal(machine: Machine, work: Workload, size: int) -> float:
    """Seconds of a step if products alone took time and could be shared out to the last: no step is shorter."""
    c = work.config
    once = cost.tiled_evaluation(c, work.tiling, work.samples).multiply_adds
    if work.training:
        n = work.tiling.y.length * work.tiling.x.length // math.prod(c.patch)
        once = 3 * (once + cost.memory(c, n, work.frames, batch=work.samples).multiply_adds)
    return once / (size * machine.attained * machine.peak)


def efficiency(machine: Machine, work: Workload, size: int = SIZES[-1], baseline: int = SIZES[0]) -> float:
    """E(P) of the module's equations."""
    return best(machine, work, baseline).total * baseline / (best(machine, work, size).total * size)


@dataclass(frozen=True)
class Knob:
    """An assumption to turn: its name, its default as printed, how many of the unit that is, and how to set it."""

    name: str
    unit: str
    default: float
    turn: Callable[[Machine, Workload, float], tuple[Machine, Workload]]
    of_work: bool = False


def _inside(m: Machine, **change: float) -> Machine:
    return replace(m, inside=replace(m.inside, **change))


def _between(m: Machine, **change: float) -> Machine:
    return replace(m, between=replace(m.between, **change))


KNOBS = (
    Knob("peak attained", "", 0.4, lambda m, w, v: (replace(m, attained=min(v, 1.0)), w)),
    Knob("memory", "TB/s", 1.6, lambda m, w, v: (replace(m, memory_bandwidth=v * 1e12), w)),
    Knob("inside a node", "GB/s", 50.0, lambda m, w, v: (_inside(m, bandwidth=v * 1e9), w)),
    Knob("a hop inside", "us", 5.0, lambda m, w, v: (_inside(m, latency=v * 1e-6), w)),
    Knob("between nodes", "GB/s", 10.0, lambda m, w, v: (_between(m, bandwidth=v * 1e9), w)),
    Knob("a hop between", "us", 10.0, lambda m, w, v: (_between(m, latency=v * 1e-6), w)),
    Knob("launch a block", "ms", 0.5, lambda m, w, v: (replace(m, issue=v * 1e-3), w)),
    Knob("fixed", "ms", 5.0, lambda m, w, v: (replace(m, fixed=v * 1e-3), w)),
    Knob("jitter", "%", 1.0, lambda m, w, v: (replace(m, jitter=v / 100), w)),
    Knob("overlap", "", 0.8, lambda m, w, v: (replace(m, overlap=min(v, 1.0)), w)),
    Knob("history", "frames", 8.0, lambda m, w, v: (m, replace(w, frames=round(v))), of_work=True),
    Knob("side of a core", "points", 60.0, lambda m, w, v: (m, replace(w, tiling=era5(round(v)))), of_work=True),
)


def turned(work: Workload, knob: Knob, factor: float) -> float:
    """E(32,768) on the default machine with one assumption times `factor`; shares end at one."""
    return efficiency(*knob.turn(Machine(), work, factor * knob.default))


def needed(work: Workload, knob: Knob, goal: float = sum(PAPER) / 2) -> float | None:
    """What one assumption would have to be for E(32,768) to be `goal`; None if `goal` is not between the values that a
    64th of it and 64 times it give.
    """
    low, high = -6.0, 6.0  # powers of two
    below = turned(work, knob, 2**low) < goal
    if below == (turned(work, knob, 2**high) < goal):
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if (turned(work, knob, 2**middle) < goal) == below else (low, middle)
    return float(knob.default * 2.0 ** ((low + high) / 2))


# Tables, picture, command


def predict(samples: int = 512, training: bool = True) -> dict[str, list[Step]]:
    """Of each preset the fastest step at each size."""
    works = {name: Workload(config, samples=samples, training=training) for name, config in PRESETS.items()}
    return {name: [best(Machine(), work, size) for size in SIZES] for name, work in works.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def prediction_rows(steps: Mapping[str, Sequence[Step]]) -> list[list[str]]:
    """Preset, accelerators, mesh, seconds, efficiency and the parts of the step in %."""
    rows = []
    for name, found in steps.items():
        first = found[0].total * found[0].mesh.size
        for s in found:
            shares = [_percent(getattr(s, part) / s.total) for part in PARTS]
            numbers = f"{s.mesh.size:,}", "x".join(map(str, s.mesh.shape)), f"{s.total:.3g}"
            rows.append([name, *numbers, _percent(first / s.mesh.size / s.total), *shares])
    return rows


def sensitivity_rows(samples: int = 512) -> list[list[str]]:
    """An assumption, its value; for each preset E(32,768) in % with half and twice of it, and what PAPER needs.

    A dash: nothing gives it, or, for tiles and history, it was not looked for.
    """
    rows = []
    for knob in KNOBS:
        cells = [knob.name, f"{knob.default:g} {knob.unit}".strip()]
        for config in PRESETS.values():
            work = Workload(config, samples=samples)
            value = None if knob.of_work else needed(work, knob)
            cells += [*(_percent(turned(work, knob, f)) for f in (0.5, 2.0)), "-" if value is None else f"{value:.3g}"]
        rows.append(cells)
    return rows


def batch_rows() -> list[list[str]]:
    """E(32,768) in % against the samples of a step."""
    works = [Workload(config) for config in PRESETS.values()]
    return [[f"{b:,}", *(_percent(efficiency(Machine(), replace(w, samples=b))) for w in works)] for b in BATCHES]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for k, head in enumerate(heads):
        table.add_column(head, justify="right" if k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def picture(steps: Mapping[str, Sequence[Step]]) -> Figure:
    """Efficiency against accelerators; what accelerators spend their time on, over that of the baseline's step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    tops = []
    for k, (name, found) in enumerate(steps.items()):
        sizes, first = [s.mesh.size for s in found], found[0].total * found[0].mesh.size
        share = [100 * first / s.total / s.mesh.size for s in found]
        left.semilogx(sizes, share, color=COLOURS[k], marker=MARKERS[k], label=f"model, {name}")
        places, bottom = [2.0 ** (0.38 * k - 0.19) * size for size in sizes], [0.0] * len(found)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            height = [getattr(s, part) * s.mesh.size / first for s in found]
            look: dict[str, Any] = {"color": colour, "edgecolor": "white", "lw": 0.5, "hatch": "//" if k else None}
            right.bar(places, height, [0.22 * x for x in places], bottom, label=None if k else part, **look)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
        for x, top in zip(places, bottom, strict=True):
            right.annotate(name, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=7, rotation=90)
        tops += bottom
    middle, half = 50 * sum(PAPER), 50 * (PAPER[1] - PAPER[0])
    left.errorbar([SIZES[-1]], [middle], half, color=TRUTH, capsize=6, lw=3, ls="", label="paper, both sizes: 61-64 %")
    left.set(xlabel="accelerators", ylabel="strong-scaling efficiency against 512 (%)", ylim=(0, 105))
    left.legend(loc="lower left")
    right.axhline(1, color=TRUTH, lw=0.8, ls="--")
    label = "accelerators x time of a step,\nover that of 512 (dashed: ideal)"
    right.set(xlabel="accelerators", ylabel=label, ylim=(0, 1.15 * max(tops)))
    right.legend(title="part of the step (10 B hatched)", ncols=3, loc="upper left")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.grid(alpha=0.3)
    figure.suptitle("Strong scaling of one training step as the cost model predicts it; machine and batch are assumed")
    return figure


def _run(out: Path, samples: int) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and results go to a folder: name another")
    if samples < 1:
        raise ValueError(f"--batch must be at least 1, got {samples}")
    steps, drawn = predict(samples), predict(samples, training=False)
    found = {"training": prediction_rows(steps), "evaluation": prediction_rows(drawn)}
    found |= {"sensitivities": sensitivity_rows(samples), "batches": batch_rows()}
    out.mkdir(parents=True, exist_ok=True)
    runs = {name: [asdict(s) | {"total": s.total} for s in of] for name, of in steps.items()}
    with replacing(out / "scaling.json") as part:
        record = {"machine": asdict(Machine()), "samples": samples, "paper": PAPER, "steps": runs, "tables": found}
        part.write_text(json.dumps(record, indent=1) + "\n")
    save(picture(steps), out / "scaling.png")
    columns, mesh = ("preset", "ranks", "mesh", "s", "E", *PARTS), "mesh: ddp x fsdp x tile x tp; E and parts in %"
    names = [f"{name}\n{what}" for name in PRESETS for what in ("half", "twice", "paper")]
    title = "E(32,768) in % with half and twice of an assumption,\nand what it would have to be for 62.5 %"
    console = plain_console()
    console.print(_table(f"One training step, {samples:,} samples\n{mesh}", columns, found["training"]))
    console.print(_table(f"One evaluation, {samples:,} members\n{mesh}", columns, found["evaluation"]))
    console.print(_table(title, ("assumption", "value", *names), found["sensitivities"]))
    console.print(_table("E(32,768) in %", ("samples", *PRESETS), found["batches"]))
    console.print("The paper: 61-64 % for both sizes. Machine, batch and tiles are assumptions, see docs/scale.md.")
    console.print(f"written: {out / 'scaling.json'}, {out / 'scaling.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write scaling.json and scaling.png; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m storm_ref.experiments.scaling", description="strong scaling, modelled"
    )
    parser.add_argument("--out", type=Path, default=Path("build/scaling"), metavar="DIR", help="where results go")
    parser.add_argument("--batch", type=int, default=512, metavar="N", help="samples of a step in all (default: 512)")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments.out, arguments.batch)
    except (ValueError, OSError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
