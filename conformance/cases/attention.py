"""Cases of chapter 3: the noise gate, attention with and without a window, and one block with generic weights.

Expected values: the equations written out in NumPy, query by query where a window applies.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.cases.memory import linear
from conformance.tolerance import Bound, MustReject, chain_bound

__all__ = ["attention", "block", "block_shapes", "cases", "draw_weights", "gate", "modulate", "silu", "visible"]

HEADS = 2


def gate(sigma: Array, alpha: Array, beta: Array) -> Array:
    """[ATT-4]: [b], [a], [a] -> [b, a]."""
    steepness = np.maximum(alpha, 0) + np.log1p(np.exp(-np.abs(alpha)))
    gamma: Array = 1 / (1 + np.exp(-steepness * (np.log(sigma)[:, None] - beta)))
    return gamma


def visible(window: Mapping[str, Any], token: int) -> list[int]:
    """[ATT-6]: the tokens that `token` sees, from its distances along rows and columns."""
    rows, cols, radius = window["rows"], window["cols"], window["radius"]
    i, j = divmod(token, cols)
    seen = []
    for other in range(rows * cols):
        di, dj = abs(other // cols - i), abs(other % cols - j)
        dj = min(dj, cols - dj) if window["periodic"] else dj
        if max(di, dj) <= radius:
            seen.append(other)
    return seen


def attention(q: Array, k: Array, v: Array, window: Mapping[str, Any] | None) -> Array:
    """[ATT-1] query by query: [b, a, n, d], [b, a, m, d], [b, a, m, d] -> [b, a, n, d]."""
    out = np.empty_like(q)
    for n in range(q.shape[2]):
        seen = list(range(k.shape[2])) if window is None else visible(window, n)
        score = (k[:, :, seen] * q[:, :, n, None]).sum(-1) / math.sqrt(q.shape[-1])
        weight = np.exp(score - score.max(-1, keepdims=True))
        out[:, :, n] = (weight[..., None] * v[:, :, seen]).sum(2) / weight.sum(-1, keepdims=True)
    return out


def silu(x: Array) -> Array:
    """x / (1 + e^-x)."""
    y: Array = x / (1 + np.exp(-x))
    return y


def _gelu(x: Array) -> Array:
    """x Phi(x), with the error function and not its tanh approximation."""
    phi = np.array([math.erfc(-t / math.sqrt(2)) / 2 for t in x.ravel().tolist()], x.dtype)
    y: Array = x * phi.reshape(x.shape)
    return y


def _layer_norm(x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    y: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return y


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """[ATT-2]: LN(x) (1 + scale) + shift."""
    y: Array = _layer_norm(x) * (1 + scale[:, None]) + shift[:, None]
    return y


def _multi_head(
    weights: Mapping[str, Array],
    name: str,
    x: Array,
    context: Array,
    head_weight: Array,
    window: Mapping[str, Any] | None,
) -> Array:
    heads = head_weight.shape[-1]

    def split(t: Array) -> Array:
        return t.reshape(*t.shape[:2], heads, -1).swapaxes(1, 2)

    q, k, v = (
        split(linear(weights, f"{name}.{part}", t)) for part, t in (("query", x), ("key", context), ("value", context))
    )
    y = attention(q, k, v, window) * head_weight[:, :, None, None]
    return linear(weights, f"{name}.out", y.swapaxes(1, 2).reshape(x.shape))


def block(
    weights: Mapping[str, Array], x: Array, memory: Array, e: Array, sigma: Array, window: Mapping[str, Any] | None
) -> Array:
    """[ATT-3]: tokens [b, n, w], memory [b, n, w], noise embedding [b, w], sigma [b]; names of a block's state dict."""
    nine = np.split(linear(weights, "adaptive", silu(e)), 9, -1)
    gamma = gate(sigma, weights["weights.gate_alpha"], weights["weights.gate_beta"])
    y = modulate(x, nine[0], nine[1])
    x = x + nine[2][:, None] * _multi_head(weights, "spatial", y, y, 1 - gamma, window)
    y = modulate(x, nine[3], nine[4])
    x = x + nine[5][:, None] * _multi_head(weights, "temporal", y, _layer_norm(memory), gamma, window)
    y = modulate(x, nine[6], nine[7])
    x = x + nine[8][:, None] * linear(weights, "mlp.2", _gelu(linear(weights, "mlp.0", y)))
    return x


