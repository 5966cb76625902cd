"""Laws of chapter 2: chunks and order do not matter, one frame is passed on, every location is for itself.

Limits: the softmax weights of K frames are known to 2 u times the distance of a score from the maximum, at most 1/e a
term; sums of K terms, and every rescaling, add K u. The whole compression adds a linear map of some 12 terms and the
codes before, and two projections of 8 terms after: `CHAIN` round-offs of its largest value on either side.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.judging.inputs import compress_inputs, config, copying_weights, past_inputs, scaled
from conformance.judging.law import Draw, Law, arrays, check_close, check_equal
from conformance.ports.checked import Port
from conformance.protocol.operations import round_to

__all__ = ["CHAIN", "LAWS", "drawn_history", "reordered"]

CORE = ("core",)
# 12 + 6 + 6 terms of the embeddings, 8 + 4 of key and score, whose error the softmax turns into one of the value, 8 of
# the value, 8 of the output: some 60 round-offs; twice for two evaluations, twice for values above the largest result.
CHAIN = 256
AGES = st.sampled_from([0.5, 1.0, 3.0, 6.0, 9.5, 12.0, 18.0, 24.0, 48.0, 168.0, 720.0, 8760.0, 177500.0])


def _splits(draw: Draw, frames: int) -> list[int]:
    """A drawn split of the frames into chunks."""
    cuts = sorted(draw(st.sets(st.integers(1, max(frames - 1, 1)), max_size=frames - 1), "cuts"))
    edges = [0, *(cut for cut in cuts if cut < frames), frames]
    return [b - a for a, b in pairwise(edges)]


def _scores(draw: Draw) -> tuple[Array, Array]:
    frames = draw(st.integers(2, 9), "frames")
    size = draw(st.sampled_from([0.5, 4.0, 64.0]), "size of the scores")
    return draw(arrays(2, frames, 3, 2, scale=size), "score"), draw(arrays(2, frames, 3, 2, 3), "value")


def _memory(port: Port, score: Array, value: Array, chunks: list[int]) -> Array:
    return port.values("memory", {"score": score, "value": value}, {"chunks": chunks}, "memory")[0]


def _chunks(port: Port, draw: Draw) -> None:
    score, value = _scores(draw)
    k = score.shape[1]
    order, chunks = draw(st.permutations(range(k)), "order"), _splits(draw, k)
    whole = _memory(port, score, value, [k])
    parts = _memory(port, score[:, order], value[:, order], chunks)
    limit = (16 + 8 * k) * port.unit("memory", "memory") * float(np.abs(value).max())
    check_close(parts, whole, limit, f"frames {list(order)} in chunks {chunks} against one chunk")


def _shift(port: Port, draw: Draw) -> None:
    k = draw(st.integers(1, 8), "frames")
    quarters = draw(st.lists(st.integers(-16, 16), min_size=k * 12, max_size=k * 12), "score in quarters")
    score = np.array(quarters).reshape(2, k, 3, 2) / 4
    shift = draw(st.lists(st.integers(-16, 16), min_size=12, max_size=12), "shift")
    moved = score + np.array(shift, np.float64).reshape(2, 1, 3, 2)  # at most 80 quarters: exact in bfloat16
    value = draw(arrays(2, k, 3, 2, 3), "value")
    chunks = _splits(draw, k)
    limit = (8 + 4 * k) * port.unit("memory", "memory") * float(np.abs(value).max())
    got, want = _memory(port, moved, value, chunks), _memory(port, score, value, chunks)
    check_close(got, want, limit, "scores of a location and head that all grew alike")


def _huge(port: Port, draw: Draw) -> None:
    k = draw(st.sampled_from([1, 2, 4, 8]), "frames")
    base = draw(st.sampled_from([-5120.0, 0.0, 5120.0]), "base")
    steps = draw(st.lists(st.integers(-5, 5), min_size=k, max_size=k), "steps of 1024")
    value = np.round(8 * draw(arrays(1, k, 2, 1, 3), "value"))
    best = np.flatnonzero(np.array(steps) == max(steps))
    score = np.broadcast_to((base + 1024.0 * np.array(steps))[None, :, None, None], (1, k, 2, 1)).copy()
    got = _memory(port, score, value, _splits(draw, k))
    # e^0 = 1 and e^-1024 = 0: integer sums, one division.
    limit = 4 * port.unit("memory", "memory") * float(np.abs(value).max())
    check_close(got, value[:, best].mean(1), limit, "huge scores against the mean of the frames that have the largest")


def _convex(port: Port, draw: Draw) -> None:
    score, value = _scores(draw)
    got = _memory(port, score, value, _splits(draw, score.shape[1]))
    slack = (4 + 4 * score.shape[1]) * port.unit("memory", "memory") * float(np.abs(value).max())
    inside = np.clip(got, value.min(1), value.max(1))
    check_close(got, inside, slack, "a memory outside the range of its frames' values")


def drawn_history(draw: Draw, frames: int, batch: int, sharp: float = 2.0) -> tuple[dict[str, Any], dict[str, Array]]:
    """A configuration of width 8 and everything `compress` takes, on a grid of 2 x 3 patches."""
    c = config(width=8, patch=[1, 2], channels=draw(st.integers(1, 2), "channels"))
    ages = draw(st.lists(AGES, min_size=batch * frames, max_size=batch * frames), "ages")
    seed = draw(st.integers(0, 2**32 - 1), "seed of the network")
    return c, scaled(compress_inputs(c, (2, 6), np.reshape(ages, (batch, frames)).tolist(), seed), memory__query=sharp)


def reordered(inputs: dict[str, Array], order: Any) -> dict[str, Array]:
    """The same frames, each with its static fields and age, in another order."""
    return inputs | {name: inputs[name][:, list(order)] for name in ("past", "past_static", "age")}


def _compress(port: Port, inputs: dict[str, Array], c: dict[str, Any], chunk: int = 16) -> Array:
    return port.values("compress", inputs, {"config": c, "chunk": chunk}, "memory")[0]


def _limit(port: Port, memory: Array, count: float = CHAIN) -> float:
    return count * port.unit("compress", "memory") * float(np.abs(memory).max())


def _compress_chunks(port: Port, draw: Draw) -> None:
    k = draw(st.integers(2, 7), "frames")
    c, inputs = drawn_history(draw, k, 2)
    order, chunk = draw(st.permutations(range(k)), "order"), draw(st.integers(1, k), "chunk")
    whole = _compress(port, inputs, c)
    parts = _compress(port, reordered(inputs, order), c, chunk)
    check_close(parts, whole, _limit(port, whole), f"frames {list(order)}, {chunk} at a time, against one chunk")


def _compress_one_frame(port: Port, draw: Draw) -> None:
    c, inputs = drawn_history(draw, 1, 2)
    one = _compress(port, inputs, c)
    other = _compress(port, scaled(inputs, memory__query=-8, memory__key__weight=4), c)
    check_close(other, one, _limit(port, one, 8), "the memory of one frame with another query and key")


def _compress_twice(port: Port, draw: Draw) -> None:
    k = draw(st.integers(1, 4), "frames")
    c, inputs = drawn_history(draw, k, 1)
    once = _compress(port, inputs, c)
    twice = _compress(port, reordered(inputs, [*range(k), *range(k)]), c, draw(st.integers(1, 2 * k), "chunk"))
    check_close(twice, once, _limit(port, once), "every frame given twice against once")


def _compress_local(port: Port, draw: Draw) -> None:
    c, inputs = drawn_history(draw, 3, 1)
    row, col = draw(st.integers(0, 1), "row"), draw(st.integers(0, 2), "column of patches")
    other = dict(inputs)
    for name in ("past", "past_static"):
        other[name] = inputs[name].copy()
        other[name][..., row, 2 * col : 2 * col + 2] += 1024.0
    before, after = _compress(port, inputs, c), _compress(port, other, c)
    elsewhere = np.ones((2, 3), bool)
    elsewhere[row, col] = False
    limit = _limit(port, before, 8)
    check_close(after[:, elsewhere], before[:, elsewhere], limit, "the memory of places where no frame was changed")


def _compress_batch(port: Port, draw: Draw) -> None:
    c, inputs = drawn_history(draw, 3, 3)
    together = _compress(port, inputs, c, 2)
    sample = draw(st.integers(0, 2), "sample")
    alone = inputs | {name: inputs[name][sample : sample + 1] for name in ("past", "past_static", "age")}
    check_close(
        _compress(port, alone, c, 2)[0], together[sample], _limit(port, together), "a sample alone against its batch"
    )


def _full(dtype: str, value: Array) -> Array:
    """Numbers that use all bits of the run's dtype."""
    return round_to(value, dtype)


