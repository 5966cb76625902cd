"""Traffic: the messages that every rank takes part in, and their bytes, as functions of sizes alone.

The collectives are those of [PAR-5] to [PAR-18]. Tests compare all of this with messages counted on running ranks, for
every rank of a mesh. Messages by which ranks report errors to one another, a few bytes per analysis, are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storm_ref.config import StormConfig
from storm_ref.cost import tile_batches, token_values
from storm_ref.parallel.halo import token_tiling
from storm_ref.parallel.mesh import Mesh, share
from storm_ref.tiling import Axis, Tiling, cores

__all__ = [
    "Ledger",
    "Traffic",
    "added",
    "block_shapes",
    "collect_traffic",
    "ensemble_traffic",
    "evaluation_traffic",
    "exchange_traffic",
    "exchanged_rows",
    "gradient_traffic",
    "held_numbers",
    "memory_traffic",
    "padded_numbers",
    "root_shapes",
    "step_traffic",
    "tensor_traffic",
    "weight_traffic",
]


@dataclass(frozen=True)
class Traffic:
    """The number of messages that a rank takes part in, and the bytes that it contributes.

    The bytes of an all-reduce or reduce-scatter are those of its input, of an all-gather those of the rank's own part,
    and of an all-to-all those for other ranks, whatever algorithm carries them. Traffics add, and n * traffic is that
    of n runs.
    """

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "Traffic":
        return Traffic(times * self.messages, times * self.bytes)


# Traffic by axis of the mesh and kind of collective, for instance ("tp", "all-reduce").
Ledger = dict[tuple[str, str], Traffic]


def added(*ledgers: Ledger) -> Ledger:
    """The sum of several ledgers, without entries that have no message."""
    keys = dict.fromkeys(key for ledger in ledgers for key in ledger)
    total = {key: sum((ledger.get(key, Traffic()) for ledger in ledgers), Traffic()) for key in keys}
    return {key: traffic for key, traffic in total.items() if traffic.messages}


# Tensor parallelism


def tensor_traffic(c: StormConfig, n: int, batch: int, itemsize: int, mesh: Mesh, backward: int = 0) -> Ledger:
    """The messages over tp in one evaluation of n tokens, [PAR-6]: three all-reduces per block.

    backward: the number of all-reduces per block in the backward pass, 3 for the gradient with respect to the state
    alone and 4 with that of the memory.
    """
    size = batch * n * c.width * itemsize
    return {("tp", "all-reduce"): (3 + backward) * c.depth * Traffic(1, size)} if mesh.tp > 1 else {}


def memory_traffic(
    c: StormConfig, n: int, frames: int, chunk: int, batch: int, itemsize: int, mesh: Mesh, backward: bool = False
) -> Ledger:
    """The messages over tp while K frames of n tokens are compressed: one all-reduce at the end.

    backward: adds the backward pass, which has one all-reduce per chunk, of the chunk's tokens.
    """
    if mesh.tp == 1:
        return {}
    token = batch * n * c.width * itemsize
    gradients = Traffic(-(-frames // chunk), frames * token) if backward else Traffic()
    return {("tp", "all-reduce"): Traffic(1, token) + gradients}


# Tile parallelism


def _overlaps(axis: Axis, halo: int) -> list[list[int]]:
    """The number of points that the core of tile i, grown by `halo`, shares with the core of tile j, at [i][j]."""
    if axis.core == axis.length:
        return [[axis.length]]
    intervals = cores(axis)
    shifts = (-axis.length, 0, axis.length) if axis.periodic else (0,)

    def overlap(first: tuple[int, int], second: tuple[int, int]) -> int:
        start, stop = first[0] - halo, first[1] + halo
        return sum(max(min(stop, second[1] + shift) - max(start, second[0] + shift), 0) for shift in shifts)

    return [[overlap(first, second) for second in intervals] for first in intervals]


def exchanged_rows(tiling: Tiling, ranks: int, blend: bool = False) -> list[list[int]]:
    """The number of rows that rank r sends to rank s in a gather, [PAR-9], or in a blend, [PAR-10], at [r][s].

    One row is sent for each tile that covers a point: in a gather for the points of the extents of s, in a blend for
    the points that s owns.
    """
    widths = (tiling.y.blend, tiling.x.blend) if blend else (tiling.y.halo, tiling.x.halo)
    rows = _overlaps(tiling.y, widths[0])
    cols = _overlaps(tiling.x, widths[1])
    across = len(cols)
    count = len(rows) * len(cols)
    shares = [share(count, ranks, rank) for rank in range(ranks)]

    def shared(grown: range, owned: range) -> int:
        return sum(rows[i // across][j // across] * cols[i % across][j % across] for i in grown for j in owned)

    return [[shared(r, s) if blend else shared(s, r) for s in shares] for r in shares]


def _all_to_all(rows: list[list[int]], rank: int, size: int, backward: bool) -> Ledger:
    """The all-to-all of one table of `exchanged_rows`, with that of the backward pass, which goes the other way."""
    if len(rows) == 1:
        return {}
    out = sum(rows[rank]) - rows[rank][rank]
    back = sum(row[rank] for row in rows) - rows[rank][rank]
    return {("tile", "all-to-all"): Traffic(1, size * out) + (Traffic(1, size * back) if backward else Traffic())}


def exchange_traffic(tiling: Tiling, mesh: Mesh, rank: int, size: int, backward: bool = False) -> Ledger:
    """The messages over tile in one evaluation: a gather and a blend of rows of `size` bytes.

    rank: the place along the tile axis. backward: adds the backward pass.
    """
    tables = exchanged_rows(tiling, mesh.tile), exchanged_rows(tiling, mesh.tile, blend=True)
    return added(*(_all_to_all(rows, rank, size, backward) for rows in tables))


def _core_points(tiling: Tiling) -> list[int]:
    """The number of points of each tile's core."""
    return [(b - a) * (e - d) for a, b in cores(tiling.y) for d, e in cores(tiling.x)]


