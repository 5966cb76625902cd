"""The block and the network, chapters 3 and 4, in plain NumPy.

[ATT-3]  a block: self-attention, cross-attention to the memory, perceptron; gamma_a shares between the first two
[NET-4]  F = unpatchify(W_f [LN(t)(1 + scale) + shift] + b_f)
[NET-5]  D(x; sigma) = c_skip x + c_out F(c_in x; sigma)

Preconditioning is float64, everything inside of F is in the network's dtype, [NUM-9]. Numbers may be complex, and
weights may differ from sample to sample, as in numpy_tokens.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.adapters.numpy import checks as check
from conformance.adapters.numpy.tokens import (
    Config,
    embed_state,
    gelu,
    layer_norm,
    linear,
    narrow,
    sigmoid,
    silu,
    softmax,
    softplus,
    tokens_of,
    unpatchify,
)

__all__ = [
    "Condition",
    "Network",
    "attention",
    "block",
    "denoise",
    "final",
    "gate",
    "noise_embedding",
    "precondition",
    "window_mask",
]

# Chapter 3: the block.


def gate(sigma: Array, alpha: Array, beta: Array) -> Array:
    """gamma [b, a] = sigmoid(softplus(alpha) (ln sigma - beta)), [ATT-4]."""
    log_sigma = np.log(check.positive("sigma", check.shape("sigma", sigma, None))).astype(alpha.real.dtype)
    for name, vector in (("alpha", alpha), ("beta", beta)):
        check.finite(name, vector)
    if alpha.shape[-1:] != beta.shape[-1:]:
        raise ValueError(f"alpha and beta have shapes {list(alpha.shape)}, {list(beta.shape)}; give one of each a head")
    return sigmoid(softplus(alpha) * (log_sigma[:, None] - beta))


def window_mask(rows: int, cols: int, radius: int, periodic: bool) -> Array:
    """Mask [n, n], true where the token of the row attends to that of the column, [ATT-6]."""
    i, j = np.divmod(np.arange(check.integer("rows", rows) * check.integer("cols", cols)), cols)
    di, dj = np.abs(i[:, None] - i), np.abs(j[:, None] - j)
    dj = np.minimum(dj, cols - dj) if periodic else dj
    reach = check.integer("radius", radius, 0)
    return (di <= reach) & (dj <= reach)  # type: ignore[no-any-return]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(d)) v of [b, a, n, d] and [b, a, m, d], [ATT-1]."""
    b, heads, n, d = check.shape("q", q, None, None, None, None).shape
    check.batch({"q": q, "k": k, "v": v}, b)
    check.shape("k", k, None, heads, None, d)
    check.shape("v", v, *k.shape)
    if k.shape[2] < 1:
        raise ValueError("k has 0 tokens; give at least one to attend to")
    if mask is not None and mask.shape != (n, k.shape[2]):
        raise ValueError(f"the window is of {mask.shape[0]} tokens, q and k have {n} and {k.shape[2]}; make them agree")
    weight = softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(d), mask)
    return weight @ v


def heads_of(x: Array, heads: int) -> Array:
    """[b, n, D] to [b, a, n, d]: head a owns features a d ... (a + 1) d - 1, [ATT-1]."""
    return np.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def branch(weights: Arrays, name: str, x: Array, source: Array, share: Array, mask: Array | None) -> Array:
    """W_o[share_a Attn_a(x, source)]: the share of each head [b, a] acts before the projection, [ATT-3]."""
    heads = share.shape[-1]
    q, k, v = (
        heads_of(linear(weights, f"{name}.{part}", from_), heads)
        for part, from_ in (("query", x), ("key", source), ("value", source))
    )
    y = share[..., None, None] * attention(q, k, v, mask)
    b, _, n, d = y.shape
    return linear(weights, f"{name}.out", np.swapaxes(y, 1, 2).reshape(b, n, heads * d))


def block(x: Array, m: Array, e: Array, sigma: Array, weights: Arrays, mask: Array | None) -> Array:
    """x [b, n, D] after one block with memory tokens m and noise embedding e [b, D], [ATT-2] and [ATT-3]."""
    gamma = gate(sigma, weights["gate_alpha"], weights["gate_beta"])
    parts = np.split(linear(weights, "adaptive", silu(e))[:, None], 9, axis=-1)
    (shift_1, scale_1, g_1), (shift_2, scale_2, g_2), (shift_3, scale_3, g_3) = parts[:3], parts[3:6], parts[6:]
    y = layer_norm(x) * (1 + scale_1) + shift_1
    x = x + g_1 * branch(weights, "spatial", y, y, 1 - gamma, mask)
    y = layer_norm(x) * (1 + scale_2) + shift_2
    x = x + g_2 * branch(weights, "temporal", y, layer_norm(m), gamma, mask)
    y = layer_norm(x) * (1 + scale_3) + shift_3
    return x + g_3 * linear(weights, "mlp.2", gelu(linear(weights, "mlp.0", y)))  # type: ignore[no-any-return]


