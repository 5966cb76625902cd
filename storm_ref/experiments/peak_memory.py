"""Peak live bytes: the most that torch's tensors hold at one time besides weights and inputs, without gradients.

They depend on the temporaries that torch makes, and are those of version 2.13 on the CPU; what a kernel allocates for
itself is left out. Tests compare them with the storages alive in the running code.
"""

from storm_ref.config import StormConfig
from storm_ref.cost import memory_state, tile_batches, token_values
from storm_ref.tiling import Tiling

__all__ = ["peak_compression", "peak_evaluation", "peak_tiled"]


def peak_evaluation(c: StormConfig, n: int, itemsize: int, batch: int = 1, positions: int = 1) -> int:
    """The peak live bytes of one evaluation of D on n tokens, at least 2 x 2 of them, in numbers of 4 or 8 bytes.

    The peak is at one of six moments. Attention keeps no scores, but a window's mask is n x n, as booleans and as
    numbers. positions: the number of samples that have positions of their own.
    """
    m, points = batch * n, c.patch[0] * c.patch[1]
    tokens, mask = m * c.width * itemsize, 0 if c.window is None else n * n
    codes = c.position_octaves * (5 * positions * n * c.position_features + 1)
    state = 4 * 8 * batch + m * c.channels * points * itemsize  # coefficients, and c_in x
    base = state + batch * (10 * c.width + c.heads) * itemsize + mask  # noise embedding, its nine maps, gates
    return max(
        state + 2 * m * token_values(c) * itemsize,  # fields side by side, and their patches
        state + tokens + 8 * codes,  # phases, sines, cosines, and both in one, in float64
        base + 8 * tokens + (m * c.heads + mask) * itemsize,  # x twice, two norms, q, k, v, result; its normaliser
        base + 9 * tokens,  # the result weighted by the gate
        base + (4 + 2 * c.mlp_ratio) * tokens,  # x twice, two norms, the MLP before and after gelu
        4 * 8 * batch + m * c.channels * points * (itemsize + 3 * 8),  # F, and D in float64
    )


def peak_tiled(c: StormConfig, tiling: Tiling, itemsize: int, members: int = 1, tiles_per_batch: int = 16) -> int:
    """The peak live bytes of T[D], from its second evaluation on, when all cropped conditions are cached.

    These and the blended result grow with the domain; the tiles in flight do not. Raises ValueError as
    `cost.tile_batches` does.
    """
    points = c.patch[0] * c.patch[1]
    conditions = 0
    most = 0
    previous = 0  # results of the batch before, which are released when those of the next are there
    for n, count in tile_batches(c, tiling, tiles_per_batch):
        batch = members * count
        conditions += batch * n * ((c.static_channels * points + c.width) * itemsize + 8 * c.position_features)
        states = 8 * batch * n * c.channels * points  # a batch of states, or of results, in float64
        inside = previous + states + 8 * batch + peak_evaluation(c, n, itemsize, batch, batch)
        most = max(most, inside)
        previous = states
    return conditions + 8 * members * c.channels * tiling.y.length * tiling.x.length + most


def peak_compression(c: StormConfig, n: int, chunk: int, itemsize: int, batch: int = 1, first: bool = False) -> int:
    """The peak live bytes while a chunk of at least two frames streams into the memory, whatever K, [COST-4].

    This holds for heads of at least two numbers and frames in the network's dtype. first: the memory is still empty.
    """
    m, e = batch * n, itemsize
    tokens, fields, score = chunk * m * c.width * e, chunk * m * token_values(c) * e, chunk * m * c.heads * e
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