def _copied(port: Port, draw: Draw) -> None:
    """One frame, weights that copy: the memory is the patches of past and static fields, bit for bit."""
    c = config(width=8, channels=1, static_channels=1, patch=[2, 2], heads=2)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    inputs = copying_weights(c, embed_history__weight=np.eye(8)) | past_inputs(c, (4, 6), [[draw(AGES, "age")]], rng)
    inputs |= {
        "past": _full(port.dtype, rng.standard_normal((1, 1, 1, 4, 6))),
        "position": rng.uniform(-1, 1, (2, 3, 3)),
    }
    fields = np.concatenate([inputs["past"], inputs["past_static"]], 2)[0, 0]
    want = fields.reshape(2, 2, 2, 3, 2).transpose(1, 3, 0, 2, 4).reshape(1, 2, 3, 8)
    check_equal(_compress(port, inputs, c), want, "a frame that is only copied")


def _weight_bits(port: Port, draw: Draw) -> None:
    """One frame that is a unit vector: the memory is a column of a matrix, in all its bits."""
    c = config(width=8, channels=2, static_channels=0, patch=[2, 2], heads=2)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    part = draw(st.sampled_from(["embed_history", "memory__value", "memory__out"]), "matrix")
    value, column = draw(st.integers(0, 1), "channel"), draw(st.integers(0, 3), "point")
    matrix = _full(port.dtype, rng.standard_normal((8, 8)))
    inputs = copying_weights(c, **{"embed_history__weight": np.eye(8), f"{part}__weight": matrix})
    past = np.zeros((1, 1, 2, 2, 2))
    past[0, 0, value].flat[column] = 1.0
    inputs |= {"past": past, "past_static": np.zeros((1, 1, 0, 2, 2)), "age": np.array([[6.0]])}
    got = _compress(port, inputs | {"position": np.zeros((1, 1, 3))}, c)
    check_equal(got[0, 0, 0], matrix[:, 4 * value + column], f"a column of {part}")