# Chapter 4: the network, and its preconditioning (chapter 6).


def noise_embedding(sigma: Array, weights: Arrays, c: Config) -> Array:
    """e [b, D] of c_noise = ln(sigma) / 4, [NET-1]; the waves are float64, rounded once."""
    c_noise = np.log(check.positive("sigma", check.shape("sigma", sigma, None))) / 4
    frequency = 2 * np.pi * 2.0 ** (np.arange(c.noise_features // 2) / 8 - 2)
    phase = frequency * c_noise[:, None]
    codes = np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)
    codes = codes.astype(weights["embed_noise.0.weight"].real.dtype)
    return linear(weights, "embed_noise.2", silu(linear(weights, "embed_noise.0", codes)))


def final(tokens: Array, e: Array, weights: Arrays, c: Config, rows: int) -> Array:
    """The raw output F [b, C, H, W], [NET-4]."""
    shift, scale = np.split(linear(weights, "final_adaptive", silu(e))[:, None], 2, axis=-1)
    y = linear(weights, "final", layer_norm(tokens) * (1 + scale) + shift)
    return unpatchify(y, c.patch, rows)


@dataclass(frozen=True)
class Condition:
    """Everything D is conditioned on besides x and sigma: static [b, S, H, W], memory [b, rows, cols, D], position."""

    static: Array
    memory: Array
    position: Array

    def crop(self, y: Array, x: Array, patch: Sequence[int]) -> "Condition":
        """The condition on the grid points y and x of a tile; positions stay absolute, [TILE-6]."""
        rows, cols = y[:: patch[0]] // patch[0], x[:: patch[1]] // patch[1]
        tokens = np.ix_(rows, cols)
        return Condition(self.static[:, :, y][..., x], self.memory[:, rows][:, :, cols], self.position[tokens])


@dataclass(frozen=True)
class Network:
    """Weights, sizes, dtype, and whether columns close."""

    weights: Arrays
    config: Config
    dtype: type[np.floating[Any]]
    periodic: bool = False

    def raw(self, x: Array, sigma: Array, condition: Condition) -> Array:
        """F(x; sigma) of x already times c_in, [NET-2] to [NET-4]."""
        c, w = self.config, self.weights
        rows, cols = tokens_of(x.shape[-2:], c.patch)
        t = embed_state(narrow(x, self.dtype), condition.static, condition.position, w, c)
        m = check.shape("memory", condition.memory, None, rows, cols, c.width)
        check.batch({"memory": m}, len(x))
        m = m.reshape(len(m), rows * cols, c.width)
        e = noise_embedding(sigma, w, c)
        mask = None if c.window is None else window_mask(rows, cols, c.window, self.periodic)
        for i in range(c.depth):
            own = {name.removeprefix(f"blocks.{i}."): v for name, v in w.items() if name.startswith(f"blocks.{i}.")}
            t = block(t, m, e, sigma, own, mask)
        return final(t, e, w, c, rows)

    def closed(self) -> "Network":
        """The network on a tile that does not span the circle: its columns are not periodic."""
        return replace(self, periodic=False)


def precondition(sigma: Array, sigma_data: float) -> dict[str, Array]:
    """Coefficients [b] of EDM, float64, [EDM-2] and [EDM-3]."""
    s, d = check.positive("sigma", check.shape("sigma", sigma, None)), float(check.positive("sigma_data", sigma_data))
    total = s**2 + d**2
    return {
        "c_skip": d**2 / total,
        "c_out": s * d / np.sqrt(total),
        "c_in": 1 / np.sqrt(total),
        "c_noise": np.log(s) / 4,
        "loss_weight": total / (s * d) ** 2,
    }


def denoise(x: Array, sigma: Array, condition: Condition, network: Network) -> Array:
    """D(x; sigma) = c_skip x + c_out F(c_in x; sigma), float64 outside of F, [NET-5] and [NUM-9]."""
    check.shape("x", check.finite("x", x), None, network.config.channels, None, None)
    check.shape("sigma", sigma, len(x))
    c = {name: v[:, None, None, None] for name, v in precondition(sigma, network.config.sigma_data).items()}
    raw = network.raw(c["c_in"] * x, sigma, condition)
    return c["c_skip"] * x + c["c_out"] * narrow(raw, np.float64)  # type: ignore[no-any-return]
