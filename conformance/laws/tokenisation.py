"""Laws of chapter 1: tokens are moved, not made; positions close at the date line; a patch knows its own place."""

import numpy as np
from hypothesis import strategies as st

from conformance.judging.law import Draw, Law, arrays, check_close, check_equal
from conformance.ports.checked import Port

__all__ = ["LAWS"]


def _inverse(port: Port, draw: Draw) -> None:
    p, q, rows, cols, c, b = (draw(st.integers(1, 3), label) for label in ("p_y", "p_x", "rows", "cols", "C", "b"))
    x = draw(arrays(b, c, rows * p, cols * q), "x")
    (tokens,) = port.values("patchify", {"x": x}, {"patch": [p, q]}, "tokens")
    want = x.reshape(b, c, rows, p, cols, q).transpose(0, 2, 4, 1, 3, 5).reshape(b, rows * cols, -1)
    check_equal(tokens, want, "tokens against the patches of the field")
    (back,) = port.values("unpatchify", {"tokens": want}, {"patch": [p, q], "rows": rows}, "x")
    check_equal(back, x, "the field that comes back from its tokens")


def _date_line(port: Port, draw: Draw) -> None:
    turns = draw(st.integers(-2, 2), "turns")
    longitude = draw(st.integers(-180, 180), "first longitude") + 7.5 * np.arange(6)
    latitude = np.array([60.0, 30.0, 0.0, -30.0])
    params = {"kind": "sphere", "patch": [2, 2]}
    (here,) = port.values("position", {"latitude": latitude, "longitude": longitude}, params, "position")
    there_at = {"latitude": latitude, "longitude": longitude + 360.0 * turns}
    (there,) = port.values("position", there_at, params, "position")
    # Angles of at most 7 pi in radians are known to 7 pi 2^-53; sine and cosine have slopes of at most one.
    check_close(there, here, 64 * 2.0**-53, f"positions after {turns} turns around the globe")
    check_close((here**2).sum(-1), np.ones(here.shape[:2]), 16 * 2.0**-53, "squared distance from the centre")


LAWS = (
    Law(
        "tokenisation/law-inverse",
        ("TOK-2", "TOK-3", "CONV-1"),
        ("core",),
        ("patchify", "unpatchify"),
        "tokens are not the patches of the field in row-major order, or do not give it back",
        _inverse,
    ),
    Law(
        "tokenisation/law-date-line",
        ("TOK-6", "CONV-3"),
        ("core",),
        ("position",),
        "positions jump at the date line, are not in degrees, or do not lie on the unit sphere",
        _date_line,
    ),
)
