"""Cases of chapter 5: cores, extents, weights, and the blended operator with a linear D in place of the network.

D on a tile with points z: (own z + mean (average of z over the tile) + field on the tile) / (1 + sigma^2). `field`
stands for the conditioning at absolute coordinates, `mean` for attention over the whole tile. Expected values: geometry
in Python integers, weights point by point in decimal arithmetic, and loops over tiles.
"""

import math
from collections.abc import Mapping
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.tolerance import Bound, Exact, MustReject, Ulp

__all__ = ["axis", "cases", "geometry", "tiled", "weights"]

Axis = Mapping[str, Any]


def axis(length: int, core: int, halo: int, blend: int, periodic: bool, patch: int = 1) -> dict[str, Any]:
    """The params of one axis."""
    return {"length": length, "core": core, "halo": halo, "blend": blend, "periodic": periodic, "patch": patch}


def geometry(a: Axis) -> list[tuple[int, int, list[int]]]:
    """[TILE-2], [TILE-3]: start and stop of each core, and the unwrapped points of its extent."""
    n, c, h = a["length"], a["core"], a["halo"]
    found = []
    for start in range(0, n, c):
        stop = min(start + c, n)
        points = range(start - h, stop + h) if c < n else range(n)
        found.append((start, stop, [g for g in points if a["periodic"] or 0 <= g < n]))
    return found


PI = Decimal("3.14159265358979323846264338327950288419716939937511")


def _rise(point: int, boundary: int, blend: int) -> Decimal:
    """Weight at `point` of the tile that begins at `boundary`: sin^2 u = (1 - cos 2u) / 2 by its series."""
    k = point - (boundary - blend)
    if not 0 <= k < 2 * blend:
        return Decimal(int(k >= 2 * blend))
    double = PI * (2 * k + 1) / (4 * blend)
    terms = [(-1) ** (j + 1) * double ** (2 * j) / math.factorial(2 * j) for j in range(1, 30)]
    return sum(terms, Decimal(0)) / 2


def weights(a: Axis) -> list[Array]:
    """[TILE-4] point by point in decimal arithmetic; across a boundary the left tile has what the right one lacks."""
    found = []
    with localcontext() as context:
        context.prec = 50
        for start, stop, points in geometry(a):
            left = a["core"] < a["length"] and (a["periodic"] or start > 0)
            right = a["core"] < a["length"] and (a["periodic"] or stop < a["length"])
            rise = [_rise(g, start, a["blend"]) if left else Decimal(1) for g in points]
            fall = [1 - _rise(g, stop, a["blend"]) if right else Decimal(1) for g in points]
            found.append(np.array([float(r * f) for r, f in zip(rise, fall, strict=True)]))
    return found


def tiled(
    x: Array, sigma: Array, field: Array, y: Axis, x_axis: Axis, own: float, mean: float, evaluations: int
) -> Array:
    """[TILE-6] by loops over tiles, applied `evaluations` times."""
    for _ in range(evaluations):
        out = np.zeros_like(x)
        for (_, _, rows), wy in zip(geometry(y), weights(y), strict=True):
            for (_, _, cols), wx in zip(geometry(x_axis), weights(x_axis), strict=True):
                at = np.ix_(
                    range(x.shape[0]),
                    range(x.shape[1]),
                    np.array(rows) % y["length"],
                    np.array(cols) % x_axis["length"],
                )
                z = x[at]
                local = own * z + mean * z.mean((-2, -1), keepdims=True) + field[at[1][0], at[2][0], at[3][0]]
                out[at] += wy[:, None] * wx * local / (1 + sigma**2)[:, None, None, None]
        x = out
    return x


def _geometry_case(name: str, a: Axis, meaning: str, requirements: tuple[str, ...] = ("TILE-2", "TILE-3")) -> Case:
    found = geometry(a)
    expected = {
        "cores": np.array([[start, stop] for start, stop, _ in found]),
        "sizes": np.array([len(points) for _, _, points in found]),
        "points": np.array([g % a["length"] for _, _, points in found for g in points]),
    }
    return Case(f"tiling/{name}", "tile_geometry", requirements, Exact("indices"), meaning, {}, a, expected)


def _weights_case(name: str, a: Axis, meaning: str) -> Case:
    found = np.concatenate(weights(a))
    why = "relative errors of angle and sine are an ULP each, doubled by the square"
    tolerance = Ulp(4, why) if a["blend"] else Exact("weights of a hard crop are 0 and 1")
    return Case(
        f"tiling/{name}", "tile_weights", ("TILE-4", "TILE-5", "NUM-2"), tolerance, meaning, {}, a, {"weights": found}
    )


