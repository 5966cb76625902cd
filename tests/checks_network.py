"""Checks of the network chapters: storm_ref against NumPy loops written from the numbered equations alone, float64.

The tests call them on the true code. test_mutants_network.py calls them on wrong versions and wants an AssertionError.

Tolerances are `roundings * eps * magnitude`: `roundings` is the number of operations on the longest chain that ends in
a value (a sum of n terms is n of them), `magnitude` the largest value of the result unless a comment says otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storm_ref.attention import (
    Block,
    DividedBlock,
    MultiHead,
    SpaceTimeBlock,
    attention,
    attention_by_definition,
    layer_norm,
    modulate,
    noise_gate,
    window_mask,
)
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, denoiser, noise_features, randomise
from storm_ref.memory import (
    MemoryState,
    TemporalMemory,
    memory_by_definition,
    memory_finish,
    memory_start,
    memory_update,
)
from storm_ref.tokenisation import (
    age_features,
    fourier_features,
    latitude_position,
    patchify,
    region_position,
    sphere_position,
    unpatchify,
)

Array = NDArray[np.float64]
Weights = dict[str, Array]
M = TypeVar("M", bound=nn.Module)
EPS64 = float(np.finfo(np.float64).eps)


# What checks are made of


def close(got: Tensor, want: Array | Tensor, roundings: float, what: str, magnitude: float | None = None) -> None:
    """Asserts |got - want| <= roundings * eps * magnitude, equal shapes and float64."""
    a, b = got.detach().numpy(), np.asarray(want.detach() if isinstance(want, Tensor) else want)
    assert got.dtype == torch.float64, f"{what}: {got.dtype} where float64 is wanted"
    assert a.shape == b.shape, f"{what}: shape {a.shape} where {b.shape} is wanted"
    size = float(np.abs(b).max(initial=0.0)) if magnitude is None else magnitude
    error = float(np.abs(a - b).max(initial=0.0))
    assert error <= roundings * EPS64 * size, f"{what}: off by {error:.3g}, allowed {roundings * EPS64 * size:.3g}"


def refuses(call: Callable[[], object], *words: str) -> None:
    """Asserts that the call raises ValueError with all the words in its message."""
    try:
        call()
    except Exception as error:
        assert isinstance(error, ValueError), f"{type(error).__name__} where a ValueError is wanted: {error}"
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"the message does not name {missing}: {error}"
    else:
        raise AssertionError(f"accepted what must be refused; wanted an error that names {words}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generic(module: M, seed: int = 0) -> M:
    """The module in float64 with weights, biases and gates away from zero."""
    module = module.double()
    randomise(module, torch.Generator().manual_seed(seed))
    return module


def weights_of(module: nn.Module) -> Weights:
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


# The equations in NumPy


def np_linear(w: Weights, name: str, x: Array) -> Array:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def np_silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def np_gelu(x: Array) -> Array:
    return np.asarray(np.vectorize(lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))))(x))


def np_softmax(s: Array) -> Array:
    e = np.exp(s - s.max())
    return np.asarray(e / e.sum())


def np_layer_norm(x: Array) -> Array:
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        token = x[at]
        mean = token.sum() / len(token)
        out[at] = (token - mean) / math.sqrt(((token - mean) ** 2).sum() / len(token) + 1e-6)
    return out


def np_patchify(x: Array, patch: tuple[int, int]) -> Array:
    (p, q), (c, h, w) = patch, x.shape
    tokens = []
    for i in range(h // p):
        for j in range(w // q):
            tokens.append([x[k, i * p + a, j * q + b] for k in range(c) for a in range(p) for b in range(q)])
    return np.array(tokens)


def np_unpatchify(tokens: Array, patch: tuple[int, int], grid: tuple[int, int]) -> Array:
    (p, q), (h, w) = patch, grid
    c = tokens.shape[1] // (p * q)
    x = np.empty((c, h, w))
    for k, y, z in np.ndindex(c, h, w):
        x[k, y, z] = tokens[(y // p) * (w // q) + z // q, k * p * q + (y % p) * q + z % q]
    return x


def np_fourier(r: Sequence[float], octaves: int) -> list[float]:
    phases = [2**j * math.pi * value / 2 for value in r for j in range(octaves)]
    return [math.sin(f) for f in phases] + [math.cos(f) for f in phases]


def np_age(age: float, octaves: int) -> list[float]:
    return np_fourier([math.log2(1 + age) / 8], octaves)


def np_window(rows: int, cols: int, radius: int, periodic: bool) -> NDArray[np.bool_]:
    see = np.zeros((rows * cols, rows * cols), dtype=bool)
    for i, j, k, m in np.ndindex(rows, cols, rows, cols):
        wraps = (-cols, 0, cols) if periodic else (0,)
        see[i * cols + j, k * cols + m] = abs(i - k) <= radius and any(abs(j - m + s) <= radius for s in wraps)
    return see


def np_attention(q: Array, k: Array, v: Array, see: NDArray[np.bool_] | None = None) -> Array:
    out = np.zeros((len(q), v.shape[1]))
    for n in range(len(q)):
        keys = [m for m in range(len(k)) if see is None or see[n, m]]
        weight = np_softmax(np.array([q[n] @ k[m] / math.sqrt(q.shape[1]) for m in keys]))
        for share, m in zip(weight, keys, strict=True):
            out[n] += share * v[m]
    return out


def np_multihead(
    w: Weights, name: str, x: Array, context: Array, share: Array, see: NDArray[np.bool_] | None = None
) -> Array:
    d = x.shape[1] // len(share)
    q = np_linear(w, f"{name}query", x)
    k, v = np_linear(w, f"{name}key", context), np_linear(w, f"{name}value", context)
    heads = [slice(a * d, (a + 1) * d) for a in range(len(share))]
    parts = [share[a] * np_attention(q[:, h], k[:, h], v[:, h], see) for a, h in enumerate(heads)]
    return np_linear(w, f"{name}out", np.concatenate(parts, 1))


def np_gate(sigma: float, alpha: Array, beta: Array) -> Array:
    slope = [math.log1p(math.exp(value)) for value in alpha]
    return np.array([1 / (1 + math.exp(-s * (math.log(sigma) - b))) for s, b in zip(slope, beta, strict=True)])


def np_block(
    w: Weights, name: str, x: Array, memory: Array, e: Array, sigma: float, see: NDArray[np.bool_] | None = None
) -> Array:
    d = x.shape[1]
    nine = np_linear(w, f"{name}adaptive", np_silu(e))
    shift, scale, gate = ([nine[(3 * s + i) * d : (3 * s + i + 1) * d] for s in range(3)] for i in range(3))
    gamma = np_gate(sigma, w[f"{name}gate_alpha"], w[f"{name}gate_beta"])
    y = np_layer_norm(x) * (1 + scale[0]) + shift[0]
    x = x + gate[0] * np_multihead(w, f"{name}spatial.", y, y, 1 - gamma, see)
    y = np_layer_norm(x) * (1 + scale[1]) + shift[1]
    x = x + gate[1] * np_multihead(w, f"{name}temporal.", y, np_layer_norm(memory), gamma, see)
    y = np_layer_norm(x) * (1 + scale[2]) + shift[2]
    return x + gate[2] * np_linear(w, f"{name}mlp.2", np_gelu(np_linear(w, f"{name}mlp.0", y)))


def np_memory(w: Weights, name: str, tokens: Array) -> Array:
    query = w[f"{name}query"]
    heads, d = query.shape
    key, value = np_linear(w, f"{name}key", tokens), np_linear(w, f"{name}value", tokens)
    mixed = np.empty(tokens.shape[1:])
    for n in range(tokens.shape[1]):
        for a in range(heads):
            part = slice(a * d, (a + 1) * d)
            share = np_softmax(np.array([query[a] @ key[k, n, part] / math.sqrt(d) for k in range(len(tokens))]))
            mixed[n, part] = sum(s * value[k, n, part] for k, s in enumerate(share))
    return np_linear(w, f"{name}out", mixed)


# [TOK]


def check_patchify(
    channels: int = 2, rows: int = 2, cols: int = 3, patch: tuple[int, int] = (2, 3), batch: int = 2
) -> None:
    """[TOK-1] [TOK-2] number, order and content of tokens, bit for bit."""
    shape = (batch, channels, rows * patch[0], cols * patch[1])
    x = torch.arange(math.prod(shape)).reshape(shape).double()
    got = patchify(x, patch)
    assert got.shape[1] == rows * cols, f"{got.shape[1]} tokens where {rows * cols} are wanted"
    want = np.stack([np_patchify(sample, patch) for sample in x.numpy()])
    assert np.array_equal(got.numpy(), want), "tokens are row-major over patches, and channel, row, column inside"


def check_unpatchify(channels: int = 2, rows: int = 2, cols: int = 3, patch: tuple[int, int] = (2, 3)) -> None:
    """[TOK-2] [TOK-3] the inverse, from the order alone and as a round trip both ways, bit for bit."""
    tokens = torch.arange(rows * cols * channels * patch[0] * patch[1]).double().reshape(1, rows * cols, -1)
    field = unpatchify(tokens, patch, rows)
    want = np_unpatchify(tokens[0].numpy(), patch, (rows * patch[0], cols * patch[1]))
    assert np.array_equal(field[0].numpy(), want), "fields put together in another order than [TOK-2]"
    assert torch.equal(patchify(field, patch), tokens), "patchify(unpatchify(t)) is not t"
    x = normal(channels, rows * patch[0], cols * patch[1])
    assert torch.equal(unpatchify(patchify(x, patch), patch, rows), x), "unpatchify(patchify(x)) is not x"


def check_patch_refused(height: int = 5, width: int = 6, patch: tuple[int, int] = (2, 3)) -> None:
    """[TOK-1] a patch that does not divide the grid: the error names both."""
    refuses(lambda: patchify(torch.zeros(1, height, width), patch), f"{patch[0]} x {patch[1]}", f"{height} x {width}")


def check_sphere_position(
    latitude: Sequence[float] = (75.0, 25.0, -25.0, -75.0),
    longitude: Sequence[float] = (0.0, 60.0, 120.0, 180.0, 240.0, 300.0),
    patch: tuple[int, int] = (2, 3),
) -> None:
    """[TOK-6] unit-sphere coordinates of the centre of each patch."""
    got = sphere_position(*(torch.tensor(t, dtype=torch.float64) for t in (latitude, longitude)), patch)
    want = np.empty((len(latitude) // patch[0], len(longitude) // patch[1], 3))
    for i, j in np.ndindex(want.shape[:2]):
        lat = math.radians(sum(latitude[i * patch[0] : (i + 1) * patch[0]]) / patch[0])
        lon = math.radians(sum(longitude[j * patch[1] : (j + 1) * patch[1]]) / patch[1])
        want[i, j] = math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)
    # The angle reaches 4 pi (two turns); each of its `patch` roundings moves the position by as much.
    close(got, want, 4 * math.pi * (max(patch) + 4), "position on the sphere", 1.0)


def check_longitude_periodic(start: float = -180.0, count: int = 8, patch: int = 2) -> None:
    """[TOK-6] 360 degrees on are the same place; a shift by whole patches shifts the columns."""
    latitude = torch.tensor([60.0, 20.0, -20.0, -60.0], dtype=torch.float64)
    longitude = start + torch.arange(count, dtype=torch.float64) * (360 / count)
    here = sphere_position(latitude, longitude, (2, patch))
    # Angles of up to four turns, with a rounding in the mean, in the addition of 360 and in radians each.
    close(sphere_position(latitude, longitude + 360, (2, patch)), here, 8 * math.pi * (patch + 4), "one turn on", 1.0)
    moved = sphere_position(latitude, longitude + patch * 360 / count, (2, patch))
    close(moved, here.roll(-1, 1), 8 * math.pi * (patch + 4), "one patch on", 1.0)


def check_region_position() -> None:
    """[TOK-6] equirectangular x, y about the middle of the region; x grows eastward and y northward."""
    latitude, longitude = [58.0, 56.0, 54.0, 52.0], [-9.0, -6.0, -3.0, 0.0, 3.0, 6.0]
    got = region_position(*(torch.tensor(t, dtype=torch.float64) for t in (latitude, longitude)), (2, 3), 5.0)
    middle = math.cos(math.radians(55.0))
    want = [[((x - -1.5) * middle / 5.0, (y - 55.0) / 5.0) for x in (-6.0, 3.0)] for y in (57.0, 53.0)]
    close(got, np.array(want), 16, "position in a region")


def check_latitude_position() -> None:
    """[TOK-6] sin(lat) of the patch centre, the same in every column."""
    got = latitude_position(torch.tensor([80.0, 40.0, -10.0, -20.0], dtype=torch.float64), 3, (2, 5))
    want = [[[math.sin(math.radians(60.0))]] * 3, [[math.sin(math.radians(-15.0))]] * 3]
    close(got, np.array(want), 8, "latitude position", 1.0)


def check_fourier(r: Sequence[Sequence[float]] = ((0.3, -0.9), (1.0, 0.05), (-1.0, 0.7)), octaves: int = 4) -> None:
    """[TOK-7] values and their order: sines before cosines, coordinate by coordinate, octaves fastest."""
    got = fourier_features(torch.tensor(r, dtype=torch.float64), octaves)
    want = np.array([np_fourier(row, octaves) for row in r])
    # A phase of up to 2^(J-1) pi/2 |r| carries three roundings, and sine and cosine one more.
    largest = max(1.0, max(abs(value) for row in r for value in row))
    close(got, want, 3 * 2 ** (octaves - 1) * math.pi / 2 * largest + 2, "position features", 1.0)


def check_codes_distinct(values: Sequence[float] = (-1.0, -0.99, -0.5, 0.0, 0.5, 0.99, 1.0)) -> None:
    """[TOK-7] the longest wave alone gives the coordinate back: no two points of [-1, 1] share a code."""
    code = fourier_features(torch.tensor(values, dtype=torch.float64)[:, None], 1)
    close(torch.atan2(code[:, 0], code[:, 1]) * 2 / math.pi, np.array(values), 8, "coordinate read back", 1.0)


def check_ages_distinct(ages: Sequence[float] = (1.0, 6.0, 8760.0, 65_535.0, 1_065_000.0, 4.0e9)) -> None:
    """[TOK-8] the longest wave gives the age back, half a million years of it."""
    code = age_features(torch.tensor(ages, dtype=torch.float64), 1)
    s = torch.atan2(code[:, 0], code[:, 1]).remainder(2 * math.pi) * 2 / math.pi
    close(s * 8, np.log2(1 + np.array(ages)), 16, "logarithm of the age read back", 32.0)


def check_age_features(ages: Sequence[float] = (0.25, 1.0, 6.0, 24.0, 31.5, 8760.0), octaves: int = 4) -> None:
    """[TOK-8] values, hours in."""
    got = age_features(torch.tensor([ages], dtype=torch.float64), octaves)
    want = np.array([[np_age(age, octaves) for age in ages]])
    # s <= 4 has four roundings, which the phase multiplies by 2^(J-1) pi / 2.
    close(got, want, 4 * 4 * 2 ** (octaves - 1) * math.pi / 2, "age features", 1.0)


def check_age_refused(age: float = -6.0) -> None:
    """[TOK-8] the present, the future, NaN and infinity are no ages; the error names the value."""
    refuses(lambda: age_features(torch.tensor([[6.0, age]], dtype=torch.float64), 2), "age", str(age))


# [MEM]


def check_memory_scores() -> None:
    """[MEM-1]"""
    memory, tokens = generic(TemporalMemory(12, 3)), normal(2, 4, 5, 12)
    w, (score, value) = weights_of(memory), memory.scores_and_values(tokens)
    want_score, want_value = np.empty((2, 4, 5, 3)), np.empty((2, 4, 5, 3, 4))
    for b, k, n, a in np.ndindex(2, 4, 5, 3):
        head = slice(4 * a, 4 * a + 4)
        token = tokens[b, k, n].numpy()
        want_score[b, k, n, a] = w["query"][a] @ (w["key.weight"][head] @ token) / math.sqrt(4)
        want_value[b, k, n, a] = w["value.weight"][head] @ token + w["value.bias"][head]
    close(score, want_score, 12 + 4 + 2, "memory scores")
    close(value, want_value, 12 + 1, "memory values")


def check_memory_tokens(frames: int = 4) -> None:
    """[MEM-2] tokens of the whole compression."""
    memory, tokens = generic(TemporalMemory(12, 3)), normal(2, frames, 5, 12)
    want = np.stack([np_memory(weights_of(memory), "", sample) for sample in tokens.numpy()])
    close(memory(tokens), want, 12 + 4 + 12 + frames + 12 + 4, "memory tokens")


def check_memory_update(frames: int = 3) -> None:
    """[MEM-3] maximum, denominator and accumulator after one chunk on top of a state."""
    score, value = 3 * normal(1, frames, 2, 2, seed=1), normal(1, frames, 2, 2, 3, seed=2)
    before = MemoryState(3 * normal(1, 2, 2, seed=3), 1 + normal(1, 2, 2, seed=4).abs(), normal(1, 2, 2, 3, seed=5))
    got = memory_update(before, score, value)
    want = [np.empty((1, 2, 2)), np.empty((1, 2, 2)), np.empty((1, 2, 2, 3))]
    for at in np.ndindex(1, 2, 2):
        b, n, a = at
        old, s = before.maximum[at].item(), score[b, :, n, a].tolist()
        top = max([old, *s])
        want[0][at] = top
        want[1][at] = before.denominator[at].item() * math.exp(old - top) + sum(math.exp(t - top) for t in s)
        want[2][at] = before.accumulator[at].numpy() * math.exp(old - top)
        want[2][at] += sum(math.exp(t - top) * value[b, k, n, a].numpy() for k, t in enumerate(s))
    # exp turns a rounding of its argument, at most 20 here, into as many of its value.
    for name, a, b in zip(("maximum", "denominator", "accumulator"), vars(got).values(), want, strict=True):
        close(a, b, frames + 20 + 4, name)


def check_memory_split(
    sizes: Sequence[int] = (2, 1, 3), order: Sequence[int] = (3, 0, 5, 1, 4, 2), stretch: float = 3.0
) -> None:
    """[MEM-3] [MEM-4] any split of the frames into chunks, in any order, equals one softmax over all of them."""
    k = len(order)
    score, value = stretch * normal(2, k, 3, 2, seed=1), normal(2, k, 3, 2, 4, seed=2)
    want = np.empty((2, 3, 2, 4))
    for b, n, a in np.ndindex(2, 3, 2):
        want[b, n, a] = np_softmax(score[b, :, n, a].numpy()) @ value[b, :, n, a].numpy()
    # Scores differ by at most 8 stretch (the draws are within 4): the argument of exp is rounded to that.
    roundings = 2 * (k + 8 * stretch + 4)
    close(memory_by_definition(score, value), want, roundings, "one softmax over the frames", float(value.abs().max()))
    state = memory_start(value.dtype, (len(value), *value.shape[2:]))
    for frames in torch.tensor(order).split(list(sizes)):
        state = memory_update(state, score[:, frames], value[:, frames])
    assert state.accumulator.shape == (2, 3, 2, 4), "the state must not grow with the number of frames"
    close(memory_finish(state), want, roundings, "streamed memory", float(value.abs().max()))


def check_memory_single() -> None:
    """[MEM-5] one frame: a plain projection, whatever its score."""
    memory, tokens = generic(TemporalMemory(12, 3)), normal(2, 1, 5, 12)
    w = weights_of(memory)
    want = np_linear(w, "out", np_linear(w, "value", tokens[:, 0].numpy()))
    close(memory(tokens), want, 12 + 12 + 4, "memory of one frame")


def check_memory_extreme(dtype: torch.dtype = torch.float64, top: float = 1e4) -> None:
    """[MEM-6] scores of +-1e4, in ascending, descending and mixed order: finite, and the largest takes all."""
    value = torch.arange(1.0, 5.0, dtype=dtype).reshape(1, 4, 1, 1, 1)
    for scores in ([-top, top, 0, 1], [top, -top, 0, -1], [0, 1, -top, top], [-top] * 4, [top] * 4):
        score = torch.tensor(scores, dtype=dtype).reshape(1, 4, 1, 1)
        winners = [k + 1.0 for k, s in enumerate(scores) if s == max(scores)]
        want = torch.tensor(sum(winners) / len(winners), dtype=dtype)
        for size in (1, 2, 4):
            state = memory_start(value.dtype, (len(value), *value.shape[2:]))
            for s, v in zip(score.split(size, 1), value.split(size, 1), strict=True):
                state = memory_update(state, s, v)
            # Exact: the other weights are e^-9999 or less, zero in both dtypes, and the means are of small integers.
            got = memory_finish(state).squeeze()
            assert torch.equal(got, want), f"scores {scores} in chunks of {size}: {got.item()}, not {want.item()}"


def check_memory_empty() -> None:
    """[MEM-3] no frame: refused in words."""
    value = torch.zeros(1, 0, 2, 1, 3, dtype=torch.float64)
    refuses(lambda: memory_finish(memory_start(value.dtype, (len(value), *value.shape[2:]))), "no frame")
    refuses(lambda: generic(TemporalMemory(4, 2))(normal(1, 0, 3, 4)), "no frame")


# [ATT]


def check_attention(n: int = 4, m: int = 5, d: int = 3, masked: bool = False, stretch: float = 2.0) -> None:
    """[ATT-1] both forms against loops over queries and keys."""
    q, k, v = stretch * normal(2, 2, n, d, seed=1), normal(2, 2, m, d, seed=2), normal(2, 2, m, d, seed=3)
    see = np.random.default_rng(0).random((n, m)) < 0.5 if masked else None
    if see is not None:
        see[:, 0] = True
    mask = None if see is None else torch.from_numpy(see)
    want = np.empty((2, 2, n, d))
    for b, a in np.ndindex(2, 2):
        want[b, a] = np_attention(q[b, a].numpy(), k[b, a].numpy(), v[b, a].numpy(), see)
    largest = float((q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(d))  # bound of a score
    # A score s carries (d + 2) |s| eps, which exp makes relative, twice (numerator and denominator); then sums over m.
    roundings = 2 * (d + 2) * largest + 2 * m + 4
    close(attention_by_definition(q, k, v, mask), want, roundings, "attention_by_definition", float(v.abs().max()))
    close(attention(q, k, v, mask), want, roundings, "attention", float(v.abs().max()))


def check_multihead(heads: int = 3) -> None:
    """[ATT-1] [ATT-3] heads side by side, each with its own weight, other tokens as context."""
    layer, x, context = generic(MultiHead(12, heads)), normal(2, 4, 12, seed=1), normal(2, 5, 12, seed=2)
    share = normal(2, heads, seed=3).abs()
    want = np.stack(
        [np_multihead(weights_of(layer), "", x[b].numpy(), context[b].numpy(), share[b].numpy()) for b in range(2)]
    )
    close(layer(x, context, share), want, 12 + 12 + 5 + 5 + 12 + 8, "heads")
    plain = np.stack([np_multihead(weights_of(layer), "", s, s, np.ones(heads)) for s in x.numpy()])
    close(layer(x, x), plain, 12 + 12 + 5 + 5 + 12 + 8, "self-attention")


def check_layer_norm(spread: float = 1e-3, width: int = 8) -> None:
    """[ATT-2] near-constant tokens tell eps 1e-6 from others, and the population variance from the sample's."""
    x = 2 + spread * normal(3, 4, width)
    # x - mean has (width + 1) roundings of x, divided by a standard deviation that eps keeps above 1e-3.
    roundings = (width + 4) * (float(x.abs().max()) / max(spread / 4, 1e-3) + math.sqrt(width))
    close(layer_norm(x), np_layer_norm(x.numpy()), roundings, f"layer norm of tokens with spread {spread}", 1.0)


