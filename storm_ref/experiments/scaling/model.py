"""A cost model of strong scaling: one step is fixed, B samples of one domain, and the number P of accelerators grows.

Of a rank, with the counts of [PAR-1] to [PAR-16]:

    step       t = c + exposed(ddp, fsdp) + w_tile + w_tp + fixed
    compute    c = (1 + s sqrt(2 ln P)) sum over batches of tiles of max(products / rate, bytes / bandwidth, issue)
    products   [COST-2] and [COST-3], the part that tp shards divided by its size; backwards twice as much again
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

The slowest tile rank counts, so c includes the imbalance where ranks do not divide tiles. The machine's numbers are
assumptions, round public figures of one like Frontier: the paper states none, and neither its batch nor its tiles.
docs/scale.md has the results and their reading.
"""

import math
from dataclasses import dataclass, field
from functools import cache

from storm_ref import cost
from storm_ref.config import StormConfig
from storm_ref.cost import Cost
from storm_ref.parallel import traffic as messages
from storm_ref.parallel.mesh import AXES, Mesh, share
from storm_ref.parallel.traffic import Ledger, Traffic
from storm_ref.tiling import Tiling, cores

__all__ = [
    "SIZES",
    "Level",
    "Machine",
    "Step",
    "Workload",
    "best",
    "efficiency",
    "era5",
    "ideal",
    "meshes",
    "step",
    "weight_bytes",
    "wire",
]

