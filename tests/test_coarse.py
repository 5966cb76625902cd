"""The coarse level: equal to the untiled network where that is demanded, and linear in cost."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from counting import Count
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import CONFIG, EPS, NETWORK, World, normal, world
from torch import Tensor

from storm_ref import cost
from storm_ref.attention import Block, MultiHead, layer_norm, modulate
from storm_ref.denoiser import Condition, Storm, denoiser, randomise
from storm_ref.experiments.coarse import (
    attend,
    block_step,
    blocks,
    coarse_denoiser,
    coarse_evaluation,
    coarse_pass,
    outside,
    pool,
)
from storm_ref.tiling import Axis, Tiling, tiled_denoiser
from storm_ref.workbench.prior.covariance import white

POINTS = replace(CONFIG, patch=(1, 1))
# Closed and periodic, hard and soft, a halo that spans several blocks, a short last core.
CUTS = [
    Tiling(Axis(6, 2, patch=1), Axis(12, 4, periodic=True)),
    Tiling(Axis(6, 2, 2, 1), Axis(12, 4, 2, 2, periodic=True)),  # the first two rows of tiles both begin at 0
    Tiling(Axis(6, 4, 1, 1), Axis(12, 3, 4, 1, periodic=True)),
    Tiling(Axis(6, 6), Axis(12, 5, 2, 1)),
]


def gap(w: World, tiling: Tiling, shape: tuple[int, int]) -> float:
    """Largest difference from the untiled denoiser, in units of its largest value."""
    want = denoiser(w.network, w.condition)(w.x, w.sigma)
    plain = white((w.network.config.channels, *w.x.shape[-2:]))
    got = coarse_denoiser(w.network, w.condition, tiling, plain, shape)(w.x, w.sigma)
    return float((got - want).abs().max() / want.abs().max())


def by_blocks(w: World, shape: tuple[int, int]) -> World:
    """The same world with states, static fields, memory and positions equal within each block; one point a token."""
    rows, cols = w.condition.position.shape[1:3]
    block = blocks(rows, cols, shape)
    first = torch.stack([torch.nonzero(block == g)[0, 0] for g in range(int(block.max()) + 1)])[block]

    def equal(t: Tensor, at: int) -> Tensor:
        return t.flatten(at, at + 1).index_select(at, first).unflatten(at, (rows, cols))

    c = w.condition
    told = replace(c, static=equal(c.static, 2), memory=equal(c.memory, 1), position=equal(c.position, 1))
    return replace(w, condition=told, x=equal(w.x, 2))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_blocks_are_as_equal_as_they_come(rows: int, cols: int, down: int, across: int) -> None:
    block = blocks(rows, cols, (down, across)).reshape(rows, cols)
    assert int(block.max()) + 1 == min(down, rows) * min(across, cols)
    for g in range(int(block.max()) + 1):
        i, j = torch.nonzero(block == g).T
        height, width = int(i.max() - i.min()) + 1, int(j.max() - j.min()) + 1
        assert height * width == len(i)
        assert abs(height - rows / min(down, rows)) < 1 and abs(width - cols / min(across, cols)) < 1


def test_pool_and_outside_value() -> None:
    """Against loops: integers, so exactly."""
    block, tokens = blocks(2, 4, (1, 2)), torch.arange(16.0).reshape(1, 8, 2) * 4
    want = torch.stack([tokens[0, [n for n in range(8) if block[n] == g]].mean(0) for g in range(2)])
    assert torch.equal(pool(tokens, block)[0], want)
    seen = torch.tensor([[0, 1, 4], [1, 2, 3], [5, 6, 7]])
    assert outside(seen, block).tolist() == [[1, 4], [3, 2], [3, 2]]


def test_attend_counts_equal_tokens() -> None:
    """A key that stands for m is m equal keys; one that stands for none is not there."""
    head = MultiHead(6, 2).double()
    x, context, counts = normal(2, 3, 6), normal(2, 4, 6, seed=1), [1, 3, 0, 2]
    many = torch.cat([context[:, [n]].expand(-1, m, -1) for n, m in enumerate(counts)], 1)
    weight = torch.tensor([[0.5, 1.0], [0.25, 2.0]], dtype=torch.float64)
    want = head(x, many, weight)
    pair = tuple(f(context).unflatten(-1, (2, 3)).transpose(1, 2) for f in (head.key, head.value))
    got = attend(head, x, (pair[0], pair[1]), torch.tensor([counts, counts]), weight)
    assert (got - want).abs().max() <= 32 * EPS * want.abs().max()


def test_block_step_of_tokens_alone_is_the_block() -> None:
    """[ATT-3]"""
    layer = Block(8, 2).double()
    randomise(layer, torch.Generator().manual_seed(0))
    x, memory, e = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(2, 8, seed=2)
    sigma = torch.tensor([0.3, 4.0], dtype=torch.float64)
    want = layer(x, memory, e, sigma)
    got, _ = block_step(layer, x, layer_norm(memory), e, sigma, torch.ones(2, 5, dtype=torch.long))
    assert (got - want).abs().max() <= NETWORK * want.abs().max()


def test_coarse_pass_pools_what_attention_sees() -> None:
    """Keys of the first layer: of LN1 of the mean of the state tokens, and of the mean of the normalised memory."""
    w, block = world((6, 12), True, config=POINTS), blocks(6, 12, (2, 3))
    network, c = w.network, w.condition
    sources = coarse_pass(network, w.x, w.sigma, c, block)
    layer, e = network.blocks[0], network.embed_sigma(w.sigma)
    shift, scale = layer.adaptive(torch.nn.functional.silu(e)).chunk(9, -1)[:2]
    near = layer.spatial.key(modulate(pool(network.embed(w.x, c.static, c.position), block), shift, scale))
    past = layer.temporal.key(pool(layer_norm(c.memory.flatten(1, 2)), block))
    for (keys, _), want in zip(sources[0], (near, past), strict=True):
        assert (keys.transpose(1, 2).flatten(2) - want).abs().max() <= NETWORK * want.abs().max()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_coarse_denoiser_with_one_tile_is_untiled(shape: tuple[int, int]) -> None:
    """It sees every block whole: no mean stands for anything."""
    w = world((8, 12), True)
    assert gap(w, Tiling.whole((8, 12), True, (2, 2)), shape) <= NETWORK


@pytest.mark.parametrize("tiling", CUTS, ids=str)
def test_coarse_denoiser_with_a_block_a_token_is_untiled(tiling: Tiling) -> None:
    """G = N: the coarse pass is the untiled network, and its tokens are exact. Plain tiles are far from it."""
    w = world((6, 12), tiling.x.periodic, config=POINTS)
    assert gap(w, tiling, (6, 12)) <= NETWORK
    assert gap(w, tiling, (99, 99)) <= NETWORK
    want = denoiser(w.network, w.condition)(w.x, w.sigma)
    assert (tiled_denoiser(w.network, w.condition, tiling)(w.x, w.sigma) - want).abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("shape", [(2, 3), (4, 5), (1, 1)])
@pytest.mark.parametrize("tiling", CUTS, ids=str)
def test_coarse_denoiser_is_exact_for_tokens_equal_within_blocks(tiling: Tiling, shape: tuple[int, int]) -> None:
    """Blocks that tiles see in part among them, and blocks of unequal size: 5 do not divide 12."""
    w = by_blocks(world((6, 12), tiling.x.periodic, config=POINTS), shape)
    assert gap(w, tiling, shape) <= NETWORK


def test_coarse_denoiser_with_patches_is_exact_for_a_block_a_token() -> None:
    w = world((8, 12), True)
    assert gap(w, Tiling(Axis(8, 4, 2, 2, patch=2), Axis(12, 4, 2, 2, True, 2)), (4, 6)) <= NETWORK


def test_coarse_denoiser_is_nearer_to_the_untiled_network_than_tiles_alone() -> None:
    """Smooth states; one sigma a member. Not a law: generic weights, and by a factor of two here."""
    w = world((6, 12), True, config=POINTS)
    i, j = torch.arange(6.0).double()[:, None], torch.arange(12.0).double()
    smooth = torch.sin(i / 3) + torch.cos(2 * torch.pi * j / 12)
    memory = smooth[None, :, :, None] * normal(2, 1, 1, POINTS.width)
    told = replace(w.condition, static=smooth.expand(2, 2, -1, -1), memory=memory)
    w = replace(w, x=smooth.expand(2, 2, -1, -1).contiguous(), condition=told)
    want = denoiser(w.network, w.condition)(w.x, w.sigma)
    plain = (tiled_denoiser(w.network, told, CUTS[0])(w.x, w.sigma) - want).abs().max() / want.abs().max()
    assert gap(w, CUTS[0], (3, 6)) < plain / 2


def test_coarse_denoiser_keeps_members_and_batches_apart() -> None:
    """Members alone and tiles_per_batch, tiles one by one and all at once, and a second call with other members."""
    w, tiling = world((6, 12), True, config=POINTS), CUTS[2]
    shared = replace(w.condition, static=w.condition.static[:1], memory=w.condition.memory[:1])
    plain = white((2, 6, 12))
    both = coarse_denoiser(w.network, shared, tiling, plain, (2, 3))
    want = both(w.x, w.sigma)
    for tiles_per_batch in (1, 5):
        one = coarse_denoiser(w.network, shared, tiling, plain, (2, 3), tiles_per_batch)
        parts = [one(w.x[m : m + 1], w.sigma[m : m + 1]) for m in range(2)]
        assert (torch.cat(parts) - want).abs().max() <= NETWORK * want.abs().max()
    assert (both(w.x[:1], w.sigma[:1]) - want[:1]).abs().max() <= NETWORK * want.abs().max()


@pytest.mark.parametrize(
    ("window", "shape", "message"), [(1, (2, 2), "window = None"), (None, (0, 2), "at least one block")]
)
def test_coarse_denoiser_invalid(window: int | None, shape: tuple[int, int], message: str) -> None:
    w = world((6, 12), True, config=replace(POINTS, window=window))
    with pytest.raises(ValueError, match=message):
        coarse_denoiser(w.network, w.condition, CUTS[0], white((2, 6, 12)), shape)


@pytest.mark.slow
@torch.no_grad()
@settings(max_examples=8)
@given(st.sampled_from(CUTS), st.integers(1, 2), st.sampled_from([3, 16]), st.integers(1, 7), st.integers(1, 7))
def test_coarse_evaluation_equals_count(
    tiling: Tiling, members: int, tiles_per_batch: int, down: int, across: int
) -> None:
    """[COST-1] multiply-adds."""
    network = Storm(POINTS)
    told = Condition(torch.zeros(1, 2, 6, 12), torch.zeros(members, 6, 12, 8), torch.zeros(1, 6, 12, 3).double())
    x, sigma = torch.zeros(members, 2, 6, 12).double(), torch.ones(members).double()
    # Without leading directions the covariance multiplies by matrices of no columns, which count for nothing.
    denoise = coarse_denoiser(network, told, tiling, white((2, 6, 12)), (down, across), tiles_per_batch)
    with Count() as count:
        denoise(x, sigma)
    want = coarse_evaluation(POINTS, tiling, (down, across), members, tiles_per_batch)
    assert count.total.multiply_adds == want.multiply_adds


def growing(counts: Sequence[int]) -> set[int]:
    return {b - a for a, b in pairwise(counts)}


@given(st.integers(1, 4), st.integers(1, 4))
def test_coarse_evaluation_affine_in_the_domain(down: int, across: int) -> None:
    """Bands of one height that grow: second differences are zero, whatever G."""
    cut = [Tiling(Axis(12, 4, 2, 1), Axis(4 * n, 4, 2, 1, True)) for n in (4, 6, 8, 10)]
    assert len(growing([coarse_evaluation(POINTS, t, (down, across)).multiply_adds for t in cut])) == 1
    assert len(growing([cost.evaluation(POINTS, 12 * t.x.length).multiply_adds for t in cut])) == 3