def collect_traffic(tiling: Tiling, mesh: Mesh, size: int, backward: bool = False) -> Ledger:
    """The messages over tile that replicate a sharded state of `size` bytes per point, [PAR-11].

    Every rank gathers all shards, padded to the largest. backward: adds the gather of the gradient's shards.
    """
    if mesh.tile == 1:
        return {}
    points = _core_points(tiling)
    most = max(sum(points[i] for i in share(len(points), mesh.tile, rank)) for rank in range(mesh.tile))
    return added({("tile", "all-gather"): (2 if backward else 1) * Traffic(1, most * size)})


# Members and weights


def ensemble_traffic(mesh: Mesh, members: int, size: int) -> Ledger:
    """The messages that replicate an ensemble of `size` bytes per member, [PAR-18]: along fsdp, then along ddp."""
    most = max(len(share(members, mesh.data, rank)) for rank in range(mesh.data)) * size
    ledger: Ledger = {}
    if mesh.fsdp > 1:
        ledger["fsdp", "all-gather"] = Traffic(1, most)
    if mesh.ddp > 1:
        ledger["ddp", "all-gather"] = Traffic(1, mesh.fsdp * most)
    return ledger


def _cut(shape: tuple[int, ...], dim: int | None, ranks: int) -> tuple[int, ...]:
    return shape if dim is None else (*shape[:dim], shape[dim] // ranks, *shape[dim + 1 :])


def block_shapes(c: StormConfig, tp: int = 1) -> list[tuple[int, ...]]:
    """The shapes of a block's weights on one tp rank, [PAR-7]."""
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
    """The shapes of all weights outside the blocks on one tp rank: embeddings, memory, output."""
    d, v, out = c.width, token_values(c), c.channels * c.patch[0] * c.patch[1]
    plain = [(d, v), (d,), (d, v), (d,), (d, 2 * c.position_features * c.position_octaves), (d, 2 * c.position_octaves)]
    noise = [(d, c.noise_features), (d,), (d, d), (d,)]
    memory = [((c.heads, d // c.heads), 0), ((d, d), 0), ((d, d), 0), ((d,), 0), ((d, d), 1), ((d,), None)]
    final = [(2 * d, d), (2 * d,), (out, d), (out,)]
    return [*plain, *noise, *(_cut(shape, dim, tp) for shape, dim in memory), *final]


def padded_numbers(shapes: Sequence[tuple[int, ...]], ranks: int) -> int:
    """The numbers in each fsdp rank's part of weights that are cut by rows, all padded to the size of the first."""
    return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)


def held_numbers(shapes: Sequence[tuple[int, ...]], ranks: int, rank: int) -> int:
    """The numbers that one fsdp rank holds of weights that are cut by rows, without padding."""

    def rows(count: int) -> int:
        most = -(-count // ranks)
        return max(min(most, count - rank * most), 0)

    return sum(rows(shape[0]) * math.prod(shape[1:]) for shape in shapes)


def weight_traffic(c: StormConfig, mesh: Mesh, itemsize: int, calls: int = 1, backward: bool = False) -> Ledger:
    """The messages over fsdp and ddp in one step in which every block runs `calls` times, [PAR-16].

    A block's weights are gathered before each use, those of the root once. backward: blocks are gathered again,
    gradients are scattered over fsdp and their parts summed over ddp.
    """
    block = padded_numbers(block_shapes(c, mesh.tp), mesh.fsdp) * itemsize
    root = padded_numbers(root_shapes(c, mesh.tp), mesh.fsdp) * itemsize
    units = [*[block] * c.depth, root]
    ledger: Ledger = {}
    if mesh.fsdp > 1:
        uses = calls * (2 if backward else 1)
        ledger["fsdp", "all-gather"] = Traffic(uses * c.depth + 1, uses * c.depth * block + root)
    if backward and mesh.fsdp > 1:
        ledger["fsdp", "reduce-scatter"] = Traffic(len(units), mesh.fsdp * sum(units))
    if backward and mesh.ddp > 1:
        ledger["ddp", "all-reduce"] = Traffic(len(units), sum(units))
    return ledger


def gradient_traffic(c: StormConfig, mesh: Mesh, itemsize: int, rank: int = 0) -> Ledger:
    """The messages of one training step besides those of its forward and backward pass, [PAR-12] to [PAR-14].

    All gradients are summed over tile in one message; the squares of the norm over tp and fsdp; the number of valid
    points and the recorded loss over ddp, fsdp and tile. rank: the place along the fsdp axis; the first has most.
    """
    blocks = held_numbers(c.depth * block_shapes(c, mesh.tp), mesh.fsdp, rank)
    own = blocks + held_numbers(root_shapes(c, mesh.tp), mesh.fsdp, rank)
    ledgers: list[Ledger] = [{("tile", "all-reduce"): Traffic(1, own * itemsize)}] if mesh.tile > 1 else []
    for axis, numbers in (("ddp", 2), ("fsdp", 3), ("tile", 2), ("tp", 1)):
        if getattr(mesh, axis) > 1:
            ledgers.append({(axis, "all-reduce"): numbers * Traffic(1, 8)})
    return added(*ledgers)


# Evaluations and training steps


def _own_batches(c: StormConfig, tiling: Tiling, ranks: int, rank: int, tiles_per_batch: int) -> list[tuple[int, int]]:
    """The tokens of a tile and the number of tiles, for each batch of one tile rank, [PAR-8]."""
    return tile_batches(c, tiling, tiles_per_batch, share(len(_core_points(tiling)), ranks, rank))


def _samples(mesh: Mesh, rank: int, count: int) -> int:
    """The number of samples or members of a rank, [PAR-2]."""
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
    """Count one rank's messages in one evaluation on shards, of `members` over all data ranks, with the memory given.

    rank: its number in the mesh. backward: adds a product with J^T. kept: weights stay gathered, and this is the first
    evaluation; later ones gather none.
    """
    own = _samples(mesh, rank, members)
    tile = mesh.coordinates(rank)["tile"]
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
    """Count one rank's messages in a training step of `samples` over all data ranks.

    The step compresses the memory in shards and gathers it, evaluates, and takes loss, gradients and norm. The state
    needs no gradient, so that its gather has no backward pass. rank: its number in the mesh. recomputed: with
    activation checkpointing, where a block that runs again sums again.
    """
    place = mesh.coordinates(rank)
    tile = place["tile"]
    own = _samples(mesh, rank, samples)
    batches = _own_batches(c, tiling, mesh.tile, tile, tiles_per_batch)
    points = _core_points(tiling)
    tokens = sum(points[i] for i in share(len(points), mesh.tile, tile)) // math.prod(c.patch)
    state = own * c.channels * state_itemsize
    row = own * c.width * itemsize
    return added(
        *(tensor_traffic(c, n, own * count, itemsize, mesh, 4 + (3 if recomputed else 0)) for n, count in batches),
        memory_traffic(c, tokens, frames, chunk, own, itemsize, mesh, backward=True),
        _all_to_all(exchanged_rows(token_tiling(tiling, c.patch), mesh.tile), tile, row, True),
        _all_to_all(exchanged_rows(tiling, mesh.tile), tile, state, False),
        _all_to_all(exchanged_rows(tiling, mesh.tile, blend=True), tile, state, True),
        weight_traffic(c, mesh, itemsize, len(batches), backward=True),
        gradient_traffic(c, mesh, itemsize, place["fsdp"]),
    )
