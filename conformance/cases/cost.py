"""Cases of cost (chapter 5): multiply-adds of compressing the past and of one tiled evaluation, exact integers.

Expected: each weight's size times the tokens that it meets, plus the two products of attention, in Python's integers;
tiles are found by asking every point of an axis whether it lies within the halo of a core.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.judging.case import Recipe
from conformance.judging.inputs import config, shapes
from conformance.judging.tolerance import Exact, MustReject

__all__ = ["recipes"]

COUNT = Exact("integers are counted, not measured")


def axis(length: int, core: int = 0, halo: int = 0, periodic: bool = False, patch: int = 1) -> dict[str, Any]:
    """An axis of tiles of this core; without one a single tile."""
    return {
        "length": length, "core": core or length, "halo": halo, "blend": 0, "periodic": periodic, "patch": patch,
    }  # fmt: skip


def lengths(a: Mapping[str, Any]) -> Counter[int]:
    """Count the tiles of each length, in tokens."""
    n, core, halo = (a[name] // a["patch"] for name in ("length", "core", "halo"))

    def sees(start: int, point: int) -> bool:
        core_points = range(start, min(start + core, n))
        near = (abs(point - q) for q in core_points)
        return any(min(d, n - d) <= halo if a["periodic"] else d <= halo for d in near)

    return Counter(sum(sees(start, point) for point in range(n)) for start in range(0, n, core))


def _compress(c: Mapping[str, Any], cells: int, frames: int) -> int:
    """[COST-3]: which rows each weight meets, and the weighted sum of values, D multiply-adds a frame and location."""
    everywhere = frames * cells
    rows = {
        "embed_history.weight": everywhere, "embed_position.weight": cells, "embed_age.weight": frames,
        "memory.query": everywhere, "memory.key.weight": everywhere, "memory.value.weight": everywhere,
        "memory.out.weight": cells,
    }  # fmt: skip
    return sum(count * int(np.prod(shapes(c)[name])) for name, count in rows.items()) + everywhere * int(c["width"])


def _tile(c: Mapping[str, Any], n: int) -> int:
    """[COST-2] of one tile: some weights meet it once, the others every token; attention pairs all tokens, twice."""
    once = ("embed_noise", "final_adaptive", "adaptive")
    ours = {name: shape for name, shape in shapes(c).items() if len(shape) == 2 and not name.startswith("memory.")}
    total = 0
    for name, (out, inner) in ours.items():
        part = name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]
        if part not in ("embed_history", "embed_age"):
            total += out * inner * (1 if part in once else n)
    return total + sum(2 * n * n * int(c["width"]) for _ in range(c["depth"]) for _ in ("spatial", "temporal"))


def _expected(c: Mapping[str, Any], frames: int, y: Mapping[str, Any], x: Mapping[str, Any]) -> dict[str, Array]:
    cells = y["length"] // c["patch"][0] * (x["length"] // c["patch"][1])
    pairs = [(r * q, m * k) for r, m in lengths(y).items() for q, k in lengths(x).items()]
    counts = {"compress": _compress(c, cells, frames), "denoise": sum(many * _tile(c, n) for n, many in pairs)}
    return {name: np.array(count, dtype=np.int64) for name, count in counts.items()}


def _params(c: Mapping[str, Any], frames: int, y: Mapping[str, Any], x: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": c, "grid": [y["length"], x["length"]], "frames": frames, "y": y, "x": x}


def _count(
    name: str,
    requirements: tuple[str, ...],
    meaning: str,
    c: Mapping[str, Any],
    frames: int,
    y: dict[str, Any],
    x: dict[str, Any],
) -> Recipe:
    y, x = ({**a, "patch": patch} for a, patch in zip((y, x), c["patch"], strict=True))
    profiles = ("smoke", "cost") if name == "one-tile" else ("cost",)
    params, expected = _params(c, frames, y, x), _expected(c, frames, y, x)
    return Recipe(
        f"cost/{name}",
        "multiply_adds",
        requirements=requirements,
        profiles=profiles,
        judge=COUNT,
        meaning=meaning,
        inputs={},
        params=params,
        expected=expected,
    )


def _networks() -> list[Recipe]:
    other = config(
        channels=3, static_channels=0, patch=[1, 3], width=24, heads=3, depth=3, mlp_ratio=2, position_features=1,
        position_octaves=5, noise_features=6,
    )  # fmt: skip
    # Sizes chosen so that both counts are odd numbers beyond 2^53, which no float64 holds.
    large = config(
        channels=6,
        static_channels=4,
        patch=[1, 1],
        width=3075,
        heads=25,
        depth=40,
        position_octaves=6,
        noise_features=64,
    )
    return [
        _count(
            "one-tile",
            ("COST-1", "COST-2", "COST-3"),
            meaning="operations (two to a multiply-add) or weights are counted, biases or elementwise work are in, "
            "or a product is not",
            c=config(),
            frames=3,
            y=axis(8),
            x=axis(12, periodic=True),
        ),
        _count(
            "other-network",
            ("COST-1", "COST-2", "COST-3"),
            meaning="a ratio of 4, square patches, three coordinates or static fields are taken for granted",
            c=other,
            frames=7,
            y=axis(5),
            x=axis(12),
        ),
        _count(
            "window",
            ("COST-1",),
            meaning="products that a window masks are left out: with a mask they are computed all the same",
            c=config(window=1),
            frames=1,
            y=axis(8),
            x=axis(12, periodic=True),
        ),
        _count(
            "large",
            ("COST-2", "COST-3"),
            meaning="counts are floating-point numbers: beyond 2^53 they are not exact",
            c=large,
            frames=6001,
            y=axis(721, 103, 12),
            x=axis(1443, 39, 12, True),
        ),
    ]


def _tiles() -> list[Recipe]:
    return [
        _count(
            "halo-closed",
            ("COST-2", "TILE-3", "TILE-10"),
            meaning="tiles at the ends of a closed axis are counted with halos that they do not have, "
            "or none have halos",
            c=config(),
            frames=2,
            y=axis(16, 4, 2),
            x=axis(24, 8, 4),
        ),
        _count(
            "halo-periodic",
            ("COST-2", "TILE-3", "TILE-10"),
            meaning="halos across the date line are not counted",
            c=config(),
            frames=2,
            y=axis(8, 4, 2),
            x=axis(24, 8, 4, True),
        ),
        _count(
            "short-last-core",
            ("COST-2", "TILE-2", "TILE-3"),
            meaning="a shorter last tile counts as a whole one or not at all, or halos reach over one core only",
            c=config(patch=[1, 2]),
            frames=2,
            y=axis(11, 4, 5),
            x=axis(26, 8, 10),
        ),
    ]


def _refusals() -> list[Recipe]:
    c, y, x = config(), axis(8, 4, 2, patch=2), axis(12, 4, 2, True, 2)
    good = _params(c, 2, y, x)

    def refuse(name: str, requirements: tuple[str, ...], why: str, meaning: str, **wrong: Any) -> Recipe:
        judge = MustReject(why)
        return Recipe(
            f"cost/{name}",
            "multiply_adds",
            requirements=requirements,
            profiles=("cost",),
            judge=judge,
            meaning=meaning,
            inputs={},
            params=good | wrong,
            valid_counterpart=({}, good),
        )

    return [
        refuse(
            "refuses-no-frame",
            ("MEM-7", "COST-3"),
            "there is no past frame to compress",
            "a memory of nothing has a cost",
            frames=0,
        ),
        refuse(
            "refuses-other-patch",
            ("TILE-1", "CONV-10"),
            "tiles are cut in other patches than the network's",
            "tokens of a tile are counted with a patch that is not the network's",
            y=axis(8, 4, 2),
        ),
    ]


def recipes() -> list[Recipe]:
    """Untiled networks, a window, counts beyond 2^53, halos on closed and periodic axes, refusals."""
    return [*_networks(), *_tiles(), *_refusals()]
