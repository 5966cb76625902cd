"""Cases of chapter 3: the noise gate, attention with and without a window, and one block with generic weights.

Expected values: the gate to 50 digits; attention of equal scores counts whom a token sees, and of scores far apart
picks one; a block without gates is the identity. What is generic is the reference's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mpmath
import numpy as np

from conformance.adapter import Array
from conformance.judging.case import Chain, Recipe
from conformance.judging.inputs import block_shapes, draw, scaled, weights
from conformance.judging.tolerance import Bound, Exact, MustReject

__all__ = ["gate", "recipes", "visible"]

CORE = ("core",)
HEADS = 2
Window = Mapping[str, Any]


def gate(sigma: Array, alpha: Array, beta: Array) -> Array:
    """[ATT-4] to 50 digits, rounded once: [b], [a], [a] -> [b, a]."""
    with mpmath.workdps(50):

        def one(s: float, a: float, b: float) -> float:
            slope = mpmath.log1p(mpmath.exp(a))
            return float(1 / (1 + mpmath.exp(-slope * (mpmath.log(s) - b))))

        pairs = list(zip(alpha.tolist(), beta.tolist(), strict=True))
        return np.array([[one(s, a, b) for a, b in pairs] for s in sigma.tolist()])


def visible(window: Window, token: int) -> list[int]:
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


def _gate(
    name: str,
    sigma: Sequence[float],
    alpha: Sequence[float],
    beta: Sequence[float],
    bound: Bound,
    meaning: str,
    targets: tuple[str, ...] = (),
) -> Recipe:
    inputs = {"sigma": np.array(sigma), "alpha": np.array(alpha, np.float64), "beta": np.array(beta, np.float64)}
    return Recipe(
        f"attention/{name}", "gate", requirements=("ATT-4",), profiles=CORE, judge=bound, meaning=meaning,
        inputs=inputs, params={}, expected={"gamma": gate(**inputs)}, targets=targets,
    )  # fmt: skip


def _gates() -> list[Recipe]:
    arguments = "the argument t = softplus (ln sigma - beta) is known to 4 u |t| and more, which moves the sigmoid by u"
    steep = "slopes of 1024 times a logarithm and a shift near 1, both of one rounding: at most 1024 (1 + 1) u, twice"
    valid = {"sigma": np.array([1.0, 0.5]), "alpha": np.array([-2.0, 0.5]), "beta": np.array([0.5, -1.0])}

    def refuses(name: str, sigma: float, why: str) -> Recipe:
        return Recipe(
            f"attention/{name}", "gate", requirements=("ATT-4", "CONV-10"), profiles=CORE, judge=MustReject(why),
            meaning="sigma <= 0 reaches the gate's logarithm", inputs=valid | {"sigma": np.array([1.0, sigma])},
            params={}, valid_counterpart=(valid, {}),
        )  # fmt: skip

    return [
        _gate(
            "gate", [1e-3, 0.3, 1.05, 80], alpha=[-2, 0, 4, 20.5], beta=[0.5, -1, 0.125, 0],
            bound=Bound(32, arguments, 1.0),
            meaning="the gate is reversed, its slope alpha not made positive by softplus, "
            "or beta enters with the wrong sign",
            targets=(
                "gate_reversed", "gate_without_softplus", "gate_exp_for_softplus", "gate_of_c_noise",
                "gate_offset_added",
            ),
        ),
        _gate(
            "gate-limits", [1e-300, 1e300], alpha=[0, 3, 60], beta=[1, -1, 0], bound=Bound(32, arguments, 1.0),
            meaning="the gate does not go to 0 (spatial) at low and 1 (temporal) at high noise, "
            "or overflows on the way",
            targets=("gate_reversed",),
        ),
        _gate(
            "gate-steep", [2.71, 2.72, 2.7187], alpha=[1024, 128, 20.5], beta=[1, 1, 0.953125],
            bound=Bound(4096, steep, 1.0),
            meaning="softplus overflows for large alpha, "
            "or gives up its precision there (a threshold of 20 is off by 2e-9)",
            targets=("softplus_threshold",),
        ),
        _gate(
            "gate-flat", [0.002, 80], alpha=[-8, -30, -128], beta=[0, 2, -2], bound=Bound(32, arguments, 1.0),
            meaning="softplus of a large negative alpha is not small and positive", targets=("gate_without_softplus",),
        ),
        refuses("gate-refuses-zero", 0.0, "sigma = 0 has no logarithm"),
        refuses("gate-refuses-negative", -1.0, "sigma = -1 is no noise level"),
    ]  # fmt: skip


RING: Window = {"rows": 3, "cols": 5, "radius": 1, "periodic": True}
BOX: Window = {"rows": 5, "cols": 3, "radius": 1, "periodic": False}


def _attention(
    name: str,
    seed: int,
    sizes: tuple[int, int, int],
    window: Window | None,
    meaning: str,
    targets: tuple[str, ...] = (),
) -> Recipe:
    """Generic queries, keys and values: n queries, m keys, d features."""
    n, m, d = sizes
    rng = np.random.default_rng(seed)
    inputs = {"q": draw(rng, 2, HEADS, n, d, scale=2), "k": draw(rng, 2, HEADS, m, d), "v": draw(rng, 2, HEADS, m, d)}
    requirements = ("ATT-1",) if window is None else ("ATT-1", "ATT-6")
    chain = Chain("scores, a softmax over keys, a weighted sum")
    return Recipe(
        f"attention/{name}", "attention", requirements=requirements, profiles=CORE, judge=chain, meaning=meaning,
        inputs=inputs, params={"window": window}, targets=targets,
    )  # fmt: skip


def _seen(name: str, window: Window, meaning: str, *targets: str) -> Recipe:
    """With equal scores and unit vectors as values, y shows which tokens each token attends to, as 1 / count."""
    n = window["rows"] * window["cols"]
    rows = [visible(window, token) for token in range(n)]
    y = np.array([[(other in seen) / len(seen) for other in range(n)] for seen in rows])
    rng = np.random.default_rng(310)
    inputs = {"q": np.zeros((1, 1, n, n)), "k": draw(rng, 1, 1, n, n), "v": np.eye(n)[None, None]}
    bound = Bound(4, "equal scores: a reciprocal of a small integer, and sums with zeros", 1.0)
    return Recipe(
        f"attention/{name}", "attention", requirements=("ATT-6",), profiles=CORE, judge=bound, meaning=meaning,
        inputs=inputs, params={"window": window}, expected={"y": y[None, None]}, targets=targets,
    )  # fmt: skip


def _sharp() -> Recipe:
    """Scores -5120, 0 and 5120 by integer products; the largest is there once, or twice."""
    q = np.array([[64.0, 0, 0, 0], [0, -64, 0, 0], [0, 0, 64, 64]])
    k = np.array([[160.0, -160, 0, 0], [0, 160, 160, 0], [-160, 0, 0, 160], [0, 0, -160, -160]])
    v = np.random.default_rng(311).integers(-8, 9, (1, 1, 4, 4)).astype(np.float64)
    y = np.stack([v[0, 0, 0], v[0, 0, 0], (v[0, 0, 1] + v[0, 0, 2]) / 2])
    return Recipe(
        "attention/sharp", "attention", requirements=("ATT-1",), profiles=CORE,
        judge=Bound(4, "scores are integers, weights 1, 1/2 and e^-5120 = 0"),
        meaning="scores of some thousands overflow, or lose their differences",
        inputs={"q": q[None, None], "k": k[None, None], "v": v}, params={"window": None}, expected={"y": y[None, None]},
        targets=("attention_not_shifted",),
    )  # fmt: skip


def _attentions() -> list[Recipe]:
    return [
        _attention(
            "dense", 301, sizes=(5, 6, 4), window=None,
            meaning="the scores are not divided by sqrt(d), or softmax is over queries",
            targets=("attention_scale_d", "attention_over_queries", "attention_causal"),
        ),
        _attention(
            "single-feature", 302, (6, 6, 1), None, "with d = 1 the scores are divided by something other than 1",
        ),
        _attention(
            "window-periodic", 303, (15, 15, 4), RING, "the window does not wrap in longitude",
            targets=("window_not_periodic",),
        ),
        _attention(
            "window-closed", 304, (15, 15, 4), BOX, "a closed window wraps", targets=("window_always_periodic",),
        ),
        _seen(
            "sees-periodic", {**RING, "rows": 4},
            "the window does not wrap in longitude, wraps in latitude too, or wraps a column short",
            "window_not_periodic", "window_rows_wrap",
        ),
        _seen(
            "sees-closed", {**BOX, "rows": 6, "cols": 4},
            "the window has another radius or shape, wraps, or tokens are column-major", "window_euclidean",
            "window_radius_minus_one", "window_column_major",
        ),
        _seen(
            "sees-itself", {"rows": 2, "cols": 3, "radius": 0, "periodic": True},
            "a window of radius 0 is taken for no window, or sees nothing",
        ),
        _seen(
            "sees-twice-round", {"rows": 4, "cols": 4, "radius": 2, "periodic": True},
            "a window wider than the ring counts a token twice, or rows are counted by columns", "window_duplicates",
        ),
        _seen(
            "sees-all", {"rows": 3, "cols": 2, "radius": 3, "periodic": True},
            "a window that covers the grid is not the same as none", "window_duplicates",
        ),
        _sharp(),
    ]  # fmt: skip


def _block(
    name: str,
    seed: int,
    shape: tuple[int, int, int],
    heads: int,
    window: Window | None,
    meaning: str,
    targets: tuple[str, ...] = (),
    sigma: Sequence[float] = (0.4, 6.0),
    ratio: int = 4,
    x: Array | None = None,
    factors: Mapping[str, float] | None = None,
) -> Recipe:
    rng = np.random.default_rng(seed)
    inputs = scaled(weights(block_shapes(shape[-1], heads, ratio), rng), **(factors or {})) | {
        "x": draw(rng, *shape) if x is None else x,
        "memory": draw(rng, *shape),
        "embedding": draw(rng, shape[0], shape[-1]),
        "sigma": np.array(sigma),
    }
    requirements = ("ATT-1", "ATT-2", "ATT-3", "ATT-4", "ATT-5") + (("ATT-6",) if window else ())
    chain, params = Chain("three sub-layers, each behind a layer norm"), {"heads": heads, "window": window}
    return Recipe(
        f"attention/{name}", "block", requirements=requirements, profiles=CORE, judge=chain, meaning=meaning,
        inputs=inputs, params=params, targets=targets,
    )  # fmt: skip


def _without_gates() -> Recipe:
    """The adaptive map is zero, so all three gates are."""
    rng = np.random.default_rng(330)
    inputs = weights(block_shapes(4, 2, 1), rng)
    inputs |= {name: np.zeros_like(value) for name, value in inputs.items() if ".adaptive." in name}
    x = draw(rng, 1, 4, 4)
    inputs |= {"x": x, "memory": draw(rng, 1, 4, 4), "embedding": draw(rng, 1, 4), "sigma": np.array([2.0])}
    return Recipe(
        "attention/block-without-gates", "block", requirements=("ATT-3",), profiles=CORE,
        judge=Exact("x + 0 three times"),
        meaning="a residual gate is missing, has 1 added, or the residual itself is missing", inputs=inputs,
        params={"heads": 2, "window": None}, expected={"y": x}, targets=("residual_gate_missing",),
    )  # fmt: skip


def _blocks() -> list[Recipe]:
    faint = draw(np.random.default_rng(331), 2, 6, 8, scale=2.0**-10)
    near_constant = 0.125 + np.random.default_rng(332).integers(-2, 3, (2, 6, 8)) * 2.0**-10  # one bfloat16 step: 2^-10
    offset = 1024 + 8.0 * np.random.default_rng(333).integers(0, 2, (2, 6, 8))  # one bfloat16 step there: 8
    return [
        _block(
            "block", 320, shape=(2, 6, 8), heads=HEADS, window=None,
            meaning="a sub-layer is missing or out of order, modulations are cut in another order, "
            "or gelu is approximate",
            targets=("gelu_tanh", "sublayers_exchanged", "adaptive_order", "gate_exchanged", "gate_after_projection"),
        ),
        _block(
            "block-window", 321, shape=(2, 15, 8), heads=HEADS, window=RING,
            meaning="the window applies to self-attention or to cross-attention only", targets=("window_self_only",),
        ),
        _block(
            "block-near-constant", 322, shape=(2, 6, 8), heads=HEADS, window=None,
            meaning="layer norm has another eps than 1e-6, adds it outside the root, or uses the sample variance",
            targets=("layer_norm_eps", "layer_norm_eps_outside", "layer_norm_sample_variance"), x=near_constant,
        ),
        _block(
            "block-offset", 325, shape=(2, 6, 8), heads=HEADS, window=None,
            meaning="layer norm takes the variance as mean square minus squared mean, "
            "and loses the digits of an offset",
            targets=("layer_norm_quick_variance",), x=offset,
        ),
        _block(
            "block-faint", 323, shape=(2, 6, 8), heads=HEADS, window=None,
            meaning="layer norm has another eps than 1e-6, adds it outside the root, "
            "or divides before it subtracts the mean",
            targets=("layer_norm_eps", "layer_norm_eps_outside"), x=faint,
        ),
        _block(
            "block-odd-sizes", 324, (3, 4, 6), 3, None,
            "width, heads or MLP ratio are taken for a power of two, or for 4", sigma=(0.002, 1.0, 80.0), ratio=2,
        ),
        _block(
            "block-saturated", 325, shape=(2, 5, 4), heads=4, window=None,
            meaning="where the gate is 0 or 1 the silent branch still speaks, or its output bias is gated away",
            targets=("gate_of_projection_bias",), sigma=(1e-5, 1e5), factors={"gate_alpha": 16, "out__bias": 4},
        ),
        _without_gates(),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """Gate, attention, windows, and a block on generic, faint and nearly constant tokens."""
    return [*_gates(), *_attentions(), *_blocks()]
