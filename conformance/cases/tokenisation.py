"""Cases of chapter 1: patches, their order, where on Earth they are, and the two embeddings.

Expected values: slices of arrays of integers (exact), trigonometry of the patch centres in NumPy, and the sines and
cosines of the codes to 50 digits; the embeddings with generic weights are the reference's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mpmath
import numpy as np

from conformance.adapter import Array
from conformance.judging.case import Chain, Recipe
from conformance.judging.inputs import config, draw, past_inputs, shapes, state_inputs, weights
from conformance.judging.tolerance import Bound, Exact, MustReject

__all__ = ["age_code", "position_code", "recipes"]

COPY = Exact("values are moved, not computed")


def _patchify(x: Array, patch: tuple[int, int]) -> Array:
    """[TOK-1], [TOK-2] by slices: [b, c, h, w] -> [b, n, c p q]."""
    b, _, h, w = x.shape
    p, q = patch
    corners = [(i, j) for i in range(0, h, p) for j in range(0, w, q)]
    return np.stack([x[:, :, i : i + p, j : j + q].reshape(b, -1) for i, j in corners], 1)


def _unpatchify(tokens: Array, patch: tuple[int, int], rows: int) -> Array:
    """The inverse by slices: [b, n, c p q] -> [b, c, h, w]."""
    b, n, values = tokens.shape
    p, q = patch
    cols = n // rows
    x = np.zeros((b, values // (p * q), rows * p, cols * q), tokens.dtype)
    for token in range(n):
        i, j = token // cols * p, token % cols * q
        x[:, :, i : i + p, j : j + q] = tokens[:, token].reshape(b, -1, p, q)
    return x


def _moves() -> list[Recipe]:
    """Order of tokens and values, bits, and the way back."""
    x = np.arange(2 * 3 * 4 * 9, dtype=np.float64).reshape(2, 3, 4, 9)
    odd = np.array([0.1015625, -0.0, 2.0**-126, 1.5 * 2.0**126, 0.333984375, -3.140625] * 16).reshape(1, 2, 6, 8)
    tokens = _patchify(x, (2, 3))
    return [
        Recipe(
            "tokenisation/order",
            "patchify",
            requirements=("TOK-1", "TOK-2", "CONV-1"),
            profiles=("core",),
            judge=COPY,
            meaning="tokens are not row-major over patches, or values inside a token not channel, row, column",
            inputs={"x": x},
            params={"patch": [2, 3]},
            expected={"tokens": tokens},
            targets=("tokens_column_major", "tokens_channel_last", "token_columns_before_rows"),
        ),
        Recipe(
            "tokenisation/bits",
            "patchify",
            requirements=("TOK-3",),
            profiles=("core",),
            judge=COPY,
            meaning="values are rounded, scaled or flushed to zero on the way into tokens",
            inputs={"x": odd},
            params={"patch": [3, 2]},
            expected={"tokens": _patchify(odd, (3, 2))},
        ),
        Recipe(
            "tokenisation/inverse",
            "unpatchify",
            requirements=("TOK-2", "TOK-3"),
            profiles=("core",),
            judge=COPY,
            meaning="fields do not come back from their tokens: another order than patchify's",
            inputs={"tokens": tokens},
            params={"patch": [2, 3], "rows": 2},
            expected={"x": _unpatchify(tokens, (2, 3), 2)},
        ),
    ]


def _code(values: Sequence[Any], octaves: int) -> list[float]:
    """[TOK-7] to 50 digits, rounded once: all sines, then all cosines, coordinate by coordinate, the octave fastest."""
    with mpmath.workdps(50):
        phases = [mpmath.mpf(2) ** j * mpmath.pi * value / 2 for value in values for j in range(octaves)]
        return [float(wave(phase)) for wave in (mpmath.sin, mpmath.cos) for phase in phases]


def position_code(position: Array, octaves: int) -> Array:
    """[TOK-7]: the sines and cosines of positions [rows, cols, P], to [n, 2 P J]."""
    return np.array(
        [_code([mpmath.mpf(float(r)) for r in point], octaves) for point in position.reshape(-1, position.shape[-1])]
    )


def age_code(age: float, octaves: int) -> Array:
    """[TOK-8]: the sines and cosines of one age in hours, [2 J]."""
    with mpmath.workdps(50):
        return np.array(_code([mpmath.log(1 + mpmath.mpf(age), 2) / 8], octaves))


def _position(
    name: str,
    kind: str,
    latitude: Array,
    longitude: Array,
    expected: Array,
    meaning: str,
    patch: tuple[int, int] = (2, 2),
) -> Recipe:
    why = "unit-size coordinates; angles below 2 pi are known to 2 pi eps, sine and cosine add one rounding each"
    return Recipe(
        f"tokenisation/{name}",
        "position",
        requirements=("TOK-6", "TOK-9", "CONV-3"),
        profiles=("core",),
        judge=Bound(32, why, scale=1.0),
        meaning=meaning,
        inputs={"latitude": latitude, "longitude": longitude},
        params={"kind": kind, "patch": list(patch)} | ({"length": 10.0} if kind == "region" else {}),
        expected={"position": expected},
    )


def _positions() -> list[Recipe]:
    latitude, longitude = np.array([90.0, 60, 30, 0, -30, -60]), np.arange(300.0, 420.0, 15.0)
    lat, lon = np.radians(latitude.reshape(-1, 2).mean(1))[:, None], np.radians(longitude.reshape(-1, 2).mean(1))
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat) + 0 * lon], -1)
    height = np.array([50.0, 51, 52, 53])
    width = np.array([-6.0, -5, -4, -3, -2, -1])
    x = np.array([-2.0, 0, 2]) * np.cos(np.radians(51.5)) / 10
    y = np.array([-1.0, 1]) / 10
    region = np.stack([np.broadcast_to(x, (2, 3)), np.broadcast_to(y[:, None], (2, 3))], -1)
    return [
        _position(
            "position-sphere",
            "sphere",
            latitude,
            longitude,
            sphere,
            "positions are of the patch corner, in another axis order, or not periodic in longitude",
        ),
        _position(
            "position-region",
            "region",
            height,
            width,
            region,
            "x and y are swapped, the meridians' convergence cos(lat_0) is missing, or the origin is not the middle",
        ),
        _position(
            "position-latitude",
            "latitude",
            latitude,
            longitude,
            sphere[..., 2:].copy(),
            "the zonally equivariant position depends on longitude, or is the latitude instead of its sine",
        ),
    ]


def _irregular_positions() -> list[Recipe]:
    """Grids whose patches are neither square nor evenly spaced: centre and middle are then not what a step gives."""
    latitude, longitude = np.array([90.0, 88, 80, 51, 50, 7, -33, -89, -90]), np.array([170.0, 178, 181, 190])
    lat = np.radians(latitude.reshape(-1, 3).mean(1))[:, None]
    lon = np.radians(longitude)
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat) + 0 * lon], -1)
    north, east = np.array([60.0, 52, 48, 46]), np.array([355.0, 356, 358, 362, 370, 371])
    x = (east.reshape(-1, 3).mean(1) - 363) * np.cos(np.radians(53.0)) / 10
    y = (north - 53) / 10
    region = np.stack([np.broadcast_to(x, (4, 2)), np.broadcast_to(y[:, None], (4, 2))], -1)
    return [
        _position(
            "position-irregular-sphere",
            "sphere",
            latitude=latitude,
            longitude=longitude,
            expected=sphere,
            meaning="the centre is taken from the corner and the spacing, or is the mean of unit vectors, "
            "not of coordinates",
            patch=(3, 1),
        ),
        _position(
            "position-irregular-region",
            "region",
            latitude=north,
            longitude=east,
            expected=region,
            meaning="the region's middle is the mean of its coordinates instead of the middle of its extremes",
            patch=(1, 3),
        ),
    ]


def _embed(name: str, seed: int, grid: tuple[int, int], changes: Mapping[str, Any], meaning: str) -> Recipe:
    c, rng = config(width=8, **changes), np.random.default_rng(seed)
    inputs = weights(shapes(c), rng, "embed_state", "embed_position") | state_inputs(c, grid, 2, rng)
    return Recipe(
        f"tokenisation/{name}",
        "embed",
        requirements=("TOK-4", "TOK-7", "TOK-9"),
        profiles=("core",),
        judge=Chain("a patch embedding and a position code"),
        meaning=meaning,
        inputs=inputs | {"x": draw(rng, 2, c["channels"], *grid)},
        params={"config": c},
    )


def _codes() -> list[Recipe]:
    """The codes themselves: the patch embedding is zero and the code's matrix the identity."""
    c = config(width=16, position_features=2, position_octaves=4, patch=[1, 2], heads=4)
    rng = np.random.default_rng(104)
    position = rng.uniform(-1, 1, (2, 3, 2))
    position[0, :2] = [[1, -1], [-1, 1]]  # the ends of the range: the longest wave must tell them apart
    zero = {f"weights.embed_state.{part}": np.zeros(shape) for part, shape in (("weight", (16, 6)), ("bias", (16,)))}
    field = {"x": draw(rng, 1, 2, 2, 6), "static": draw(rng, 1, 1, 2, 6)}
    why = "phases below 4 pi are known to 8 pi u, sine and cosine have slopes below one and round once, then once more"
    return [
        Recipe(
            "tokenisation/position-code",
            "embed",
            requirements=("TOK-7", "TOK-9"),
            profiles=("core",),
            judge=Bound(32, why, scale=1.0),
            meaning="the longest wave is not 4, octaves do not double, or sines, "
            "cosines and coordinates are in another order",
            inputs=zero | field | {"weights.embed_position.weight": np.eye(16), "position": position},
            params={"config": c},
            expected={"tokens": position_code(position, 4)[None]},
            targets=("fourier_interleaved", "fourier_cosines_first", "fourier_octaves_from_one"),
        ),
    ]


