"""Cases of chapter 10: networks in float32 and bfloat16, whatever the dtype of the run.

Only the network is narrow: the skip connection keeps 53 bits, and what enters the codes keeps its digits until they are
made. Sums and weights inside may be no worse than the dtype allows.

Expected values: fractions and 50 digits for the skip connection and the codes, integers for huge scores; for chains the
reference's float64 result, with limits from the reference in the case's own dtype.
"""

import numpy as np

from conformance.adapter import Array
from conformance.cases.attention import gate
from conformance.cases.denoiser import network_recipe, skip_recipe
from conformance.cases.memory import code_recipe
from conformance.judging.case import Chain, Recipe
from conformance.judging.inputs import (
    compress_inputs,
    config,
    copying_weights,
    draw,
    past_inputs,
    scaled,
    shapes,
    weights,
)
from conformance.judging.tolerance import Bound

__all__ = ["recipes"]

LOW = ("lowprec",)
NARROW = ("float32", "bfloat16")


def _skips() -> list[Recipe]:
    return [skip_recipe(f"numerics/skip-{dtype}", [0.3, 0.002, 7.0], LOW, dtype, 0.7) for dtype in NARROW]


def _codes() -> list[Recipe]:
    """Eight octaves: an argument that is rounded first is off by a hundred round-offs and more."""
    bound = Bound(4, "sines and cosines round once, and sums with zeros, products with one are exact", scale=1.0)
    return [
        recipe
        for dtype in NARROW
        for recipe in (
            code_recipe(f"numerics/position-code-{dtype}", None, 8, bound, dtype=dtype, profiles=LOW,
                        targets=("position_narrow",)),
            code_recipe(f"numerics/age-code-{dtype}", 177500.3, 8, bound, dtype=dtype, profiles=LOW,
                        targets=("age_narrow",)),
        )
    ]  # fmt: skip


def _compression(dtype: str) -> Recipe:
    c = config(width=8, position_octaves=6)
    ages = [[0.5, 1.25, 6.1, 12.3, 719.9, 8760.7, 177500.3], [2.2, 6.0, 12.0, 18.0, 24.0, 30.0, 36.0]]
    inputs = scaled(compress_inputs(c, (4, 4), ages, 601), memory__query=2)
    chain = Chain("a compression in one narrow dtype, frames three at a time")
    return Recipe(
        f"numerics/compress-{dtype}", "compress", requirements=("NUM-9", "TOK-9", "MEM-4"), profiles=LOW, judge=chain,
        meaning=f"products have fewer bits than {dtype}, or ages and positions are rounded before their codes are made",
        inputs=inputs, params={"config": c, "chunk": 3}, targets=("tf32_products", "age_narrow", "position_narrow"),
        dtype=dtype,
    )  # fmt: skip


def _long_history(dtype: str) -> Recipe:
    """320 frames of equal score, one at a time: 160 of zeros, then 160 of ones."""
    c = config(width=4, channels=4, static_channels=0, patch=[1, 1], position_features=1, position_octaves=1)
    past = np.repeat([0.0, 1.0], 160)[None, :, None, None, None] * np.array([1.0, 2, 3, 4])[:, None, None]
    inputs = copying_weights(c, embed_history__weight=np.eye(4)) | {
        "past": past,
        "past_static": np.zeros((1, 320, 0, 1, 1)),
        "age": np.arange(1.0, 321.0)[None],
        "position": np.zeros((1, 1, 1)),
    }
    why = "one running sum: integers below 2^24 and a division; one softmax: 160 weights of 1/320, their sum in float32"
    return Recipe(
        f"numerics/long-history-{dtype}", "compress", requirements=("MEM-3", "MEM-4"), profiles=LOW,
        judge=Bound(4 if dtype == "bfloat16" else 324, why),
        meaning="sums over many frames stop growing: the state between chunks has too few bits", inputs=inputs,
        params={"config": c, "chunk": 1}, expected={"memory": np.array([[[[0.5, 1, 1.5, 2]]]])},
        targets=("memory_state_narrow",), dtype=dtype,
    )  # fmt: skip


def _between(level: float) -> float:
    """A noise level near `level`, just short of halfway between two float32 numbers: rounded to one it moves most."""
    near = np.float32(level)
    return float(near) + 0.49 * float(np.spacing(near))


