"""Laws of chapter 4: what a whole network may not notice, and what it must.

Samples do not know each other, frames come in any order, tokens are known by their position alone, the same call gives
the same bits. Limits: a network of one block rounds some 60 times in a row between its input and D, several times in
sums of up to 32 terms and four times behind a layer norm that divides by a spread below one: 256 round-offs of the
largest value of D, and `NETWORK` for two evaluations.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.cases.denoiser import count
from conformance.judging.inputs import config, network_inputs
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.laws.memory import AGES, reordered
from conformance.ports.checked import Port
from conformance.protocol.operations import UNIT, round_to

__all__ = ["LAWS", "NETWORK"]

CORE = ("core",)
NETWORK = 512
LEVELS = st.sampled_from([0.01, 0.1, 0.37, 1.0, 2.5, 9.0, 60.0])
Inputs = dict[str, Array]


def _network(
    draw: Draw, frames: int, batch: int, grid: tuple[int, int] = (2, 6), **changes: Any
) -> tuple[dict[str, Any], Inputs]:
    """A network of one block, width 8, patches of 1 x 2, and everything `denoise` takes."""
    c = config(**{"width": 8, "depth": 1, "patch": [1, 2], "channels": 1, **changes})
    ages = draw(st.lists(AGES, min_size=batch * frames, max_size=batch * frames), "ages")
    sigma = draw(st.lists(LEVELS, min_size=batch, max_size=batch), "sigma")
    seed = draw(st.integers(0, 2**32 - 1), "seed of the network")
    return c, network_inputs(c, grid, sigma, np.reshape(ages, (batch, frames)).tolist(), seed)


def _denoise(port: Port, inputs: Inputs, c: dict[str, Any], chunk: int = 16, periodic: bool = True) -> Array:
    return port.values("denoise", inputs, {"config": c, "chunk": chunk, "periodic": periodic}, "denoised")[0]


def _close(port: Port, got: Array, want: Array, what: str) -> None:
    check_close(got, want, NETWORK * UNIT[port.dtype] * float(np.abs(want).max()), what)


def _of(inputs: Inputs, sample: int, *names: str) -> Inputs:
    return inputs | {name: inputs[name][sample : sample + 1] for name in names}


PER_SAMPLE = ("x", "sigma", "static", "past", "past_static", "age")


def _batch(port: Port, draw: Draw) -> None:
    c, inputs = _network(draw, 2, 3)
    sample = draw(st.integers(0, 2), "sample")
    together = _denoise(port, inputs, c)[sample]
    alone = _denoise(port, _of(inputs, sample, *PER_SAMPLE), c)[0]
    _close(port, alone, together, "a sample alone against its batch")


def _shared(port: Port, draw: Draw) -> None:
    c, inputs = _network(draw, 2, 3)
    names = PER_SAMPLE[2:] if draw(st.booleans(), "static fields are shared too") else PER_SAMPLE[3:]
    one = _of(inputs, 0, *names)
    each = one | {name: np.repeat(one[name], 3, 0) for name in names}
    want = _denoise(port, each, c)
    _close(port, _denoise(port, one, c), want, "a condition of batch 1 against the same for each sample")


def _frames(port: Port, draw: Draw) -> None:
    k = draw(st.integers(2, 6), "frames")
    c, inputs = _network(draw, k, 1)
    order, chunk = draw(st.permutations(range(k)), "order"), draw(st.integers(1, k), "chunk")
    want = _denoise(port, inputs, c)
    _close(port, _denoise(port, reordered(inputs, order), c, chunk), want, f"frames {list(order)}, {chunk} at a time")


def _same_bits(port: Port, draw: Draw) -> None:
    c, inputs = _network(draw, 2, 1)
    other = inputs | {name: -inputs[name] for name in ("position", "past", "static")}
    first = _denoise(port, inputs, c)
    between = _denoise(port, other, c)
    check_equal(_denoise(port, inputs, c), first, "the same call, before and after another")
    check_equal(_denoise(port, other, c), between, "the other call, again")


def _permuted(port: Port, draw: Draw) -> None:
    """Without a window a token is known by its position alone: move all that belongs to it."""
    c, inputs = _network(draw, 2, 1)
    order = list(draw(st.permutations(range(6)), "order of the patches"))

    def move(fields: Array) -> Array:
        patches = fields.reshape(*fields.shape[:-2], 2, 3, 2)
        flat = patches.reshape(*fields.shape[:-2], 6, 2)[..., order, :]
        return flat.reshape(*fields.shape[:-2], 2, 6)

    moved = inputs | {name: move(inputs[name]) for name in ("x", "static", "past", "past_static")}
    moved["position"] = inputs["position"].reshape(6, -1)[order].reshape(inputs["position"].shape)
    want = move(_denoise(port, inputs, c))
    _close(port, _denoise(port, moved, c), want, "patches in another order, with their positions and all fields")


def _zonal(port: Port, draw: Draw) -> None:
    """Positions of latitude alone, columns that close: a turn by whole patches turns the result."""
    window = draw(st.sampled_from([None, 0, 1, 2]), "window")
    c, inputs = _network(draw, 2, 1, (3, 8), position_features=1, window=window)
    inputs["position"] = np.broadcast_to(inputs["position"][:, :1], inputs["position"].shape).copy()
    turn = 2 * draw(st.integers(1, 3), "turn in patches")
    turned = inputs | {name: np.roll(inputs[name], turn, -1) for name in ("x", "static", "past", "past_static")}
    want = np.roll(_denoise(port, inputs, c), turn, -1)
    _close(port, _denoise(port, turned, c), want, f"fields turned by {turn} columns")


def _cone(port: Port, draw: Draw) -> None:
    """Depth times radius: farther than that nothing is heard, of the state, the static fields or the past."""
    depth, periodic = draw(st.integers(1, 2), "depth"), draw(st.booleans(), "periodic")
    c, inputs = _network(draw, 2, 1, (3, 16), window=1, depth=depth)
    row, col = draw(st.integers(0, 2), "row"), draw(st.integers(0, 7), "column of patches")
    name = draw(st.sampled_from(["x", "static", "past", "past_static"]), "field that changes")
    other = inputs | {name: inputs[name].copy()}
    other[name][..., row, 2 * col : 2 * col + 2] += 8.0
    before, after = (_denoise(port, i, c, periodic=periodic) for i in (inputs, other))
    across = np.abs(np.arange(8) - col)
    across = np.minimum(across, 8 - across) if periodic else across
    far = np.maximum(np.abs(np.arange(3) - row)[:, None], across) > depth
    limit = 8 * UNIT[port.dtype] * float(np.abs(before).max())
    beyond = np.repeat(far, 2, 1)
    check_close(after[..., beyond], before[..., beyond], limit, f"beyond {depth} patches of a change in {name}")
    if not np.abs(after - before)[..., ~beyond].max() > 0:
        raise Broken(f"a change in {name} is not heard at all")


def _skip(port: Port, draw: Draw) -> None:
    """With a last layer of zeros D = c_skip x, in float64 whatever the dtype of the network."""
    c, inputs = _network(draw, 1, 2, sigma_data=draw(st.sampled_from([0.5, 1.0, 3.0]), "sigma_data"))
    inputs |= {f"weights.final.{part}": np.zeros_like(inputs[f"weights.final.{part}"]) for part in ("weight", "bias")}
    square = c["sigma_data"] ** 2
    want = (square / (inputs["sigma"] ** 2 + square))[:, None, None, None] * inputs["x"]
    # Four roundings in c_skip and one product here, as many in the port.
    check_close(_denoise(port, inputs, c) / want, np.ones_like(want), 16 * 2.0**-53, "c_skip x, relative")


def _bias(port: Port, draw: Draw) -> None:
    """With a last matrix of zeros F is its bias, patch by patch."""
    c, inputs = _network(draw, 1, 2, channels=2, sigma_data=draw(st.sampled_from([0.5, 2.0]), "sigma_data"))
    inputs |= {"weights.final.weight": np.zeros_like(inputs["weights.final.weight"])}
    square, sigma = c["sigma_data"] ** 2, inputs["sigma"][:, None, None, None]
    inputs["weights.final.bias"] = round_to(np.pi * inputs["weights.final.bias"], port.dtype)  # in all its bits
    raw = np.tile(inputs["weights.final.bias"].reshape(1, 2, 1, 2), (2, 1, 2, 3))
    want = square / (sigma**2 + square) * inputs["x"] + sigma * c["sigma_data"] / np.sqrt(sigma**2 + square) * raw
    # Products with zero and one sum: the bias itself. Outside some ten roundings in float64.
    check_close(_denoise(port, inputs, c), want, 32 * 2.0**-53 * float(np.abs(want).max() + 9), "c_skip x + c_out b")


def _last_layer(port: Port, draw: Draw) -> None:
    """D - c_skip x is linear in the last layer."""
    c, inputs = _network(draw, 2, 1)
    factor = draw(st.sampled_from([-2.0, -1.0, 0.5, 4.0]), "factor")
    names = ("weights.final.weight", "weights.final.bias")
    once, none, more = (
        _denoise(port, inputs | {name: f * inputs[name] for name in names}, c) for f in (1.0, 0.0, factor)
    )
    # A power of two changes no rounding inside; outside some ten roundings in float64.
    limit = 64 * 2.0**-53 * float(np.abs(once).max() + np.abs(more).max() + np.abs(none).max())
    check_close(more - none, factor * (once - none), limit, f"D - c_skip x for a last layer times {factor}")


def _count(port: Port, draw: Draw) -> None:
    heads = draw(st.integers(1, 4), "heads")
    c = config(
        heads=heads,
        width=heads * draw(st.integers(1, 8), "features of a head"),
        depth=draw(st.integers(1, 5), "depth"),
        mlp_ratio=draw(st.integers(1, 5), "MLP ratio"),
        channels=draw(st.integers(1, 4), "channels"),
        static_channels=draw(st.integers(0, 3), "static channels"),
        patch=[draw(st.integers(1, 3), "p_y"), draw(st.integers(1, 3), "p_x")],
        position_features=draw(st.integers(1, 3), "P"),
        position_octaves=draw(st.integers(1, 6), "octaves"),
        noise_features=2 * draw(st.integers(1, 32), "pairs of noise features"),
    )
    (counted,) = port.values("count_weights", {}, {"config": c}, "count")
    check_equal(np.asarray(counted), np.array(count(c), np.int64), "the number of weights")


def _law(name: str, check: Any, meaning: str, *requirements: str, op: str = "denoise", **settings: Any) -> Law:
    return Law(f"denoiser/law-{name}", requirements, settings.pop("profiles", CORE), (op,), meaning, check, **settings)


LAWS = (
    _law("batch", _batch, "samples of a batch know each other: a shared noise level, history or normalisation",
         "NET-6", "NET-5", targets=("sigma_of_first_sample", "static_of_first_sample")),
    _law("shared-condition", _shared, "a condition of batch 1 does not serve every sample", "NET-6", examples=8),
    _law("frames", _frames, "the order of past frames, or the chunks they are taken in, change D", "MEM-4", "NET-2",
         targets=("memory_not_rescaled", "age_shared", "last_chunk_dropped")),
    _law("same-bits", _same_bits, "D depends on what was called before: noise drawn in secret, or a stale memory",
         "NUM-12", "CONF-6", "NET-5", targets=("memory_kept_between_calls",), examples=6),
    _law("patches-permuted", _permuted, "a token is known by its index, or fields and positions have different orders",
         "TOK-2", "TOK-6", "NET-2", targets=("tokens_column_major", "attention_causal", "position_of_index")),
    _law("zonal", _zonal, "with latitude-only positions longitudes are not alike: an index, or a seam in the window",
         "TOK-6", "ATT-6", "NET-3", targets=("window_not_periodic", "position_of_index")),
    _law("cone", _cone, "context reaches farther than depth times radius, through the window of memory or state",
         "ATT-6", "NET-3", targets=("window_self_only", "window_forgotten"), examples=10),
    _law("skip", _skip, "the skip connection is missing, or passes through the network's dtype", "NET-5", "EDM-1",
         "NUM-9",
         targets=("skip_narrow", "skip_missing"), examples=8),
    _law("bias", _bias, "c_out is wrong, or fields are put together in another order than they were taken apart",
         "NET-4", "NET-5", "TOK-3", targets=("tokens_channel_last", "sigma_data_one"), examples=8),
    _law("last-layer", _last_layer, "something nonlinear, or another term, comes after the last layer", "NET-4",
         "NET-5",
         examples=6),
    _law("count", _count, "a bias too many, a weight missing or another width somewhere", "NET-7", "ATT-5", "ATT-7",
         op="count_weights", targets=("key_bias",)),
)  # fmt: skip