SIZES = tuple(2**k for k in range(9, 16))  # 512 ... 32,768 accelerators


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
    fixed: float = 5e-3  # s of a step that are not divided among ranks: optimiser, host
    jitter: float = 0.01  # relative standard deviation s of a rank's compute; sqrt(2 ln P) s is the worst of P
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
    """The work that is fixed in strong scaling. Raises ValueError for less than one sample, frame or tile at a time."""

    config: StormConfig
    tiling: Tiling = field(default_factory=era5)
    samples: int = 512  # B of a training step, or members of an ensemble; one for each accelerator of the baseline
    frames: int = 8  # K
    chunk: int = 16  # frames compressed at a time
    tiles_per_batch: int = 64  # of a rank
    itemsize: int = 2  # bytes of weights and tokens: bfloat16
    wide_itemsize: int = 4  # bytes of gradients, states and moments: float32
    training: bool = True  # otherwise one evaluation of the sampler, for which the memory exists already

    def __post_init__(self) -> None:
        for name in ("samples", "frames", "chunk", "tiles_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return len(cores(self.tiling.y)) * len(cores(self.tiling.x))

    def samples_of_rank(self, mesh: Mesh) -> int:
        """The most samples that a rank has."""
        return -(-self.samples // mesh.data)


@dataclass(frozen=True)
class Step:
    """Seconds of one step on a mesh: its compute, and what it waits for along each axis of the mesh."""

    mesh: Mesh
    compute: float
    tp: float
    tile: float
    fsdp: float
    ddp: float
    fixed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.tp + self.tile + self.fsdp + self.ddp + self.fixed


# Messages


def wire(machine: Machine, mesh: Mesh, axis: str, kind: str, traffic: Traffic) -> float:
    """Seconds of some collectives of one kind along one axis, by the module's formulas."""
    q: int = getattr(mesh, axis)
    hops = math.ceil(math.log2(q))
    stride = math.prod(mesh.shape[AXES.index(axis) + 1 :])
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


@cache
def _exchange(tiling: Tiling, ranks: int, training: bool) -> tuple[Traffic, int]:
    """The busiest tile rank's traffic with one byte a row, as by traffic.exchange_traffic, and most memory tokens.

    Tokens are gathered as points are, p_y p_x of them in one. One table serves all ranks, so that it is made once.
    """

    def sent(table: list[list[int]]) -> list[int]:
        forwards = [sum(row) - row[rank] for rank, row in enumerate(table)]
        if not training:
            return forwards
        backwards = [sum(column) - column[rank] for rank, column in enumerate(zip(*table, strict=True))]
        return [a + b for a, b in zip(forwards, backwards, strict=True)]

    gathered = sent(messages.exchanged_rows(tiling, ranks))
    blended = sent(messages.exchanged_rows(tiling, ranks, blend=True))
    most = max(a + b for a, b in zip(gathered, blended, strict=True))
    return Traffic(4 if training else 2, most), max(gathered) // (tiling.y.patch * tiling.x.patch)


@cache
def _messages(work: Workload, mesh: Mesh, calls: int) -> Ledger:
    """Tile's exchanges and gradients, and fsdp's and ddp's weights and gradients: all messages but tp's sums."""
    config = work.config
    samples = work.samples_of_rank(mesh)
    rows, tokens = _exchange(work.tiling, mesh.tile, work.training) if mesh.tile > 1 else (Traffic(), 0)
    states = Traffic(rows.messages, samples * config.channels * work.wide_itemsize * rows.bytes)
    weights = messages.weight_traffic(config, mesh, work.itemsize, calls, work.training)
    gathered = {key: traffic for key, traffic in weights.items() if key[1] == "all-gather"}
    ledgers: list[Ledger] = [{("tile", "all-to-all"): states}, gathered]
    if work.training:
        there_and_back = 2 if mesh.tile > 1 else 0
        memory = Traffic(there_and_back, samples * config.width * work.itemsize * tokens)
        gradients = messages.weight_traffic(config, mesh, work.wide_itemsize, calls, backward=True)
        ledgers.append({("tile", "all-to-all"): memory})
        ledgers.append({key: traffic for key, traffic in gradients.items() if key[1] != "all-gather"})
        ledgers.append(messages.gradient_traffic(config, mesh, work.wide_itemsize))
    return messages.added(*ledgers)


# Compute


@dataclass(frozen=True)
class _RankWork:
    """The work of the ranks of one tile coordinate on any machine: its batches of tiles, its memory, tp's messages."""

    batches: tuple[Cost, ...]
    memory: Cost
    tensor: Ledger


def _sharded(whole: Cost, shared: Cost, tp: int) -> Cost:
    """A rank's own part of a cost of which tp shards a part."""
    return Cost(
        whole.multiply_adds - shared.multiply_adds + -(-shared.multiply_adds // tp),
        whole.numbers - shared.numbers + -(-shared.numbers // tp),
    )


@cache
def _rank_works(work: Workload, samples: int, ranks: int, tp: int) -> tuple[_RankWork, ...]:
    """The different kinds of work among the tile ranks, each with `samples` samples."""
    patch = math.prod(work.config.patch)
    own = [(b - a) * (f - e) // patch for a, b in cores(work.tiling.y) for e, f in cores(work.tiling.x)]
    runs = [share(work.tiles, ranks, rank) for rank in range(ranks)]
    kinds = set()
    for run in runs:
        sizes = sorted(cost.tile_batches(work.config, work.tiling, work.tiles_per_batch, run), key=lambda size: size[0])
        kinds.add((tuple(sizes), sum(own[i] for i in run)))
    return tuple(_rank_work(work, samples, tp, sizes, tokens) for sizes, tokens in sorted(kinds))


def _rank_work(work: Workload, samples: int, tp: int, sizes: tuple[tuple[int, int], ...], tokens: int) -> _RankWork:
    """The work of a rank with batches of these sizes, (tokens of a tile, tiles), and `tokens` tokens in their cores."""
    config = work.config
    mesh = Mesh(tp=tp)
    batches = []
    ledgers = []
    for n, tiles in sizes:
        b = samples * tiles
        block = 2 * cost.multi_head(b, n, n, config.width) + cost.mlp(b * n, config.width, config.mlp_ratio)
        batches.append(_sharded(cost.evaluation(config, n, b, b), config.depth * block, tp))
        ledgers.append(messages.tensor_traffic(config, n, b, work.itemsize, mesh, 4 if work.training else 0))
    if not work.training:
        return _RankWork(tuple(batches), Cost(), messages.added(*ledgers))
    rows = samples * tokens
    heads = 2 * cost.linear(work.frames * rows, config.width, config.width)
    heads += cost.linear(rows, config.width, config.width)
    memory = _sharded(cost.memory(config, tokens, work.frames, work.chunk, samples), heads, tp)
    ledgers.append(
        messages.memory_traffic(config, tokens, work.frames, work.chunk, samples, work.itemsize, mesh, backward=True)
    )
    return _RankWork(tuple(batches), memory, messages.added(*ledgers))


def _seconds(machine: Machine, forwards: Cost, work: Workload, issue: float = 0.0) -> float:
    passes = 3 if work.training else 1  # backwards is twice forwards
    return passes * max(
        forwards.multiply_adds / (machine.attained * machine.peak),
        forwards.bytes_moved(work.itemsize) / machine.memory_bandwidth,
        issue * work.config.depth,
    )


# Steps and meshes


def step(machine: Machine, work: Workload, mesh: Mesh) -> Step:
    """One training step, or one evaluation of the sampler. Raises ValueError for a mesh that does not fit, [PAR-4]."""
    mesh.check(work.config, work.tiles, work.samples)
    ranks = _rank_works(work, work.samples_of_rank(mesh), mesh.tile, mesh.tp)
    late = 1 + machine.jitter * math.sqrt(2 * math.log(mesh.size))
    slowest = (0.0, 0.0)
    for rank in ranks:
        forwards = sum((_seconds(machine, batch, work, machine.issue) for batch in rank.batches), 0.0)
        compute = late * (forwards + _seconds(machine, rank.memory, work))
        tp = sum((wire(machine, mesh, *key, traffic) for key, traffic in rank.tensor.items()), 0.0)
        slowest = max(slowest, (compute, tp), key=sum)
    compute, tp = slowest
    waits = dict.fromkeys(AXES, 0.0) | {"tp": tp}
    for (axis, kind), traffic in _messages(work, mesh, max(len(rank.batches) for rank in ranks)).items():
        waits[axis] += wire(machine, mesh, axis, kind, traffic)
    weights = waits["ddp"] + waits["fsdp"]
    exposed = 1 - min(machine.overlap, compute / weights) if weights else 1.0
    waits |= {axis: exposed * waits[axis] for axis in ("ddp", "fsdp")}
    return Step(mesh, compute, fixed=machine.fixed, **waits)


def weight_bytes(work: Workload, mesh: Mesh) -> int:
    """Bytes of a rank's weights; in training in float32 and with their gradients and two moments."""
    config = work.config
    numbers = config.depth * messages.padded_numbers(messages.block_shapes(config, mesh.tp), mesh.fsdp)
    numbers += messages.padded_numbers(messages.root_shapes(config, mesh.tp), mesh.fsdp)
    return numbers * (4 * work.wide_itemsize if work.training else work.itemsize)


@cache
def meshes(capacity: float, work: Workload, size: int) -> tuple[Mesh, ...]:
    """List the meshes of `size` ranks that [PAR-4] allows and whose weights take at most half of so many bytes."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    legal = [
        Mesh(ddp=size // (tp * tile * fsdp), fsdp=fsdp, tile=tile, tp=tp)
        for tp in divisors
        if work.config.heads % tp == 0
        for tile in divisors
        if size % (tp * tile) == 0 and tile <= work.tiles and size // (tp * tile) <= work.samples
        for fsdp in divisors
        if size % (tp * tile * fsdp) == 0
    ]
    return tuple(mesh for mesh in legal if weight_bytes(work, mesh) <= capacity / 2)


def best(machine: Machine, work: Workload, size: int) -> Step:
    """The step on the fastest of all meshes. Raises ValueError when none fits."""
    candidates = meshes(machine.capacity, work, size)
    if not candidates:
        raise ValueError(
            f"no mesh of {size} accelerators fits {work.samples} samples, {work.tiles} tiles and {work.config.heads} "
            "heads, or memory: take more samples, smaller tiles, or another number of accelerators"
        )
    return min((step(machine, work, mesh) for mesh in candidates), key=lambda s: (s.total, s.mesh.shape))


def ideal(machine: Machine, work: Workload, size: int) -> float:
    """Seconds of a step if only products took time and could be divided without remainder: no step is shorter."""
    config = work.config
    products = cost.tiled_evaluation(config, work.tiling, work.samples).multiply_adds
    if work.training:
        tokens = work.tiling.y.length * work.tiling.x.length // math.prod(config.patch)
        products = 3 * (products + cost.memory(config, tokens, work.frames, batch=work.samples).multiply_adds)
    return products / (size * machine.attained * machine.peak)


def efficiency(machine: Machine, work: Workload, size: int = SIZES[-1], baseline: int = SIZES[0]) -> float:
    """The strong-scaling efficiency E(P) of the module's equations, at `size` accelerators against `baseline`."""
    return best(machine, work, baseline).total * baseline / (best(machine, work, size).total * size)
