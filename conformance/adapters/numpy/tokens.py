"""Tokens and memory, chapters 1 and 2, in plain NumPy, and the arithmetic that the network shares.

[TOK-4]  t_n = W_x [c_in x ; s]_n + b_x + P(r_n)                  [TOK-5]  h_kn, the same for past frames, + A(a_k)
[MEM-1]  s_kna = q_a . (W_k h_kn)_a / sqrt(d)
[MEM-2]  m_n = W_o concat_a(sum_k softmax_k(s_kna) v_kna) + b_o   [MEM-3]  in one pass over chunks of frames

Codes are float64 and rounded to the network's dtype once, [TOK-9].

Two liberties, both for derivatives by complex steps (numpy_derivatives.py). Every function takes complex numbers and is
analytic in them: a maximum is of real parts, nothing is conjugated. And a weight may be shared by all samples, of its
own shape, or be one a sample, with the samples as its first axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.adapters.numpy import checks as check

__all__ = [
    "Config",
    "Past",
    "block_shapes",
    "check_weights",
    "compress",
    "config_of",
    "embed_history",
    "embed_state",
    "finite_degrees",
    "gelu",
    "layer_norm",
    "linear",
    "memory",
    "narrow",
    "patchify",
    "position",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tokens_of",
    "unpatchify",
    "weight_shapes",
]


@dataclass(frozen=True)
class Config:
    """Sizes of a network, [CONV-12]."""

    channels: int
    static_channels: int
    patch: tuple[int, int]
    width: int
    heads: int
    depth: int
    mlp_ratio: int
    position_features: int
    position_octaves: int
    noise_features: int
    window: int | None
    sigma_data: float

    def __post_init__(self) -> None:
        for name in ("channels", "width", "heads", "depth", "mlp_ratio", "position_octaves", "noise_features"):
            check.integer(name, getattr(self, name))
        for size in self.patch:
            check.integer("a side of the patch", size)
        check.integer("static_channels", self.static_channels, 0)
        if self.window is not None:
            check.integer("window", self.window, 0)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}; let heads divide the width")
        if self.position_features not in (1, 2, 3):
            raise ValueError(f"position_features is {self.position_features}; give 1, 2 or 3 coordinates")
        if self.noise_features % 2:
            raise ValueError(f"noise_features is {self.noise_features}; give an even number, half sines, half cosines")
        check.positive("sigma_data", self.sigma_data)


def config_of(given: Mapping[str, Any]) -> Config:
    """A Config of the fields of a case."""
    names = {field.name for field in fields(Config)}
    if set(given) != names:
        raise ValueError(f"the config's fields are {sorted(given)}; give just {sorted(names)}")
    if len(given["patch"]) != 2:
        raise ValueError(f"patch is {given['patch']}; give its rows and columns")
    return Config(**{**given, "patch": tuple(given["patch"])})


def weight_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by its name. Linear maps are [out, in]; keys have no bias, [ATT-5], nor have codes."""
    pixels, d = c.patch[0] * c.patch[1], c.width
    shapes: dict[str, tuple[int, ...]] = {"embed_position.weight": (d, 2 * c.position_features * c.position_octaves)}
    shapes |= {"embed_age.weight": (d, 2 * c.position_octaves), "memory.query": (c.heads, d // c.heads)}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    linear("embed_state", d, (c.channels + c.static_channels) * pixels)
    linear("embed_history", d, (c.channels + c.static_channels) * pixels)
    linear("embed_noise.0", d, c.noise_features)
    linear("embed_noise.2", d, d)
    for part in ("key", "value", "out"):
        linear(f"memory.{part}", d, d, part != "key")
    for i in range(c.depth):
        shapes |= {f"blocks.{i}.{name}": size for name, size in block_shapes(d, c.heads, c.mlp_ratio).items()}
    linear("final_adaptive", 2 * d, d)
    linear("final", c.channels * pixels, d)
    return shapes


def block_shapes(d: int, heads: int, mlp_ratio: int) -> dict[str, tuple[int, ...]]:
    """The weights of one block: 25 d^2 at ratio 4 besides biases and gates, [ATT-7]."""
    shapes: dict[str, tuple[int, ...]] = {"gate_alpha": (heads,), "gate_beta": (heads,)}
    shapes |= {"adaptive.weight": (9 * d, d), "adaptive.bias": (9 * d,)}
    for branch in ("spatial", "temporal"):
        for part in ("query", "key", "value", "out"):
            shapes[f"{branch}.{part}.weight"] = (d, d)
            if part != "key":
                shapes[f"{branch}.{part}.bias"] = (d,)
    wide = mlp_ratio * d
    return shapes | {
        "mlp.0.weight": (wide, d), "mlp.0.bias": (wide,), "mlp.2.weight": (d, wide), "mlp.2.bias": (d,),
    }  # fmt: skip


def check_weights(weights: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a weight that is absent, of another shape or not finite, and one that the network lacks."""
    for name in sorted(set(weights) ^ set(shapes)):
        raise ValueError(f"weight {name} is {'not known' if name in weights else 'missing'}; give those of the config")
    for name, wanted in shapes.items():
        check.finite(f"weight {name}", check.shape(f"weight {name}", weights[name], *wanted))


# Arithmetic that holds for complex numbers too.


def narrow(x: Array, dtype: type[np.floating[Any]]) -> Array:
    """x rounded to the network's dtype, or to the complex numbers of that dtype."""
    return x.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(x) else dtype)


def extend(x: Array, value: Callable[[Array], Array], derivative: Callable[[Array], Array]) -> Array:
    """f(x) of its value and derivative on the real axis: f(a + ib) = f(a) + ib f'(a), b being infinitesimal."""
    if not np.iscomplexobj(x):
        return value(x)
    return value(x.real) + np.array(1j, x.dtype) * (derivative(x.real) * x.imag)  # type: ignore[no-any-return]


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def sigmoid(x: Array) -> Array:
    return extend(x, _sigmoid, lambda a: _sigmoid(a) * _sigmoid(-a))


def softplus(x: Array) -> Array:
    return extend(x, lambda a: np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a))), _sigmoid)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    """x Phi(x) with the exact erf, [ATT-3]."""
    root = math.sqrt(0.5)
    erf = extend(x * root, lambda a: _erf(a).astype(a.dtype), lambda a: 2 / math.sqrt(math.pi) * np.exp(-(a**2)))
    return x * (1 + erf) / 2  # type: ignore[no-any-return]


