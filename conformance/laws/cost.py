"""Laws of cost: linear in frames, affine in tiles, a tile costs what a domain of its size does, halos cost no more than
their factor."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from conformance.cases.cost import axis, lengths
from conformance.judging.inputs import config
from conformance.judging.law import Broken, Draw, Law
from conformance.ports.checked import Port

__all__ = ["LAWS"]


def _counts(port: Port, c: Mapping[str, Any], frames: int, y: Mapping[str, Any], x: Mapping[str, Any]) -> list[int]:
    """Multiply-adds of compress and denoise."""
    params = {"config": c, "grid": [y["length"], x["length"]], "frames": frames, "y": y, "x": x}
    return [int(count) for count in port.values("multiply_adds", {}, params, "compress", "denoise")]


def _network(draw: Draw) -> dict[str, Any]:
    heads = draw(st.integers(1, 3), "heads")
    return config(
        channels=draw(st.integers(1, 3), "C"),
        width=heads * draw(st.integers(1, 8), "d"),
        heads=heads,
        depth=draw(st.integers(1, 4), "L"),
        mlp_ratio=draw(st.integers(1, 4), "ratio"),
        patch=[draw(st.integers(1, 2), "p_y"), draw(st.integers(1, 3), "p_x")],
    )


def _whole(c: Mapping[str, Any], rows: int, cols: int) -> list[dict[str, Any]]:
    """A domain of this many tokens in one tile."""
    p, q = c["patch"]
    return [axis(rows * p, patch=p), axis(cols * q, patch=q)]


def _cut(draw: Draw, patch: int, label: str, count: int, periodic: bool) -> dict[str, Any]:
    """An axis of `count` equal cores with a halo that fits."""
    core = draw(st.integers(1, 6), f"core {label}")
    halo = draw(st.integers(0, (count - 1) * core // 2), f"halo {label}")
    return axis(count * core * patch, core * patch, halo * patch, periodic, patch)


def _longer(a: Mapping[str, Any], tiles: int) -> dict[str, Any]:
    return {**a, "length": a["length"] + tiles * a["core"]}


def _equal(got: int, want: int, what: str) -> None:
    if got != want:
        raise Broken(f"{what}: {got} and {want}, which differ by {got - want}")


def _frames(port: Port, draw: Draw) -> None:
    c = _network(draw)
    domain = _whole(c, draw(st.integers(1, 9), "rows"), draw(st.integers(1, 9), "cols"))
    first, step = draw(st.integers(1, 1000), "K"), draw(st.integers(1, 1000), "step")
    counts = [_counts(port, c, first + i * step, *domain) for i in range(3)]
    grow = [after[0] - before[0] for before, after in pairwise(counts)]
    _equal(grow[1], grow[0], "two equal additions of frames to the cost of compressing")
    if grow[0] <= 0:
        raise Broken(f"{step} more frames add {grow[0]} multiply-adds to compressing")
    _equal(counts[2][1], counts[0][1], "an evaluation with more and with fewer past frames")


def _periodic(port: Port, draw: Draw) -> None:
    c = _network(draw)
    y = _cut(draw, c["patch"][0], "y", draw(st.integers(2, 3), "tiles in y"), False)
    x = _cut(draw, c["patch"][1], "x", draw(st.integers(2, 4), "tiles in x"), True)
    tiles, more = x["length"] // x["core"], draw(st.integers(1, 40), "more tiles")
    small, large = (_counts(port, c, 1, y, _longer(x, extra))[1] for extra in (0, more))
    _equal(large * tiles, small * (tiles + more), "cost times number of tiles on a periodic axis")


def _closed(port: Port, draw: Draw) -> None:
    c = _network(draw)
    y, x = (_cut(draw, c["patch"][i], "yx"[i], draw(st.integers(3, 5), f"tiles in {'yx'[i]}"), False) for i in (0, 1))
    # With at least this many tiles no extent is cut off at both ends: 2 h <= (count - 1) c.
    step = draw(st.integers(1, 5), "more tiles")
    counts = [_counts(port, c, 1, _longer(y, i * step), x)[1] for i in range(3)]
    _equal(counts[2] - counts[1], counts[1] - counts[0], "two equal additions of tiles on a closed axis")


def _one(port: Port, draw: Draw) -> None:
    c = _network(draw)
    y = _cut(draw, c["patch"][0], "y", draw(st.integers(2, 4), "tiles in y"), False)
    x = _cut(draw, c["patch"][1], "x", draw(st.integers(2, 4), "tiles in x"), True)
    whole = _counts(port, c, 1, y, x)[1]
    parts = [
        (m * k, _counts(port, c, 1, *_whole(c, r, q))[1]) for r, m in lengths(y).items() for q, k in lengths(x).items()
    ]
    _equal(whole, sum(many * cost for many, cost in parts), "all tiles together and each as a domain of its own")


def _halo(port: Port, draw: Draw) -> None:
    c = _network(draw)
    y = _cut(draw, c["patch"][0], "y", draw(st.integers(2, 4), "tiles in y"), False)
    x = _cut(draw, c["patch"][1], "x", draw(st.integers(2, 4), "tiles in x"), draw(st.booleans(), "periodic"))
    with_halo, without = (_counts(port, c, 1, {**y, **h}, {**x, **h})[1] for h in ({}, {"halo": 0}))
    # (1 + 2 h_y / c_y)(1 + 2 h_x / c_x) = above / below, in integers
    above = (y["core"] + 2 * y["halo"]) * (x["core"] + 2 * x["halo"])
    below = y["core"] * x["core"]
    pairs, bare = (_pairs(c, {**y, **h}, {**x, **h}) for h in ({}, {"halo": 0}))
    if (with_halo - pairs) * below > (without - bare) * above:
        raise Broken(
            f"products over tokens grow from {without - bare} to {with_halo - pairs}, by more than {above}/{below}"
        )
    if pairs * below**2 > bare * above**2:
        raise Broken(f"products over pairs of tokens grow from {bare} to {pairs}, by more than ({above}/{below})^2")
    if with_halo < without:
        raise Broken(f"halos make {without} multiply-adds {with_halo}")


def _pairs(c: Mapping[str, Any], y: Mapping[str, Any], x: Mapping[str, Any]) -> int:
    """Multiply-adds of attention: 4 D n^2 a block and tile."""
    squares = [sum(many * n * n for n, many in lengths(a).items()) for a in (y, x)]
    return 4 * int(c["depth"]) * int(c["width"]) * squares[0] * squares[1]


def _law(name: str, requirements: tuple[str, ...], meaning: str, check: Any) -> Law:
    return Law(f"cost/law-{name}", requirements, ("cost",), ("multiply_adds",), meaning, check)


LAWS = (
    _law(
        "frames",
        ("COST-2", "COST-3"),
        "compressing is not linear in the number of frames, or frames enter the cost of an evaluation",
        _frames,
    ),
    _law(
        "tiles-periodic",
        ("COST-2", "TILE-10"),
        "on a periodic axis cost is not proportional to the number of tiles",
        _periodic,
    ),
    _law("tiles-closed", ("COST-2", "TILE-10"), "on a closed axis cost is not affine in the number of tiles", _closed),
    _law("one-tile", ("COST-2",), "a tile does not cost what a domain of its size costs in one piece", _one),
    _law("halo", ("COST-5", "TILE-10"), "halos cost more than their overhead factor allows", _halo),
)
