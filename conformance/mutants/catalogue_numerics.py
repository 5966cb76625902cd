"""Wrong ports of chapter 10, low precision where it does not belong and bits that change; and of what things cost."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.adapters import reference_operations as adapter
from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref import attention, cost, denoiser, edm, memory, tiling
from storm_ref.cost import Cost
from storm_ref.denoiser import Storm

__all__ = ["COST", "NUMERICS"]

_attention, _bind, _norm, _gradients = attention.attention, denoiser.denoiser, attention.layer_norm, adapter._gradients
_linear, _memory = cost.linear, cost.memory


def _ten_bits(x: Tensor) -> Tensor:
    """Rounded to a mantissa of 10 bits, as TF32 rounds the factors of a product; gradients pass."""
    wide = x.detach().double()
    _, exponent = torch.frexp(wide)
    unit = torch.ldexp(torch.ones_like(wide), exponent - 11)
    return x + (((wide / unit).round() * unit).to(x.dtype) - x).detach()


def _tf32_linear(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(_ten_bits(x), _ten_bits(self.weight), self.bias)


def _tf32_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return _attention(_ten_bits(q), _ten_bits(k), _ten_bits(v), mask)


def _half_weights(self: nn.Linear, x: Tensor) -> Tensor:
    """Weights stored with 8 bits less than the network's dtype has: bfloat16 for float32."""
    return F.linear(
        x, self.weight.bfloat16().to(x.dtype) if x.dtype != torch.bfloat16 else _few_bits(self.weight), self.bias
    )


def _few_bits(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2).to(x.dtype)


def _half_sums(self: nn.Linear, x: Tensor) -> Tensor:
    """Products summed one after another in bfloat16."""
    total = torch.zeros(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)
    for i in range(x.shape[-1]):
        total = total + (x[..., i, None] * self.weight[:, i]).bfloat16()
    out = total.to(x.dtype)
    return out if self.bias is None else out + self.bias


def _half_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    score = q @ k.mT / q.shape[-1] ** 0.5
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    return torch.softmax(score.bfloat16(), -1).to(v.dtype) @ v


def _not_shifted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Exponentials of the scores as they stand."""
    weight = torch.exp(q @ k.mT / q.shape[-1] ** 0.5)
    weight = weight if mask is None else weight * mask
    return weight @ v / weight.sum(-1, keepdim=True)


def _quick_variance(x: Tensor) -> Tensor:
    """var = mean of squares minus square of the mean, which cancels on nearly constant tokens."""
    mean = x.mean(-1, keepdim=True)
    variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return (x - mean) / (variance + 1e-6).sqrt()


def _wandering_order(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Keys in another order at every call, as atomic sums have it."""
    order = torch.randperm(k.shape[-2])
    return _attention(q, k[:, :, order], v[:, :, order], None if mask is None else mask[:, order])


def _dropping(x: Tensor) -> Tensor:
    """Dropout left on."""
    return F.dropout(_norm(x), 0.1)


def _small_gradients(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value if name == "loss" else _few_bits(value) for name, value in _gradients(i, p).items()}


_SUMS = "torch.exp(score - maximum[:, None])"

NUMERICS = chapter(
    "numerics",
    ("tf32_products", "products of matrices round their factors to 10 bits, as TF32 does", "NUM-9 NUM-8",
     (nn.Linear, "forward", _tf32_linear), (attention, "attention", _tf32_attention)),
    ("weights_stored_narrow", "weights are stored with fewer bits than the network has", "NUM-9 NUM-8",
     (nn.Linear, "forward", _half_weights)),
    ("sums_in_bfloat16", "products are summed in bfloat16", "NUM-9 NUM-8", (nn.Linear, "forward", _half_sums)),
    ("softmax_in_bfloat16", "the softmax of attention is computed in bfloat16", "NUM-9 NUM-8",
     (attention, "attention", _half_softmax)),
    ("layer_norm_in_bfloat16", "layer norm is computed in bfloat16", "NUM-8 ATT-2",
     (attention, "layer_norm", lambda x: _norm(x.bfloat16()).to(x.dtype))),
    ("layer_norm_quick_variance", "layer norm subtracts the squared mean from the mean square", "ATT-2",
     (attention, "layer_norm", _quick_variance)),
    ("attention_not_shifted", "exponentials of attention's scores are taken as they stand", "ATT-1",
     (attention, "attention", _not_shifted)),
    ("memory_fast_exp", "the memory's exponential is an approximation to three digits", "MEM-3 NUM-8",
     (memory, "memory_update", edit(_SUMS, "(1 + (score - maximum[:, None]) / 1024).clamp(min=0) ** 1024"))),
    ("residual_in_bfloat16", "tokens are rounded to bfloat16 between blocks", "NUM-8",
     (Storm, "forward",
      edit("t = block(t, memory, e, sigma, mask)", "t = block(t, memory, e, sigma, mask).bfloat16().to(t.dtype)"))),
    ("denoised_narrow", "D is returned with the digits of float32", "NUM-9 CONV-9",
     (edm, "precondition", edit(".to(x.dtype)", ".float().to(x.dtype)"))),
    ("tiles_in_bfloat16", "tiles' results are rounded to bfloat16 before the blend", "NUM-9 TILE-5",
     (tiling, "blend_tiles",
      edit("tile.weight.to(value) * value", "tile.weight.to(value) * value.bfloat16().to(value)"))),
    ("gradients_in_eight_bits", "gradients are stored in eight bits", "NUM-9 EDM-3",
     (adapter, "_gradients", _small_gradients)),
    ("bits_wander", "sums run in another order at every call", "NUM-12", (attention, "attention", _wandering_order)),
    ("dropout_left_on", "dropout is on", "NUM-12 ATT-2", (attention, "layer_norm", _dropping)),
)  # fmt: skip


