"""Cost: multiply-adds, bytes moved and peak live bytes of every part, as functions of sizes alone.

A tile of n tokens, v = p_y p_x points a token, C + S channels, P coordinates of J octaves, f noise features, width D, A
heads, MLP ratio r, depth L; a domain of N tokens with K past frames:

[COST-1] counted are the products of matrices: linear maps, the scores and the weighted sum of [MEM-1] and [MEM-2], and
         both products of [ATT-1], at full size also under a window. One multiplication and its addition are one.
[COST-2] one evaluation costs the sum over its tiles of
         n D [(2 C + S) v + 2 P J] + D (f + 3 D) + L [9 D^2 + (8 + 2 r) n D^2 + 4 D n^2], whatever K
[COST-3] compressing K frames costs N D [K ((C + S) v + 2 D + 2) + 2 P J + D] + 2 K J D
[COST-4] between chunks of frames the memory holds N (D + 2 A) numbers, whatever K
[COST-5] halos multiply the products over tokens by at most o, those over pairs of tokens by at most o^2, o of [TILE-10]

These are the counts of the equations, and the reference runs just them for one member with all frames in one chunk;
what it repeats for more (position codes, for each chunk and each member of a tile) the functions below count as run.
Bytes moved: a product reads its factors and writes its result once; biases and masks are not in it. Peak live bytes:
the most that tensors hold at one time besides weights and inputs, without gradients; what a kernel keeps for itself is
not in it. Messages between ranks are those of chapter 9. All are integers, and equal to counts taken on the running
code (tests/counting.py, tests/parallel_work.py); peaks depend on which temporaries torch makes, and are those of
version 2.13 on the CPU.

The paper: linear complexity by compression and tiling; TimeSformer O(K^2 N + K N^2). The convention is ours.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from storm_ref.config import StormConfig
from storm_ref.parallel.halo import token_tiling
from storm_ref.parallel.mesh import Mesh, share
from storm_ref.tiling import Axis, Tiling, cores

__all__ = [
    "Cost",
    "Ledger",
    "Traffic",
    "added",
    "attention",
    "block",
    "block_shapes",
    "collect_traffic",
    "divided_block",
    "ensemble_traffic",
    "evaluation",
    "evaluation_traffic",
    "exchange_traffic",
    "exchanged",
    "exponent",
    "gradient_traffic",
    "linear",
    "memory",
    "memory_chunk",
    "memory_state",
    "memory_traffic",
    "mlp",
    "multi_head",
    "noise_embedding",
    "output",
    "part",
    "peak_evaluation",
    "peak_memory",
    "peak_tiled",
    "position_code",
    "root_shapes",
    "sampling",
    "space_time_block",
    "state_tokens",
    "step_traffic",
    "tensor_traffic",
    "tiled_evaluation",
    "weight_traffic",
]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of products of matrices, and the numbers these read and write. Costs add; n * cost is n runs."""

    multiply_adds: int = 0
    numbers: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds + other.multiply_adds, self.numbers + other.numbers)

    def __rmul__(self, times: int) -> "Cost":
        return Cost(times * self.multiply_adds, times * self.numbers)

    def bytes_moved(self, itemsize: int) -> int:
        """Of a network whose numbers take `itemsize` bytes."""
        return itemsize * self.numbers


# Products


def linear(rows: int, inner: int, out: int) -> Cost:
    """x W^T for x [rows, inner] and W [out, inner]."""
    return Cost(rows * inner * out, rows * inner + inner * out + rows * out)


def attention(batch: int, n: int, m: int, width: int) -> Cost:
    """Both products of [ATT-1], n queries and m keys, any number of heads; the scores are never stored."""
    return Cost(2 * batch * n * m * width, 2 * batch * (n + m) * width)


def multi_head(batch: int, n: int, m: int, width: int) -> Cost:
    """Projections and attention of n tokens to m tokens of context."""
    project = linear(batch * n, width, width), linear(batch * m, width, width)
    return 2 * project[0] + 2 * project[1] + attention(batch, n, m, width)