def _tiled_case(
    name: str,
    requirements: tuple[str, ...],
    y: Axis,
    x_axis: Axis,
    own: float,
    mean: float,
    meaning: str,
    evaluations: int = 1,
    x: Array | None = None,
) -> Case:
    rng = np.random.default_rng(500)
    shape = (3, 2, y["length"], x_axis["length"])
    plain = x is not None or not mean
    x = rng.standard_normal(shape) if x is None else x
    field = np.zeros(x.shape[1:]) if plain else rng.standard_normal(shape[1:])
    sigma = np.zeros(len(x)) + (0.0 if plain else np.array([0.5, 1.0, 2.0]))
    points = (y["core"] + 2 * y["halo"]) * (x_axis["core"] + 2 * x_axis["halo"])
    scale = ((abs(own) + abs(mean)) * float(np.abs(x).max()) + float(np.abs(field).max())) * max(own + mean, 1.0) ** (
        evaluations - 1
    )
    why = f"means of {points} points, 4 weights of 8 eps and sums of at most 4 tiles, {evaluations} evaluation(s)"
    expected = tiled(x, sigma, field, y, x_axis, own, mean, evaluations)
    params = {"y": y, "x": x_axis, "own": own, "mean": mean, "evaluations": evaluations}
    return Case(
        f"tiling/{name}",
        "tiled_denoise",
        requirements,
        Bound((points + 48) * evaluations, why, scale),
        meaning,
        {"x": x, "sigma": sigma, "field": field},
        params,
        {"denoised": expected},
    )


def _refusal(name: str, requirement: str, bad: Axis, good: Axis, why: str, meaning: str) -> Case:
    return Case(
        f"tiling/{name}", "tile_geometry", (requirement,), MustReject(why), meaning, {}, bad, neighbour=({}, good)
    )


def _refusals() -> list[Case]:
    ring = axis(16, 4, 4, 2, True)
    return [
        _refusal(
            "refuses-wrapping-halo",
            "TILE-3",
            axis(16, 4, 8, 2, True),
            ring,
            "core 4 and halo 8 wrap onto themselves on 16",
            "a tile shows the network a point twice",
        ),
        _refusal(
            "refuses-wide-blend",
            "TILE-1",
            axis(16, 4, 2, 4, False),
            axis(16, 4, 2, 2, False),
            "the blend 4 exceeds the halo 2",
            "points are blended that the tile does not see",
        ),
        _refusal(
            "refuses-overlapping-blends",
            "TILE-1",
            axis(16, 4, 4, 4, False),
            axis(16, 4, 4, 2, False),
            "2 x 4 exceeds the core 4",
            "the blends of both ends of a tile overlap, and weights do not sum to one",
        ),
        _refusal(
            "refuses-ragged-ring",
            "TILE-2",
            axis(18, 4, 4, 2, True),
            ring,
            "the core 4 does not divide the ring 18",
            "a periodic axis is closed with a core of another size",
        ),
        _refusal(
            "refuses-broken-patch",
            "TILE-1",
            axis(16, 4, 3, 2, False, 2),
            axis(16, 4, 4, 2, False, 2),
            "the halo 3 is not whole patches",
            "an extent begins or ends inside a patch",
        ),
    ]


def cases() -> list[Case]:
    """Geometry, weights, the operator and its laws, sizes that must be refused."""
    closed, ring = axis(14, 4, 3, 2, False), axis(16, 4, 6, 2, True)
    crop, one = axis(12, 4, 2, 0, True), axis(12, 12, 0, 0, True)
    lat, lon = axis(10, 4, 2, 2, False), axis(12, 4, 3, 1, True)
    cone = axis(24, 4, 2, 2, False)
    delta = np.zeros((1, 1, 12, 24))
    delta[..., 3, 1] = 1.0
    return [
        _geometry_case(
            "geometry-closed", closed, "cores or extents are not clipped at the edges, or the last core is not the rest"
        ),
        _geometry_case(
            "geometry-periodic", ring, "extents are clipped at the date line, or not taken modulo the length"
        ),
        _geometry_case(
            "geometry-patches", axis(24, 8, 4, 4, False, 4), "extents are counted in patches where points are meant"
        ),
        _geometry_case(
            "geometry-one-tile", one, "one tile gets a halo, and with it points twice", ("TILE-3", "TILE-8")
        ),
        _weights_case(
            "weights-closed", closed, "weights taper at a pole or closed edge, where no other tile makes up for it"
        ),
        _weights_case(
            "weights-periodic", ring, "weights are of a periodic or plain Hann window (no half, or 2 b + 1 points)"
        ),
        _weights_case("weights-hard-crop", crop, "without a blend the halo is not thrown away entirely"),
        _tiled_case(
            "blend",
            ("TILE-6",),
            lat,
            lon,
            0.7,
            0.4,
            "tiles are averaged without weights, members get another's sigma, or conditioning is not the tile's",
        ),
        _tiled_case(
            "one-tile",
            ("TILE-8",),
            axis(6, 6, 0, 0, False),
            axis(8, 8, 0, 0, True),
            0.7,
            0.4,
            "one tile is not the untiled D",
        ),
        _tiled_case(
            "pointwise",
            ("TILE-5", "TILE-8"),
            lat,
            lon,
            1.0,
            0.0,
            "a pointwise D shows the seams: weights do not sum to one",
        ),
        _tiled_case(
            "cone",
            ("TILE-7", "TILE-9"),
            axis(12, 12, 0, 0, False),
            cone,
            0.5,
            0.5,
            "context does not travel one tile an evaluation: the blended state is not what is evaluated",
            evaluations=3,
            x=delta,
        ),
        *_refusals(),
    ]
