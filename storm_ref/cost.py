"""Cost: multiply-adds and bytes moved by every part of the network, as functions of sizes alone.

For a tile of n tokens with v = p_y p_x points each, C channels and S static ones, P coordinates of J octaves, f noise
features, width D, A heads, MLP ratio r and depth L, in a domain of N tokens with K past frames:

[COST-1] the products of matrices are counted: linear maps, the scores and the weighted sum of [MEM-1] and [MEM-2], and
         both products of [ATT-1], at full size also under a window. A multiplication and its addition count as one
[COST-2] one evaluation costs the sum over its tiles of
         n D [(2 C + S) v + 2 P J] + D (f + 3 D) + L [9 D^2 + (8 + 2 r) n D^2 + 4 D n^2], whatever K
[COST-3] compressing K frames costs N D [K ((C + S) v + 2 D + 2) + 2 P J + D] + 2 K J D
[COST-4] between chunks of frames the memory holds N (D + 2 A) numbers, whatever K
[COST-5] halos multiply the products over tokens by at most o, and those over pairs of tokens by at most o^2, with o of
         [TILE-10]

These are the counts of the equations, and the reference runs exactly them for one member with all frames in one chunk.
What it repeats for more (position codes, for each chunk and each member of a tile) is counted as it runs. For bytes
moved, a product reads its factors and writes its result once; biases and masks are left out. All counts are integers,
and tests compare them with counts taken on the running code.

The paper: linear complexity by compression and tiling; TimeSformer O(K^2 N + K N^2). The convention is ours.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from storm_ref.config import StormConfig
from storm_ref.tiling import Tiling, batches, shapes

__all__ = [
    "Cost",
    "attention",
    "block",
    "divided_block",
    "evaluation",
    "exponent",
    "linear",
    "memory",
    "memory_chunk",
    "memory_state",
    "mlp",
    "multi_head",
    "noise_embedding",
    "output",
    "position_code",
    "sampling",
    "space_time_block",
    "state_tokens",
    "tile_batches",
    "tiled_evaluation",
    "token_values",
]


@dataclass(frozen=True)
class Cost:
    """The multiply-adds of products of matrices, and the numbers that these read and write.

    Costs add, and n * cost is the cost of n runs.
    """

    multiply_adds: int = 0
    numbers: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds + other.multiply_adds, self.numbers + other.numbers)

    def __rmul__(self, times: int) -> "Cost":
        return Cost(times * self.multiply_adds, times * self.numbers)

    def bytes_moved(self, itemsize: int) -> int:
        """The bytes moved by a network whose numbers take `itemsize` bytes."""
        return itemsize * self.numbers


# Products


def linear(rows: int, inner: int, out: int) -> Cost:
    """The cost of x W^T for x [rows, inner] and W [out, inner]."""
    return Cost(rows * inner * out, rows * inner + inner * out + rows * out)


def attention(batch: int, n: int, m: int, width: int) -> Cost:
    """The cost of [ATT-1] for n queries and m keys and any number of heads; the scores are never stored."""
    return Cost(2 * batch * n * m * width, 2 * batch * (n + m) * width)


def multi_head(batch: int, n: int, m: int, width: int) -> Cost:
    """The cost of attention from n tokens to m tokens of context, with its projections."""
    project = linear(batch * n, width, width), linear(batch * m, width, width)
    return 2 * project[0] + 2 * project[1] + attention(batch, n, m, width)


def mlp(rows: int, width: int, ratio: int) -> Cost:
    """The cost of an MLP with `ratio * width` hidden units."""
    return linear(rows, width, ratio * width) + linear(rows, ratio * width, width)


# The network


def token_values(c: StormConfig) -> int:
    """The number of field values that one token is embedded from."""
    return (c.channels + c.static_channels) * c.patch[0] * c.patch[1]


def state_tokens(c: StormConfig, rows: int) -> Cost:
    """The cost of the patch embedding of [TOK-4] or [TOK-5] for `rows` tokens."""
    return linear(rows, token_values(c), c.width)


def position_code(c: StormConfig, rows: int) -> Cost:
    """The cost of P(r) of [TOK-7] for `rows` tokens."""
    return linear(rows, 2 * c.position_features * c.position_octaves, c.width)


def noise_embedding(c: StormConfig, batch: int) -> Cost:
    """The cost of [NET-1] for `batch` noise levels."""
    return linear(batch, c.noise_features, c.width) + linear(batch, c.width, c.width)


def block(c: StormConfig, n: int, batch: int = 1) -> Cost:
    """The cost of [ATT-3] on n tokens and n memory tokens, with the adaptive layer norm once per sample."""
    adaptive = linear(batch, c.width, 9 * c.width)
    return adaptive + 2 * multi_head(batch, n, n, c.width) + mlp(batch * n, c.width, c.mlp_ratio)


def output(c: StormConfig, n: int, batch: int = 1) -> Cost:
    """The cost of [NET-4] on n tokens."""
    values = c.channels * c.patch[0] * c.patch[1]
    return linear(batch, c.width, 2 * c.width) + linear(batch * n, c.width, values)


def evaluation(c: StormConfig, n: int, batch: int = 1, positions: int = 1) -> Cost:
    """The cost of one evaluation of the network on n tokens, [COST-2].

    positions: the number of samples that have positions of their own.
    """
    tokens = state_tokens(c, batch * n) + position_code(c, positions * n)
    return tokens + noise_embedding(c, batch) + c.depth * block(c, n, batch) + output(c, n, batch)


# The memory


def memory_chunk(c: StormConfig, n: int, frames: int, batch: int = 1) -> Cost:
    """The cost of [TOK-5] and of the streaming update of [MEM-3] for one chunk of frames of n tokens."""
    if frames == 0:
        return Cost()
    rows, codes = batch * frames * n, batch * frames
    tokens = state_tokens(c, rows) + position_code(c, n) + linear(codes, 2 * c.position_octaves, c.width)
    score = Cost(rows * c.width, rows * c.width + c.width + rows * c.heads)
    total = Cost(rows * c.width, rows * c.heads + rows * c.width + batch * n * c.width)
    return tokens + 2 * linear(rows, c.width, c.width) + score + total


def memory(c: StormConfig, n: int, frames: int, chunk: int | None = None, batch: int = 1) -> Cost:
    """The cost of [MEM-2] for all frames, `chunk` at a time (None: all at once), [COST-3].

    Raises ValueError for less than one frame, or less than one at a time.
    """
    chunk = frames if chunk is None else chunk
    if frames < 1 or chunk < 1:
        raise ValueError(f"the memory needs at least one frame and one at a time, got {frames} and {chunk}")
    chunks = frames // chunk * memory_chunk(c, n, chunk, batch) + memory_chunk(c, n, frames % chunk, batch)
    return chunks + linear(batch * n, c.width, c.width)


def memory_state(c: StormConfig, n: int, batch: int = 1) -> int:
    """The numbers held between chunks: maximum, denominator and accumulator, [COST-4]."""
    return batch * n * (c.width + 2 * c.heads)


# Tiles and the sampler


def tile_batches(
    c: StormConfig, tiling: Tiling, tiles_per_batch: int = 16, among: range | None = None
) -> list[tuple[int, int]]:
    """The tokens of a tile and the number of tiles, for each batch of `tiling.blend_tiles`.

    among: the tiles to batch, in row-major numbering; None stands for all. Raises ValueError when the tiles are cut in
    other patches than the network's, and for tiles_per_batch < 1.
    """
    if (tiling.y.patch, tiling.x.patch) != c.patch:
        raise ValueError(f"the tiling has patches of {tiling.y.patch} x {tiling.x.patch}, the network of {c.patch}")
    tokens = [(rows // c.patch[0], cols // c.patch[1]) for rows, cols in shapes(tiling)]
    own = tokens if among is None else [tokens[i] for i in among]
    return [(math.prod(own[batch[0]]), len(batch)) for batch in batches(own, tiles_per_batch)]


def tiled_evaluation(c: StormConfig, tiling: Tiling, members: int = 1, tiles_per_batch: int = 16) -> Cost:
    """The cost of one evaluation of T[D], [TILE-6].

    `tiles_per_batch` affects the bytes alone: every batch of tiles reads all weights. Raises ValueError as
    `tile_batches` does.
    """
    counts = Counter(tile_batches(c, tiling, tiles_per_batch))
    parts = [times * evaluation(c, n, members * count, members * count) for (n, count), times in counts.items()]
    return sum(parts, Cost())


def sampling(once: Cost, steps: int) -> Cost:
    """The cost of sampling by Heun's method in n steps, which take 2 n - 1 evaluations, [EDM-7]."""
    return (2 * steps - 1) * once


# Baselines


def space_time_block(width: int, frames: int, n: int, ratio: int = 4, batch: int = 1) -> Cost:
    """The cost of full attention over T N tokens: 12 T N D^2 + 2 D (T N)^2 multiply-adds for ratio 4."""
    tokens = frames * n
    return multi_head(batch, tokens, tokens, width) + mlp(batch * tokens, width, ratio)


def divided_block(width: int, frames: int, n: int, ratio: int = 4, batch: int = 1) -> Cost:
    """The cost of TimeSformer's divided attention: 17 T N D^2 + 2 D T N (T + N) multiply-adds for ratio 4."""
    rows = batch * frames * n
    time = multi_head(batch * n, frames, frames, width) + linear(rows, width, width)
    return time + multi_head(batch * frames, n, n, width) + mlp(rows, width, ratio)


def exponent(costs: Sequence[int] | Sequence[float], sizes: Sequence[int]) -> float:
    """The slope of ln cost against ln size by least squares: 1 is linear growth, 2 quadratic."""
    x, y = ([math.log(v) for v in values] for values in (sizes, costs))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
