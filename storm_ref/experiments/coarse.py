"""A coarse level for tiles: every tile also attends to G means of what lies outside it. An extension of ours.

It is outside the specification: neither the paper nor the normative chapters have it, T[D] of [TILE-6] does without it,
and a port need not have it. Nothing is trained for it: it uses a network's own weights.

The grid of tokens is cut into G nearly equal blocks J, with G the same for every domain. First the means of the
blocks go through the network among themselves, then every tile with them. With t the state tokens and m the memory
tokens of the whole domain, n_J the tokens of block J, and LN as in [ATT-2]:

    coarse    c_J = mean of t over block J,  M_J = mean of LN(m) over block J
    l = 1..L  c <- block_l(c, M), where both attentions raise the score of key J by ln n_J; kept: Y_J = LN1(c_J)
    tile i    x_i = its state tokens
    l = 1..L  x_i <- block_l(x_i, LN(m_i)), where self-attention sees the Y_J besides its own tokens, cross-attention
              the M_J besides its own memory, scores raised by ln m_iJ, m_iJ = tokens of J that tile i does not see

A mean stands for as many equal tokens, and for none where the tile sees the whole block. Tiles are blended as in
[TILE-6], and exchange nothing but the coarse pass. With one tile, with G = N, or with tokens and
memory equal within each block, this is the untiled network to rounding. One evaluation costs that of its tiles,
4 L G D multiply-adds for each of their tokens, the embedding of N tokens, and L blocks of G tokens: linear in N.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from storm_ref import cost
from storm_ref.attention import Block, MultiHead, layer_norm, modulate, noise_gate
from storm_ref.config import StormConfig
from storm_ref.cost import Cost
from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise
from storm_ref.tiling import Tile, Tiling, blend_tiles, once_per_batch, tiles
from storm_ref.workbench.prior.covariance import Covariance, precondition

__all__ = ["attend", "block_step", "blocks", "coarse_denoiser", "coarse_evaluation", "coarse_pass", "outside", "pool"]

Pair = tuple[Tensor, Tensor]  # keys and values of one attention, [b a m d]
Sources = tuple[Pair, Pair]  # those of self-attention, and those of cross-attention to memory


def blocks(rows: int, cols: int, shape: tuple[int, int]) -> Int[Tensor, " n"]:
    """The block of each token, row-major, with `shape` blocks along latitude and longitude, at most one a token.

    Raises ValueError for a shape without blocks.
    """
    if min(shape) < 1:
        raise ValueError(f"a coarse level needs at least one block along each axis, got {shape}")
    down, across = min(shape[0], rows), min(shape[1], cols)
    i, j = torch.arange(rows) * down // rows, torch.arange(cols) * across // cols
    return (i[:, None] * across + j).flatten()


def pool(tokens: Float[Tensor, "b n d"], block: Int[Tensor, " n"]) -> Float[Tensor, "b g d"]:
    """The mean of the tokens of each block."""
    count = torch.bincount(block)
    total = tokens.new_zeros(tokens.shape[0], len(count), tokens.shape[2]).index_add(1, block, tokens)
    return total / count[:, None].to(tokens)


def outside(seen: Int[Tensor, "t n"], block: Int[Tensor, " all"]) -> Int[Tensor, "t g"]:
    """The numbers m_iJ of tokens of each block that are not among those each tile sees."""
    count = torch.bincount(block)
    inside = torch.zeros(len(seen), len(count), dtype=count.dtype)
    return count - inside.scatter_add(1, block[seen], torch.ones_like(seen))


def attend(
    head: MultiHead,
    x: Float[Tensor, "b n w"],
    pair: tuple[Float[Tensor, "b a m d"], Float[Tensor, "b a m d"]],
    stands_for: Int[Tensor, "b m"],
    weight: Float[Tensor, "b a"],
) -> Float[Tensor, "b n w"]:
    """W_o[weight_a A_a], [ATT-1] with each key standing for so many equal ones: its score raised by their logarithm."""
    q = rearrange(head.query(x), "b n (a d) -> b a n d", a=head.heads)
    raised = stands_for.to(q).log()[:, None, None].expand(-1, -1, x.shape[1], -1)
    y = F.scaled_dot_product_attention(q, *pair, attn_mask=raised) * weight[:, :, None, None]
    return head.out(rearrange(y, "b a n d -> b n (a d)"))  # type: ignore[no-any-return]


def _pair(head: MultiHead, context: Tensor) -> Pair:
    keys, values = (rearrange(f(context), "b m (a d) -> b a m d", a=head.heads) for f in (head.key, head.value))
    return keys, values


def block_step(
    layer: Block,
    x: Float[Tensor, "b n w"],
    memory: Float[Tensor, "b n w"],
    embedding: Float[Tensor, "b w"],
    sigma: Float[Tensor, " b"],
    stands_for: Int[Tensor, "b m"],
    afar: Sources | None = None,
) -> tuple[Float[Tensor, "b n w"], Sources]:
    """One block, [ATT-3], on tokens x and LN(memory), which attend also to the distant keys and values in `afar`.

    Returns the tokens and their own keys and values. `stands_for` is the number of tokens that each key stands for, own
    keys first.
    """
    nine = layer.adaptive(F.silu(embedding)).chunk(9, -1)
    shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine
    gamma = noise_gate(sigma, layer.gate_alpha, layer.gate_beta).to(x.dtype)
    y = modulate(x, shift1, scale1)
    own = _pair(layer.spatial, y), _pair(layer.temporal, memory)
    near, past = own if afar is None else (_beside(a, b) for a, b in zip(own, afar, strict=True))
    x = x + gate1[:, None] * attend(layer.spatial, y, near, stands_for, 1 - gamma)
    y = modulate(x, shift2, scale2)
    x = x + gate2[:, None] * attend(layer.temporal, y, past, stands_for, gamma)
    return x + gate3[:, None] * layer.mlp(modulate(x, shift3, scale3)), own


def _beside(own: Pair, afar: Pair) -> Pair:
    """Append distant keys and values [b a g d], shared by the tiles of a batch, to own ones [t b a n d], tile-major."""
    times = len(own[0]) // len(afar[0])
    keys, values = (torch.cat([a, b.repeat(times, 1, 1, 1)], 2) for a, b in zip(own, afar, strict=True))
    return keys, values


def coarse_pass(
    network: Storm,
    z: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    condition: Condition,
    block: Int[Tensor, " n"],
) -> list[Sources]:
    """Pass the means through the network among themselves, with z = c_in x; returns keys and values of each layer."""
    batch = len(z)
    c = pool(network.embed(z, condition.static.to(z).expand(batch, -1, -1, -1), condition.position), block)
    memory = pool(_normalised(condition, z), block).expand(batch, -1, -1)
    embedding, size, sources = network.embed_sigma(sigma), torch.bincount(block).expand(batch, -1), []
    for layer in network.blocks:
        assert isinstance(layer, Block)
        c, own = block_step(layer, c, memory, embedding, sigma, size)
        sources.append(own)
    return sources


def _normalised(condition: Condition, like: Tensor) -> Tensor:
    return layer_norm(rearrange(condition.memory.to(like), "b i j d -> b (i j) d"))


def _tile_pass(
    network: Storm, z: Tensor, sigma: Tensor, told: Condition, stands_for: Tensor, sources: Sequence[Sources]
) -> Tensor:
    """F of a batch of tiles that also see the coarse level."""
    x = network.embed(z, told.static.to(z), told.position)
    memory, embedding = _normalised(told, z), network.embed_sigma(sigma)
    for layer, afar in zip(network.blocks, sources, strict=True):
        assert isinstance(layer, Block)
        x, _ = block_step(layer, x, memory, embedding, sigma, stands_for, afar)
    return network.finish(x, embedding, told.position.shape[-3])


def coarse_denoiser(
    network: Storm,
    condition: Condition,
    tiling: Tiling,
    covariance: Covariance,
    shape: tuple[int, int],
    tiles_per_batch: int = 16,
) -> Denoise:
    """The denoiser D(x; s) of one analysis by tiles that also see `shape` blocks along latitude and longitude.

    With `covariance.white(shape, sigma_d^2)` it has the preconditioning of [EDM-1]. Raises ValueError for windowed
    attention, which is meant to see nothing distant, and for a shape without blocks.
    """
    if network.config.window is not None:
        raise ValueError("windowed attention sees nothing beyond its window: a coarse level needs window = None")
    dtype, patch = network.final.weight.dtype, network.config.patch
    rows, cols = condition.position.shape[1:3]
    block = blocks(rows, cols, shape)

    def prepare(batch: Sequence[Tile], members: int) -> tuple[Condition, Tensor]:
        cropped = Condition.stack([condition.crop(t.rows, t.cols, patch) for t in batch], members)
        seen = torch.stack([_tokens(t, patch, cols) for t in batch])
        counts = torch.cat([torch.ones_like(seen), outside(seen, block)], 1)
        return cropped, counts.repeat_interleave(members, 0)

    prepared = once_per_batch(prepare)

    def evaluate(z: Tensor, sigma: Tensor) -> Tensor:
        sources, members = coarse_pass(network, z, sigma, condition, block), len(z)

        def evaluate_batch(part: Tensor, s: Tensor, batch: Sequence[Tile]) -> Tensor:
            return _tile_pass(network, part, s, *prepared(batch, members), sources)

        return blend_tiles(evaluate_batch, tiling, tiles_per_batch)(z, sigma)

    return lambda x, sigma: precondition(evaluate, x, sigma, covariance, dtype)


def _tokens(tile: Tile, patch: tuple[int, int], cols: int) -> Int[Tensor, " n"]:
    i, j = tile.rows[:: patch[0]] // patch[0], tile.cols[:: patch[1]] // patch[1]
    return (i[:, None] * cols + j).flatten()


def coarse_evaluation(
    c: StormConfig, tiling: Tiling, shape: tuple[int, int], members: int = 1, tiles_per_batch: int = 16
) -> Cost:
    """The cost of one evaluation of `coarse_denoiser`, [COST-1], which is affine in the numbers of tiles and tokens."""
    rows, cols = tiling.y.length // c.patch[0], tiling.x.length // c.patch[1]
    means = min(shape[0], rows) * min(shape[1], cols)
    embed = cost.state_tokens(c, members * rows * cols) + cost.position_code(c, rows * cols)
    total = embed + cost.noise_embedding(c, members) + c.depth * cost.block(c, means, members)
    total += cost.tiled_evaluation(c, tiling, members, tiles_per_batch)
    for n, count in Counter(t.weight.numel() // (c.patch[0] * c.patch[1]) for t in tiles(tiling)).items():
        pair = 2 * members * count * means * c.width
        total += 2 * c.depth * Cost(n * pair, pair)
    return total