def block_shapes(width: int, heads: int, ratio: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's weights; keys have no bias, [ATT-5]."""
    shapes: dict[str, tuple[int, ...]] = {"adaptive.weight": (9 * width, width), "adaptive.bias": (9 * width,)}
    for name in ("spatial", "temporal"):
        for part in ("query", "key", "value", "out"):
            shapes[f"{name}.{part}.weight"] = (width, width)
            if part != "key":
                shapes[f"{name}.{part}.bias"] = (width,)
    shapes |= {"mlp.0.weight": (ratio * width, width), "mlp.0.bias": (ratio * width,)}
    shapes |= {"mlp.2.weight": (width, ratio * width), "mlp.2.bias": (width,)}
    return shapes | {"gate_alpha": (heads,), "gate_beta": (heads,)}


def draw_weights(shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Array]:
    """Generic weights, gates included: a zero would hide whatever stands behind it."""
    return {
        f"weights.{name}": rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        for name, shape in shapes.items()
    }


def _gates() -> list[Case]:
    sigma, alpha, beta = (
        np.array([1e-3, 0.3, 1.05, 80.0]),
        np.array([-2.0, 0.0, 4.0, 21.0]),
        np.array([0.5, -1.0, 0.1, 0.0]),
    )
    inputs = {"sigma": sigma, "alpha": alpha, "beta": beta}
    far = {"sigma": np.array([1e-300, 1e300]), "alpha": np.array([0.0, 3.0]), "beta": np.array([1.0, -1.0])}
    arguments = (
        "the argument t = softplus (ln sigma - beta) is known to 4 eps |t|, which moves the sigmoid by less than eps"
    )
    return [
        Case(
            "attention/gate",
            "gate",
            ("ATT-4",),
            Bound(16, arguments, scale=1.0),
            "the gate is reversed, its slope alpha not made positive by softplus, or beta enters with the wrong sign",
            inputs,
            {},
            {"gamma": gate(**inputs)},
        ),
        Case(
            "attention/gate-limits",
            "gate",
            ("ATT-4",),
            Bound(16, arguments, scale=1.0),
            "the gate does not go to 0 (spatial) at low and 1 (temporal) at high noise, or overflows on the way",
            far,
            {},
            {"gamma": np.array([[0.0, 0.0], [1.0, 1.0]])},
        ),
        Case(
            "attention/gate-refuses-zero",
            "gate",
            ("ATT-4",),
            MustReject("sigma = 0 has no logarithm"),
            "sigma <= 0 reaches the gate's logarithm",
            inputs | {"sigma": np.array([1.0, 0.0])},
            {},
            neighbour=(inputs, {}),
        ),
    ]


def _attention_case(
    name: str,
    requirements: tuple[str, ...],
    rng: np.random.Generator,
    size: float,
    window: dict[str, Any] | None,
    meaning: str,
) -> Case:
    n, m, d = (15, 15, 4) if window else (5, 6, 4)
    q, k, v = (s * rng.standard_normal((2, HEADS, t, d)) for s, t in ((size, n), (1.0, m), (1.0, m)))
    score = float(np.abs(q).max() * np.abs(k).max()) * d / math.sqrt(d)
    why = f"scores up to {score:.3g} are sums of {d} products and move weights by {2 * d} eps |score|; then sums of {m}"
    bound = Bound(2 * d * score + 4 * m + 16, why, scale=float(np.abs(v).max()))
    expected = {"y": attention(q, k, v, window)}
    return Case(
        f"attention/{name}",
        "attention",
        requirements,
        bound,
        meaning,
        {"q": q, "k": k, "v": v},
        {"window": window},
        expected,
    )


def _block_case(name: str, rng: np.random.Generator, x: Array, window: dict[str, Any] | None, meaning: str) -> Case:
    width = x.shape[-1]
    inputs = draw_weights(block_shapes(width, HEADS, 4), rng) | {
        "x": x,
        "memory": rng.standard_normal(x.shape),
        "embedding": rng.standard_normal((2, width)),
        "sigma": np.array([0.4, 6.0]),
    }

    def formula(a: dict[str, Array]) -> Array:
        return block(a, a["x"], a["memory"], a["embedding"], a["sigma"], window)

    requirements = ("ATT-2", "ATT-3") + (("ATT-6",) if window else ())
    bound = chain_bound(formula, inputs, "three sub-layers")
    params = {"heads": HEADS, "window": window}
    return Case(f"attention/{name}", "block", requirements, bound, meaning, inputs, params, {"y": formula(inputs)})


def cases() -> list[Case]:
    """Gate, attention, windows, and a block on generic and on nearly constant tokens."""
    rng = np.random.default_rng(300)
    ring = {"rows": 3, "cols": 5, "radius": 1, "periodic": True}
    box = {"rows": 5, "cols": 3, "radius": 1, "periodic": False}
    return [
        *_gates(),
        _attention_case(
            "dense", ("ATT-1",), rng, 1.0, None, "the scores are not divided by sqrt(d), or softmax is over queries"
        ),
        _attention_case(
            "sharp", ("ATT-1",), rng, 300.0, None, "scores of some hundreds overflow, or lose their differences"
        ),
        _attention_case(
            "window-periodic",
            ("ATT-6",),
            rng,
            1.0,
            ring,
            "the window does not wrap in longitude, or wraps in latitude too",
        ),
        _attention_case(
            "window-closed",
            ("ATT-6",),
            rng,
            1.0,
            box,
            "the window has another radius or shape, or tokens are column-major",
        ),
        _block_case(
            "block",
            rng,
            rng.standard_normal((2, 6, 8)),
            None,
            "a sub-layer is missing or out of order, modulations are cut in another order, or gelu is approximate",
        ),
        _block_case(
            "block-window",
            rng,
            rng.standard_normal((2, 15, 8)),
            ring,
            "the window applies to self-attention or to cross-attention only",
        ),
        _block_case(
            "block-near-constant",
            rng,
            3 + 1e-3 * rng.standard_normal((2, 6, 8)),
            None,
            "layer norm has another eps than 1e-6, adds it outside the root, or uses the sample variance",
        ),
    ]
