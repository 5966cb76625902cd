"""Cases of chapter 2: the compressed memory, as a softmax over frames and with its projections.

Expected values: one-hot, equal and dyadic softmax weights in closed form, integers where weights only move numbers,
codes to 50 digits; what is left is the reference's, in one chunk whatever the chunks the port is asked to take.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.cases.tokenisation import age_code, position_code
from conformance.judging.case import Chain, Judge, Recipe
from conformance.judging.inputs import compress_inputs, config, copying_weights, draw, past_inputs, scaled
from conformance.judging.tolerance import Bound, MustReject

__all__ = ["code_recipe", "recipes"]

CORE = ("core",)
SOFTMAX = Chain("a softmax over frames and a weighted sum, in chunks")
COMPRESS = Chain("a patch embedding, two codes, scores, a softmax over frames and two projections")


def _memory(
    name: str,
    requirements: tuple[str, ...],
    score: Array,
    value: Array,
    chunks: list[int],
    meaning: str,
    expected: Array | None = None,
    judge: Judge = SOFTMAX,
    targets: tuple[str, ...] = (),
) -> Recipe:
    given = None if expected is None else {"memory": expected}
    inputs, params = {"score": score, "value": value}, {"chunks": chunks}
    return Recipe(
        f"memory/{name}",
        "memory",
        requirements=requirements,
        profiles=CORE,
        judge=judge,
        meaning=meaning,
        inputs=inputs,
        params=params,
        expected=given,
        targets=targets,
    )


def _softmaxes() -> list[Recipe]:
    """Generic scores, taken in one chunk, in several, in any order."""
    rng = np.random.default_rng(200)
    score, value = draw(rng, 2, 7, 3, 2, scale=3), draw(rng, 2, 7, 3, 2, 4)
    rising = np.sort(draw(rng, 1, 24, 2, 3, scale=4), 1)
    many = draw(rng, 1, 24, 2, 3, 1)
    turn = [6, 2, 0, 5, 1, 4, 3]
    return [
        _memory(
            "one-chunk", ("MEM-2",), score, value, [7], "the softmax is not over the frames, or not normalised",
            targets=("memory_over_locations", "memory_over_heads"),
        ),
        _memory(
            "chunks",
            ("MEM-3", "MEM-4"),
            score,
            value,
            [2, 1, 4],
            "a chunk is weighted as if it came alone: denominator or accumulator are not rescaled by e^(M-M')",
            targets=("memory_not_rescaled", "memory_denominator_not_rescaled"),
        ),
        _memory(
            "order",
            ("MEM-4",),
            score[:, turn],
            value[:, turn],
            [1] * 7,
            "the result depends on the order of the frames: one is rescaled wrongly when the maximum rises or stays",
        ),
        _memory(
            "rising",
            ("MEM-3", "MEM-4"),
            rising,
            many,
            [1] * 24,
            "a maximum that rises with every frame is not carried over, or scales the wrong way",
        ),
        _memory(
            "falling",
            ("MEM-3", "MEM-4"),
            rising[:, ::-1].copy(),
            many,
            [5, 5, 5, 5, 4],
            "a chunk's own maximum replaces the running one when it is lower",
            targets=("memory_maximum_of_chunk",),
        ),
    ]  # fmt: skip


def _closed_forms() -> list[Recipe]:
    """Softmax weights that are known: 1, 1/2, 1/4, 0."""
    rng = np.random.default_rng(201)
    value = rng.integers(-8, 9, (1, 8, 2, 2, 3)).astype(np.float64)
    equal = np.full((1, 8, 2, 2), 3.0)
    few = "e^0 = 1 and e^-1000 = 0 are exact, and so are sums of small integers; one division rounds"
    # Up and down: a running maximum that is not carried, or never lowered, shows either way.
    huge = np.array([-10240.0, 3, 10240, 9216, 10240, -10240, 0, 9216]).reshape(1, 8, 1, 1) * np.array([[1.0, -1]])
    best = np.stack([(value[:, 2, :, 0] + value[:, 4, :, 0]) / 2, (value[:, 0, :, 1] + value[:, 5, :, 1]) / 2], 2)
    low = np.array([-10240.0, -9216, -10240, -9216, -10240, -10240, -10240, -10240]).reshape(1, 8, 1, 1)
    return [
        _memory(
            "one-frame",
            ("MEM-5",),
            score=draw(rng, 1, 1, 2, 2),
            value=value[:, :1],
            chunks=[1],
            meaning="a single frame is not passed on as it is",
            expected=value[:, 0],
            judge=Bound(2, "one weight of 1, one division by 1"),
        ),
        _memory(
            "equal-scores",
            ("MEM-2", "MEM-3"),
            score=equal,
            value=value,
            chunks=[3, 4, 1],
            meaning="frames of equal score do not count alike: the mean of chunks, or of a chunk and what came before",
            expected=value.mean(1),
            judge=Bound(4, few),
            targets=("memory_mean_of_chunks", "memory_divided_twice"),
        ),
        _memory(
            "huge-scores",
            ("MEM-6",),
            score=np.broadcast_to(huge, (1, 8, 2, 2)).copy(),
            value=value,
            chunks=[1, 2, 3, 2],
            meaning="exp overflows: the running maximum is not subtracted, or only within a chunk",
            expected=best,
            judge=Bound(4, few),
            targets=("memory_not_shifted",),
        ),
        _memory(
            "low-scores",
            ("MEM-6",),
            score=np.broadcast_to(low, (1, 8, 2, 2)).copy(),
            value=value,
            chunks=[2, 2, 4],
            meaning="0/0 for scores near -1e4: the running maximum starts at 0 instead of minus infinity",
            expected=(value[:, 1] + value[:, 3]) / 2,
            judge=Bound(4, few),
            targets=("memory_maximum_starts_at_zero",),
        ),
    ]


def _compress(
    name: str,
    seed: int,
    grid: tuple[int, int],
    age: Sequence[Sequence[float]],
    chunk: int,
    meaning: str,
    sharp: float = 1.0,
    profiles: tuple[str, ...] = CORE,
    targets: tuple[str, ...] = (),
    **changes: Any,
) -> Recipe:
    c = config(**{"width": 8, **changes})
    inputs = scaled(compress_inputs(c, grid, age, seed), memory__query=sharp)
    requirements = ("MEM-1", "MEM-2", "MEM-4", "TOK-5", "TOK-7", "TOK-8")
    params = {"config": c, "chunk": chunk}
    return Recipe(
        f"memory/{name}",
        "compress",
        requirements=requirements,
        profiles=profiles,
        judge=COMPRESS,
        meaning=meaning,
        inputs=inputs,
        params=params,
        targets=targets,
    )


def _generic() -> list[Recipe]:
    hours = [0.5, 1.1, 3, 6, 12, 18, 24.3, 30, 48, 49, 72, 100, 168.7, 240, 720, 2000, 4380, 8760.1, 26280, 1065000]
    return [
        _compress(
            "compress", 210, (4, 6), [[6, 12, 18], [1, 30, 200]], 2,
            "history tokens lack a part (statics, position, age), scores lack 1/sqrt(d), or heads are cut wrongly",
            profiles=("smoke", "core"), width=12, heads=3, position_features=2, sharp=4,
            targets=("memory_not_rescaled", "age_in_days", "memory_scale_width", "memory_heads_interleaved"),
        ),
        _compress(
            "compress-one-frame", 211, (4, 4), [[6], [30]], 16,
            "a single frame is weighted by its score, or a chunk longer than the history is padded",
        ),
        _compress(
            "compress-one-by-one", 212, (3, 4), [[36, 6, 30, 12, 24, 18, 1]], 1,
            "frames taken one at a time are not rescaled as the running maximum moves",
            sharp=4, patch=[1, 2], static_channels=2, channels=1,
            targets=("memory_not_rescaled", "memory_denominator_not_rescaled", "memory_maximum_of_chunk"),
        ),
        _compress(
            "compress-many-frames", 213, (2, 6), [hours], 6,
            "the last, shorter chunk is dropped, or ages of a year and more lose their digits or fold",
            sharp=2, patch=[1, 3], channels=1, static_channels=0, heads=1, position_octaves=6,
            targets=("last_chunk_dropped", "age_in_days", "age_clamped"),
        ),
        _compress(
            "compress-tall", 214, (6, 3), [[3, 9, 27, 81], [2, 4, 8, 16], [5, 10, 15, 20]], 3,
            "tall patches, a latitude-only position or heads of two features are mixed up",
            patch=[3, 1], position_features=1, heads=4, channels=3, position_octaves=1, sharp=2,
        ),
        _compress(
            "compress-single-feature-heads", 215, (2, 4), [[6, 12, 24, 48]], 4,
            "scores are divided by the square root of the width instead of that of a head's",
            width=6, heads=6, patch=[1, 1], channels=1, sharp=2,
        ),
    ]  # fmt: skip


def code_recipe(name: str, age: float | None, octaves: int, judge: Judge, **settings: Any) -> Recipe:
    """`compress` whose memory is a code: of the position, or of the age in hours. All else is zero or identity."""
    width = 2 * octaves
    c = config(width=width, heads=2, position_features=1, position_octaves=octaves, patch=[1, 1], channels=1)
    part = "embed_position__weight" if age is None else "embed_age__weight"
    rng = np.random.default_rng(220)
    position = rng.uniform(-1, 1, (2, 3, 1))
    inputs = copying_weights(c, **{part: np.eye(width)}) | past_inputs(c, (2, 3), [[age or 6.0]], rng)
    flat = position_code(position, octaves) if age is None else np.tile(age_code(age, octaves), (6, 1))
    what = ("position", "TOK-7") if age is None else ("age", "TOK-8")
    meaning = f"the {what[0]}'s code is computed in the network's dtype, in another unit, with other waves or order"
    return Recipe(
        name, "compress", requirements=(what[1], "TOK-9"), profiles=settings.pop("profiles", CORE), judge=judge,
        meaning=meaning, inputs=inputs | {"position": position}, params={"config": c, "chunk": 1},
        expected={"memory": flat.reshape(1, 2, 3, width)}, **settings,
    )  # fmt: skip


def _codes() -> list[Recipe]:
    why = "phases below {} are known to 2 u of themselves, sines have slopes below one; two roundings; sums with zeros"
    return [
        code_recipe("memory/compress-position-code", None, 4, Bound(64, why.format("4 pi"), scale=1.0)),
        code_recipe(
            "memory/compress-age-code", 100.1, 4, Bound(64, why.format("4 pi"), scale=1.0), targets=("age_in_days",)
        ),
        code_recipe("memory/compress-old-age-code", 1065000.1, 4, Bound(192, why.format("11 pi"), scale=1.0)),
    ]


def _integers(name: str, score: Sequence[float], meaning: str, requirement: str, targets: tuple[str, ...]) -> Recipe:
    """Frames of integers whose first feature is the score: the memory is the mean of the frames that have the largest.

    d = 4, so 1/sqrt(d) is a power of two, and the query asks for feature 0 of the first head and -0 of the second's.
    """
    c = config(width=8, heads=2, channels=2, static_channels=0, patch=[2, 2], position_features=1, position_octaves=1)
    rng = np.random.default_rng(221)
    past = rng.integers(-8, 9, (1, len(score), 2, 4, 2)).astype(np.float64)
    past[:, :, :, ::2, 0] = np.array(score)[None, :, None, None]  # the first value of either channel's patch
    query = np.zeros((2, 4))
    query[:, 0] = [2048.0, -2048.0]  # times the score 10, by sqrt(4): 10240
    inputs = copying_weights(c, embed_history__weight=np.eye(8), memory__query=query)
    inputs |= {
        "past": past,
        "past_static": np.zeros((1, len(score), 0, 4, 2)),
        "position": np.array([[[0.5]], [[-0.5]]]),
    }
    tokens = past.reshape(1, len(score), 2, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(len(score), 2, 2, 4)
    best = [np.flatnonzero(np.array(score) == edge) for edge in (max(score), min(score))]
    memory = np.concatenate([tokens[frames, :, head].mean(0) for head, frames in enumerate(best)], -1)
    return Recipe(
        f"memory/{name}", "compress", requirements=(requirement, "MEM-2", "TOK-2", "NUM-1"), profiles=CORE,
        judge=Bound(4, "integers, e^0 and e^-1000 are exact; a division by one, two or four frames rounds"),
        meaning=meaning, inputs=inputs | {"age": np.arange(1.0, len(score) + 1)[None]},
        params={"config": c, "chunk": 2}, expected={"memory": memory.reshape(1, 2, 1, 8)}, targets=targets,
    )  # fmt: skip


def _exact() -> list[Recipe]:
    return [
        _integers(
            "compress-huge-scores", [-10, 3, 10, 8, 10, -10, 0],
            "scores of 1e4 overflow or give 0/0 in the whole compression", "MEM-6",
            ("memory_not_shifted", "memory_maximum_starts_at_zero"),
        ),
        _integers(
            "compress-low-scores", [-10, -9, -10, -9],
            "all scores near -1e4 for one head and 1e4 for the other: the running maximum starts at 0", "MEM-6",
            ("memory_maximum_starts_at_zero",),
        ),
        _integers(
            "compress-equal-frames", [-10, -10, -10, -10],
            "frames of equal score are not averaged: the last chunk, or the mean of chunks, counts for too much",
            "MEM-4",
            ("memory_mean_of_chunks",),
        ),
    ]  # fmt: skip


def _refusals() -> list[Recipe]:
    c = config(width=4, position_octaves=1, position_features=1, patch=[2, 2], channels=1)
    valid = compress_inputs(c, (4, 4), [[6.0, 12.0, 18.0]], 230)
    params = {"config": c, "chunk": 2}

    def refuses(name: str, requirement: str, why: str, meaning: str, **change: Array) -> Recipe:
        return Recipe(
            f"memory/refuses-{name}", "compress", requirements=(requirement, "CONV-10"), profiles=CORE,
            judge=MustReject(why), meaning=meaning, inputs=valid | change, params=params,
            valid_counterpart=(valid, params),
        )  # fmt: skip

    def aged(age: float) -> Array:
        return np.array([[6.0, age, 18.0]])

    past, static = valid["past"], valid["past_static"]
    none = {"past": past[:, :0], "past_static": static[:, :0], "age": valid["age"][:, :0]}
    narrow = {"past": past[..., :2].copy(), "past_static": static[..., :2].copy()}
    odd = {"past": past[..., :3].copy(), "past_static": static[..., :3].copy()}
    future = "a frame of the present or the future is taken for one of the past"
    return [
        refuses("future", "CONV-4", "a frame with age -6 h is of the future", future, age=aged(-6.0)),
        refuses("present", "CONV-4", "a frame with age 0 h is the state itself", future, age=aged(0.0)),
        refuses("unknown-age", "CONV-4", "an age is not a number", "a NaN for an age spreads into the memory",
                age=aged(np.nan)),
        refuses("infinite-age", "TOK-8", "an age is infinite", "an infinite age has a code, or gives NaN",
                age=aged(np.inf)),
        refuses("empty-history", "MEM-7", "there is no past frame", "an empty history gives NaN or zeros", **none),
        refuses(
            "other-grid", "NET-6", "the past frames have 2 columns where the positions are of 4",
            "past frames of another grid are broadcast against the positions", **narrow,
        ),
        refuses(
            "broken-patch", "TOK-1", "3 columns are not whole patches of 2",
            "columns that fill no patch are cropped or padded",
            **odd,
        ),
        refuses(
            "other-channels", "NET-6", "the past frames have two channels where the network takes one",
            "channels of past frames are cut or broadcast", past=np.concatenate([past, past], 2),
        ),
        refuses(
            "missing-static", "NET-6", "static fields of one frame are missing",
            "one static field is broadcast to all frames",
            past_static=static[:, :2],
        ),
        refuses(
            "missing-age", "NET-6", "three frames have two ages", "ages are broadcast or cut to the number of frames",
            age=valid["age"][:, :2],
        ),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """The streaming softmax: chunks, order, one frame, huge scores; the whole compression; what it refuses."""
    return [*_softmaxes(), *_closed_forms(), *_generic(), *_codes(), *_exact(), *_refusals()]