def mlp(rows: int, width: int, ratio: int) -> Cost:
    """Up to ratio * width and down again."""
    return linear(rows, width, ratio * width) + linear(rows, ratio * width, width)


# The network


def _values(c: StormConfig) -> int:
    return (c.channels + c.static_channels) * c.patch[0] * c.patch[1]


def state_tokens(c: StormConfig, rows: int) -> Cost:
    """The patch embedding of [TOK-4], or of [TOK-5], for this many tokens."""
    return linear(rows, _values(c), c.width)


def position_code(c: StormConfig, rows: int) -> Cost:
    """P(r) of [TOK-7]."""
    return linear(rows, 2 * c.position_features * c.position_octaves, c.width)


def noise_embedding(c: StormConfig, batch: int) -> Cost:
    """[NET-1]"""
    return linear(batch, c.noise_features, c.width) + linear(batch, c.width, c.width)


def block(c: StormConfig, n: int, batch: int = 1) -> Cost:
    """[ATT-3] on n tokens and n memory tokens: adaptive layer norm once a sample, two attentions, MLP."""
    adaptive = linear(batch, c.width, 9 * c.width)
    return adaptive + 2 * multi_head(batch, n, n, c.width) + mlp(batch * n, c.width, c.mlp_ratio)


def output(c: StormConfig, n: int, batch: int = 1) -> Cost:
    """[NET-4]"""
    values = c.channels * c.patch[0] * c.patch[1]
    return linear(batch, c.width, 2 * c.width) + linear(batch * n, c.width, values)


def evaluation(c: StormConfig, n: int, batch: int = 1, positions: int = 1) -> Cost:
    """One evaluation of the network on n tokens, [COST-2]; `positions`: how many samples have their own positions."""
    tokens = state_tokens(c, batch * n) + position_code(c, positions * n)
    return tokens + noise_embedding(c, batch) + c.depth * block(c, n, batch) + output(c, n, batch)


# The memory


def memory_chunk(c: StormConfig, n: int, frames: int, batch: int = 1) -> Cost:
    """[TOK-5] and the streaming update of [MEM-3] for a chunk of frames of n tokens; no frame costs nothing."""
    if frames == 0:
        return Cost()
    rows, codes = batch * frames * n, batch * frames
    tokens = state_tokens(c, rows) + position_code(c, n) + linear(codes, 2 * c.position_octaves, c.width)
    score = Cost(rows * c.width, rows * c.width + c.width + rows * c.heads)
    total = Cost(rows * c.width, rows * c.heads + rows * c.width + batch * n * c.width)
    return tokens + 2 * linear(rows, c.width, c.width) + score + total


def memory(c: StormConfig, n: int, frames: int, chunk: int | None = None, batch: int = 1) -> Cost:
    """[MEM-2] of all frames, `chunk` at a time (None: at once), [COST-3]. Raises ValueError for no frame or chunk."""
    chunk = frames if chunk is None else chunk
    if frames < 1 or chunk < 1:
        raise ValueError(f"the memory needs at least one frame and one at a time, got {frames} and {chunk}")
    chunks = frames // chunk * memory_chunk(c, n, chunk, batch) + memory_chunk(c, n, frames % chunk, batch)
    return chunks + linear(batch * n, c.width, c.width)


def memory_state(c: StormConfig, n: int, batch: int = 1) -> int:
    """Numbers held between chunks: maximum, denominator and accumulator, [COST-4]."""
    return batch * n * (c.width + 2 * c.heads)


# Tiles and the sampler


def _spans(axis: Axis) -> list[int]:
    """The length of each tile, as tiling.extents has them."""
    if axis.core == axis.length:
        return [axis.length]
    ends = ((start - axis.halo, stop + axis.halo) for start, stop in cores(axis))
    if axis.periodic:
        return [stop - start for start, stop in ends]
    return [min(stop, axis.length) - max(start, 0) for start, stop in ends]


def _lengths(axis: Axis) -> Counter[int]:
    """How many tiles have which length, in the order of their first."""
    return Counter(_spans(axis))


