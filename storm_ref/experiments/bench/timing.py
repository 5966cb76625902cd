"""Times: their growth with the number of tokens, beside the counts of cost.py, and what tiling and sampling add.

    growth      one evaluation of D by tiles, of the same network untiled, and of TimeSformer's block, sizes doubling;
                a method stops where its next size would take more time or memory than the tiled one at its largest
    exponent    slope of ln seconds against ln tokens by least squares, over all sizes of a method
    to dense    attention by tiles over one dense attention of the same multiply-adds, cropping and blending included
    overhead    everything a sampling run does besides the network's forward passes, over those passes

Each figure is a ratio or an exponent within one run. For each size the fastest of several rounds counts; tiles and
dense attention take turns, and the median of their ratios counts. The machine should have nothing else to do.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from storm_ref import cost
from storm_ref.attention import DividedBlock, attention
from storm_ref.config import StormConfig, storm_10m, tiny
from storm_ref.denoiser import Condition, Storm, denoiser, randomise
from storm_ref.edm import sample, schedule
from storm_ref.experiments import peak_memory
from storm_ref.tiling import Axis, Tiling, tiled_denoiser, tiles
from storm_ref.tokenisation import sphere_position
from storm_ref.workbench.io.progress import Progress

__all__ = [
    "BLEND",
    "CORE",
    "HALO",
    "band",
    "counted",
    "fastest",
    "generic_network",
    "growth",
    "methods",
    "ratio_to_dense",
    "sampler_overhead",
    "scene",
    "small",
    "ten_million",
    "time_exponent",
]

CORE, HALO, BLEND = 32, 8, 4  # tokens: a tile of 48 x 48
FRAMES = 8  # of TimeSformer
TILES_PER_BATCH = 8


def band(tokens: int, rows: int = 64) -> Tiling:
    """Two rows of tiles around the Earth, all of one shape, so that cost is proportional to the length of the band.

    Raises ValueError when `tokens` is not whole rows of whole tiles.
    """
    if tokens % (rows * CORE):
        raise ValueError(f"{tokens} tokens are not {rows} rows of whole tiles of {CORE}")
    return Tiling(Axis(rows, CORE, HALO, BLEND), Axis(tokens // rows, CORE, HALO, BLEND, periodic=True))


def scene(network: Storm, tiling: Tiling, seed: int = 0) -> tuple[Tensor, Condition]:
    """A noisy state and its condition: random fields and memory with one token a grid point."""
    c = network.config
    grid = (tiling.y.length, tiling.x.length)
    g = torch.Generator().manual_seed(seed)
    latitude = torch.linspace(-89, 89, grid[0])
    longitude = torch.arange(grid[1]) * (360 / grid[1])
    static = torch.randn(1, c.static_channels, *grid, generator=g)
    memory = torch.randn(1, *grid, c.width, generator=g)
    state = torch.randn(1, c.channels, *grid, generator=g, dtype=torch.float64)
    return state, Condition(static, memory, sphere_position(latitude, longitude, (1, 1))[None], True)


def fastest(run: Callable[[], object], rounds: int = 1) -> float:
    """Seconds that the fastest of several rounds takes."""
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def generic_network(c: StormConfig, seed: int = 0) -> Storm:
    """A network of random weights, for evaluation only."""
    network = Storm(c)
    randomise(network, torch.Generator().manual_seed(seed))
    return network.eval().requires_grad_(False)


def ten_million(depth: int = 6) -> StormConfig:
    """The paper's "10M" with one token a grid point."""
    return replace(storm_10m(3, 3, (1, 1)), depth=depth)


def small() -> StormConfig:
    """The smallest preset with one token a grid point, the hardest case for overheads."""
    return tiny(3, 3, (1, 1))


# Growth


@dataclass(frozen=True)
class Method:
    """A way to denoise so many tokens: its counted multiply-adds and peak live bytes, and a run to time."""

    name: str
    multiply_adds: Callable[[int], int]
    peak_bytes: Callable[[int], int]
    prepare: Callable[[int], Callable[[], object]]