def _embeddings() -> list[Recipe]:
    c, rng = config(patch=[1, 2]), np.random.default_rng(101)
    some = weights(shapes(c), rng, "embed_state", "embed_position")
    state = {"x": draw(rng, 2, 2, 3, 8)} | state_inputs(c, (3, 8), 2, rng)
    past = weights(shapes(c), rng, "embed_history", "embed_position", "embed_age")
    past |= past_inputs(c, (3, 8), [[6.0, 1.0, 250.0], [0.5, 12.0, 8760.0]], rng) | {"position": state["position"]}
    return [
        Recipe(
            "tokenisation/embed",
            "embed",
            requirements=("TOK-4", "TOK-7", "TOK-9"),
            profiles=("core",),
            judge=Chain("a patch embedding and a position code"),
            meaning="static channels stand before the state's, or the position code is in another order",
            inputs=some | state,
            params={"config": c},
        ),
        Recipe(
            "tokenisation/embed-history",
            "embed_history",
            requirements=("TOK-5", "TOK-7", "TOK-8", "TOK-9"),
            profiles=("core",),
            judge=Chain("a patch embedding, a position and an age code"),
            meaning="frames share one age or one static field, or age is in another unit or scale",
            inputs=past,
            params={"config": c},
            targets=("age_in_days", "age_natural_logarithm", "age_shared"),
        ),
        _embed(
            "embed-single",
            102,
            (6, 2),
            {"channels": 1, "static_channels": 0, "patch": [3, 1], "position_features": 1, "position_octaves": 1},
            "one channel without static fields or a one-number position is not handled: a dimension is dropped",
        ),
        _embed(
            "embed-region",
            103,
            (2, 6),
            {"channels": 1, "static_channels": 3, "patch": [1, 2], "position_features": 2, "position_octaves": 6},
            "octaves and coordinates of the position code are exchanged, or it is computed in the network's dtype",
        ),
    ]