def _doubled(rows: int, inner: int, out: int) -> Cost:
    cost = _linear(rows, inner, out)
    return Cost(2 * cost.multiply_adds, cost.numbers)


def _biased(rows: int, inner: int, out: int) -> Cost:
    cost = _linear(rows, inner, out)
    return Cost(cost.multiply_adds + rows * out, cost.numbers)


def _cost(name: str, *pieces: str) -> Patch:
    return (cost, name, edit(*pieces))


def _span(*pieces: str) -> Patch:
    return (tiling, "spans", edit(*pieces))


_ATTENTION_COUNT = "Cost(2 * batch * n * m * width, "

COST = chapter(
    "cost",
    ("operations_counted", "a multiplication and its addition count as two", "COST-1", (cost, "linear", _doubled)),
    ("biases_counted", "biases count too", "COST-1", (cost, "linear", _biased)),
    ("one_product_of_attention", "attention counts its scores alone", "COST-1 COST-2",
     _cost("attention", _ATTENTION_COUNT, "Cost(batch * n * m * width, ")),
    ("attention_linear_in_tokens", "attention counts as linear in the tokens", "COST-2",
     _cost("attention", _ATTENTION_COUNT, "Cost(2 * batch * n * width, ")),
    ("cross_attention_not_counted", "cross-attention is not counted", "COST-2",
     _cost("block", "2 * multi_head", "multi_head")),
    ("adaptive_norm_a_token", "adaptive layer norm counts once a token", "COST-2",
     _cost("block", "linear(batch, c.width, 9 * c.width)", "linear(batch * n, c.width, 9 * c.width)")),
    ("mlp_ratio_four", "the MLP counts with a ratio of 4, whatever the configuration says", "COST-2",
     _cost("block", "c.mlp_ratio", "4")),
    ("window_saves_products", "products that a window masks are not counted", "COST-1",
     _cost("block", "2 * multi_head(batch, n, n, c.width)",
         "2 * multi_head(batch, n, n if c.window is None else min(n, (2 * c.window + 1) ** 2), c.width)")),
    ("halo_not_counted", "halos are not counted", "COST-2 TILE-10",
     _span("start - axis.halo, stop + axis.halo", "start, stop")),
    ("halo_beyond_the_edge_counted", "tiles at a closed edge count with whole halos", "COST-2 TILE-3 TILE-10",
     _span("if axis.periodic:", "if True:")),
    ("halo_clipped_at_date_line", "tiles at the date line count with clipped halos", "COST-2 TILE-3 TILE-10",
     _span("if axis.periodic:", "if False:")),
    ("last_tile_as_whole", "a shorter last core counts as a whole one", "COST-2 TILE-2",
     _span("for start, stop in cores(axis))",
         "for start, stop in [(a, a + axis.core) for a, _ in cores(axis)])", "min(stop, axis.length)",
         "min(stop, -(-axis.length // axis.core) * axis.core)")),
    ("one_tile_for_all", "all tiles count as one of their total size: cost is quadratic in the domain",
     "COST-2 TILE-10",
     _cost("tiled_evaluation", "parts = [",
         "counts = {(sum(n * count * times for (n, count), times in counts.items()), 1): 1}\n    parts = [")),
    ("frames_in_every_evaluation", "compressing the past is counted without its frames", "COST-3",
     (cost, "memory", lambda c, n, frames, chunk=None, batch=1: _memory(c, n, 1, None, batch))),
    ("memory_output_a_frame", "the memory's output projection counts once a frame", "COST-3",
     _cost("memory", "linear(batch * n, c.width, c.width)", "linear(batch * n * frames, c.width, c.width)")),
    ("memory_scores_not_counted", "scores and the weighted sum of the memory are not counted", "COST-3",
     _cost("memory_chunk", "+ score + total", "")),
    ("positions_a_frame", "position codes count once a frame", "COST-3",
     _cost("memory_chunk", "position_code(c, n)", "position_code(c, n * frames)")),
    ("counts_are_floats", "counts go through floating-point numbers", "COST-2",
     (adapter, "_multiply_adds",
      edit("torch.tensor(count.multiply_adds)",
          "torch.tensor(int(float(torch.tensor(float(count.multiply_adds), dtype=torch.float32))))"))),
    ("no_frame_costs", "no frame at all has a cost", "MEM-7 COST-3 CONV-10",
     _cost("memory", "chunk = frames if", "frames = max(frames, 1)\n    chunk = frames if")),
    ("cost_patch_unchecked", "tiles may be cut in other patches than the network's", "TILE-1 CONV-10",
     _cost("tile_batches", "if (tiling.y.patch, tiling.x.patch) != c.patch:", "if False:")),
)  # fmt: skip
