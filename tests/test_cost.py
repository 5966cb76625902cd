"""[COST-1] to [COST-5]: formulas equal to counts on running code and to the equations, and growing as the spec says."""

import pytest
import torch
import torch.nn.functional as F
from counting import Count, Live
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from storm_ref import cost
from storm_ref.attention import Block, DividedBlock, SpaceTimeBlock, attention_by_definition, window_mask
from storm_ref.config import StormConfig
from storm_ref.cost import Cost
from storm_ref.denoiser import Condition, Storm, denoiser
from storm_ref.edm import sample, schedule
from storm_ref.experiments import peak_memory
from storm_ref.tiling import Axis, Tiling, tiled_denoiser

DTYPES = {4: torch.float32, 8: torch.float64}
CONFIG = StormConfig(2, 1, (1, 2), 8, 2, 2, position_octaves=2, noise_features=4)


@st.composite
def configs(draw: st.DrawFn, least: int = 1) -> StormConfig:
    """Any network, small; heads of at least `least` numbers."""
    heads = draw(st.integers(1, 3))
    return StormConfig(
        channels=draw(st.integers(1, 3)),
        static_channels=draw(st.integers(0, 6)),
        patch=(draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        width=heads * draw(st.integers(least, 6)),
        heads=heads,
        depth=draw(st.integers(1, 2)),
        mlp_ratio=draw(st.integers(1, 4)),
        position_features=draw(st.integers(1, 3)),
        position_octaves=draw(st.integers(1, 4)),
        noise_features=2 * draw(st.integers(1, 3)),
        window=draw(st.none() | st.integers(0, 2)),
    )


@st.composite
def axes(draw: st.DrawFn, patch: int, least: int = 1) -> Axis:
    """Any axis of cores of at least `least` tokens, one to three tiles, a shorter last one among them."""
    core, count, periodic = draw(st.integers(least, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    if count == 1:
        return Axis(core * patch, core * patch, periodic=periodic, patch=patch)
    halo = draw(st.integers(0, (count - 1) * core // 2 if periodic else core + 1))
    blend = draw(st.integers(0, min(halo, core // 2)))
    last = core if periodic else draw(st.integers(max(blend, least), core))
    length = (count - 1) * core + last
    return Axis(length * patch, core * patch, halo * patch, blend * patch, periodic, patch)


@st.composite
def domains(draw: st.DrawFn, least: int = 1, width: int = 1) -> tuple[StormConfig, Tiling]:
    """A network, and tiles of its patches."""
    c = draw(configs(width))
    return c, Tiling(draw(axes(c.patch[0], least)), draw(axes(c.patch[1], least)))


def cells(tiling: Tiling) -> tuple[int, int]:
    return tiling.y.length // tiling.y.patch, tiling.x.length // tiling.x.patch


def condition(c: StormConfig, tiling: Tiling, members: int, dtype: torch.dtype = torch.float32) -> Condition:
    rows, cols = cells(tiling)
    static = torch.zeros(1, c.static_channels, tiling.y.length, tiling.x.length, dtype=dtype)
    memory = torch.zeros(members, rows, cols, c.width, dtype=dtype)
    return Condition(static, memory, torch.zeros(1, rows, cols, c.position_features, dtype=torch.float64))


def state(c: StormConfig, tiling: Tiling, members: int) -> tuple[Tensor, Tensor]:
    x = torch.zeros(members, c.channels, tiling.y.length, tiling.x.length, dtype=torch.float64)
    return x, torch.ones(members, dtype=torch.float64)


def past(c: StormConfig, rows: int, cols: int, frames: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Make the arguments of `Storm.compress`, but for the chunk."""
    lead, grid = (batch, frames), (rows * c.patch[0], cols * c.patch[1])
    fields = (torch.zeros(*lead, channels, *grid, dtype=dtype) for channels in (c.channels, c.static_channels))
    age = torch.arange(1, frames + 1, dtype=torch.float64).repeat(batch, 1)
    return *fields, age, torch.zeros(rows, cols, c.position_features, dtype=torch.float64)


# Formula and count: multiply-adds and numbers moved


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=25)
@given(domains(), st.integers(1, 3), st.sampled_from([1, 2, 16]), st.sampled_from([*DTYPES.values(), torch.bfloat16]))
def test_tiled_evaluation_equals_count(
    domain: tuple[StormConfig, Tiling], members: int, tiles_per_batch: int, dtype: torch.dtype
) -> None:
    """[COST-1] [COST-2] [TILE-10]"""
    c, tiling = domain
    denoise = tiled_denoiser(Storm(c).to(dtype), condition(c, tiling, members, dtype), tiling, tiles_per_batch)
    with Count() as count:
        denoise(*state(c, tiling, members))
    assert count.total == cost.tiled_evaluation(c, tiling, members, tiles_per_batch)


@torch.no_grad()
@settings(max_examples=25)
@given(domains(), st.integers(1, 3))
def test_evaluation_equals_count(domain: tuple[StormConfig, Tiling], members: int) -> None:
    """[COST-2], and of its parts."""
    c, tiling = domain
    network, told, (rows, cols) = Storm(c), condition(c, tiling, members), cells(tiling)
    n, x = rows * cols, state(c, tiling, members)
    tokens, embedding, sigma = torch.zeros(members, n, c.width), torch.zeros(members, c.width), x[1]
    mask = None if c.window is None else window_mask(rows, cols, c.window, False)
    block = Block(c.width, c.heads, c.mlp_ratio)
    state_tokens = cost.state_tokens(c, members * n) + cost.position_code(c, n)
    parts = [
        (lambda: denoiser(network, told)(*x), cost.evaluation(c, n, members)),
        (
            lambda: network.embed(x[0].float(), told.static.expand(members, -1, -1, -1), told.position),
            state_tokens,
        ),
        (lambda: network.embed_sigma(sigma), cost.noise_embedding(c, members)),
        (lambda: block(tokens, tokens, embedding, sigma, mask), cost.block(c, n, members)),
        (lambda: block.spatial(tokens, tokens), cost.multi_head(members, n, n, c.width)),
        (lambda: block.mlp(tokens), cost.mlp(members * n, c.width, c.mlp_ratio)),
        (lambda: network.finish(tokens, embedding, rows), cost.output(c, n, members)),
    ]
    for run, formula in parts:
        with Count() as count:
            run()
        assert count.total == formula


@torch.no_grad()
@given(configs(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 8), st.integers(1, 2))
def test_memory_equals_count(c: StormConfig, rows: int, cols: int, frames: int, chunk: int, batch: int) -> None:
    """[COST-3], with chunks that do not divide the frames and chunks of one frame."""
    network, inputs = Storm(c), past(c, rows, cols, frames, batch, torch.float32)
    with Count() as count:
        network.compress(*inputs, chunk)
    assert count.total == cost.memory(c, rows * cols, frames, chunk, batch)


@torch.no_grad()
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 2))
def test_baselines_equal_count(heads: int, size: int, frames: int, n: int, ratio: int, batch: int) -> None:
    width = heads * size
    x = torch.zeros(batch, frames, n, width)
    for block, formula in ((SpaceTimeBlock, cost.space_time_block), (DividedBlock, cost.divided_block)):
        with Count() as count:
            block(width, heads, ratio)(x)
        assert count.total == formula(width, frames, n, ratio, batch)


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 5])
def test_sampling_equals_count(steps: int) -> None:
    """[EDM-7] 2 n - 1 evaluations."""
    tiling = Tiling(Axis(4, 2, 1), Axis(8, 4, 2, 2, True, 2))
    denoise = tiled_denoiser(Storm(CONFIG), condition(CONFIG, tiling, 2), tiling)
    with Count() as count:
        sample(denoise, state(CONFIG, tiling, 2)[0], schedule(steps))
    assert count.total == cost.sampling(cost.tiled_evaluation(CONFIG, tiling, 2), steps)


# Formula and equation


@given(configs(), st.integers(1, 10**6))
def test_evaluation_value(c: StormConfig, n: int) -> None:
    """[COST-2] for one tile, as the chapter writes it."""
    v, codes, d = c.patch[0] * c.patch[1], 2 * c.position_features * c.position_octaves, c.width
    tokens = n * d * ((2 * c.channels + c.static_channels) * v + codes)
    blocks = c.depth * (9 * d**2 + (8 + 2 * c.mlp_ratio) * n * d**2 + 4 * d * n**2)
    assert cost.evaluation(c, n).multiply_adds == tokens + d * (c.noise_features + 3 * d) + blocks


@given(configs(), st.integers(1, 10**6), st.integers(1, 10**6))
def test_memory_value(c: StormConfig, n: int, frames: int) -> None:
    """[COST-3]"""
    values, codes, d = (c.channels + c.static_channels) * c.patch[0] * c.patch[1], 2 * c.position_octaves, c.width
    shared = c.position_features * codes + d
    want = n * d * (frames * (values + 2 * d + 2) + shared) + frames * codes * d
    assert cost.memory(c, n, frames).multiply_adds == want


@given(st.integers(1, 64), st.integers(1, 100), st.integers(1, 10**5))
def test_baselines_value(d: int, frames: int, n: int) -> None:
    """17 T N D^2 + 2 D T N (T + N), and 12 T N D^2 + 2 D (T N)^2."""
    tokens = frames * n
    assert cost.divided_block(d, frames, n).multiply_adds == 17 * tokens * d**2 + 2 * d * tokens * (frames + n)
    assert cost.space_time_block(d, frames, n).multiply_adds == 12 * tokens * d**2 + 2 * d * tokens**2


def test_linear_and_attention_value() -> None:
    """[COST-1] 3 x 5 times 5 x 7; 2 x (3 x 4 x 8) for each of two samples. Bytes: what is read and written, once."""
    assert cost.linear(3, 5, 7) == Cost(105, 15 + 35 + 21)
    assert cost.attention(2, 3, 4, 8) == Cost(384, 2 * (24 + 32 + 32 + 24))
    assert cost.linear(3, 5, 7).bytes_moved(4) == 284


# Peak live bytes


@pytest.mark.slow
@torch.no_grad()
@given(domains(least=2, width=2), st.integers(1, 2), st.sampled_from([*DTYPES]))
def test_peak_evaluation_equals_count(domain: tuple[StormConfig, Tiling], members: int, itemsize: int) -> None:
    c, tiling = domain
    dtype, (rows, cols), x = DTYPES[itemsize], cells(tiling), state(c, tiling, members)
    denoise = denoiser(Storm(c).to(dtype), condition(c, tiling, members, dtype))
    with Live() as live:
        denoise(*x)
    assert live.peak == peak_memory.peak_evaluation(c, rows * cols, itemsize, members)
    assert live.now == 0


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=25)
@given(domains(least=2, width=2), st.integers(1, 2), st.sampled_from([1, 2, 16]), st.sampled_from([*DTYPES]))
def test_peak_tiled_equals_count(
    domain: tuple[StormConfig, Tiling], members: int, tiles_per_batch: int, itemsize: int
) -> None:
    """From the second evaluation on: in the first the cropped conditions are still coming."""
    c, tiling = domain
    dtype, x = DTYPES[itemsize], state(c, tiling, members)
    denoise = tiled_denoiser(Storm(c).to(dtype), condition(c, tiling, members, dtype), tiling, tiles_per_batch)
    with Live() as live:
        denoise(*x)
        live.peak = 0
        denoise(*x)
    assert live.peak == peak_memory.peak_tiled(c, tiling, itemsize, members, tiles_per_batch)


@torch.no_grad()
@given(
    configs(2), st.integers(2, 4), st.integers(2, 4), st.integers(2, 5), st.integers(1, 2), st.sampled_from([*DTYPES])
)
def test_peak_memory_equals_count_whatever_the_frames(
    c: StormConfig, rows: int, cols: int, chunk: int, batch: int, itemsize: int
) -> None:
    """[COST-4] the peak of two chunks is that of five; the state between chunks has N (D + 2 A) numbers a member."""
    network, n = Storm(c).to(DTYPES[itemsize]), rows * cols
    for chunks in (1, 2, 5):
        inputs = past(c, rows, cols, chunks * chunk, batch, DTYPES[itemsize])
        with Live() as live:
            network.compress(*inputs, chunk)
        assert live.peak == peak_memory.peak_compression(c, n, chunk, itemsize, batch, first=chunks == 1)
        held = network.compress_chunk(None, *inputs)
        numbers = held.maximum.numel() + held.denominator.numel() + held.accumulator.numel()
        assert numbers == cost.memory_state(c, n, batch) == batch * n * (c.width + 2 * c.heads)


# What is refused


@pytest.mark.parametrize(("frames", "chunk"), [(0, None), (-1, None), (3, 0)])
def test_memory_invalid_no_frame(frames: int, chunk: int | None) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        cost.memory(CONFIG, 4, frames, chunk)


def test_tiled_evaluation_invalid_patch() -> None:
    tiling = Tiling(Axis(4, 2), Axis(8, 4))
    with pytest.raises(ValueError, match="patches of 1 x 1"):
        cost.tiled_evaluation(CONFIG, tiling)
    with pytest.raises(ValueError, match="patches of 1 x 1"):
        peak_memory.peak_tiled(CONFIG, tiling, 4)


# The counters themselves


def test_count_of_attention_by_any_kernel() -> None:
    """The fused kernel, its plain form and the written equation have the same multiply-adds, with and without mask."""
    q, k = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6, 5)
    mask = torch.ones(4, 6, dtype=torch.bool)
    for masked in (None, mask):
        counts = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(backend), Count() as count:
                F.scaled_dot_product_attention(q, k, k, attn_mask=masked)
            counts.append(count.total.multiply_adds)
        with Count() as count:
            attention_by_definition(q, k, k, masked)
        assert [*counts, count.total.multiply_adds] == [2 * 2 * 3 * 4 * 6 * 5] * 3


@pytest.mark.parametrize("size", [1, 2])
def test_count_of_einsum_with_and_without_a_matrix_product(size: int) -> None:
    """Torch multiplies elementwise where the summed dimension has size one."""
    a, b = torch.zeros(3, size), torch.zeros(size, 4)
    with Count() as count:
        torch.einsum("ij,jk->ik", a, b)
        a + a * 2
    assert count.total == Cost(12 * size, 3 * size + 4 * size + 12)


def test_live_counts_storages_once() -> None:
    """Views and results in place take no bytes; what is let go no longer counts."""
    outside = torch.zeros(100)
    with Live() as live:
        kept = outside + 1
        half = kept[:50].view(5, 10)
        kept += 1
        gone = outside.double()
        del gone
        outside.mul_(2)
    assert (live.peak, live.now) == (400 + 800, 400)
    del kept
    assert live.now == 400
    del half
    assert live.now == 0