def _networks(dtype: str) -> list[Recipe]:
    """The level case has its levels near 1, where c_noise is small and a rounding of sigma is not: its fast waves see
    the one and not the other, and so does a steep gate in bfloat16."""
    slope = 64.0 if dtype == "bfloat16" else 4.0
    fast = np.zeros((6, 208))
    fast[:, [*range(100, 104), *range(204, 208)]] = draw(np.random.default_rng(613), 6, 8, scale=8**-0.5)
    change = {
        "weights.embed_noise.0.weight": fast,
        "weights.blocks.0.gate_alpha": np.array([slope, -1]),
        "weights.blocks.0.gate_beta": np.array([0.0, 1]),
    }
    return [
        network_recipe(
            f"numerics/denoise-{dtype}", 610, (4, 4), [0.7],
            f"products have fewer bits than {dtype}: reduced precision is switched on, or weights are stored in less",
            profiles=LOW, dtype=dtype, requirements=("NUM-9",), targets=("tf32_products",), width=8,
        ),
        network_recipe(
            f"numerics/denoise-quiet-{dtype}", 611, (4, 4), [0.002], "x passes through the network's dtype, or D does",
            profiles=LOW, dtype=dtype, requirements=("NUM-9", "EDM-1"), targets=("skip_narrow", "denoised_narrow"),
            width=4,
        ),
        network_recipe(
            f"numerics/denoise-level-{dtype}", 615, (2, 4), [_between(1.0031), _between(1.0013)],
            "the noise level is rounded to the network's dtype before its logarithm is taken",
            profiles=LOW, dtype=dtype, requirements=("NUM-9", "NET-1", "NET-9", "CONV-9"), targets=("sigma_narrow",),
            width=6, noise_features=208, change=change,
        ),
    ]  # fmt: skip


def _scores(dtype: str) -> Recipe:
    """[MEM-6] in one dtype: frames of score 10240, twice, among scores of all sizes."""
    score = np.array([-10240.0, 0, 10240, 9216, -10240, 10240, 9216, 100]).reshape(1, 8, 1, 1)
    value = np.random.default_rng(620).integers(-8, 9, (1, 8, 1, 1, 4)).astype(np.float64)
    return Recipe(
        f"numerics/huge-scores-{dtype}", "memory", requirements=("MEM-6",), profiles=LOW,
        judge=Bound(4, "e^0 = 1 and e^-1024 = 0 are exact, sums of two small integers too"),
        meaning=f"scores of 1e4 overflow in {dtype}", inputs={"score": score, "value": value},
        params={"chunks": [1, 1, 2, 1, 3]}, expected={"memory": (value[:, 2] + value[:, 5]) / 2},
        targets=("memory_not_shifted",), dtype=dtype,
    )  # fmt: skip


def _gate(dtype: str) -> Recipe:
    """[NET-9]: gates so steep that a noise level in the network's dtype is another one."""
    inputs = {
        "sigma": np.array([_between(1.0031), _between(1.0013), 1.0]),
        "alpha": np.array([1024.0, 256, 32]),
        "beta": np.array([0.0, 0.00390625, -0.03125]),
    }
    return Recipe(
        f"numerics/gate-{dtype}", "gate", requirements=("NET-9", "ATT-4"), profiles=LOW,
        judge=Bound(4, "softplus is alpha to the last digit, the argument float64; one rounding", scale=1.0),
        meaning="sigma, its logarithm or the gate's argument is rounded to the network's dtype", inputs=inputs,
        params={}, expected={"gamma": gate(**inputs)}, targets=("sigma_narrow",), dtype=dtype,
    )  # fmt: skip


def _attention(dtype: str) -> Recipe:
    rng = np.random.default_rng(630)
    inputs = {name: draw(rng, 1, 2, 24, 4) for name in ("q", "k", "v")}
    return Recipe(
        f"numerics/attention-{dtype}", "attention", requirements=("ATT-1", "NUM-9"), profiles=LOW,
        judge=Chain("one attention over 24 keys"), meaning="softmax weights have fewer bits than the dtype",
        inputs=inputs, params={"window": None}, targets=("tf32_products",), dtype=dtype,
    )  # fmt: skip


def _embedding(dtype: str) -> Recipe:
    c = config(width=8, position_octaves=8, patch=[1, 2])
    inputs = weights(shapes(c), np.random.default_rng(640), "embed_history", "embed_position", "embed_age")
    fields: dict[str, Array] = past_inputs(c, (2, 4), [[0.3, 177500.3]], np.random.default_rng(641))
    position = np.random.default_rng(642).uniform(-1, 1, (2, 2, 3))
    return Recipe(
        f"numerics/embed-history-{dtype}", "embed_history", requirements=("TOK-9",), profiles=LOW,
        judge=Chain("a patch embedding and two codes"),
        meaning="positions or ages are rounded to the network's dtype before their codes are made",
        inputs=inputs | fields | {"position": position}, params={"config": c},
        targets=("age_narrow", "position_narrow"), dtype=dtype,
    )  # fmt: skip


def recipes() -> list[Recipe]:
    """Coarse operations and their parts in float32 and in bfloat16."""
    each = [
        recipe
        for dtype in NARROW
        for recipe in (
            _compression(dtype), _long_history(dtype), *_networks(dtype), _scores(dtype), _gate(dtype),
            _attention(dtype),
            _embedding(dtype),
        )
    ]  # fmt: skip
    return [*_skips(), *_codes(), *each]