def check_modulate() -> None:
    """[ATT-2] LN(x) (1 + scale) + shift."""
    x, shift, scale = normal(2, 3, 8, seed=1), normal(2, 8, seed=2), normal(2, 8, seed=3)
    want = np_layer_norm(x.numpy()) * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    close(modulate(x, shift, scale), want, 3 * 8 + 4, "adaptive layer norm")


def check_gate(
    sigma: Sequence[float] = (0.002, 0.3, 1.0, 5.0, 80.0),
    alpha: Sequence[float] = (-2.0, 0.0, 1.5),
    beta: Sequence[float] = (0.5, 0.0, -1.0),
) -> None:
    """[ATT-4] value."""
    got = noise_gate(*(torch.tensor(t, dtype=torch.float64) for t in (sigma, alpha, beta)))
    want = np.array([np_gate(s, np.array(alpha), np.array(beta)) for s in sigma])
    # The logit softplus(alpha) (ln sigma - beta) has four roundings, and the slope of the logistic is at most 1/4.
    logit = max(math.log1p(math.exp(a)) * (abs(math.log(s)) + abs(b)) for s in sigma for a in alpha for b in beta)
    close(got, want, logit + 4, "noise gate", 1.0)


def check_gate_monotone(
    sigma: Sequence[float] = (1e-6, 0.002, 0.5, 1.0, 80.0, 1e6),
    alpha: Sequence[float] = (-30.0, -2.0, 0.0, 3.0, 30.0),
    beta: Sequence[float] = (0.0, -5.0, 5.0, 1.0, -1.0),
) -> None:
    """[ATT-4] never falls as sigma grows, and stays within 0 and 1, for any alpha and beta."""
    gamma = noise_gate(*(torch.tensor(t, dtype=torch.float64) for t in (sorted(sigma), alpha, beta)))
    assert bool((gamma.diff(dim=0) >= 0).all()), f"the gate falls somewhere in {sorted(sigma)}"
    assert bool(((gamma >= 0) & (gamma <= 1)).all()), "the gate leaves [0, 1]"