def _batches(c: StormConfig, tiling: Tiling, tiles_per_batch: int) -> list[tuple[int, int, int]]:
    """Tokens of a tile, tiles in a batch, how many such batches: those of `tiling.blend_tiles`, of one shape."""
    if (tiling.y.patch, tiling.x.patch) != c.patch:
        raise ValueError(f"the tiling has patches of {tiling.y.patch} x {tiling.x.patch}, the network of {c.patch}")
    found = []
    for (rows, across), (cols, along) in product(_lengths(tiling.y).items(), _lengths(tiling.x).items()):
        n, count = rows // tiling.y.patch * (cols // tiling.x.patch), across * along
        found += [(n, tiles_per_batch, count // tiles_per_batch), (n, count % tiles_per_batch, 1)]
    return [(n, tiles, times) for n, tiles, times in found if tiles and times]


def tiled_evaluation(c: StormConfig, tiling: Tiling, members: int = 1, tiles_per_batch: int = 16) -> Cost:
    """T[D] once, [TILE-6]; `tiles_per_batch` enters the bytes alone: each batch of tiles reads all weights.

    Raises ValueError when the tiles are cut in other patches than the network's.
    """
    batches = _batches(c, tiling, tiles_per_batch)
    parts = [times * evaluation(c, n, members * count, members * count) for n, count, times in batches]
    return sum(parts, Cost())


def sampling(once: Cost, steps: int) -> Cost:
    """Heun's sampler of n steps: 2 n - 1 evaluations, [EDM-7]."""
    return (2 * steps - 1) * once


# Peak live bytes


def peak_evaluation(c: StormConfig, n: int, itemsize: int, batch: int = 1, positions: int = 1) -> int:
    """Most bytes at one time in one evaluation of D on n tokens, at least 2 x 2 of them, in numbers of 4 or 8 bytes.

    The largest of six moments. Attention keeps no scores, but a window's mask is n x n, as booleans and as numbers.
    """
    m, points = batch * n, c.patch[0] * c.patch[1]
    tokens, mask = m * c.width * itemsize, 0 if c.window is None else n * n
    codes = c.position_octaves * (5 * positions * n * c.position_features + 1)
    state = 4 * 8 * batch + m * c.channels * points * itemsize  # coefficients, and c_in x
    base = state + batch * (10 * c.width + c.heads) * itemsize + mask  # noise embedding, its nine maps, gates
    return max(
        state + 2 * m * _values(c) * itemsize,  # fields side by side, and their patches
        state + tokens + 8 * codes,  # phases, sines, cosines, and both in one, in float64
        base + 8 * tokens + (m * c.heads + mask) * itemsize,  # x twice, two norms, q, k, v, result; its normaliser
        base + 9 * tokens,  # the result weighted by the gate
        base + (4 + 2 * c.mlp_ratio) * tokens,  # x twice, two norms, the MLP before and after gelu
        4 * 8 * batch + m * c.channels * points * (itemsize + 3 * 8),  # F, and D in float64
    )


def peak_tiled(c: StormConfig, tiling: Tiling, itemsize: int, members: int = 1, tiles_per_batch: int = 16) -> int:
    """Most bytes at one time in T[D], from its second evaluation on, when all cropped conditions are there.

    These and the blended result grow with the domain; the tiles in flight do not.
    """
    points, kept, most, last = c.patch[0] * c.patch[1], 0, 0, 0
    for n, count, times in _batches(c, tiling, tiles_per_batch):
        batch = members * count
        kept += times * batch * n * ((c.static_channels * points + c.width) * itemsize + 8 * c.position_features)
        tiles = 8 * batch * n * c.channels * points  # a batch of states, or of results, in float64
        before = tiles if times > 1 else last  # results of the batch before are let go when the next are there
        inside = before + tiles + 8 * batch + peak_evaluation(c, n, itemsize, batch, batch)
        most, last = max(most, inside), tiles
    return kept + 8 * members * c.channels * tiling.y.length * tiling.x.length + most


def peak_memory(c: StormConfig, n: int, chunk: int, itemsize: int, batch: int = 1, first: bool = False) -> int:
    """Most bytes at one time while a chunk of at least two frames streams into the memory, [COST-4]: whatever K.

    For heads of at least two numbers, frames in the network's dtype; `first`: no frame is in it yet.
    """
    m, e = batch * n, itemsize
    tokens, fields, score = chunk * m * c.width * e, chunk * m * _values(c) * e, chunk * m * c.heads * e
    start = memory_state(c, n, batch) * e
    held = 0 if first else start
    ages = batch * chunk * c.width * e
    codes = 8 * c.position_octaves * (5 * n * c.position_features + 1)
    parts = m * (2 * c.width + 3 * c.heads) * e
    update = start + parts + 2 * tokens + 2 * score  # the old state and its parts in the new
    return max(
        held + 2 * fields + tokens,  # fields, their patches, tokens
        held + fields + tokens + ages + codes,
        held + fields + 3 * tokens + ages,  # with the position, with the age
        held + 3 * tokens + 2 * score,  # tokens, keys, values
        update + (score if m > n or c.heads > 1 else 0) + (tokens if batch > 1 else 0),  # copies for torch's product
        update + m * c.width * e,  # the new accumulator
    )


# Messages between ranks


@dataclass(frozen=True)
class Traffic:
    """Messages that a rank takes part in, and the bytes that it hands in. Traffics add; n * traffic is n runs.

    Bytes of an all-reduce or reduce-scatter are those of its input, of an all-gather those of the rank's own part, of
    an all-to-all those for other ranks: what algorithm carries them, and how often it sends them on, is not in it.
    """

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "Traffic":
        return Traffic(times * self.messages, times * self.bytes)


# By axis of the mesh and kind of collective, for instance ("tp", "all-reduce").
Ledger = dict[tuple[str, str], Traffic]


def added(*ledgers: Ledger) -> Ledger:
    """The sum of several; what has no message is left out."""
    keys = {key for ledger in ledgers for key in ledger}
    total = {key: sum((ledger.get(key, Traffic()) for ledger in ledgers), Traffic()) for key in keys}
    return {key: traffic for key, traffic in total.items() if traffic.messages}


def tensor_traffic(c: StormConfig, n: int, batch: int, itemsize: int, mesh: Mesh, backward: int = 0) -> Ledger:
    """tp in one evaluation of n tokens, [PAR-6]: a block sums three times forwards, and backwards `backward` times: 3
    for the gradient in the state alone, 4 with that in the memory.
    """
    size = batch * n * c.width * itemsize
    return {("tp", "all-reduce"): (3 + backward) * c.depth * Traffic(1, size)} if mesh.tp > 1 else {}


def memory_traffic(
    c: StormConfig, n: int, frames: int, chunk: int, batch: int, itemsize: int, mesh: Mesh, backward: bool = False
) -> Ledger:
    """tp while K frames of n tokens are compressed: one sum at the end, and backwards one of each chunk's tokens."""
    if mesh.tp == 1:
        return {}
    token = batch * n * c.width * itemsize
    slopes = Traffic(-(-frames // chunk), frames * token) if backward else Traffic()
    return {("tp", "all-reduce"): Traffic(1, token) + slopes}


def _overlaps(axis: Axis, halo: int) -> list[list[int]]:
    """[i][j]: how many points the core of tile i, grown by `halo`, shares with the core of tile j."""
    parts = cores(axis)
    if axis.core == axis.length:
        return [[axis.length]]
    turns = (-axis.length, 0, axis.length) if axis.periodic else (0,)
    return [
        [
            sum(max(min(b + halo, d + turn) - max(a - halo, c + turn), 0) for turn in turns)
            for c, d in parts
        ]
        for a, b in parts
    ]  # fmt: skip


def exchanged(tiling: Tiling, ranks: int, blend: bool = False) -> list[list[int]]:
    """[r][s]: rows that rank r hands to rank s in a gather, [PAR-9], or in a blend, [PAR-10]: one for each point that s
    owns (in a blend) or has in an extent (in a gather), and each tile that has it.
    """
    widths = (tiling.y.blend, tiling.x.blend) if blend else (tiling.y.halo, tiling.x.halo)
    rows, cols = _overlaps(tiling.y, widths[0]), _overlaps(tiling.x, widths[1])
    across, count = len(cols), len(rows) * len(cols)
    shares = [share(count, ranks, rank) for rank in range(ranks)]

    def shared(wants: range, owns: range) -> int:
        return sum(rows[i // across][j // across] * cols[i % across][j % across] for i in wants for j in owns)

    return [[shared(r, s) if blend else shared(s, r) for s in shares] for r in shares]


def _exchange(table: list[list[int]], rank: int, size: int, backward: bool) -> Ledger:
    """Of one table of `exchanged`: one way, and backwards the other."""
    if len(table) == 1:
        return {}
    out = sum(table[rank]) - table[rank][rank]
    back = sum(row[rank] for row in table) - table[rank][rank]
    return {("tile", "all-to-all"): Traffic(1, size * out) + (Traffic(1, size * back) if backward else Traffic())}


def exchange_traffic(tiling: Tiling, mesh: Mesh, rank: int, size: int, backward: bool = False) -> Ledger:
    """tile in one evaluation: a gather and a blend of rows of `size` bytes; backwards the same the other way round.

    rank: along the tile axis.
    """
    tables = exchanged(tiling, mesh.tile), exchanged(tiling, mesh.tile, blend=True)
    return added(*(_exchange(table, rank, size, backward) for table in tables))


def collect_traffic(tiling: Tiling, mesh: Mesh, size: int, backward: bool = False) -> Ledger:
    """tile where states of `size` bytes a point are whole between evaluations, [PAR-11]: every rank gathers the shards,
    padded to the largest; backwards it gathers those of the gradient in the state.
    """
    sizes = [(b - a) * (e - d) for a, b in cores(tiling.y) for d, e in cores(tiling.x)]
    most = max(sum(sizes[i] for i in share(len(sizes), mesh.tile, rank)) for rank in range(mesh.tile))
    return added({("tile", "all-gather"): (2 if backward else 1) * Traffic(1, most * size)}) if mesh.tile > 1 else {}


def ensemble_traffic(mesh: Mesh, members: int, size: int) -> Ledger:
    """The ensemble, of `size` bytes a member, on every rank, [PAR-18]: along fsdp, then along ddp. That ranks tell one
    another of errors first is not in it.
    """
    most = max(len(share(members, mesh.data, rank)) for rank in range(mesh.data)) * size
    fsdp, ddp = ("fsdp", "all-gather"), ("ddp", "all-gather")
    found = {fsdp: Traffic(1, most)} if mesh.fsdp > 1 else {}
    return found | ({ddp: Traffic(1, mesh.fsdp * most)} if mesh.ddp > 1 else {})


def _cut(shape: tuple[int, ...], dim: int | None, ranks: int) -> tuple[int, ...]:
    return shape if dim is None else (*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :])


def block_shapes(c: StormConfig, tp: int = 1) -> list[tuple[int, ...]]:
    """Shapes of a block's weights on one tp rank, [PAR-7]."""
    d, hidden = c.width, c.mlp_ratio * c.width
    heads = [((d, d), 0), ((d,), 0), ((d, d), 0), ((d, d), 0), ((d,), 0), ((d, d), 1), ((d,), None)]  # q, k, v, out
    mlp = [((hidden, d), 0), ((hidden,), 0), ((d, hidden), 1), ((d,), None)]
    gates = [((c.heads,), 0)] * 2
    every: list[tuple[tuple[int, ...], int | None]] = [
        ((9 * d, d), None),
        ((9 * d,), None),
        *heads,
        *heads,
        *mlp,
        *gates,
    ]
    return [_cut(shape, dim, tp) for shape, dim in every]


def root_shapes(c: StormConfig, tp: int = 1) -> list[tuple[int, ...]]:
    """Shapes of all other weights on one tp rank: embeddings, memory, output."""
    d, v, out = c.width, _values(c), c.channels * c.patch[0] * c.patch[1]
    plain = [(d, v), (d,), (d, v), (d,), (d, 2 * c.position_features * c.position_octaves), (d, 2 * c.position_octaves)]
    noise = [(d, c.noise_features), (d,), (d, d), (d,)]
    memory = [((c.heads, d // c.heads), 0), ((d, d), 0), ((d, d), 0), ((d,), 0), ((d, d), 1), ((d,), None)]
    final = [(2 * d, d), (2 * d,), (out, d), (out,)]
    return [*plain, *noise, *(_cut(shape, dim, tp) for shape, dim in memory), *final]


def part(shapes: Sequence[tuple[int, ...]], ranks: int) -> int:
    """Numbers of one fsdp rank's part of weights that are cut by rows, each padded to the size of the first."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


def weight_traffic(c: StormConfig, mesh: Mesh, itemsize: int, calls: int = 1, backward: bool = False) -> Ledger:
    """fsdp and ddp in one step, [PAR-16], in which every block runs `calls` times: weights are gathered before each
    use, the root's once; backwards gathered again, gradients scattered over fsdp and their parts summed over ddp.
    """
    block, root = (part(shapes, mesh.fsdp) * itemsize for shapes in (block_shapes(c, mesh.tp), root_shapes(c, mesh.tp)))
    units = [*[block] * c.depth, root]
    found: Ledger = {}
    if mesh.fsdp > 1:
        uses = calls * (2 if backward else 1)
        found["fsdp", "all-gather"] = Traffic(uses * c.depth + 1, uses * c.depth * block + root)
    if backward and mesh.fsdp > 1:
        found["fsdp", "reduce-scatter"] = Traffic(len(units), mesh.fsdp * sum(units))
    if backward and mesh.ddp > 1:
        found["ddp", "all-reduce"] = Traffic(len(units), sum(units))
    return found


def gradient_traffic(c: StormConfig, mesh: Mesh, itemsize: int, rank: int = 0) -> Ledger:
    """After backward: all gradients summed over tile in one message, [PAR-13]; the norm's squares over tp and fsdp,
    [PAR-14]; the number of valid points before it, and the loss for the record, over ddp, fsdp and tile, [PAR-12].

    rank: along the fsdp axis; the first has most.
    """
    own = sum(
        _held(shapes, mesh.fsdp, rank) for shapes in (c.depth * block_shapes(c, mesh.tp), root_shapes(c, mesh.tp))
    )
    found = [{("tile", "all-reduce"): Traffic(1, own * itemsize)}] if mesh.tile > 1 else []
    for axis, numbers in (("ddp", 2), ("fsdp", 3), ("tile", 2), ("tp", 1)):
        if getattr(mesh, axis) > 1:
            found.append({(axis, "all-reduce"): numbers * Traffic(1, 8)})
    return added(*found)


def _held(shapes: Sequence[tuple[int, ...]], ranks: int, rank: int) -> int:
    """Numbers that one fsdp rank holds of these weights, padding left out."""

    def rows(count: int) -> int:
        most = -(-count // ranks)
        return max(min(most, count - rank * most), 0)

    return sum(rows(shape[0]) * math.prod(shape[1:]) for shape in shapes)


def _own_batches(c: StormConfig, tiling: Tiling, ranks: int, rank: int, tiles_per_batch: int) -> list[tuple[int, int]]:
    """Tokens of a tile, and tiles, of each batch of one tile rank, [PAR-8]."""
    shapes = list(product(_spans(tiling.y), _spans(tiling.x)))
    counts = Counter(shapes[i] for i in share(len(shapes), ranks, rank))
    return [
        (rows // c.patch[0] * (cols // c.patch[1]), min(tiles_per_batch, count - first))
        for (rows, cols), count in counts.items()
        for first in range(0, count, tiles_per_batch)
    ]


def _samples(mesh: Mesh, rank: int, count: int) -> int:
    """How many of the samples or members are those of a rank, [PAR-2]."""
    return len(share(count, mesh.data, rank // (mesh.tile * mesh.tp)))


def evaluation_traffic(
    c: StormConfig,
    tiling: Tiling,
    mesh: Mesh,
    rank: int,
    members: int,
    tiles_per_batch: int,
    itemsize: int,
    state_itemsize: int = 8,
    backward: bool = False,
    kept: bool = False,
) -> Ledger:
    """All messages of one rank (of all, not along an axis) in one evaluation on shards, of `members` over all data
    ranks; the memory is there.

    backward: and of J^T. kept: weights stay gathered, and this is the first evaluation; later ones gather none.
    """
    own, tile = _samples(mesh, rank, members), mesh.coordinates(rank)["tile"]
    batches = _own_batches(c, tiling, mesh.tile, tile, tiles_per_batch)
    calls, again = (1, False) if kept else (len(batches), backward)
    weights = weight_traffic(c, mesh, itemsize, calls, again)
    return added(
        *(tensor_traffic(c, n, own * count, itemsize, mesh, 3 if backward else 0) for n, count in batches),
        exchange_traffic(tiling, mesh, tile, own * c.channels * state_itemsize, backward),
        {key: traffic for key, traffic in weights.items() if key[1] == "all-gather"},
    )


def step_traffic(
    c: StormConfig,
    tiling: Tiling,
    mesh: Mesh,
    rank: int,
    samples: int,
    frames: int,
    chunk: int,
    tiles_per_batch: int,
    itemsize: int,
    state_itemsize: int = 8,
    recomputed: bool = False,
) -> Ledger:
    """All messages of one rank (of all, not along an axis) in a training step of `samples` over all data ranks: memory
    compressed in shards and gathered, evaluation, loss, gradients, norm.

    The state wants no gradient, so its gather has no way back; a block that runs again sums again.
    """
    place, own = mesh.coordinates(rank), _samples(mesh, rank, samples)
    tile, points = place["tile"], math.prod(c.patch)
    batches = _own_batches(c, tiling, mesh.tile, tile, tiles_per_batch)
    sizes = [(b - a) * (e - d) for a, b in cores(tiling.y) for d, e in cores(tiling.x)]
    tokens = sum(sizes[i] for i in share(len(sizes), mesh.tile, tile)) // points
    state, row = own * c.channels * state_itemsize, own * c.width * itemsize
    return added(
        *(tensor_traffic(c, n, own * count, itemsize, mesh, 4 + (3 if recomputed else 0)) for n, count in batches),
        memory_traffic(c, tokens, frames, chunk, own, itemsize, mesh, backward=True),
        _exchange(exchanged(token_tiling(tiling, c.patch), mesh.tile), tile, row, True),
        _exchange(exchanged(tiling, mesh.tile), tile, state, False),
        _exchange(exchanged(tiling, mesh.tile, blend=True), tile, state, True),
        weight_traffic(c, mesh, itemsize, len(batches), backward=True),
        gradient_traffic(c, mesh, itemsize, place["fsdp"]),
    )


# Baselines


def space_time_block(width: int, frames: int, n: int, ratio: int = 4, batch: int = 1) -> Cost:
    """Full attention over T N tokens: 12 T N D^2 + 2 D (T N)^2 for ratio 4."""
    tokens = frames * n
    return multi_head(batch, tokens, tokens, width) + mlp(batch * tokens, width, ratio)


def divided_block(width: int, frames: int, n: int, ratio: int = 4, batch: int = 1) -> Cost:
    """TimeSformer: 17 T N D^2 + 2 D T N (T + N) for ratio 4."""
    rows = batch * frames * n
    time = multi_head(batch * n, frames, frames, width) + linear(rows, width, width)
    return time + multi_head(batch * frames, n, n, width) + mlp(rows, width, ratio)


def exponent(costs: Sequence[int] | Sequence[float], sizes: Sequence[int]) -> float:
    """Slope of ln cost against ln size by least squares: 1 is linear, 2 quadratic."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