def methods(c: StormConfig) -> list[Method]:
    """The tiled denoiser, the same network untiled, and TimeSformer's divided attention over 8 frames in all."""
    network = generic_network(c)
    divided = DividedBlock(c.width, c.heads, c.mlp_ratio).eval().requires_grad_(False)
    sigma = torch.ones(1, dtype=torch.float64)

    def tiled(tokens: int) -> Callable[[], object]:
        x, condition = scene(network, band(tokens))
        denoise = tiled_denoiser(network, condition, band(tokens), tiles_per_batch=TILES_PER_BATCH)
        return lambda: denoise(x, sigma)

    def full(tokens: int) -> Callable[[], object]:
        x, condition = scene(network, band(tokens))
        denoise = denoiser(network, condition)
        return lambda: denoise(x, sigma)

    def timesformer(tokens: int) -> Callable[[], object]:
        x = torch.randn(1, FRAMES, tokens // FRAMES, c.width, generator=torch.Generator().manual_seed(0))
        return lambda: divided(x)

    return [
        Method(
            "tiled",
            lambda n: cost.tiled_evaluation(c, band(n)).multiply_adds,
            lambda n: peak_memory.peak_tiled(c, band(n), 4, tiles_per_batch=TILES_PER_BATCH),
            tiled,
        ),
        Method(
            "full", lambda n: cost.evaluation(c, n).multiply_adds, lambda n: peak_memory.peak_evaluation(c, n, 4), full
        ),
        Method(
            "timesformer",
            lambda n: cost.divided_block(c.width, FRAMES, n // FRAMES, c.mlp_ratio).multiply_adds,
            lambda n: (4 + 2 * c.mlp_ratio) * 4 * n * c.width,  # x, norm, MLP before and after gelu
            timesformer,
        ),
    ]


def counted(c: StormConfig, sizes: Sequence[int]) -> dict[str, float]:
    """Exponents of counted multiply-adds.

    In tokens: for all methods over the same sizes, and on squares of closed latitude from 4,096 to 1,048,576 tokens. In
    frames: of compressing K of them.
    """
    exponents = {m.name: cost.exponent([m.multiply_adds(n) for n in sizes], sizes) for m in methods(c)}
    frames = [1000, 6000, 30_000, 177_500]
    exponents["frames"] = cost.exponent([cost.memory(c, 3584, k).multiply_adds for k in frames], frames)
    square = [(64 << i) ** 2 for i in range(5)]
    closed = [Tiling.of((math.isqrt(n),) * 2, (CORE,) * 2, (HALO,) * 2, (BLEND,) * 2, True) for n in square]
    adds = [cost.tiled_evaluation(c, t).multiply_adds for t in closed]
    return exponents | {"tiled_closed_square": cost.exponent(adds, square)}


def growth(
    smallest: int = 4096,
    largest: int = 262_144,
    rounds: int = 2,
    c: StormConfig | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Records of (method, tokens, multiply_adds, peak_live_bytes, seconds) at sizes that double.

    The network is by default one block of the 10 M network.
    """
    c = ten_million(depth=1) if c is None else c
    sizes = [smallest << i for i in range(int(math.log2(largest // smallest)) + 1)]
    records: list[dict[str, Any]] = []
    seconds_limit = bytes_limit = math.inf
    for method in methods(c):
        last: dict[str, Any] | None = None
        for i, tokens in enumerate(sizes):
            adds = method.multiply_adds(tokens)
            expected = 0.0 if last is None else last["seconds"] * adds / last["multiply_adds"]
            if expected > seconds_limit or method.peak_bytes(tokens) > bytes_limit:
                break
            run = method.prepare(tokens)
            run()  # the first run fills caches: the tiles' conditions, the kernels' buffers
            seconds = fastest(run, rounds if tokens > 16_384 else 3 * rounds)
            last = {
                "method": method.name,
                "tokens": tokens,
                "multiply_adds": adds,
                "peak_live_bytes": method.peak_bytes(tokens),
                "seconds": seconds,
            }
            records.append(last)
            if progress is not None:
                progress(f"growth: {method.name}", i + 1, len(sizes), f"{tokens:,} tokens, {seconds:.2f} s")
        if method.name == "tiled" and last is not None:
            seconds_limit, bytes_limit = last["seconds"], last["peak_live_bytes"]
    return records


def time_exponent(records: Sequence[dict[str, Any]]) -> float:
    """The exponent of measured seconds in tokens."""
    return cost.exponent([r["seconds"] for r in records], [r["tokens"] for r in records])


# Tiles against one dense attention


def ratio_to_dense(
    side: int = 4, heads: int = 8, width: int = 256, rounds: int = 9, progress: Progress | None = None
) -> dict[str, float]:
    """The time of attention by side x side tiles of 48 x 48 tokens over that of one dense attention of equal cost.

    The tiles are cropped out of q, k and v of a doubly periodic domain and blended into one result, which the dense
    attention need not do. `ratio` is the median over rounds that take turns.
    """
    axis = Axis(side * CORE, CORE, HALO, BLEND, periodic=True)
    cut = tiles(Tiling(axis, axis))
    n = CORE + 2 * HALO
    g = torch.Generator().manual_seed(0)
    domain = torch.randn(3, axis.length, axis.length, width, generator=g)
    dense = torch.randn(3, 1, side * n * n, width, generator=g)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "three t n (a d) -> three t a n d", a=heads)
        return rearrange(attention(q, k, v), "t a n d -> t n (a d)")

    def by_tiles() -> Tensor:
        crops = torch.stack([domain[:, t.rows[:, None], t.cols].flatten(1, 2) for t in cut], 1)
        out = torch.zeros_like(domain[0])
        for t, value in zip(cut, rearrange(attend(crops), "t (i j) w -> t i j w", i=n), strict=True):
            out[t.rows[:, None], t.cols] += t.weight[..., None].to(value) * value
        return out

    def at_once() -> Tensor:
        return attend(dense)

    by_tiles()
    at_once()
    pairs = []
    for i in range(rounds):
        pairs.append((fastest(by_tiles), fastest(at_once)))
        if progress is not None:
            progress("tiles against one dense attention", i + 1, rounds, "")
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "tiles": len(cut),
        "tokens_of_a_tile": n * n,
        "tokens_dense": dense.shape[2],
        "multiply_adds": cost.attention(len(cut), n * n, n * n, width).multiply_adds,
        "multiply_adds_dense": cost.attention(1, dense.shape[2], dense.shape[2], width).multiply_adds,
        "seconds_tiles": min(a for a, _ in pairs),
        "seconds_dense": min(b for _, b in pairs),
    }


# The sampler


@contextmanager
def _timed(network: Storm) -> Iterator[list[float]]:
    """Collect the seconds of each forward pass of the network within the block."""
    seconds: list[float] = []
    handles = [
        network.register_forward_pre_hook(lambda *_: seconds.append(-time.perf_counter())),
        network.register_forward_hook(lambda *_: seconds.append(seconds.pop() + time.perf_counter())),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def sampler_overhead(
    c: StormConfig | None = None, steps: int = 3, tokens: int = 4096, members: int = 1
) -> dict[str, Any]:
    """The seconds of a sampling run by tiles, those of the network in it, and the overhead of everything else.

    Everything else is the sampler's arithmetic, preconditioning, cropping and blending.
    """
    c = ten_million() if c is None else c
    network, tiling = generic_network(c), band(tokens)
    _, condition = scene(network, tiling)
    denoise = tiled_denoiser(network, condition, tiling, tiles_per_batch=TILES_PER_BATCH)
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(members, c.channels, tiling.y.length, tiling.x.length, generator=g, dtype=torch.float64)
    with torch.no_grad():
        denoise(latents, torch.ones(members, dtype=torch.float64))  # crops of the conditions are made once an analysis
        with _timed(network) as passes:
            start = time.perf_counter()
            sample(denoise, latents, schedule(steps))
            total = time.perf_counter() - start
    return {
        "width": c.width,
        "depth": c.depth,
        "tokens": tokens,
        "members": members,
        "evaluations": 2 * steps - 1,
        "seconds": total,
        "seconds_network": sum(passes),
        "overhead": total / sum(passes) - 1,
    }