def check_gate_limits() -> None:
    """[ATT-4] one (temporal) as sigma grows without end, zero (spatial) as it falls; strictly rising between."""
    alpha, beta = torch.tensor([-1.0, 0.0, 2.0]).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    gamma = noise_gate(torch.tensor([1e-300, 0.1, 1.0, 10.0, 1e300], dtype=torch.float64), alpha, beta)
    # softplus(-1) = 0.313 and |ln sigma| = 690: a logit of at least 215, e^-215 from the limit.
    assert bool((gamma[0] < 1e-90).all()), f"towards sigma = 0 the gate is {gamma[0].tolist()}, not 0"
    assert bool((1 - gamma[-1] < 1e-15).all()), f"for large sigma the gate is {gamma[-1].tolist()}, not 1"
    assert bool((gamma.diff(dim=0) > 0).all()), "the gate does not rise"


def check_gate_refused(sigma: float = 0.0) -> None:
    """[ATT-4] sigma <= 0 or NaN is refused."""
    one = torch.ones(1, dtype=torch.float64)
    refuses(lambda: noise_gate(torch.tensor([1.0, sigma], dtype=torch.float64), one, one), "sigma", str(sigma))


def check_key_bias() -> None:
    """[ATT-5] no key projection has a bias; one would not change a thing."""
    for owner in (MultiHead(8, 2), TemporalMemory(8, 2)):
        assert owner.key.bias is None, f"{type(owner).__name__} has a bias on its keys"
    q, k, v, bias = normal(1, 1, 4, 3), normal(1, 1, 5, 3, seed=1), normal(1, 1, 5, 3, seed=2), normal(3, seed=3)
    largest = float(q.norm(dim=-1).max() * (k.norm(dim=-1).max() + bias.norm()))
    moved = attention_by_definition(q, k + bias, v)
    close(moved, attention_by_definition(q, k, v), 2 * (3 + 2) * largest + 14, "keys moved", float(v.abs().max()))