def softmax(x: Array, where: Array | None = None) -> Array:
    """Over the last axis; `where` says which entries take part."""
    real = x.real if where is None else np.where(where, x.real, -np.inf)
    e = np.exp(x - real.max(-1, keepdims=True))
    e = e if where is None else np.where(where, e, 0)
    return e / e.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def layer_norm(x: Array) -> Array:
    """LN of [ATT-2]: population variance, 1e-6 inside the root, no weights."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)  # type: ignore[no-any-return]


def spread(vector: Array, ndim: int) -> Array:
    """A vector of features, shared or one a sample, as an array of `ndim` axes, samples first and features last."""
    return vector.reshape(vector.shape[:-1] + (1,) * (ndim - vector.ndim) + vector.shape[-1:])


def linear(weights: Arrays, name: str, x: Array) -> Array:
    """x W^T + b, b where there is one; W [out, in] or one a sample."""
    matrix, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = x @ matrix.T if matrix.ndim == 2 else np.einsum("b...i,boi->b...o", x, matrix)
    return y if bias is None else y + spread(bias, y.ndim)


# Chapter 1: tokens.


def tokens_of(grid: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tokens, [TOK-1]."""
    for size, side, name in zip(grid, patch, ("rows", "columns"), strict=True):
        if size < 1 or size % check.integer("a side of the patch", side):
            raise ValueError(f"{size} {name} are not cut by the patch {list(patch)}; give one that divides the grid")
    return grid[0] // patch[0], grid[1] // patch[1]


def patchify(x: Array, patch: Sequence[int]) -> Array:
    """Fields [..., c, h, w] to tokens [..., n, c p_y p_x], [TOK-2]."""
    (py, px), (rows, cols) = patch, tokens_of(x.shape[-2:], patch)
    cut = [x[..., i * py : (i + 1) * py, j * px : (j + 1) * px] for i in range(rows) for j in range(cols)]
    return np.stack([piece.reshape(*x.shape[:-3], -1) for piece in cut], axis=-2)