def _law(name: str, check: Any, meaning: str, *requirements: str, fine: bool = False, **settings: Any) -> Law:
    op = "memory" if fine else "compress"
    profiles = settings.pop("profiles", CORE)
    return Law(f"memory/law-{name}", requirements, profiles, (op,), meaning, check, **settings)


LAWS = (
    _law("chunks", _chunks, "chunks or the order of frames change the softmax over them", "MEM-3", "MEM-4", fine=True,
         targets=("memory_not_rescaled", "memory_denominator_not_rescaled")),
    _law("shift", _shift, "a number added to all scores of a location and head changes the weights", "MEM-2",
         fine=True),
    _law("huge", _huge, "scores of 1e4 overflow, or give 0/0", "MEM-6", fine=True, targets=("memory_not_shifted",)),
    _law("convex", _convex, "the weights are negative or do not add to one", "MEM-2", fine=True),
    _law("compress-chunks", _compress_chunks, "the memory depends on the chunks or on the order of frames", "MEM-4",
         targets=("memory_not_rescaled", "last_chunk_dropped", "age_shared")),
    _law("compress-one-frame", _compress_one_frame, "a single frame's memory depends on query or key", "MEM-5"),
    _law("compress-twice", _compress_twice, "weights do not add to one: a frame given twice counts for more", "MEM-2",
         "MEM-4"),
    _law("compress-local", _compress_local, "locations share something: softmax or normalisation over the map", "MEM-2",
         targets=("memory_over_locations",)),
    _law("compress-batch", _compress_batch, "samples of a batch share a frame, an age or a maximum", "NET-6", "MEM-2"),
    _law("compress-copies", _copied, "values of past frames are moved, scaled or rounded on their way into the memory",
         "MEM-5", "TOK-2", "TOK-5", "NUM-1", targets=("past_times_c_in", "tokens_channel_last")),
    _law("compress-weight-bits", _weight_bits, "weights are kept or multiplied in fewer bits than the run's dtype",
         "MEM-5", "NUM-1", "NUM-8", targets=("tf32_products",)),
)  # fmt: skip