def check_window(rows: int = 3, cols: int = 5, radius: int = 1, periodic: bool = True) -> None:
    """[ATT-6] who sees whom."""
    got = window_mask(rows, cols, radius, periodic)
    want = np_window(rows, cols, radius, periodic)
    assert got.shape == want.shape and np.array_equal(got.numpy(), want), (
        f"window of radius {radius} on {rows} x {cols} tokens, periodic {periodic}"
    )


def block_roundings(width: int, heads: int, tokens: int, ratio: int = 4) -> float:
    """Longest chain of one block: each attention norm, projection, score, softmax, sum, projection; then the MLP."""
    one = 2 * width + width + width // heads + 2 * tokens + width
    return 2 * one + 2 * width + width + ratio * width + width


def check_block(window: int | None = None, spread: float = 1.0) -> None:
    """[ATT-2] [ATT-3] [ATT-6] the whole block with generic weights; the same window for tokens and memory."""
    rows, cols, width, heads = 2, 4, 12, 3
    block = generic(Block(width, heads))
    x, memory = 2 + spread * normal(2, 8, width, seed=1), normal(2, 8, width, seed=2)
    e, sigma = normal(2, width, seed=3), torch.tensor([0.3, 4.0], dtype=torch.float64)
    see = None if window is None else np_window(rows, cols, window, True)
    mask = None if see is None else torch.from_numpy(see)
    w = weights_of(block)
    want = np.stack(
        [np_block(w, "", x[b].numpy(), memory[b].numpy(), e[b].numpy(), sigma[b].item(), see) for b in range(2)]
    )
    # Near-constant tokens: the first norm divides the roundings of x, of size 2, by the spread.
    roundings = block_roundings(width, heads, 8) * 2 / min(spread, 1)
    close(block(x, memory, e, sigma, mask), want, roundings, "block")


