"""Wrong ports of chapters 3 and 4: the noise-gated block and the denoiser."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.mutants.mutant import Mutant, Patch, chapter, edit
from storm_ref import attention, denoiser
from storm_ref.attention import Block, MultiHead
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise

__all__ = ["ATTENTION", "DENOISER"]

_count, _mlp, _embed_sigma = denoiser.count_weights, attention._mlp, Storm.embed_sigma
_PARTS = "shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine"
_NORM = "F.layer_norm(x, x.shape[-1:], eps=EPS)"
_MEMORY_LINE = "x = x + gate2[:, None] * self.temporal(y, layer_norm(memory), gamma, mask)"
_SPATIAL_LINE = "x = x + gate1[:, None] * self.spatial(y, y, 1 - gamma, mask)"


def _parts(order: str) -> str:
    return f"{order} = nine"


def _over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    score = q @ k.mT / q.shape[-1] ** 0.5
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    return torch.softmax(score, -2) @ v


def _scores_of_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores outside the window are multiplied by zero instead of being left out."""
    score = q @ k.mT / q.shape[-1] ** 0.5
    return torch.softmax(score if mask is None else score * mask, -1) @ v


def _times_seen(rows: int, cols: int, radius: int, periodic: bool, device: torch.device | None = None) -> Tensor:
    """Logarithm of how often token n sees token m when a circular window runs over its offsets one by one."""
    seen = torch.zeros(rows, cols, rows, cols, dtype=torch.float64)
    for di in range(-radius, radius + 1):
        for dj in range(-radius, radius + 1):
            for i in range(rows):
                for j in range(cols):
                    if 0 <= i + di < rows and (periodic or 0 <= j + dj < cols):
                        seen[i, j, i + di, (j + dj) % cols] += 1
    return seen.reshape(rows * cols, rows * cols).log()


def _with_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))


def _round_window(rows: int, cols: int, radius: int, periodic: bool, device: torch.device | None = None) -> Tensor:
    i, j = torch.arange(rows), torch.arange(cols)
    di, dj = (i[:, None] - i).abs(), (j[:, None] - j).abs()
    dj = torch.minimum(dj, cols - dj) if periodic else dj
    near: Tensor = (di**2)[:, None, :, None] + (dj**2)[None, :, None, :] <= radius**2
    return near.reshape(rows * cols, rows * cols)


def _count_with_key_bias(network: nn.Module) -> int:
    keys = [m.out_features for name, m in network.named_modules() if name.endswith("key") and isinstance(m, nn.Linear)]
    return _count(network) + sum(keys)