def _refusals() -> list[Recipe]:
    x = np.arange(2 * 3 * 4 * 9, dtype=np.float64).reshape(2, 3, 4, 9)
    tokens = np.arange(2 * 6 * 12, dtype=np.float64).reshape(2, 6, 12)
    refused = "the patch does not divide the grid"
    return [
        Recipe(
            "tokenisation/refuses-rows",
            "patchify",
            requirements=("TOK-1", "CONV-10"),
            profiles=("core",),
            judge=MustReject(f"{refused}: 3 rows a patch, 4 rows"),
            meaning="rows that do not fill a patch are cropped or padded in silence",
            inputs={"x": x},
            params={"patch": [3, 3]},
            valid_counterpart=({"x": x}, {"patch": [2, 3]}),
        ),
        Recipe(
            "tokenisation/refuses-columns",
            "patchify",
            requirements=("TOK-1", "CONV-10"),
            profiles=("core",),
            judge=MustReject(f"{refused}: 2 columns a patch, 9 columns"),
            meaning="columns that do not fill a patch are cropped or padded in silence",
            inputs={"x": x},
            params={"patch": [2, 2]},
            valid_counterpart=({"x": x}, {"patch": [2, 3]}),
        ),
        Recipe(
            "tokenisation/refuses-rows-of-tokens",
            "unpatchify",
            requirements=("TOK-1", "CONV-10"),
            profiles=("core",),
            judge=MustReject("6 tokens do not fill 4 rows"),
            meaning="tokens that do not fill their rows are dropped or repeated",
            inputs={"tokens": tokens},
            params={"patch": [2, 2], "rows": 4},
            valid_counterpart=({"tokens": tokens}, {"patch": [2, 2], "rows": 3}),
        ),
        Recipe(
            "tokenisation/refuses-date-line-jump",
            "position",
            requirements=("TOK-6", "CONV-2", "CONV-10"),
            profiles=("core",),
            judge=MustReject("longitudes jump from 355 to 0: the mean of 355 and 0 is on the other side of the Earth"),
            meaning="longitudes that jump at the date line are averaged across the jump",
            inputs={"latitude": np.array([10.0, 5]), "longitude": np.array([345.0, 350, 355, 0, 5, 10])},
            params={"kind": "sphere", "patch": [2, 2]},
            valid_counterpart=(
                {"latitude": np.array([10.0, 5]), "longitude": np.array([345.0, 350, 355, 360, 365, 370])},
                {"kind": "sphere", "patch": [2, 2]},
            ),
        ),
    ]


def recipes() -> list[Recipe]:
    """Order of tokens and values, round trip, positions, embeddings, and grids that the patch does not divide."""
    return [*_moves(), *_positions(), *_irregular_positions(), *_codes(), *_embeddings(), *_refusals()]