def check_block_weights(width: int = 16, heads: int = 4) -> None:
    """[ATT-7] 25 D^2 besides biases and the gate, in their parts."""
    block = Block(width, heads)
    count = {name: sum(p.numel() for p in part.parameters() if p.ndim > 1) for name, part in block.named_children()}
    want = {"adaptive": 9, "spatial": 4, "temporal": 4, "mlp": 8}
    assert count == {name: k * width**2 for name, k in want.items()}, f"{count} where {want} D^2 are wanted"
    vectors = sum(p.numel() for p in block.parameters() if p.ndim == 1)
    assert vectors == (9 + 3 + 3 + 5) * width + 2 * heads, "biases of all projections but the keys, and the gate"


def check_space_time_block() -> None:
    """Baseline: every token of every frame sees every other."""
    block, x = generic(SpaceTimeBlock(12, 3)), normal(2, 3, 4, 12)
    w, want = weights_of(block), np.empty((2, 3, 4, 12))
    for b in range(2):
        t = x[b].reshape(12, 12).numpy()
        y = np_layer_norm(t)
        t = t + np_multihead(w, "joint.", y, y, np.ones(3))
        t = t + np_linear(w, "mlp.2", np_gelu(np_linear(w, "mlp.0", np_layer_norm(t))))
        want[b] = t.reshape(3, 4, 12)
    close(block(x), want, block_roundings(12, 3, 12), "space-time block")