def unpatchify(tokens: Array, patch: Sequence[int], rows: int) -> Array:
    """The inverse of patchify, [TOK-3]."""
    (py, px), (n, features) = patch, tokens.shape[-2:]
    if n % check.integer("rows", rows) or features % (check.integer("p_y", py) * check.integer("p_x", px)):
        raise ValueError(f"{n} tokens of {features} are not {rows} rows of patches {list(patch)}; give what fits")
    cols, channels = n // rows, features // (py * px)
    x = np.empty((*tokens.shape[:-2], channels, rows * py, cols * px), tokens.dtype)
    for k in range(n):
        i, j = divmod(k, cols)
        patch_k = tokens[..., k, :].reshape(*tokens.shape[:-2], channels, py, px)
        x[..., i * py : (i + 1) * py, j * px : (j + 1) * px] = patch_k
    return x


def position(latitude: Array, longitude: Array, kind: str, patch: Sequence[int], length: float | None) -> Array:
    """Positions of patch centres [rows, cols, P] of degrees, [TOK-6]."""
    latitude = finite_degrees("latitude", latitude)
    longitude = check.finite("longitude", check.shape("longitude", longitude, None))
    if (np.abs(np.diff(longitude)) > 180).any():
        raise ValueError(f"longitudes jump: {longitude.tolist()}; add or subtract 360 so that they go on")
    rows, cols = tokens_of((len(latitude), len(longitude)), patch)
    phi, lam = latitude.reshape(rows, -1).mean(1)[:, None], longitude.reshape(cols, -1).mean(1)[None, :]
    if kind == "sphere":
        f, g = np.deg2rad(phi), np.deg2rad(lam)
        parts = [np.cos(f) * np.cos(g), np.cos(f) * np.sin(g), np.sin(f) + 0 * g]
    elif kind == "region":
        phi_0 = (latitude.min() + latitude.max()) / 2
        lam_0 = (longitude.min() + longitude.max()) / 2
        ell = float(check.positive("length", np.nan if length is None else length))
        parts = [(lam - lam_0) * np.cos(np.deg2rad(phi_0)) / ell + 0 * phi, (phi - phi_0) / ell + 0 * lam]
    elif kind == "latitude":
        parts = [np.sin(np.deg2rad(phi)) + 0 * lam]
    else:
        raise ValueError(f"the kind of position is {kind!r}; give sphere, region or latitude")
    return np.stack(parts, axis=-1)


def finite_degrees(name: str, latitude: Array) -> Array:
    """Latitudes: degrees from -90 to 90, [CONV-3]."""
    degrees = check.finite(name, check.shape(name, latitude, None))
    if np.abs(degrees).max(initial=0) > 90:
        raise ValueError(f"{name} reaches {np.abs(degrees).max()} degrees; give -90 to 90, north positive")
    return degrees


def waves(r: Array, octaves: int) -> Array:
    """[sin(2^j pi r / 2), cos(2^j pi r / 2)] [..., 2 P J] of r [..., P], j fastest, float64, [TOK-7] and [TOK-9]."""
    phase = (np.pi / 2 * r[..., None] * 2.0 ** np.arange(octaves)).reshape(*r.shape[:-1], -1)
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)


def age_waves(age: Array, octaves: int) -> Array:
    """The code of ages in hours before W_a, [..., 2 J], [TOK-8]."""
    s = np.log2(1 + check.positive("age", age)) / 8
    return waves(s[..., None], octaves)


def position_code(r: Array, weights: Arrays, c: Config, dtype: type[np.floating[Any]]) -> Array:
    """P(r) [1, n, D] or [b, n, D]."""
    r = check.finite("position", check.shape("position", r, None, None, c.position_features))
    codes = waves(r.reshape(1, -1, c.position_features), c.position_octaves)
    return linear(weights, "embed_position", narrow(codes, dtype))