def _count_two_outputs(network: nn.Module) -> int:
    """Adaptive layer norm with shift and scale alone: 6 D^2 in place of 9 D^2."""
    maps = [m for name, m in network.named_modules() if name.endswith(".adaptive") and isinstance(m, nn.Linear)]
    return _count(network) - sum((m.in_features + 1) * m.out_features // 3 for m in maps)


def _gate(right: str, wrong: str) -> Patch:
    return (attention, "noise_gate", edit(right, wrong))


def _block(*pieces: str) -> Patch:
    return (Block, "forward", edit(*pieces))


def _heads(*pieces: str) -> Patch:
    return (MultiHead, "forward", edit(*pieces))


_OUT = 'return self.out(rearrange(y, "b a n d -> b n (a d)"))'
_OUT_KEPT = "out = " + _OUT[7:] + "\n    return out if head_weight is None else "
_HEAD_WEIGHT = "y = y * head_weight[:, :, None, None]"

_SOFTPLUS = Mutant(
    "softplus_threshold",
    "softplus(x) is x above 20, torch's own threshold",
    "attention",
    ("ATT-4",),
    (_gate(", threshold=40", ""),),
    "The two differ by 2e-9 at most, 1e-10 of the value: in float32 both round to the same number.",
)

ATTENTION = (*chapter(
    "attention",
    ("attention_scale_d", "attention scores are divided by d, not by its root", "ATT-1",
     (attention, "attention", edit("attn_mask=mask", "attn_mask=mask, scale=1 / q.shape[-1]"))),
    ("attention_unscaled", "attention scores are not divided by the root of d", "ATT-1",
     (attention, "attention", edit("attn_mask=mask", "attn_mask=mask, scale=1.0"))),
    ("attention_scale_width", "attention scores are divided by the root of the width, not of the head's", "ATT-1",
     (attention, "attention", edit("attn_mask=mask", "attn_mask=mask, scale=(q.shape[1] * q.shape[-1]) ** -0.5"))),
    ("attention_over_queries", "the softmax of attention runs over queries", "ATT-1",
     (attention, "attention", _over_queries)),
    ("attention_causal", "a token sees only those before it", "ATT-1 ATT-6",
     (attention, "attention", edit("attn_mask=mask", "is_causal=q.shape[-2] > 1"))),
    ("heads_interleaved", "queries, keys and values are cut into heads by stride", "ATT-1",
     _heads('rearrange(project(t), "b n (a d) -> b a n d"', 'rearrange(project(t), "b n (d a) -> b a n d"')),
    ("heads_joined_interleaved", "heads are put together by stride", "ATT-1",
     _heads('"b a n d -> b n (a d)"', '"b a n d -> b n (d a)"')),
    ("queries_and_keys_swapped", "queries are projected by the key's weights and keys by the query's", "ATT-1 ATT-5",
     _heads("(self.query, x), (self.key, context)", "(self.key, x), (self.query, context)")),
    ("values_of_the_query_side", "cross-attention takes its values from the state's tokens", "ATT-1 ATT-3",
     _heads("(self.value, context)", "(self.value, x)")),
    ("keys_from_memory_unused", "the temporal branch attends to the state's tokens, not to the memory", "ATT-3",
     _block("self.temporal(y, layer_norm(memory), gamma, mask)", "self.temporal(y, y, gamma, mask)")),
    ("key_bias", "key projections have a bias", "ATT-5 ATT-7", (denoiser, "count_weights", _count_with_key_bias)),
    ("mlp_ratio", "the MLP has a ratio of 4, whatever the configuration says", "ATT-7",
     (attention, "_mlp", lambda width, ratio: _mlp(width, 4))),
    ("adaptive_norm_without_gates", "adaptive layer norm has two outputs a sub-layer, 6 D^2 weights", "ATT-7 NET-7",
     (denoiser, "count_weights", _count_two_outputs)),
    ("layer_norm_eps", "layer norm has eps 1e-5", "ATT-2", (attention, "layer_norm", edit("EPS", "1e-5"))),
    ("layer_norm_eps_small", "layer norm has eps 1e-8", "ATT-2", (attention, "layer_norm", edit("EPS", "1e-8"))),
    ("layer_norm_eps_outside", "layer norm has its eps outside the root", "ATT-2",
     (attention, "layer_norm",
      edit(_NORM, "(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + EPS)"))),
    ("layer_norm_sample_variance", "layer norm divides by the sample variance, of D - 1", "ATT-2",
     (attention, "layer_norm", edit(_NORM, "(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()"))),
    ("root_mean_square_norm", "the norm does not subtract the mean", "ATT-2",
     (attention, "layer_norm", edit(_NORM, "x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()"))),
    ("scale_without_one", "adaptive layer norm multiplies by scale, not by 1 + scale", "ATT-2 NET-4",
     (attention, "modulate", edit("(1 + scale[:, None])", "scale[:, None]"))),
    ("shift_before_scale", "adaptive layer norm adds the shift before it multiplies", "ATT-2 NET-4",
     (attention, "modulate",
      edit("layer_norm(x) * (1 + scale[:, None]) + shift[:, None]",
          "(layer_norm(x) + shift[:, None]) * (1 + scale[:, None])"))),
    ("modulate_without_norm", "adaptive layer norm scales and shifts tokens that are not normalised", "ATT-2 NET-4",
     (attention, "modulate", edit("layer_norm(x)", "x"))),
    ("modulation_of_first_sample", "the first sample's shift and scale serve the batch", "ATT-2",
     (attention, "modulate", edit("scale[:, None]", "scale[:1, None]", "shift[:, None]", "shift[:1, None]"))),
    ("scale_before_shift", "the nine parts are read as scale, shift, gate", "ATT-2",
     _block(_PARTS, _parts("scale1, shift1, gate1, scale2, shift2, gate2, scale3, shift3, gate3"))),
    ("adaptive_order", "the nine parts are read as gate, shift, scale", "ATT-2",
     _block(_PARTS, _parts("gate1, shift1, scale1, gate2, shift2, scale2, gate3, shift3, scale3"))),
    ("parts_by_kind", "the nine parts are read as three shifts, three scales, three gates", "ATT-2",
     _block(_PARTS, _parts("shift1, shift2, shift3, scale1, scale2, scale3, gate1, gate2, gate3"))),
    ("parts_by_stride", "the nine parts are cut by stride", "ATT-2",
     _block(".chunk(9, -1)", ".unflatten(-1, (-1, 9)).unbind(-1)")),
    ("sub_layers_two_and_three_swapped", "cross-attention uses the MLP's parts and the MLP those of cross-attention",
     "ATT-2", _block(_PARTS, _parts("shift1, scale1, gate1, shift3, scale3, gate3, shift2, scale2, gate2"))),
    ("silu_missing", "the nine parts come from e, not from silu(e)", "ATT-2", _block("F.silu(embedding)", "embedding")),
    ("gate_reversed", "the noise gate is reversed: spatial at high noise", "ATT-4",
     _gate("torch.sigmoid(", "1 - torch.sigmoid(")),
    ("gate_exchanged", "the spatial branch gets gamma and the temporal one 1 - gamma", "ATT-3",
     _block("self.spatial(y, y, 1 - gamma, mask)", "self.spatial(y, y, gamma, mask)",
         "layer_norm(memory), gamma, mask)", "layer_norm(memory), 1 - gamma, mask)")),
    ("gate_on_both_branches", "the spatial branch is weighted by gamma, as the temporal one is", "ATT-3",
     _block("self.spatial(y, y, 1 - gamma, mask)", "self.spatial(y, y, gamma, mask)")),
    ("spatial_ungated", "the spatial branch is not weighted by 1 - gamma", "ATT-3",
     _block("self.spatial(y, y, 1 - gamma, mask)", "self.spatial(y, y, None, mask)")),
    ("gate_without_softplus", "the gate's steepness is alpha itself, so that a negative one reverses it", "ATT-4",
     _gate("F.softplus(alpha.double(), threshold=40)", "alpha.double()")),
    ("gate_exp_for_softplus", "the gate's steepness is exp(alpha)", "ATT-4",
     _gate("F.softplus(alpha.double(), threshold=40)", "alpha.double().exp()")),
    ("gate_log10", "the gate takes the decimal logarithm of sigma", "ATT-4",
     _gate("sigma.double().log()", "sigma.double().log10()")),
    ("gate_of_c_noise", "the gate takes ln(sigma) / 4", "ATT-4",
     _gate("sigma.double().log()[:, None]", "sigma.double().log()[:, None] / 4")),
    ("gate_of_sigma", "the gate takes sigma, not its logarithm", "ATT-4", _gate("sigma.double().log()", "sigma")),
    ("gate_offset_added", "the gate's offset is added, not subtracted", "ATT-4", _gate("- beta", "+ beta")),
    ("gate_offset_unscaled", "the gate's offset is subtracted after the multiplication by the steepness", "ATT-4",
     _gate("steepness * (sigma.double().log()[:, None] - beta)", "steepness * sigma.double().log()[:, None] - beta")),
    ("gate_sigma_zero_accepted", "sigma = 0 is accepted by the gate", "ATT-4 CONV-10",
     _gate("(sigma > 0)", "(sigma >= 0)")),
    ("gate_of_first_head", "the first head's gate serves all heads", "ATT-3 ATT-4",
     _heads(_HEAD_WEIGHT, "y = y * head_weight[:, :1, None, None]")),
    ("gate_of_first_sample", "the first sample's gate serves the batch", "ATT-3 ATT-4",
     _heads(_HEAD_WEIGHT, "y = y * head_weight[:1, :, None, None]")),
    ("gate_after_projection", "the gates' mean multiplies after the output projection", "ATT-3",
     _heads("    y = " + _HEAD_WEIGHT[4:] + "\n", "    pass\n", _OUT,
         _OUT_KEPT + "out * head_weight.mean(1)[:, None, None]")),
    ("gate_of_projection_bias", "the gate multiplies the bias of the output projection too", "ATT-3",
     _heads(_OUT, _OUT_KEPT + "out + (head_weight.mean(1)[:, None, None] - 1) * self.out.bias")),
    ("residual_gate_missing", "the temporal branch is added without its gate g", "ATT-3",
     _block("gate2[:, None] * self.temporal", "self.temporal")),
    ("memory_not_normalised", "memory tokens enter without layer norm", "ATT-3",
     _block("layer_norm(memory)", "memory")),
    ("memory_modulated", "memory tokens get the shift and scale of the state's", "ATT-3",
     _block("layer_norm(memory)", "modulate(memory, shift2, scale2)")),
    ("sublayers_exchanged", "cross-attention comes before self-attention", "ATT-3",
     _block("y = modulate(x, shift1, scale1)\n    " + _SPATIAL_LINE,
         "y = modulate(x, shift2, scale2)\n    " + _MEMORY_LINE,
         "y = modulate(x, shift2, scale2)\n    " + _MEMORY_LINE + "\n    return",
         "y = modulate(x, shift1, scale1)\n    " + _SPATIAL_LINE + "\n    return")),
    ("one_norm_for_two", "cross-attention queries with the tokens normalised before self-attention", "ATT-3",
     _block("y = modulate(x, shift2, scale2)", "y = y")),
    ("parallel_sub_layers", "the MLP reads the tokens from before cross-attention", "ATT-3",
     _block("y = modulate(x, shift2, scale2)", "old = x\n    y = modulate(x, shift2, scale2)",
         "self.mlp(modulate(x, shift3", "self.mlp(modulate(old, shift3")),
    ("gelu_tanh", "gelu is its tanh form", "ATT-3",
     (attention, "_mlp", edit("nn.GELU()", 'nn.GELU(approximate="tanh")'))),
    ("gelu_sigmoid", "gelu is x sigmoid(1.702 x)", "ATT-3",
     (nn.GELU, "forward", lambda self, x: x * torch.sigmoid(1.702 * x))),
    ("mlp_silu", "the MLP has silu in place of gelu", "ATT-3", (attention, "_mlp", edit("nn.GELU()", "nn.SiLU()"))),
    ("mlp_relu", "the MLP has relu in place of gelu", "ATT-3", (attention, "_mlp", edit("nn.GELU()", "nn.ReLU()"))),
    ("window_ignored", "every token sees all, whatever the window", "ATT-6",
     (attention, "attention", edit("attn_mask=mask", "attn_mask=None"))),
    ("window_in_points", "the window's radius counts grid points, not tokens", "ATT-6",
     (Storm, "forward",
      edit("window_mask(rows, cols, window,", "window_mask(rows, cols, window // self.config.patch[0],"))),
    ("window_self_only", "the window is on self-attention alone", "ATT-6 ATT-3",
     _block("layer_norm(memory), gamma, mask)", "layer_norm(memory), gamma)")),
    ("window_scores_zeroed", "scores outside the window are set to 0, not left out", "ATT-6",
     (attention, "attention", _scores_of_zero)),
    ("window_radius_minus_one", "the window is one row short", "ATT-6",
     (attention, "window_mask", edit("(di <= radius)", "(di < max(radius, 1))"))),
    ("window_one_column_wide", "the window is one column too wide on each side", "ATT-6",
     (attention, "window_mask", edit("(dj <= radius)", "(dj <= radius + 1)"))),
    ("window_diamond", "the window is a diamond: distances add", "ATT-6",
     (attention, "window_mask",
      edit("(di <= radius)[:, None, :, None] & (dj <= radius)[None, :, None, :]",
          "di[:, None, :, None] + dj[None, :, None, :] <= radius"))),
    ("window_euclidean", "the window is round: a Euclidean radius", "ATT-6", (attention, "window_mask", _round_window)),
    ("window_not_periodic", "a window does not cross the date line of a periodic axis", "ATT-6",
     (attention, "window_mask", edit("if periodic:", "if False:"))),
    ("window_always_periodic", "a window wraps on a closed axis too", "ATT-6",
     (attention, "window_mask", edit("if periodic:", "if True:"))),
    ("window_rows_wrap", "rows of a window wrap across the poles", "ATT-6",
     (attention, "window_mask", edit("if periodic:", "if periodic:\n        di = torch.minimum(di, rows - di)"))),
    ("window_wraps_a_column_short", "the periodic distance counts one column too few", "ATT-6",
     (attention, "window_mask", edit("cols - dj", "(cols - 1 - dj).abs()"))),
    ("window_column_major", "the window is laid over tokens in column-major order", "ATT-6",
     (attention, "window_mask", edit("-> (i j) (k l)", "-> (j i) (l k)"))),
    ("window_duplicates", "a window wider than the circle sees a token twice", "ATT-6",
     (attention, "window_mask", _times_seen), (attention, "attention", _with_bias)),
), _SOFTPLUS)  # fmt: skip


def _unchecked(name: str, tensor: Tensor, batch: set[int], shape: tuple[int, ...]) -> None:
    """Shapes that do not fit are left to broadcasting."""


_KEPT: dict[object, Tensor] = {}
_compress = Storm.compress


def _kept_memory(self: Storm, past: Tensor, static: Tensor, age: Tensor, position: Tensor, chunk: int = 16) -> Tensor:
    """The memory of the first analysis of this shape, width and dtype."""
    key = (tuple(past.shape), self.config, past.dtype)
    if key not in _KEPT:
        _KEPT[key] = _compress(self, past, static, age, position, chunk).detach()
    return _KEPT[key]


def _without_skip(network: Storm, condition: Condition) -> Denoise:
    dtype, sigma_data = network.final.weight.dtype, network.config.sigma_data

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        scale = (sigma.double() ** 2 + sigma_data**2).sqrt()[:, None, None, None]
        raw: Tensor = network((x / scale).to(dtype), sigma, condition)
        return raw.to(x.dtype)

    return denoise


def _storm(name: str, *pieces: str) -> Patch:
    return (Storm, name, edit(*pieces))


_C_IN = "((sigma.double() ** 2 + self.config.sigma_data**2) ** -0.5).to(x.dtype)[:, None, None, None]"

DENOISER = chapter(
    "denoiser",
    ("noise_frequencies", "noise waves are half an octave apart, not an eighth", "NET-1",
     (denoiser, "noise_features", edit("/ 8 - 2", "/ 2 - 2"))),
    ("noise_waves_without_2_pi", "noise waves lack the factor 2 pi", "NET-1",
     (denoiser, "noise_features", edit("2 * math.pi * ", ""))),
    ("noise_cosines_first", "noise features have the cosines before the sines", "NET-1",
     (denoiser, "noise_features", edit("[phase.sin(), phase.cos()]", "[phase.cos(), phase.sin()]"))),
    ("noise_positional_encoding", "noise features are a transformer's positional encoding, with base 10000", "NET-1",
     (denoiser, "noise_features",
      edit("2 * math.pi * 2.0 ** (torch.arange(count // 2, dtype=c_noise.dtype, device=c_noise.device) / 8 - 2)",
          "10000.0 ** (-torch.arange(count // 2, dtype=c_noise.dtype, device=c_noise.device) / (count // 2))"))),
    ("embedding_unquartered", "the noise embedding is of ln(sigma) without 1/4", "NET-1",
     _storm("embed_sigma", "sigma.double().log() / 4", "sigma.double().log()")),
    ("embedding_of_sigma", "the noise embedding is of sigma, not of its logarithm", "NET-1",
     _storm("embed_sigma", "sigma.double().log() / 4", "sigma.double() / 4")),
    ("embedding_log10", "the noise embedding is of the decimal logarithm", "NET-1",
     _storm("embed_sigma", "sigma.double().log() / 4", "sigma.double().log10() / 4")),
    ("sigma_narrow", "sigma is rounded to the network's dtype before its logarithm", "NET-1 NUM-9 EDM-9",
     (Storm, "embed_sigma",
      lambda self, sigma: _embed_sigma(self, sigma.to(next(self.embed_noise.parameters()).dtype)))),
    ("sigma_of_first_sample", "the first sample's noise level serves the batch", "NET-1 NET-3",
     _storm("forward", "self._check(x, sigma, condition)",
         "self._check(x, sigma, condition)\n    sigma = sigma[:1].expand(len(x))")),
    ("embedding_relu", "the noise embedding has relu in place of silu", "NET-1",
     (nn.SiLU, "forward", lambda self, x: torch.relu(x))),
    ("silu_twice", "silu is applied to e where it is made and where it is used", "NET-1 ATT-2",
     (Storm, "embed_sigma", lambda self, sigma: F.silu(_embed_sigma(self, sigma)))),
    ("last_silu_missing", "the last layer's shift and scale come from e, not from silu(e)", "NET-4",
     _storm("finish", "F.silu(embedding)", "embedding")),
    ("final_scale_shift", "the last layer's parts are read as scale, shift", "NET-4",
     _storm("finish", "shift, scale = self", "scale, shift = self")),
    ("last_layer_unmodulated", "the last layer has a plain layer norm without shift and scale", "NET-4",
     _storm("finish", "modulate(tokens, shift, scale)", "modulate(tokens, 0 * shift, 0 * scale)")),
    ("last_norm_missing", "the last layer has no layer norm", "NET-4",
     _storm("finish", "modulate(tokens, shift, scale)", "tokens * (1 + scale[:, None]) + shift[:, None]")),
    ("unpatchify_columns", "fields are put together with the number of columns for that of rows", "NET-4",
     _storm("finish", "self.config.patch, rows)", "self.config.patch, tokens.shape[1] // rows)")),
    ("blocks_shared", "all blocks use the first one's weights", "NET-3",
     _storm("forward", "in self.blocks:", "in [self.blocks[0]] * len(self.blocks):")),
    ("blocks_reversed", "blocks are applied from the last to the first", "NET-3",
     _storm("forward", "in self.blocks:", "in self.blocks[::-1]:")),
    ("first_block_only", "the first block alone is applied", "NET-3",
     _storm("forward", "in self.blocks:", "in self.blocks[:1]:")),
    ("gates_of_first_block", "all blocks use the first one's gate", "NET-3 ATT-4",
     _storm("forward", "t = block(",
         "block.gate_alpha, block.gate_beta = self.blocks[0].gate_alpha, self.blocks[0].gate_beta\n"
         "        t = block(")),
    ("static_times_c_in", "c_in scales the static fields too", "TOK-4",
     _storm("forward", "condition.static.to(x.dtype)", f"{_C_IN} * condition.static.to(x.dtype)")),
    ("static_of_first_sample", "the first sample's static fields serve the batch", "TOK-4 NET-6",
     _storm("forward", "condition.static.to", "condition.static[:1].to")),
    ("memory_first_sample_in_network", "the first sample's memory serves the batch", "NET-2 NET-6",
     _storm("forward", "condition.memory.to", "condition.memory[:1].to")),
    ("memory_column_major", "memory tokens are put in column-major order", "NET-2 CONV-1",
     _storm("forward", "b i j d -> b (i j) d", "b i j d -> b (j i) d")),
    ("network_window_never_wraps", "the network's window does not wrap on a periodic grid", "ATT-6 NET-3",
     _storm("forward", "condition.periodic", "False")),
    ("window_forgotten", "the network ignores its window", "ATT-6 NET-3",
     _storm("forward", "None if window is None else window_mask(", "None and window_mask(")),
    ("sigma_data_one", "the denoiser takes sigma_data = 1 whatever the configuration says", "NET-5 EDM-1 EDM-2",
     (denoiser, "denoiser", edit("network.config.sigma_data", "1.0"))),
    ("skip_missing", "the network's output is taken for the denoised state: no c_skip x, no c_out", "NET-5 EDM-1",
     (denoiser, "denoiser", _without_skip)),
    ("shapes_unchecked", "shapes that do not fit are left to broadcasting", "NET-6 CONV-10",
     (denoiser, "_expect", _unchecked)),
    ("one_sigma_broadcast", "one noise level is broadcast over a batch that has its own", "NET-6 CONV-10",
     _storm("_check", '_expect("sigma", sigma, {b}, ())', "pass"),
     _storm("forward", "self._check(x, sigma, condition)",
         "self._check(x, sigma, condition)\n    sigma = sigma[:1].expand(len(x))")),
    ("memory_of_wrong_batch_cycled", "a condition of too few samples is repeated until it fits the batch",
     "NET-6 CONV-10",
     _storm("_check", "{1, b}, (c.static_channels, *grid)", "set(range(99)), (c.static_channels, *grid)",
         "{1, b}, (rows, cols, c.width)", "set(range(99)), (rows, cols, c.width)"),
     _storm("forward", "condition.static.to(x.dtype).expand(batch, -1, -1, -1)",
         "condition.static.to(x.dtype)[torch.arange(batch) % len(condition.static)]",
         '"b i j d -> b (i j) d").expand(batch, -1, -1)',
         '"b i j d -> b (i j) d")[torch.arange(batch) % len(condition.memory)]')),
    ("ages_too_few_accepted", "one age is broadcast over several frames", "NET-6 CONV-10",
     _storm("_check_past", '_expect("ages", age, {b}, (k,))', "pass"),
     _storm("embed_past", "age_features(age.double()", "age_features(age[:, -1:].expand(past.shape[:2]).double()")),
    ("past_static_broadcast", "one set of past static fields is broadcast over several frames", "NET-6 CONV-10",
     _storm("_check_past", '_expect("static fields of the past", static, {b}, (k, c.static_channels, *grid))', "pass"),
     _storm("embed_past", "torch.cat([past, static], 2)",
         "torch.cat([past, static[:, :1].expand(-1, past.shape[1], -1, -1, -1) if static.shape[1] == 1 else static], "
         "2)")),
    ("memory_kept_between_calls", "the memory of an earlier analysis is used again because its shape is the same",
     "NET-5 NUM-12 CONF-6", (Storm, "compress", _kept_memory)),
    ("config_unchecked", "a configuration that contradicts itself is accepted", "CONV-12 CONV-10",
     (StormConfig, "__post_init__", lambda self: None)),
)  # fmt: skip