def check_divided_block() -> None:
    """Baseline: each location over its frames, then each frame over its locations, then the MLP."""
    block, x = generic(DividedBlock(12, 3)), normal(2, 3, 4, 12)
    w, want = weights_of(block), x.numpy().copy()
    for b in range(2):
        t = want[b]
        for n in range(4):
            y = np_layer_norm(t[:, n])
            t[:, n] += np_linear(w, "time_out", np_multihead(w, "time.", y, y, np.ones(3)))
        for k in range(3):
            y = np_layer_norm(t[k])
            t[k] += np_multihead(w, "space.", y, y, np.ones(3))
        t += np_linear(w, "mlp.2", np_gelu(np_linear(w, "mlp.0", np_layer_norm(t))))
    close(block(x), want, block_roundings(12, 3, 4) + 12, "divided block")


# [NET]


@dataclass(frozen=True)
class World:
    """A small analysis with generic weights: all that the network is given."""

    network: Storm
    x: Tensor
    sigma: Tensor
    static: Tensor
    past: Tensor
    past_static: Tensor
    age: Tensor
    position: Tensor
    periodic: bool = True

    def memory(self, chunk: int = 16) -> Tensor:
        return self.network.compress(self.past, self.past_static, self.age, self.position, chunk)

    def condition(self) -> Condition:
        return Condition(self.static, self.memory(), self.position[None], self.periodic)

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.network(self.x, self.sigma, self.condition())

    @property
    def roundings(self) -> float:
        c, (rows, cols) = self.network.config, self.position.shape[:2]
        values, width = (c.channels + c.static_channels) * c.patch[0] * c.patch[1], c.width
        memory = values + width + width // c.heads + self.past.shape[1] + 2 * width
        # The top wave multiplies the rounding of the positions and ages that enter it.
        codes = 2**c.position_octaves * math.pi + c.noise_features
        return values + memory + codes + c.depth * block_roundings(width, c.heads, rows * cols) + 4 * width


def world(window: int | None = None, frames: int = 3, features: int = 3, seed: int = 0, batch: int = 2) -> World:
    """Patches of 2 x 3 points, 3 x 5 of them around the globe; irregular ages; each frame has its own static fields."""
    config = StormConfig(2, 1, (2, 3), 12, 3, 2, 2, features, 2, 6, window, 0.7)
    latitude = torch.linspace(75, -75, 6, dtype=torch.float64)
    longitude = torch.arange(15, dtype=torch.float64) * 24
    position = {
        1: lambda: latitude_position(latitude, 5, (2, 3)),
        2: lambda: region_position(latitude, longitude, (2, 3), 180.0),
        3: lambda: sphere_position(latitude, longitude, (2, 3)),
    }[features]()
    age = torch.cumsum(0.5 + 6 * normal(batch, frames, seed=seed + 4).abs(), 1)
    return World(
        generic(Storm(config), seed),
        normal(batch, 2, 6, 15, seed=seed),
        torch.exp(normal(batch, seed=seed + 1)),
        normal(batch, 1, 6, 15, seed=seed + 2),
        normal(batch, frames, 2, 6, 15, seed=seed + 3),
        normal(batch, frames, 1, 6, 15, seed=seed + 5),
        age,
        position,
    )


def np_history(case: World, b: int) -> Array:
    """[TOK-5] history tokens [K, N, D] of sample b."""
    c, w, tokens = case.network.config, weights_of(case.network), []
    place = [np_fourier(r, c.position_octaves) for r in case.position.reshape(-1, c.position_features).tolist()]
    for k in range(case.past.shape[1]):
        fields = np.concatenate([case.past[b, k].numpy(), case.past_static[b, k].numpy()])
        code = np_linear(w, "embed_age", np.array(np_age(case.age[b, k].item(), c.position_octaves)))
        h = np_linear(w, "embed_history", np_patchify(fields, c.patch))
        tokens.append(h + np_linear(w, "embed_position", np.array(place)) + code)
    return np.stack(tokens)


def np_state(case: World, b: int) -> Array:
    """[TOK-4] state tokens [N, D] of sample b, whose x is already c_in x."""
    c, w = case.network.config, weights_of(case.network)
    place = [np_fourier(r, c.position_octaves) for r in case.position.reshape(-1, c.position_features).tolist()]
    fields = np.concatenate([case.x[b].numpy(), case.static[b].numpy()])
    return np_linear(w, "embed_state", np_patchify(fields, c.patch)) + np_linear(w, "embed_position", np.array(place))


