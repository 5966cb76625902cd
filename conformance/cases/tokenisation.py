"""Cases of chapter 1: patches, their order, and where on Earth they are.

Expected values: slices of arrays of integers (exact) and trigonometry of the patch centres in NumPy.
"""

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.tolerance import Bound, Exact, MustReject

__all__ = ["cases", "fourier", "patchify", "unpatchify"]

COPY = Exact("values are moved, not computed")


def patchify(x: Array, patch: tuple[int, int]) -> Array:
    """[TOK-1], [TOK-2] by slices: [b, c, h, w] -> [b, n, c p q]."""
    b, _, h, w = x.shape
    p, q = patch
    corners = [(i, j) for i in range(0, h, p) for j in range(0, w, q)]
    return np.stack([x[:, :, i : i + p, j : j + q].reshape(b, -1) for i, j in corners], 1)


def unpatchify(tokens: Array, patch: tuple[int, int], rows: int) -> Array:
    """The inverse by slices: [b, n, c p q] -> [b, c, h, w]."""
    b, n, values = tokens.shape
    p, q = patch
    cols = n // rows
    x = np.zeros((b, values // (p * q), rows * p, cols * q), tokens.dtype)
    for token in range(n):
        i, j = token // cols * p, token % cols * q
        x[:, :, i : i + p, j : j + q] = tokens[:, token].reshape(b, -1, p, q)
    return x


def fourier(r: Array, octaves: int) -> Array:
    """[TOK-7] sines, then cosines; coordinate by coordinate, j fastest: [..., P] -> [..., 2 P J]."""
    phase = np.stack([2.0**j * np.pi / 2 * r[..., i] for i in range(r.shape[-1]) for j in range(octaves)], -1)
    return np.concatenate([np.sin(phase), np.cos(phase)], -1)


def _position(case_id: str, kind: str, latitude: Array, longitude: Array, expected: Array, meaning: str) -> Case:
    why = "unit-size coordinates; angles below 2 pi are known to 2 pi eps, sine and cosine add one rounding each"
    return Case(
        f"tokenisation/{case_id}",
        "position",
        ("TOK-6",),
        Bound(16, why, scale=1.0),
        meaning,
        {"latitude": latitude, "longitude": longitude},
        {"kind": kind, "patch": [2, 2]} | ({"length": 10.0} if kind == "region" else {}),
        {"position": expected},
    )


def _positions() -> list[Case]:
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


def cases() -> list[Case]:
    """Order of tokens and values, round trip, positions, and grids that the patch does not divide."""
    x = np.arange(2 * 3 * 4 * 9, dtype=np.float64).reshape(2, 3, 4, 9)
    odd = np.array([0.1, -0.0, 5e-324, 1.7e308, 1 / 3, -np.pi] * 16).reshape(1, 2, 6, 8)
    tokens = patchify(x, (2, 3))
    refused = "the patch does not divide the grid"
    return [
        Case(
            "tokenisation/order",
            "patchify",
            ("TOK-1", "TOK-2"),
            COPY,
            "tokens are not row-major over patches, or values inside a token not channel, row, column",
            {"x": x},
            {"patch": [2, 3]},
            {"tokens": tokens},
        ),
        Case(
            "tokenisation/bits",
            "patchify",
            ("TOK-3",),
            COPY,
            "values are rounded, scaled or flushed to zero on the way into tokens",
            {"x": odd},
            {"patch": [3, 2]},
            {"tokens": patchify(odd, (3, 2))},
        ),
        Case(
            "tokenisation/inverse",
            "unpatchify",
            ("TOK-2", "TOK-3"),
            COPY,
            "fields do not come back from their tokens: another order than patchify's",
            {"tokens": tokens},
            {"patch": [2, 3], "rows": 2},
            {"x": unpatchify(tokens, (2, 3), 2)},
        ),
        *_positions(),
        Case(
            "tokenisation/refuses-rows",
            "patchify",
            ("TOK-1",),
            MustReject(f"{refused}: 3 rows a patch, 4 rows"),
            "rows that do not fill a patch are cropped or padded in silence",
            {"x": x},
            {"patch": [3, 3]},
            neighbour=({"x": x}, {"patch": [2, 3]}),
        ),
        Case(
            "tokenisation/refuses-columns",
            "patchify",
            ("TOK-1",),
            MustReject(f"{refused}: 2 columns a patch, 9 columns"),
            "columns that do not fill a patch are cropped or padded in silence",
            {"x": x},
            {"patch": [2, 2]},
            neighbour=({"x": x}, {"patch": [2, 3]}),
        ),
    ]
