"""Tests of the tests: plausible wrong versions of the network chapters, each of which its check must catch.

A row names a function, a piece of its source, what a wrong port would have there, and the check that must raise an
AssertionError. A row whose piece is gone from the source fails: it wants updating then, not removing. Signatures are
unchecked here, as where users run the code: values must tell.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import checks_network as checks
import pytest

from storm_ref import attention, denoiser, memory, tokenisation


@dataclass(frozen=True)
class Mutant:
    name: str
    module: ModuleType
    target: str  # function, class or Class.method
    right: str
    wrong: str
    check: Callable[[], None]


def wrong_version(mutant: Mutant) -> tuple[object, str, object, object]:
    """Owner, attribute, original and the rewritten object."""
    owner: object = mutant.module
    *path, name = mutant.target.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutant.right) == 1, f"{mutant.name}: {mutant.right!r} occurs {source.count(mutant.right)} times"
    scope = dict(vars(mutant.module))
    exec(source.replace(mutant.right, mutant.wrong), scope)
    return owner, name, original, scope[name]


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mutant:
    """The mutant in place of the original, wherever that is bound by name."""
    mutant: Mutant = request.param
    owner, name, original, wrong = wrong_version(mutant)
    monkeypatch.setattr(owner, name, wrong)
    for module in [checks, *(m for key, m in sys.modules.items() if key.startswith("storm_ref."))]:
        for key, value in list(vars(module).items()):
            if value is original:
                monkeypatch.setattr(module, key, wrong)
    return mutant


TOKENISATION = [
    ("tokens column by column", "patchify", "(i j) (c p q)", "(j i) (c p q)", checks.check_patchify),
    ("channel last in a token", "patchify", "(c p q)", "(p q c)", checks.check_patchify),
    ("column before row in a token", "patchify", "(c p q)", "(c q p)", checks.check_patchify),
    (
        "silent crop",
        "patchify",
        "    height, width = x.shape[-2:]\n",
        "    height, width = (s // p * p for s, p in zip(x.shape[-2:], patch))\n    x = x[..., :height, :width]\n",
        checks.check_patch_refused,
    ),
    ("fields column by column", "unpatchify", "(i j) (c p q)", "(j i) (c p q)", checks.check_unpatchify),
    ("channel last on the way back", "unpatchify", "(c p q)", "(p q c)", checks.check_unpatchify),
    ("corner instead of centre", "_centres", ".mean(1)", "[:, 0]", checks.check_sphere_position),
    ("centre in float32", "_centres", "coordinate.double()", "coordinate.float()", checks.check_sphere_position),
    (
        "degrees taken for radians",
        "sphere_position",
        "torch.deg2rad(_centres(longitude, patch[1]))",
        "_centres(longitude, patch[1])",
        checks.check_longitude_periodic,
    ),
    (
        "sine and cosine of latitude swapped",
        "sphere_position",
        "torch.cos(lat) * torch.cos(lon)\n    y = torch.cos(lat) * torch.sin(lon)",
        "torch.sin(lat) * torch.cos(lon)\n    y = torch.sin(lat) * torch.sin(lon)",
        checks.check_sphere_position,
    ),
    (
        "longitude as a plain number",
        "sphere_position",
        "torch.cos(lat) * torch.cos(lon)",
        "torch.cos(lat) * lon / 3.14",
        checks.check_longitude_periodic,
    ),
    (
        "region without cos(lat)",
        "region_position",
        "* torch.cos(torch.deg2rad(lat_0)) ",
        "",
        checks.check_region_position,
    ),
    ("region (y, x)", "region_position", ".flip(-1)", "", checks.check_region_position),
    (
        "latitude itself",
        "latitude_position",
        "return torch.sin(torch.deg2rad(_centres(latitude, patch[0])))",
        "return (_centres(latitude, patch[0]) / 90)",
        checks.check_latitude_position,
    ),
    (
        "cosines first",
        "fourier_features",
        "[phase.sin(), phase.cos()]",
        "[phase.cos(), phase.sin()]",
        checks.check_fourier,
    ),
    ("linear wave numbers", "fourier_features", "2.0 ** torch.arange", "torch.arange", checks.check_fourier),
    ("octaves from 1", "fourier_features", "math.pi / 2 * 2.0", "math.pi * 2.0", checks.check_fourier),
    (
        "wave of 2: poles share a code",
        "fourier_features",
        "math.pi / 2 * 2.0",
        "math.pi * 2.0",
        checks.check_codes_distinct,
    ),
    (
        "wave of 2: long histories wrap",
        "fourier_features",
        "math.pi / 2 * 2.0",
        "math.pi * 2.0",
        checks.check_ages_distinct,
    ),
    (
        "octave by octave",
        "fourier_features",
        "(r[..., None] * waves)",
        "(r[..., None, :] * waves[:, None])",
        checks.check_fourier,
    ),
    ("age in days", "age_features", "1 + age)", "1 + age / 24)", checks.check_age_features),
    ("natural logarithm of age", "age_features", "torch.log2", "torch.log", checks.check_age_features),
    ("linear age", "age_features", "torch.log2(1 + age) / 8", "age / 100", checks.check_age_features),
    ("sign of age ignored", "age_features", "(age > 0)", "(age == age)", checks.check_age_refused),
    ("age 0 accepted", "age_features", "age > 0", "age >= 0", lambda: checks.check_age_refused(0.0)),
    (
        "infinite age accepted",
        "age_features",
        "torch.isfinite(age) &",
        "",
        lambda: checks.check_age_refused(float("inf")),
    ),
]

MEMORY = [
    ("scale 1/d", "TemporalMemory.scores_and_values", "** 0.5", "", checks.check_memory_scores),
    ("no scale", "TemporalMemory.scores_and_values", " / key.shape[-1] ** 0.5", "", checks.check_memory_scores),
    (
        "scale of the width",
        "TemporalMemory.scores_and_values",
        "key.shape[-1] ** 0.5",
        "tokens.shape[-1] ** 0.5",
        checks.check_memory_scores,
    ),
    (
        "heads interleaved",
        "TemporalMemory.scores_and_values",
        'self.value(tokens), "b k n (a d)',
        'self.value(tokens), "b k n (d a)',
        checks.check_memory_tokens,
    ),
    (
        "key used as value",
        "TemporalMemory.scores_and_values",
        "self.value(tokens)",
        "self.key(tokens)",
        checks.check_memory_tokens,
    ),
    (
        "key with a bias",
        "TemporalMemory",
        "nn.Linear(width, width, bias=False)",
        "nn.Linear(width, width)",
        checks.check_key_bias,
    ),
    (
        "maximum not subtracted",
        "memory_update",
        "torch.maximum(state.maximum, score.amax(1))",
        "torch.zeros_like(state.maximum)",
        checks.check_memory_extreme,
    ),
    (
        "maximum of this chunk only",
        "memory_update",
        "torch.maximum(state.maximum, score.amax(1))",
        "score.amax(1)",
        checks.check_memory_extreme,
    ),
    ("minimum for maximum", "memory_update", "amax", "amin", checks.check_memory_extreme),
    (
        "maximum over heads",
        "memory_update",
        "score.amax(1)",
        "score.amax((1, 3))[..., None].expand_as(state.maximum)",
        checks.check_memory_update,
    ),
    ("accumulator not rescaled", "memory_update", " * keep[..., None]", "", checks.check_memory_split),
    ("denominator not rescaled", "memory_update", " * keep + weight", " + weight", checks.check_memory_split),
    (
        "denominator rescaled twice",
        "memory_update",
        " * keep + weight",
        " * keep * keep + weight",
        checks.check_memory_split,
    ),
    (
        "rescaled the wrong way",
        "memory_update",
        "state.maximum - maximum)",
        "maximum - state.maximum)",
        checks.check_memory_update,
    ),
    (
        "only the last chunk",
        "memory_update",
        "state.accumulator * keep[..., None] + torch",
        "torch",
        checks.check_memory_split,
    ),
    ("plain sum of values", "memory_finish", " / state.denominator[..., None]", "", checks.check_memory_split),
    (
        "empty memory passes as NaN",
        "memory_finish",
        "(state.denominator == 0).any()",
        "False",
        checks.check_memory_empty,
    ),
    (
        "mean of the chunks",
        "TemporalMemory.update",
        "if state is None:",
        "if True:",
        checks.check_memory_of_network,
    ),
    (
        "softmax over heads",
        "memory_by_definition",
        "torch.softmax(score, 1)",
        "torch.softmax(score, 3)",
        checks.check_memory_split,
    ),
    (
        "softmax over locations",
        "memory_by_definition",
        "torch.softmax(score, 1)",
        "torch.softmax(score, 2)",
        checks.check_memory_split,
    ),
    (
        "mean over frames",
        "memory_by_definition",
        "torch.softmax(score, 1)",
        "torch.softmax(0 * score, 1)",
        checks.check_memory_split,
    ),
]

ATTENTION = [
    ("reference scale 1/d", "attention_by_definition", "** 0.5", "", checks.check_attention),
    ("fused scale 1/d", "attention", "attn_mask=mask", "attn_mask=mask, scale=1 / q.shape[-1]", checks.check_attention),
    ("fused without scale", "attention", "attn_mask=mask", "attn_mask=mask, scale=1.0", checks.check_attention),
    (
        "softmax over queries",
        "attention_by_definition",
        "torch.softmax(score, -1)",
        "torch.softmax(score, -2)",
        checks.check_attention,
    ),
    ("mask inverted", "attention_by_definition", "~mask", "mask", lambda: checks.check_attention(masked=True)),
    ("mask ignored", "attention", "attn_mask=mask", "attn_mask=None", lambda: checks.check_attention(masked=True)),
    (
        "mask as zeros, not -inf",
        "attention_by_definition",
        "-torch.inf",
        "0.0",
        lambda: checks.check_attention(masked=True),
    ),
    ("causal", "attention", "attn_mask=mask", "is_causal=True", checks.check_attention),
    (
        "heads interleaved",
        "MultiHead.forward",
        'project(t), "b n (a d)',
        'project(t), "b n (d a)',
        checks.check_multihead,
    ),
    ("heads put together interleaved", "MultiHead.forward", 'b n (a d)"))', 'b n (d a)"))', checks.check_multihead),
    (
        "gate of the first head for all",
        "MultiHead.forward",
        "head_weight[:, :, None, None]",
        "head_weight[:, :1, None, None]",
        checks.check_multihead,
    ),
    (
        "gate after the output projection",
        "MultiHead.forward",
        "    if head_weight is not None:\n        y = y * head_weight[:, :, None, None]\n"
        '    return self.out(rearrange(y, "b a n d -> b n (a d)"))',
        '    y = self.out(rearrange(y, "b a n d -> b n (a d)"))\n'
        "    return y if head_weight is None else y * head_weight.mean(1)[:, None, None]",
        checks.check_multihead,
    ),
    ("values from the query side", "MultiHead.forward", "(self.value, context)", "(self.value, x)", checks.check_block),
    (
        "key with a bias",
        "MultiHead",
        "nn.Linear(width, width, bias=False)",
        "nn.Linear(width, width)",
        checks.check_key_bias,
    ),
    ("eps 1e-5", "layer_norm", "EPS", "1e-5", checks.check_layer_norm),
    ("eps 1e-8", "layer_norm", "EPS", "1e-8", checks.check_layer_norm),
    ("eps 1e-5 in the block", "layer_norm", "EPS", "1e-5", lambda: checks.check_block(spread=1e-2)),
    (
        "eps outside the root",
        "layer_norm",
        "F.layer_norm(x, x.shape[-1:], eps=EPS)",
        "(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + EPS)",
        checks.check_layer_norm,
    ),
    (
        "sample variance",
        "layer_norm",
        "F.layer_norm(x, x.shape[-1:], eps=EPS)",
        "(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()",
        checks.check_modulate,
    ),
    (
        "root mean square norm",
        "layer_norm",
        "F.layer_norm(x, x.shape[-1:], eps=EPS)",
        "x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()",
        checks.check_modulate,
    ),
    ("scale without one", "modulate", "(1 + scale[:, None])", "scale[:, None]", checks.check_modulate),
    (
        "shift before scale",
        "modulate",
        "layer_norm(x) * (1 + scale[:, None]) + shift[:, None]",
        "(layer_norm(x) + shift[:, None]) * (1 + scale[:, None])",
        checks.check_modulate,
    ),
    ("no norm", "modulate", "layer_norm(x)", "x", checks.check_modulate),
    (
        "order scale, shift, gate",
        "Block.forward",
        "shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine",
        "scale1, shift1, gate1, scale2, shift2, gate2, scale3, shift3, gate3 = nine",
        checks.check_block,
    ),
    (
        "order gate first",
        "Block.forward",
        "shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine",
        "gate1, shift1, scale1, gate2, shift2, scale2, gate3, shift3, scale3 = nine",
        checks.check_block,
    ),
    (
        "nine grouped by kind",
        "Block.forward",
        "shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine",
        "shift1, shift2, shift3, scale1, scale2, scale3, gate1, gate2, gate3 = nine",
        checks.check_block,
    ),
    (
        "MLP last of three exchanged with cross-attention",
        "Block.forward",
        "shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine",
        "shift1, scale1, gate1, shift3, scale3, gate3, shift2, scale2, gate2 = nine",
        checks.check_block,
    ),
    ("no silu before the adaptive norm", "Block.forward", "F.silu(embedding)", "embedding", checks.check_block),
    (
        "no noise gate on the spatial branch",
        "Block.forward",
        "self.spatial(y, y, 1 - gamma, mask)",
        "self.spatial(y, y, None, mask)",
        checks.check_block,
    ),
    (
        "gate exchanged",
        "Block.forward",
        "self.spatial(y, y, 1 - gamma, mask)",
        "self.spatial(y, y, gamma, mask)",
        checks.check_block,
    ),
    ("no residual gate", "Block.forward", "gate2[:, None] * self.temporal", "self.temporal", checks.check_block),
    ("memory not normalised", "Block.forward", "layer_norm(memory)", "memory", checks.check_block),
    (
        "memory normalised with shift and scale",
        "Block.forward",
        "layer_norm(memory)",
        "modulate(memory, shift2, scale2)",
        checks.check_block,
    ),
    (
        "cross-attention of the same norm",
        "Block.forward",
        "y = modulate(x, shift2, scale2)",
        "y = y",
        checks.check_block,
    ),
    (
        "parallel sub-layers",
        "Block.forward",
        "self.mlp(modulate(x, shift3, scale3))",
        "self.mlp(modulate(y, shift3, scale3))",
        checks.check_block,
    ),
    (
        "memory without the window",
        "Block.forward",
        "layer_norm(memory), gamma, mask)",
        "layer_norm(memory), gamma)",
        lambda: checks.check_block(1),
    ),
    (
        "memory without the window, heard far off",
        "Block.forward",
        "layer_norm(memory), gamma, mask)",
        "layer_norm(memory), gamma)",
        checks.check_reach,
    ),
    ("tanh gelu", "_mlp", "nn.GELU()", 'nn.GELU(approximate="tanh")', checks.check_block),
    ("relu", "_mlp", "nn.GELU()", "nn.ReLU()", checks.check_block),
    ("gate reversed", "noise_gate", "torch.sigmoid(", "torch.sigmoid(-", checks.check_gate_limits),
    ("gate reversed, by value", "noise_gate", "torch.sigmoid(", "torch.sigmoid(-", checks.check_gate),
    ("gate reversed, by trend", "noise_gate", "torch.sigmoid(", "torch.sigmoid(-", checks.check_gate_monotone),
    (
        "slope of any sign",
        "noise_gate",
        "F.softplus(alpha.double(), threshold=40)",
        "alpha",
        checks.check_gate_monotone,
    ),
    ("exp for softplus", "noise_gate", "F.softplus(alpha.double(), threshold=40)", "alpha.exp()", checks.check_gate),
    (
        "softplus cut off early",
        "noise_gate",
        ", threshold=40",
        ", threshold=20",
        lambda: checks.check_gate(alpha=(20.5,), beta=(0.05,), sigma=(1.0,)),
    ),
    (
        "decimal logarithm in the gate",
        "noise_gate",
        "sigma.double().log()",
        "sigma.double().log10()",
        checks.check_gate,
    ),
    (
        "c_noise in the gate",
        "noise_gate",
        "sigma.double().log()[:, None]",
        "sigma.double().log()[:, None] / 4",
        checks.check_gate,
    ),
    ("sigma itself in the gate", "noise_gate", "sigma.double().log()", "sigma", checks.check_gate_limits),
    ("offset added", "noise_gate", "- beta", "+ beta", checks.check_gate),
    ("sigma = 0 accepted", "noise_gate", "(sigma > 0)", "(sigma >= 0)", checks.check_gate_refused),
    ("window one too small", "window_mask", "(di <= radius)", "(di < radius)", checks.check_window),
    ("window one too wide", "window_mask", "(dj <= radius)", "(dj <= radius + 1)", checks.check_window),
    (
        "diamond window",
        "window_mask",
        "(di <= radius)[:, None, :, None] & (dj <= radius)[None, :, None, :]",
        "di[:, None, :, None] + dj[None, :, None, :] <= radius",
        checks.check_window,
    ),
    ("columns never wrap", "window_mask", "if periodic:", "if False:", checks.check_window),
    ("columns always wrap", "window_mask", "if periodic:", "if True:", lambda: checks.check_window(periodic=False)),
    (
        "rows wrap too",
        "window_mask",
        "if periodic:",
        "if periodic:\n        di = torch.minimum(di, rows - di)",
        checks.check_window,
    ),
    ("wraps a column short", "window_mask", "cols - dj", "cols - 1 - dj", checks.check_window),
    ("window over column-major tokens", "window_mask", "-> (i j) (k l)", "-> (j i) (l k)", checks.check_window),
    ("MLP ratio 2", "Block", "mlp_ratio: int = 4", "mlp_ratio: int = 2", checks.check_block_weights),
    ("six adaptive outputs more", "Block", "9 * width", "15 * width", checks.check_block_weights),
    (
        "space before time",
        "DividedBlock.forward",
        "    x = x + rearrange(self.time_out(",
        "    x = x + 0 * rearrange(self.time_out(",
        checks.check_divided_block,
    ),
    (
        "second norm forgotten",
        "DividedBlock.forward",
        'layer_norm(rearrange(x, "b t n w -> (b t) n w"))',
        'rearrange(x, "b t n w -> (b t) n w")',
        checks.check_divided_block,
    ),
    (
        "frames apart",
        "SpaceTimeBlock.forward",
        '"b t n w -> b (t n) w"',
        '"b t n w -> b (n t) w"',
        checks.check_space_time_block,
    ),
]

DENOISER = [
    ("waves half an octave apart", "noise_features", "/ 8 - 2", "/ 2 - 2", checks.check_noise_features),
    ("noise waves without 2 pi", "noise_features", "2 * math.pi * ", "", checks.check_noise_features),
    (
        "noise cosines first",
        "noise_features",
        "[phase.sin(), phase.cos()]",
        "[phase.cos(), phase.sin()]",
        checks.check_noise_features,
    ),
    (
        "c_noise without 1/4",
        "Storm.embed_sigma",
        "sigma.double().log() / 4",
        "sigma.double().log()",
        checks.check_noise_embedding,
    ),
    (
        "sigma embedded, not its logarithm",
        "Storm.embed_sigma",
        "sigma.double().log() / 4",
        "sigma.double()",
        checks.check_network,
    ),
    (
        "silu twice",
        "Storm.forward",
        "t = block(t, memory, e, sigma, mask)",
        "t = block(t, memory, F.silu(e), sigma, mask)",
        checks.check_network,
    ),
    (
        "silu of the last layer forgotten",
        "Storm.finish",
        "self.final_adaptive(F.silu(embedding))",
        "self.final_adaptive(embedding)",
        checks.check_network,
    ),
    (
        "scale before shift at the end",
        "Storm.finish",
        "shift, scale = self",
        "scale, shift = self",
        checks.check_network,
    ),
    (
        "no final norm",
        "Storm.finish",
        "modulate(tokens, shift, scale)",
        "(tokens * (1 + scale[:, None]) + shift[:, None])",
        checks.check_network,
    ),
    (
        "static before state",
        "Storm.embed",
        "torch.cat([x, static], 1)",
        "torch.cat([static, x], 1)",
        checks.check_state_tokens,
    ),
    ("state tokens without position", "Storm.embed", "t + self._position(position, t)", "t", checks.check_state_tokens),
    (
        "positions column-major",
        "Storm._position",
        "... i j f -> ... (i j) f",
        "... i j f -> ... (j i) f",
        checks.check_state_tokens,
    ),
    (
        "positions of the tile alone",
        "Storm._position",
        "position.double()",
        "(position.double() - position[0, 0])",
        checks.check_state_tokens,
    ),
    (
        "memory column-major",
        "Storm.forward",
        "b i j d -> b (i j) d",
        "b i j d -> b (j i) d",
        lambda: checks.check_network(1),
    ),
    ("window never wraps", "Storm.forward", "condition.periodic", "False", lambda: checks.check_network(1)),
    (
        "window forgotten",
        "Storm.forward",
        "None if window is None else window_mask(",
        "None and window_mask(",
        lambda: checks.check_network(0),
    ),
    ("first block only", "Storm.forward", "self.blocks:", "self.blocks[:1]:", checks.check_network),
    ("blocks in reverse", "Storm.forward", "self.blocks:", "self.blocks[::-1]:", checks.check_network),
    ("history without age", "Storm.embed_past", " + code[:, :, None]", "", checks.check_history_tokens),
    (
        "age from the end",
        "Storm.embed_past",
        "age_features(age.double()",
        "age_features(age.flip(1).double()",
        checks.check_history_tokens,
    ),
    (
        "number of the frame for its age",
        "Storm.embed_past",
        "age_features(age.double()",
        "age_features((torch.arange(age.shape[1]) + 1.0).double().expand_as(age)",
        checks.check_history_tokens,
    ),
    (
        "history without position",
        "Storm.embed_past",
        " + self._position(position, tokens)",
        "",
        checks.check_history_tokens,
    ),
    (
        "static fields of the first frame for all",
        "Storm.embed_past",
        "torch.cat([past, static], 2)",
        "torch.cat([past, static[:, :1].expand_as(static)], 2)",
        checks.check_history_tokens,
    ),
    (
        "state's embedding for history",
        "Storm.embed_past",
        "self.embed_history(patchify",
        "self.embed_state(patchify",
        checks.check_history_tokens,
    ),
    (
        "last chunk dropped",
        "Storm.compress",
        "range(0, past.shape[1], chunk)",
        "range(0, past.shape[1] - chunk + 1, chunk)",
        checks.check_memory_of_network,
    ),
    (
        "chunks overlap",
        "Storm.compress",
        "slice(at, at + chunk)",
        "slice(at, at + chunk + 1)",
        checks.check_memory_of_network,
    ),
    ("ages too few pass", "Storm._check_past", '_expect("ages", age, {b}, (k,))', "pass", checks.check_shapes_refused),
    (
        "static fields of other frames pass",
        "Storm._check_past",
        '_expect("static fields of the past", static, {b}, (k, c.static_channels, *grid))',
        "pass",
        checks.check_shapes_refused,
    ),
    (
        "position of another grid passes",
        "Storm._check_past",
        "(k, c.channels, *grid)",
        "past.shape[1:]",
        checks.check_shapes_refused,
    ),
    (
        "memory of another grid passes",
        "Storm._check",
        "(rows, cols, c.width)",
        "condition.memory.shape[1:]",
        checks.check_shapes_refused,
    ),
    (
        "one noise level for a batch passes",
        "Storm._check",
        '_expect("sigma", sigma, {b}, ())',
        "pass",
        checks.check_shapes_refused,
    ),
    (
        "memory grid transposed",
        "Storm.compress",
        'b (i j) d -> b i j d", i=',
        'b (i j) d -> b i j d", j=',
        checks.check_memory_of_network,
    ),
    (
        "no c_in",
        "denoiser",
        "precondition(conditioned_network, x,",
        "precondition(lambda _, s: network(x.to(dtype), s, condition), x,",
        checks.check_denoised,
    ),
    ("sigma_data of 1", "denoiser", "network.config.sigma_data", "1.0", checks.check_denoised),
    (
        "output not zero at first",
        "Storm.reset",
        "(self.final_adaptive, self.final)",
        "(self.final_adaptive,)",
        checks.check_reset,
    ),
    (
        "gates not zero at first",
        "Storm.reset",
        "nn.init.zeros_(block.adaptive.bias)",
        "nn.init.ones_(block.adaptive.bias)",
        checks.check_reset,
    ),
    (
        "state rounded to the network's dtype",
        "denoiser",
        ", x, sigma, network.config.sigma_data, dtype)",
        ", x.to(dtype), sigma, network.config.sigma_data, dtype)",
        checks.check_bind_dtype,
    ),
    (
        "positions local to the tile",
        "Condition.crop",
        "position=self.position[:, i, j]",
        "position=self.position[:, : i.shape[0], : j.shape[-1]]",
        checks.check_crop,
    ),
    (
        "memory of the first patches",
        "Condition.crop",
        "memory=self.memory[:, i, j]",
        "memory=self.memory[:, : i.shape[0], : j.shape[-1]]",
        checks.check_crop,
    ),
    ("tile that closes on itself", "Condition.crop", " and len(cols) == self.static.shape[-1]", "", checks.check_crop),
    ("broken patches pass", "_whole_patches", "raise ValueError", "str", checks.check_crop),
    (
        "members before tiles",
        "Condition.stack",
        "torch.cat([t.expand(batch, *t.shape[1:]) for t in tensors])",
        "torch.stack([t.expand(batch, *t.shape[1:]) for t in tensors], 1).flatten(0, 1)",
        checks.check_stack,
    ),
    (
        "all tiles at the first tile's place",
        "Condition.stack",
        'repeat("position")',
        "parts[0].position.expand(len(parts) * batch, -1, -1, -1)",
        checks.check_stack,
    ),
]

MUTANTS = [
    Mutant(name, module, *rest)
    for module, rows in ((tokenisation, TOKENISATION), (memory, MEMORY), (attention, ATTENTION), (denoiser, DENOISER))
    for name, *rest in rows
]


def mutant_id(mutant: Mutant) -> str:
    return f"{mutant.module.__name__.removeprefix('storm_ref.')}: {mutant.name}"


@pytest.mark.parametrize("planted", MUTANTS, ids=mutant_id, indirect=True)
def test_check_catches(planted: Mutant, unchecked: None) -> None:
    with pytest.raises(AssertionError):
        planted.check()


@pytest.mark.parametrize("right", MUTANTS, ids=mutant_id)
def test_check_passes_unmutated(right: Mutant, unchecked: None) -> None:
    """The same check is content with the true code: what it caught is the change."""
    right.check()