def np_noise(sigma: float, count: int) -> Array:
    """[NET-1] phi(c_noise)."""
    phases = [2 * math.pi * 2 ** (j / 8 - 2) * math.log(sigma) / 4 for j in range(count // 2)]
    return np.array([math.sin(f) for f in phases] + [math.cos(f) for f in phases])


def np_embedding(case: World, b: int) -> Array:
    """[NET-1] e of sample b."""
    w, count = weights_of(case.network), case.network.config.noise_features
    return np_linear(w, "embed_noise.2", np_silu(np_linear(w, "embed_noise.0", np_noise(case.sigma[b].item(), count))))


def np_storm(case: World, b: int) -> Array:
    """[NET-1] to [NET-4]: F of sample b."""
    c, w = case.network.config, weights_of(case.network)
    rows, cols = case.position.shape[:2]
    see = None if c.window is None else np_window(rows, cols, c.window, case.periodic)
    memory, t, e = np_memory(w, "memory.", np_history(case, b)), np_state(case, b), np_embedding(case, b)
    for layer in range(c.depth):
        t = np_block(w, f"blocks.{layer}.", t, memory, e, case.sigma[b].item(), see)
    shift, scale = np.split(np_linear(w, "final_adaptive", np_silu(e)), 2)
    out = np_linear(w, "final", np_layer_norm(t) * (1 + scale) + shift)
    return np_unpatchify(out, c.patch, (rows * c.patch[0], cols * c.patch[1]))


def capture(module: nn.Module, call: Callable[[], object]) -> tuple[Tensor, ...]:
    """What `module` is given, by position, the first time `call` uses it."""
    seen: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        call()
    finally:
        handle.remove()
    return seen[0]


def check_state_tokens(features: int = 3) -> None:
    """[TOK-4] [NET-2] the tokens that the first block is given."""
    case = world(features=features)
    got = capture(case.network.blocks[0], case.run)[0]
    close(got, np.stack([np_state(case, b) for b in range(2)]), case.roundings, "state tokens")


def check_history_tokens(frames: int = 3) -> None:
    """[TOK-5] [NET-2] the tokens that the memory is given: each frame with its own static fields and its own age."""
    case = world(frames=frames)
    got = capture(case.network.memory.key, case.memory)[0]
    close(got, np.stack([np_history(case, b) for b in range(2)]), case.roundings, "history tokens")


def check_noise_features(c_noise: Sequence[float] = (-1.55, -0.3, 0.0, 0.7, 1.1), count: int = 64) -> None:
    """[NET-1] phi: values, order, and waves slow enough for sigma in float32."""
    got = noise_features(torch.tensor(c_noise, dtype=torch.float64), count)
    want = np.array([np_noise(math.exp(4 * c), count) for c in c_noise])
    # c_noise -> sigma -> c_noise in the oracle costs a few roundings of 4 |c_noise|, times the largest wave number.
    top = 2 * math.pi * 2 ** ((count / 2 - 1) / 8 - 2)
    close(got, want, 4 * max(map(abs, c_noise)) * 4 * top + 4, "noise features", 1.0)


def check_noise_embedding() -> None:
    """[NET-1] the embedding that the blocks are given: the silu before the adaptive norm is theirs."""
    case = world()
    got = capture(case.network.blocks[0], case.run)[2]
    close(got, np.stack([np_embedding(case, b) for b in range(2)]), case.roundings, "noise embedding")


def check_memory_of_network(chunk: int = 2) -> None:
    """[NET-2] one memory token a location, row-major, for any chunk."""
    case = world(frames=5)
    w, shape = weights_of(case.network), (2, *case.position.shape[:2], 12)
    want = np.stack([np_memory(w, "memory.", np_history(case, b)) for b in range(2)]).reshape(shape)
    close(case.memory(chunk), want, case.roundings, f"memory in chunks of {chunk}")


def check_network(window: int | None = None, features: int = 3, frames: int = 3, periodic: bool = True) -> None:
    """[NET-1] [NET-2] [NET-3] [NET-4] the whole network with generic weights against NumPy."""
    case = replace(world(window, frames, features), periodic=periodic)
    close(case.run(), np.stack([np_storm(case, b) for b in range(2)]), case.roundings, "network")


def check_denoised() -> None:
    """[NET-5] D = c_skip x + c_out F(c_in x), with sigma_d = 0.7."""
    case, sd = world(), 0.7
    sigma = case.sigma.numpy()[:, None, None, None]
    total = sigma**2 + sd**2
    scaled = replace(case, x=torch.from_numpy(case.x.numpy() / np.sqrt(total)))
    raw = np.stack([np_storm(scaled, b) for b in range(2)])
    want = sd**2 / total * case.x.numpy() + sigma * sd / np.sqrt(total) * raw
    with torch.no_grad():
        got = denoiser(case.network, case.condition())(case.x, case.sigma)
    close(got, want, case.roundings + 8, "denoised mean")


def check_bind_dtype() -> None:
    """[NET-5] a float32 network inside, float64 outside: only F is rounded to float32."""
    case = world()
    condition = case.condition()
    with torch.no_grad():
        truth = denoiser(case.network, condition)(case.x, case.sigma)
        case.network.float()
        denoise = denoiser(case.network, condition)
        got = denoise(case.x, case.sigma)
        z, sigma, _ = capture(case.network, lambda: denoise(case.x, case.sigma))
        raw = case.network(z, sigma, condition)
    assert z.dtype == raw.dtype == torch.float32, "the network does not run in its own dtype"
    assert torch.equal(sigma, case.sigma), "the noise level was rounded on its way"
    total = (case.sigma**2 + 0.7**2)[:, None, None, None]
    single_eps = float(np.finfo(np.float32).eps)
    close(z.double(), case.x / total.sqrt(), single_eps / EPS64, "c_in x")
    want = 0.7**2 / total * case.x + case.sigma[:, None, None, None] * 0.7 / total.sqrt() * raw.double()
    close(got, want, 8, "float64 around a float32 network")
    error = float((got - truth).abs().max())
    assert 0 < error <= case.roundings * single_eps * float(truth.abs().max()), f"float32 network is off by {error:.3g}"
    with torch.no_grad():
        single = denoiser(case.network, condition)(case.x.float(), case.sigma)
    assert single.dtype == torch.float32, f"float32 in, {single.dtype} out"


def check_reset() -> None:
    """[NET-5] a fresh network has F = 0, and D = c_skip x to the last bit."""
    case = world()
    case.network.reset(torch.Generator().manual_seed(1))
    assert not case.run().any(), "F of a fresh network is not zero"
    c_skip = 0.7**2 / (case.sigma**2 + 0.7**2)
    with torch.no_grad():
        got = denoiser(case.network, case.condition())(case.x, case.sigma)
    assert torch.equal(got, c_skip[:, None, None, None] * case.x), "D of a fresh network is not c_skip x"
    for layer, block in enumerate(case.network.blocks):
        x, memory, e = normal(2, 15, 12), normal(2, 15, 12, seed=1), normal(2, 12, seed=2)
        assert torch.equal(block(x, memory, e, case.sigma), x), f"block {layer} of a fresh network is not the identity"


def check_zonal_equivariance(shift: int = 2, window: int | None = None) -> None:
    """[TOK-6] with latitude-only positions, rolling everything by whole patches rolls the output."""
    case = world(window, features=1)
    rolled = replace(
        case, **{name: getattr(case, name).roll(3 * shift, -1) for name in ("x", "static", "past", "past_static")}
    )
    close(rolled.run(), case.run().roll(3 * shift, -1), case.roundings, f"shift by {shift} patches")


def check_reach(window: int = 1, periodic: bool = True) -> None:
    """[ATT-6] [NET-3] with radius r and L blocks, a patch hears of state and history within L r and of no others."""
    case = replace(world(window), periodic=periodic)
    case = replace(case, position=case.position.repeat(1, 2, 1), x=case.x.repeat(1, 1, 1, 2))
    case = replace(case, static=case.static.repeat(1, 1, 1, 2), past=case.past.repeat(1, 1, 1, 1, 2))
    case = replace(case, past_static=case.past_static.repeat(1, 1, 1, 1, 2))
    before = case.run()
    for name in ("x", "past"):
        field = getattr(case, name).clone()
        field[..., :2, :3] += 1  # patch (0, 0)
        heard = (replace(case, **{name: field}).run() != before).any(0).any(0)
        patches = heard.reshape(3, 2, 10, 3).any(1).any(-1).numpy()
        want = np_window(3, 10, 2 * window, periodic)[0].reshape(3, 10)
        seen = f"{name} reaches\n{patches.astype(int)} but should reach\n{want.astype(int)}"
        assert np.array_equal(patches, want), seen


def check_crop() -> None:
    """[TOK-6] [NET-6] a tile keeps absolute positions, and the memory and static fields of its own patches."""
    rows, cols = torch.arange(2, 6), torch.tensor([12, 13, 14, 0, 1, 2])
    condition = world().condition()
    part = condition.crop(rows, cols, (2, 3))
    for i, j in np.ndindex(2, 2):
        a, b = (1 + i, (4 + j) % 5)
        assert torch.equal(part.position[:, i, j], condition.position[:, a, b]), "positions of a tile are not absolute"
        assert torch.equal(part.memory[:, i, j], condition.memory[:, a, b]), "memory of other patches"
    want = condition.static[:, :, 2:6][..., [12, 13, 14, 0, 1, 2]]
    assert torch.equal(part.static, want), "static fields of other points"
    assert not part.periodic, "a tile that is not the whole circle does not close on itself"
    whole = condition.crop(torch.arange(6), torch.arange(15), (2, 3))
    assert whole.periodic and torch.equal(whole.memory, condition.memory), "the whole domain is not itself"
    refuses(lambda: condition.crop(torch.arange(1, 5), cols, (2, 3)), "whole patches of 2")
    refuses(lambda: condition.crop(rows, torch.arange(4), (2, 3)), "whole patches of 3")


def check_stack() -> None:
    """[NET-6] tiles in one batch, all members of the first before those of the second, give what each gives alone."""
    case, rows = world(features=3), torch.arange(2, 6)
    condition, columns = case.condition(), (torch.arange(0, 6), torch.arange(6, 12))
    parts = [condition.crop(rows, cols, (2, 3)) for cols in columns]
    tiles = [case.x[..., 2:6, cols] for cols in columns]
    together = Condition.stack(parts, 2)
    with torch.no_grad():
        got = case.network(torch.cat(tiles), case.sigma.repeat(2), together)
        want = torch.cat([case.network(t, case.sigma, part) for t, part in zip(tiles, parts, strict=True)])
        single = [replace(p, static=p.static[:1], memory=p.memory[:1]) for p in parts]
        shared = case.network(torch.cat(tiles), case.sigma.repeat(2), Condition.stack(single, 2))
    close(got, want, case.roundings, "tiles in one batch")
    close(shared[::2], want[::2], case.roundings, "one condition for all members")
    assert together.position.shape == (4, 2, 2, 3), "each tile of each member has its own positions"


def check_shapes_refused() -> None:
    """[NET-6] what does not share the grid or the batch is named. Wants signatures unchecked."""
    case = world()
    network, condition = case.network, case.condition()

    def run(x: Tensor = case.x, sigma: Tensor = case.sigma, **parts: Tensor) -> Tensor:
        return network(x, sigma, replace(condition, **parts))

    refuses(lambda: run(x=case.x[..., :12]), "state", "(2, 2, 6, 12)", "6, 15")
    refuses(lambda: run(x=case.x[:, :1]), "state", "(2, 1, 6, 15)")
    refuses(lambda: run(sigma=case.sigma[:1]), "sigma")
    refuses(lambda: run(static=case.static[..., :3, :]), "static fields", "(2, 1, 3, 15)")
    refuses(lambda: run(static=case.static.repeat(2, 1, 1, 1)), "static fields")
    refuses(lambda: run(memory=condition.memory.transpose(1, 2)), "memory", "(2, 5, 3, 12)")
    refuses(lambda: run(memory=condition.memory.repeat(2, 1, 1, 1)), "memory")
    refuses(lambda: run(position=condition.position[..., :2]), "position")
    refuses(lambda: run(position=condition.position.repeat(3, 1, 1, 1)), "position")

    def compress(**parts: Tensor) -> Tensor:
        return replace(case, **parts).memory(1)

    refuses(lambda: compress(past=case.past[:, :0], past_static=case.past_static[:, :0]), "at least one past frame")
    refuses(lambda: compress(past=case.past[..., :12]), "past frames")
    refuses(lambda: compress(past_static=case.past_static[:, :1]), "static fields of the past")
    refuses(lambda: compress(past_static=case.past_static.repeat(1, 2, 1, 1, 1)), "static fields of the past")
    refuses(lambda: compress(age=case.age[:, :1]), "ages")
    refuses(lambda: compress(age=case.age.repeat(1, 2)), "ages")
    refuses(lambda: compress(position=case.position.transpose(0, 1)), "past frames")
    refuses(lambda: case.memory(0), "chunk")
