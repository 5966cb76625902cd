"""Stated costs: multiply-adds of the products of matrices in the equations, [COST-1], counted map by map.

Scores and weighted sums of the memory and both products of attention count at full size, also under a window.
"""

from conformance.adapters.numpy.tiling import Axis, check_patches
from conformance.adapters.numpy.tokens import Config, tokens_of

__all__ = ["compression", "evaluation", "tiled_evaluation"]


def compression(c: Config, tokens: int, frames: int) -> int:
    """Compressing `frames` frames of `tokens` tokens, [COST-3]: position codes and the output projection come once."""
    d, features = c.width, (c.channels + c.static_channels) * c.patch[0] * c.patch[1]
    embedding, keys_and_values, scores_and_sum = features * d, 2 * d**2, 2 * d
    age_code, position_code = 2 * c.position_octaves * d, 2 * c.position_features * c.position_octaves * d
    each_frame = tokens * (embedding + keys_and_values + scores_and_sum) + age_code
    return frames * each_frame + tokens * (position_code + d**2)


def evaluation(c: Config, tokens: int) -> int:
    """One evaluation of the network on a tile of `tokens` tokens, [COST-2]."""
    pixels, d = c.patch[0] * c.patch[1], c.width
    projections, attention, perceptron = 8 * tokens * d**2, 4 * d * tokens**2, 2 * c.mlp_ratio * tokens * d**2
    block = projections + attention + perceptron + 9 * d**2
    embedding = (c.channels + c.static_channels) * pixels * d + 2 * c.position_features * c.position_octaves * d
    noise, final = c.noise_features * d + d**2, tokens * c.channels * pixels * d + 2 * d**2
    return c.depth * block + tokens * embedding + noise + final


def tiled_evaluation(c: Config, y: Axis, x: Axis) -> int:
    """One evaluation of every tile, each as much as a domain of its size, [COST-2]."""
    check_patches(c.patch, y, x)
    sizes = [tokens_of((len(rows), len(cols)), c.patch) for rows in y.extents for cols in x.extents]
    return sum(evaluation(c, rows * cols) for rows, cols in sizes)