def embed_state(x: Array, static: Array, r: Array, weights: Arrays, c: Config) -> Array:
    """State tokens [b, n, D] of x, already times c_in, [TOK-4]."""
    b = check.batch({"x": x, "static": static}, len(x))
    x = check.finite("x", check.shape("x", x, None, c.channels, None, None))
    static = check.finite("static", check.shape("static", static, None, c.static_channels, *x.shape[-2:]))
    check.shape("position", r, *tokens_of(x.shape[-2:], c.patch), None)
    both = np.concatenate([x, np.broadcast_to(static, (b, *static.shape[1:]))], axis=1)
    code = position_code(r, weights, c, x.real.dtype.type)
    return linear(weights, "embed_state", patchify(both, c.patch)) + code


@dataclass(frozen=True)
class Past:
    """Past frames [b, k, C, H, W], the static fields of each, the age of each [b, k], and the position of the grid."""

    frames: Array
    static: Array
    age: Array
    position: Array


def embed_history(history: Past, weights: Arrays, c: Config) -> Array:
    """History tokens [b, k, n, D], [TOK-5]."""
    past = check.finite("past", check.shape("past", history.frames, None, None, c.channels, None, None))
    k, grid = past.shape[1], past.shape[-2:]
    static = check.finite("past_static", check.shape("past_static", history.static, None, k, c.static_channels, *grid))
    age = check.shape("age", history.age, None, k)
    if k == 0:
        raise ValueError("past has 0 frames; give at least one")  # [MEM-7]
    b = check.batch({"past": past, "past_static": static, "age": age})
    check.shape("position", history.position, *tokens_of(grid, c.patch), None)
    both = np.concatenate([np.broadcast_to(a, (b, *a.shape[1:])) for a in (past, static)], axis=2)
    ages = linear(weights, "embed_age", narrow(age_waves(age, c.position_octaves), past.dtype.type))
    places = position_code(history.position, weights, c, past.dtype.type)
    tokens = linear(weights, "embed_history", patchify(both, c.patch))
    return tokens + places[:, None] + ages[:, :, None]


# Chapter 2: memory.


def memory(score: Array, value: Array, chunks: Sequence[int]) -> Array:
    """Values [b, n, a, d] weighted by the softmax of scores [b, k, n, a] over frames, in one pass, [MEM-3]."""
    score = check.finite("score", check.shape("score", score, None, None, None, None))
    value = check.finite("value", check.shape("value", value, *score.shape, None))
    if score.shape[1] < 1:
        raise ValueError("the memory is of 0 frames; give at least one")  # [MEM-7]
    if sum(check.integer("a chunk", size) for size in chunks) != score.shape[1]:
        raise ValueError(f"chunks {list(chunks)} are not the {score.shape[1]} frames; let them add up")
    largest = np.full(score.real[:, 0].shape, -np.inf, score.real.dtype)  # M
    below, above, start = np.zeros_like(score[:, 0]), np.zeros_like(value[:, 0]), 0  # Z, Y
    for size in chunks:
        s, v = score[:, start : start + size], value[:, start : start + size]
        higher = np.maximum(largest, s.real.max(1))
        kept, e = np.exp(largest - higher), np.exp(s - higher[:, None])
        below = below * kept + e.sum(1)
        above = above * kept[..., None] + (e[..., None] * v).sum(1)
        largest, start = higher, start + size
    return above / below[..., None]


def compress(history: Past, weights: Arrays, c: Config, chunk: int | None = None) -> Array:
    """The memory [b, rows, cols, D] of all frames, `chunk` at a time, [MEM-1] and [MEM-2]."""
    h = embed_history(history, weights, c)
    b, k, n, d = h.shape
    size = k if chunk is None else check.integer("chunk", chunk)
    query = weights["memory.query"]
    heads = (*h.shape[:3], c.heads, d // c.heads)
    keys = linear(weights, "memory.key", h).reshape(heads)
    values = linear(weights, "memory.value", h).reshape(heads)
    query = query.reshape(*query.shape[:-2], 1, 1, *query.shape[-2:])
    score = (query * keys).sum(-1) / math.sqrt(d // c.heads)
    chunks = [min(size, k - start) for start in range(0, k, size)]
    m = memory(score, values, chunks).reshape(b, n, d)
    return linear(weights, "memory.out", m).reshape(-1, *history.position.shape[:2], d)
