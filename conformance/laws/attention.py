"""Laws of chapter 3: the gate rises, attention knows keys by their content alone, a block's branches obey the gate.

Limits: a score of d products is known to 2 d u of its magnitude, and moves a softmax weight by as much; sums of m terms
add m u. A block has three sub-layers behind a layer norm: `BLOCK` round-offs of its largest value, on either side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.judging.inputs import block_shapes, weights
from conformance.judging.inputs import draw as drawn
from conformance.judging.law import Broken, Draw, Law, arrays, check_close, check_equal
from conformance.ports.checked import Port

__all__ = ["LAWS"]

CORE = ("core",)
# Each of three sub-layers: a layer norm (8 terms, divided by a spread that may be a quarter of the largest token),
# scores of 4 products, sums over 6 keys, two products of 8 or 32 terms: some 64 round-offs; three of them.
BLOCK = 256
Window = Mapping[str, Any]


def _gate(port: Port, sigma: Sequence[float], alpha: Array, beta: Array) -> Array:
    inputs = {"sigma": np.array(sigma, np.float64), "alpha": alpha, "beta": beta}
    return port.values("gate", inputs, {}, "gamma")[0]


def _gate_rises(port: Port, draw: Draw) -> None:
    alpha, beta = draw(arrays(4, scale=3), "alpha"), draw(arrays(4), "beta")
    levels = sorted(draw(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6, unique=True), "sigma"))
    gamma = _gate(port, levels, alpha, beta)
    if gamma.shape != (len(levels), 4):
        raise Broken(f"gates of {len(levels)} levels and 4 heads have shape {list(gamma.shape)}")
    inside = np.clip(gamma, 0, 1)
    check_equal(gamma, inside, "a gate outside 0 to 1")
    # The argument, at most 12 (7 + 4) in size, is known to 4 u of itself; the sigmoid's slope times it is below 0.3.
    slack = 8 * port.unit("gate", "gamma")
    check_close(np.maximum(gamma[1:], gamma[:-1] - slack), gamma[1:], 0.0, "gates that fall as the noise grows")


def _gate_symmetric(port: Port, draw: Draw) -> None:
    alpha, power = draw(arrays(4, scale=3), "alpha"), draw(st.integers(1, 9), "power of two")
    gamma = _gate(port, [2.0**power, 2.0**-power, 1.0], alpha, np.zeros(4))
    slack = 16 * port.unit("gate", "gamma")
    check_close(gamma[0] + gamma[1], np.ones(4), slack, "gates at sigma and 1 / sigma with beta = 0, added")
    check_close(gamma[2], np.full(4, 0.5), slack, "the gate in its middle")
    rise = gamma[0] > 0.5 - slack
    check_equal(rise, np.ones(4, bool), "the gate above its middle is temporal")


def _attention(port: Port, q: Array, k: Array, v: Array, window: Window | None = None) -> Array:
    return port.values("attention", {"q": q, "k": k, "v": v}, {"window": window}, "y")[0]


def _attention_limit(port: Port, v: Array, keys: int) -> float:
    # Scores of 4 products of numbers up to 4, on either side, for both evaluations.
    return (4 * 8 * 16 / 4 + 8 * keys) * port.unit("attention", "y") * float(np.abs(v).max())


def _qkv(draw: Draw, n: int, m: int) -> tuple[Array, Array, Array]:
    return draw(arrays(1, 2, n, 4), "q"), draw(arrays(1, 2, m, 4), "k"), draw(arrays(1, 2, m, 4), "v")


def _keys_permuted(port: Port, draw: Draw) -> None:
    q, k, v = _qkv(draw, 3, 7)
    order = list(draw(st.permutations(range(7)), "order of keys"))
    queries = list(draw(st.permutations(range(3)), "order of queries"))
    want = _attention(port, q, k, v)[:, :, queries]
    got = _attention(port, q[:, :, queries], k[:, :, order], v[:, :, order])
    check_close(got, want, _attention_limit(port, v, 7), "keys and queries in another order")


def _keys_shifted(port: Port, draw: Draw) -> None:
    q, _, v = _qkv(draw, 3, 6)
    eighths = draw(st.lists(st.integers(-16, 16), min_size=48, max_size=48), "keys in eighths")
    k = np.array(eighths).reshape(1, 2, 6, 4) / 8
    shift = np.array(draw(st.lists(st.integers(-2, 2), min_size=8, max_size=8), "shift"), np.float64).reshape(
        1, 2, 1, 4
    )
    # Scores grow by at most 4 * 2 * 4 / 2, which is known to as many round-offs, four times.
    limit = _attention_limit(port, v, 6) + 64 * port.unit("attention", "y") * float(np.abs(v).max())
    check_close(_attention(port, q, k + shift, v), _attention(port, q, k, v), limit, "a vector added to all keys")


def _convex(port: Port, draw: Draw) -> None:
    q, k, v = _qkv(draw, 4, 5)
    got = _attention(port, 8 * q, k, v)
    inside = np.clip(got, v.min(2, keepdims=True), v.max(2, keepdims=True))
    check_close(
        got, inside, 32 * port.unit("attention", "y") * float(np.abs(v).max()), "values mixed beyond their range"
    )


def _window(draw: Draw) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 4), "rows"),
        "cols": draw(st.integers(1, 5), "cols"),
        "radius": draw(st.integers(0, 3), "radius"),
        "periodic": draw(st.booleans(), "periodic"),
    }


def _sees(window: Window) -> Array:
    i, j = np.divmod(np.arange(window["rows"] * window["cols"]), window["cols"])
    di, dj = np.abs(i[:, None] - i), np.abs(j[:, None] - j)
    dj = np.minimum(dj, window["cols"] - dj) if window["periodic"] else dj
    seen: Array = np.maximum(di, dj) <= window["radius"]
    return seen


def _window_mean(port: Port, draw: Draw) -> None:
    window = _window(draw)
    sees = _sees(window)
    n = len(sees)
    v = np.round(4 * draw(arrays(1, 1, n, 3), "v"))
    got = _attention(port, np.zeros((1, 1, n, 3)), draw(arrays(1, 1, n, 3), "k"), v, window)
    want = sees @ v[0, 0] / sees.sum(1, keepdims=True)
    # Equal weights: an integer sum of at most 20 terms, one reciprocal, one product a term.
    check_close(
        got[0, 0], want, 32 * port.unit("attention", "y") * float(np.abs(v).max()), "the mean of the tokens seen"
    )


def _window_blind(port: Port, draw: Draw) -> None:
    window = _window(draw)
    sees = _sees(window)
    n = len(sees)
    q, k, v = (draw(arrays(1, 2, n, 4), name) for name in ("q", "k", "v"))
    token = draw(st.integers(0, n - 1), "token that changes")
    other, louder = k.copy(), v.copy()
    other[:, :, token], louder[:, :, token] = -4 * k[:, :, token], 64 + v[:, :, token]
    blind = ~sees[:, token]
    limit = _attention_limit(port, v, n)
    before, after = _attention(port, q, k, v, window), _attention(port, q, other, louder, window)
    check_close(after[:, :, blind], before[:, :, blind], limit, "tokens that do not see the one that changed")
    whole = window | {"radius": max(window["rows"], window["cols"])}
    check_close(
        _attention(port, q, k, v, whole), _attention(port, q, k, v), limit, "a window over the whole grid and none"
    )


def _block_inputs(draw: Draw, batch: int, tokens: int = 6) -> dict[str, Array]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed of the block"))
    return weights(block_shapes(8, 2, 4), rng) | {
        "x": drawn(rng, batch, tokens, 8),
        "memory": drawn(rng, batch, tokens, 8),
        "embedding": drawn(rng, batch, 8),
        "sigma": np.exp(rng.uniform(-4, 4, batch)),
    }


def _block(port: Port, inputs: Mapping[str, Array], window: Window | None = None) -> Array:
    return port.values("block", inputs, {"heads": 2, "window": window}, "y")[0]


def _block_limit(port: Port, y: Array) -> float:
    return BLOCK * port.unit("block", "y") * float(np.abs(y).max())


def _block_batch(port: Port, draw: Draw) -> None:
    inputs = _block_inputs(draw, 3)
    sample = draw(st.integers(0, 2), "sample")
    own = {name: inputs[name][sample : sample + 1] for name in ("x", "memory", "embedding", "sigma")}
    together = _block(port, inputs)
    check_close(_block(port, inputs | own)[0], together[sample], _block_limit(port, together), "a sample alone")


def _block_permuted(port: Port, draw: Draw) -> None:
    inputs = _block_inputs(draw, 1)
    order, other = (list(draw(st.permutations(range(6)), f"order of {what}")) for what in ("tokens", "memory"))
    want = _block(port, inputs)
    got = _block(port, inputs | {"x": inputs["x"][:, order], "memory": inputs["memory"][:, other]})
    check_close(got, want[:, order], _block_limit(port, want), "tokens, and memory tokens, in another order")


def _block_extremes(port: Port, draw: Draw) -> None:
    """Gates of exactly 0 and 1: softplus(8) 27 ln 2 is above 149, and e^-149 is lost beside 1 in every dtype."""
    inputs = _block_inputs(draw, 1) | {"weights.gate_alpha": np.full(2, 8.0), "weights.gate_beta": np.zeros(2)}
    spatial, temporal = np.array([2.0**-27]), np.array([2.0**27])
    noise = draw(arrays(1, 6, 8), "other memory")
    quiet = _block(port, inputs | {"sigma": spatial})
    heard = _block(port, inputs | {"sigma": spatial, "memory": noise})
    check_close(heard, quiet, _block_limit(port, quiet), "the memory where the gate is shut (no noise)")
    others = inputs["x"].copy()
    others[:, 1:] = draw(arrays(1, 5, 8), "other tokens")
    alone, among = (_block(port, inputs | {"sigma": temporal, "x": x})[:, 0] for x in (inputs["x"], others))
    check_close(among, alone, _block_limit(port, alone), "the first token where self-attention is shut (all noise)")


def _block_identity(port: Port, draw: Draw) -> None:
    inputs = _block_inputs(draw, 2)
    inputs |= {name: np.zeros_like(value) for name, value in inputs.items() if ".adaptive." in name}
    check_equal(_block(port, inputs), inputs["x"], "a block whose gates are zero, against its input")


def _law(
    name: str, op: str, check: Any, meaning: str, *requirements: str, targets: tuple[str, ...] = (), examples: int = 12
) -> Law:
    ops = (op,)
    return Law(f"attention/law-{name}", requirements, CORE, ops, meaning, check, targets=targets, examples=examples)


LAWS = (
    _law("gate-rises", "gate", _gate_rises, "the gate falls as noise grows, or leaves 0 to 1", "ATT-4",
         targets=("gate_reversed", "gate_without_softplus")),
    _law("gate-symmetric", "gate", _gate_symmetric, "the gate is not a sigmoid of ln sigma about beta", "ATT-4",
         targets=("gate_reversed", "gate_of_sigma")),
    _law("order", "attention", _keys_permuted,
         "attention depends on the order of keys or queries: causal, or positions",
         "ATT-1", targets=("attention_causal",)),
    _law("key-shift", "attention", _keys_shifted,
         "a vector common to all keys changes the weights: softmax is not over keys",
         "ATT-1", "ATT-5", targets=("attention_over_queries",)),
    _law("convex", "attention", _convex, "softmax weights are negative or do not add to one", "ATT-1"),
    _law("window-mean", "attention", _window_mean, "a window sees too few tokens, too many, or one of them twice",
         "ATT-6",
         targets=("window_duplicates", "window_rows_wrap", "window_radius_minus_one"), examples=24),
    _law("window-blind", "attention", _window_blind,
         "tokens outside the window are heard, or a wide window is not none",
         "ATT-6", examples=16),
    _law("block-batch", "block", _block_batch,
         "samples of a batch share a noise level, a modulation or a normalisation",
         "ATT-2", "ATT-3"),
    _law("block-order", "block", _block_permuted, "a block knows tokens by their place", "ATT-1", "ATT-3"),
    _law("block-extremes", "block", _block_extremes,
         "the branch that the gate shuts is still heard, or the other is shut",
         "ATT-3", "ATT-4", targets=("gate_reversed", "gate_exchanged"), examples=8),
    _law("block-identity", "block", _block_identity, "a residual gate is missing, or the residual is normalised",
         "ATT-2", "ATT-3",
         targets=("residual_gate_missing",), examples=6),
)  # fmt: skip
