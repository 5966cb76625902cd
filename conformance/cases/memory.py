"""Cases of chapter 2: the compressed memory, as a softmax over frames and with its projections.

Expected values: one softmax over all frames in NumPy, whatever the chunks the port is asked to take.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.cases.tokenisation import fourier, patchify
from conformance.tolerance import Bound, MustReject, chain_bound

__all__ = ["cases", "compress", "linear"]


def softmax_average(score: Array, value: Array) -> Array:
    """Softmax over the frames, then the weighted sum: [b,k,n,a], [b,k,n,a,d] -> [b,n,a,d]."""
    weight = np.exp(score - score.max(1, keepdims=True))
    weight = weight / weight.sum(1, keepdims=True)
    total: Array = (weight[..., None] * value).sum(1)
    return total


def linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """x W^T + b, the bias where there is one."""
    y: Array = x @ weights[f"weights.{name}.weight"].T
    bias = f"weights.{name}.bias"
    return y + weights[bias] if bias in weights else y


def compress(inputs: Mapping[str, Array], config: Mapping[str, Any]) -> Array:
    """[TOK-5], [TOK-7], [TOK-8], [MEM-1], [MEM-2]: past frames -> memory tokens [b, rows, cols, D]."""
    past, position = inputs["past"], inputs["position"]
    b, k = past.shape[:2]
    rows, cols = position.shape[:2]
    width, heads, octaves = config["width"], config["heads"], config["position_octaves"]
    fields = np.concatenate([past, inputs["past_static"]], 2)
    tokens = patchify(fields.reshape(b * k, *fields.shape[2:]), tuple(config["patch"])).reshape(b, k, rows * cols, -1)
    place = linear(inputs, "embed_position", fourier(position.reshape(rows * cols, -1), octaves))
    age = linear(inputs, "embed_age", fourier((np.log2(1 + inputs["age"]) / 8)[..., None], octaves))
    history = linear(inputs, "embed_history", tokens) + place + age[:, :, None]
    key = linear(inputs, "memory.key", history).reshape(b, k, rows * cols, heads, -1)
    value = linear(inputs, "memory.value", history).reshape(b, k, rows * cols, heads, -1)
    score = (key * inputs["weights.memory.query"]).sum(-1) / math.sqrt(width // heads)
    mixed = softmax_average(score, value).reshape(b, rows * cols, width)
    return linear(inputs, "memory.out", mixed).reshape(b, rows, cols, width)


def _case(
    name: str, requirements: tuple[str, ...], score: Array, value: Array, chunks: list[int], meaning: str
) -> Case:
    k = score.shape[1]
    why = (
        f"a softmax weight times its distance from the maximum is at most 1/e, so exp adds 2 eps a term; sums of {k} "
        f"terms add {k} eps each, and every one of {len(chunks)} rescalings 2 eps"
    )
    bound = Bound(4 + 2 * k + 4 * len(chunks), why, scale=float(np.abs(value).max()))
    expected = softmax_average(score, value)
    inputs = {"score": score, "value": value}
    return Case(
        f"memory/{name}", "memory", requirements, bound, meaning, inputs, {"chunks": chunks}, {"memory": expected}
    )


COMPRESS_CONFIG = {
    "channels": 2,
    "static_channels": 1,
    "patch": [2, 2],
    "width": 12,
    "heads": 3,
    "depth": 1,
    "mlp_ratio": 4,
    "position_features": 2,
    "position_octaves": 3,
    "noise_features": 8,
    "window": None,
    "sigma_data": 1.0,
}


def _compress_inputs() -> dict[str, Array]:
    rng = np.random.default_rng(201)
    shapes = {
        "embed_history.weight": (12, 12),
        "embed_history.bias": (12,),
        "embed_position.weight": (12, 12),
        "embed_age.weight": (12, 6),
        "memory.query": (3, 4),
        "memory.key.weight": (12, 12),
        "memory.value.weight": (12, 12),
        "memory.value.bias": (12,),
        "memory.out.weight": (12, 12),
        "memory.out.bias": (12,),
    }
    inputs = {f"weights.{name}": rng.standard_normal(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    inputs |= {"past": rng.standard_normal((2, 3, 2, 4, 6)), "past_static": rng.standard_normal((2, 3, 1, 4, 6))}
    age = np.array([[6.0, 12.0, 18.0], [1.0, 30.0, 200.0]])
    return inputs | {"age": age, "position": rng.uniform(-1, 1, (2, 3, 2))}


def _compress_cases() -> list[Case]:
    inputs = _compress_inputs()
    params = {"config": COMPRESS_CONFIG, "chunk": 2}
    future = inputs | {"age": np.array([[6.0, 12.0, 18.0], [1.0, -6.0, 200.0]])}
    none = inputs | {
        "past": inputs["past"][:, :0],
        "past_static": inputs["past_static"][:, :0],
        "age": inputs["age"][:, :0],
    }
    bound = chain_bound(lambda arrays: compress(arrays, COMPRESS_CONFIG), inputs, "projections, softmax, projection")
    return [
        Case(
            "memory/compress",
            "compress",
            ("MEM-1", "MEM-2", "TOK-5", "TOK-7", "TOK-8"),
            bound,
            "history tokens lack a part (statics, position, age), scores lack 1/sqrt(d), or heads are cut wrongly",
            inputs,
            params,
            {"memory": compress(inputs, COMPRESS_CONFIG)},
        ),
        Case(
            "memory/refuses-future",
            "compress",
            ("TOK-8", "CONV-4"),
            MustReject("a frame with age -6 h is of the future"),
            "a frame of the future is taken for one of the past",
            future,
            params,
            neighbour=(inputs, params),
        ),
        Case(
            "memory/refuses-empty-history",
            "compress",
            ("MEM-7",),
            MustReject("there is no past frame"),
            "an empty history gives NaN or zeros instead of an error",
            none,
            params,
            neighbour=(inputs, params),
        ),
    ]


def cases() -> list[Case]:
    """The streaming softmax: chunks, order, one frame, huge scores; the whole compression; what it refuses."""
    rng = np.random.default_rng(200)
    score, value = 3 * rng.standard_normal((2, 7, 3, 2)), rng.standard_normal((2, 7, 3, 2, 4))
    turn = [6, 2, 0, 5, 1, 4, 3]
    # Up and down: a running maximum that is not carried, or never lowered, shows either way.
    huge = np.array([-1e4, 3.0, 1e4, 1e4 - 1, -1e4, 0.0]).reshape(1, 6, 1, 1) * np.array([1.0, -1.0])
    return [
        _case("one-chunk", ("MEM-2",), score, value, [7], "the softmax is not over the frames, or not normalised"),
        _case(
            "chunks",
            ("MEM-3", "MEM-4"),
            score,
            value,
            [2, 1, 4],
            "a chunk is weighted as if it came alone: denominator or accumulator are not rescaled by e^(M-M')",
        ),
        _case(
            "order",
            ("MEM-4",),
            score[:, turn],
            value[:, turn],
            [1] * 7,
            "the result depends on the order of the frames: one is rescaled wrongly when the maximum rises or stays",
        ),
        _case("one-frame", ("MEM-5",), score[:, :1], value[:, :1], [1], "a single frame is not passed on as it is"),
        _case(
            "huge-scores",
            ("MEM-6",),
            huge,
            rng.standard_normal((1, 6, 1, 2, 3)),
            [1, 2, 3],
            "exp overflows: the running maximum is not subtracted, or only within a chunk",
        ),
        *_compress_cases(),
    ]
