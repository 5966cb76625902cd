"""Cases of chapter 9: who has what, what goes between ranks, and the same problem on many meshes.

A problem is posed once and run on one mesh after another: inputs and expected values are the same, so that no mesh can
be right alone. Expected values: shares, extents and blends in Python integers and NumPy, from chapter 5's text; what
is generic is the reference's without ranks. A mesh is four sizes, [ddp, fsdp, tile, tp] in names and tables here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.cases.tiling import axis, geometry, weights
from conformance.judging.case import Chain, Judge, Recipe
from conformance.judging.inputs import bilinear_observations, config, network_inputs
from conformance.judging.tolerance import Bound, Exact, MustReject

__all__ = ["extents_of", "mesh", "meshes", "owners", "recipes", "share"]

Axis = Mapping[str, Any]
Params = Mapping[str, Any]
PARALLEL = ("parallel",)
AXES = ("ddp", "fsdp", "tile", "tp")

# Six tiles, corners among them, on a circle; five in a row; four of four shapes, the last ones shorter.
CORNERS = (axis(8, 4, 2, 2, False, 2), axis(12, 4, 4, 2, True, 2))
FIVE = (axis(2, 2, 0, 0, False, 2), axis(20, 4, 4, 2, True, 2))
SHAPES = (axis(6, 4, 2, 1, False, 1), axis(9, 6, 3, 3, False, 3))
CLOSED = (axis(8, 4, 2, 2, False, 2), axis(8, 4, 2, 2, False, 2))
CIRCLE = (axis(4, 4, 0, 0, False, 2), axis(12, 4, 4, 2, True, 2))
PAIR = (axis(2, 2, 0, 0, False, 2), axis(8, 4, 2, 2, False, 2))


def mesh(*sizes: int) -> dict[str, int]:
    """The params of a mesh from its sizes, outermost axis first."""
    return dict(zip(AXES, sizes, strict=True))


def meshes(*texts: str) -> list[tuple[str, dict[str, int]]]:
    """Names and meshes from words: `tile2-tp2`, `one` for a single rank."""
    pairs = []
    for text in texts:
        sizes = dict.fromkeys(AXES, 1)
        for word in text.split("-") if text != "one" else ():
            name = word.rstrip("0123456789")
            sizes[name] = int(word.removeprefix(name))
        pairs.append((text, sizes))
    return pairs


# Shares, in Python integers.


def share(count: int, ranks: int, rank: int) -> list[int]:
    """[PAR-3]: start and stop."""
    return [rank * count // ranks, (rank + 1) * count // ranks]


def _coordinates(sizes: Mapping[str, int]) -> list[list[int]]:
    """[PAR-1]: the places of all ranks, in order."""
    d, f, t, p = (sizes[name] for name in AXES)
    return [[i, j, k, m] for i in range(d) for j in range(f) for k in range(t) for m in range(p)]


def owners(y: Axis, x: Axis, ranks: int) -> list[list[int]]:
    """[PAR-8]: the points of the cores of each tile rank, as places in the flattened field."""
    cores = [(r, c) for r in geometry(y) for c in geometry(x)]
    points = []
    for rank in range(ranks):
        start, stop = share(len(cores), ranks, rank)
        points.append(
            [
                row * x["length"] + col
                for (top, bottom, _), (left, right, _) in cores[start:stop]
                for row in range(top, bottom)
                for col in range(left, right)
            ]
        )
    return points


def _shares(name: str, sizes: Mapping[str, int], y: Axis, x: Axis, samples: int, heads: int, meaning: str) -> Recipe:
    data, owned = sizes["ddp"] * sizes["fsdp"], owners(y, x, sizes["tile"])
    count = len(geometry(y)) * len(geometry(x))
    expected = {
        "coordinates": np.array(_coordinates(sizes)),
        "samples": np.array([share(samples, data, rank) for rank in range(data)]),
        "tiles": np.array([share(count, sizes["tile"], rank) for rank in range(sizes["tile"])]),
        "counts": np.array([len(own) for own in owned]),
        "points": np.array([point for own in owned for point in own]),
    }
    params = {"mesh": dict(sizes), "y": y, "x": x, "samples": samples, "heads": heads}
    return Recipe(
        f"parallel/shares-{name}", "shares", requirements=("PAR-1", "PAR-2", "PAR-3", "PAR-8"), profiles=PARALLEL,
        judge=Exact("indices"), meaning=meaning, inputs={}, params=params, expected=expected,
    )  # fmt: skip


def _all_shares() -> list[Recipe]:
    return [
        _shares("mesh", mesh(2, 3, 2, 2), *CORNERS, 12, 4, "axes are in another order, or tp is not innermost"),
        _shares("uneven", mesh(2, 2, 3, 1), *FIVE, 11, 3, "what does not come out even goes to the first or last rank"),
        _shares(
            "shapes", mesh(1, 1, 3, 4), *SHAPES, 1, 8,
            "points are shared out by rows or in equal numbers, not by " "the cores of tiles",
        ),
        _shares(
            "many", mesh(1, 7, 5, 1), y=axis(20, 2, 2, 1, False), x=axis(30, 3, 2, 1, True), samples=100, heads=1,
            meaning="shares are rounded up: the last rank gets few, or nothing",
        ),
        _shares("one", mesh(1, 1, 1, 1), *CORNERS, 1, 1, "one rank does not have all"),
    ]  # fmt: skip


def _refused_shares() -> list[Recipe]:
    good: dict[str, Any] = {"mesh": mesh(2, 1, 3, 2), "y": FIVE[0], "x": FIVE[1], "samples": 4, "heads": 4}
    wrong: list[tuple[str, dict[str, Any], str, str]] = [
        ("heads", {"heads": 3}, "3 heads on 2 tp ranks", "heads are split, or some ranks get one more"),
        ("tiles", {"mesh": mesh(2, 1, 6, 2)}, "6 tile ranks for 5 tiles", "a rank without a tile idles, or hangs"),
        ("samples", {"samples": 1}, "2 data ranks for one sample", "a rank without a sample idles, or hangs"),
        ("data-ranks", {"mesh": mesh(2, 3, 3, 2)}, "2 x 3 data ranks for 4 samples",
         "ddp and fsdp are held against the samples one by one"),
        ("no-rank", {"mesh": mesh(2, 0, 3, 2)}, "an axis of no rank", "an axis of size 0 is taken for 1, or for none"),
    ]  # fmt: skip
    return [
        Recipe(
            f"parallel/shares-refuses-{name}", "shares", requirements=("PAR-4",), profiles=PARALLEL,
            judge=MustReject(why), meaning=meaning, inputs={}, params=good | change, valid_counterpart=({}, good),
        )
        for name, change, why, meaning in wrong
    ]  # fmt: skip


# What goes from rank to rank.


def extents_of(x: Array, y_axis: Axis, x_axis: Axis) -> list[Array]:
    """[TILE-3]: every tile's extent of a state, flattened, tiles row-major."""
    return [
        x[:, :, np.array(rows)[:, None] % y_axis["length"], np.array(cols) % x_axis["length"]].reshape(*x.shape[:2], -1)
        for _, _, rows in geometry(y_axis)
        for _, _, cols in geometry(x_axis)
    ]


def _gather(
    name: str, sizes: Mapping[str, int], y: Axis, x: Axis, samples: int, meaning: str, targets: tuple[str, ...]
) -> Recipe:
    rng = np.random.default_rng(900)
    state = rng.integers(-99, 100, (samples, 1, y["length"], x["length"])).astype(np.float64)
    extents, data = extents_of(state, y, x), sizes["ddp"] * sizes["fsdp"]
    expected = {}
    for rank, (i, j, k, _) in enumerate(_coordinates(sizes)):
        (start, stop), (first, last) = (
            share(len(extents), sizes["tile"], k),
            share(samples, data, i * sizes["fsdp"] + j),
        )
        expected[f"rank.{rank}.extents"] = np.concatenate(extents[start:stop], -1)[first:last]
    params = {"mesh": dict(sizes), "y": y, "x": x, "together": 2}
    return Recipe(
        f"parallel/gather-{name}", "parallel_gather", requirements=("PAR-8", "PAR-9", "PAR-2"), profiles=PARALLEL,
        judge=Exact("copies"), meaning=meaning, inputs={"x": state}, params=params, expected=expected, targets=targets,
    )  # fmt: skip


def _gathers() -> list[Recipe]:
    halo = ("halo_of_other_neighbour", "halo_not_wrapped", "halo_order_not_undone")
    rows: list[tuple[str, str, tuple[Axis, Axis], int, str]] = [
        ("tile2", "tile2", CORNERS, 1, "halos are exchanged along one axis alone: corners are missing"),
        ("tile4", "tile4", CORNERS, 1, "ranks with one tile and with two take each other's rows"),
        ("ring", "tile3", FIVE, 1, "the halo comes from the wrong neighbour, or not across the date line"),
        ("shapes", "tile3", SHAPES, 2, "extents of several shapes are put together in the order of evaluation"),
        (
            "wide-halo",
            "tile4",
            (axis(2, 2, 0, 0, False), axis(12, 3, 4, 0, True)),
            1,
            "a halo over more than the next rank is cut",
        ),
        (
            "closed",
            "tile2",
            (axis(6, 2, 6, 1, False), axis(8, 4, 4, 2, False)),
            1,
            "clipped extents get points from the far side, or zeros",
        ),
        ("mixed", "fsdp2-tile2-tp2", CLOSED, 3, "tp ranks have other tiles, or data ranks the same samples"),
    ]
    return [_gather(name, meshes(m)[0][1], *cut, n, meaning, halo) for name, m, cut, n, meaning in rows]


def _blend(name: str, sizes: Mapping[str, int], y: Axis, x: Axis, samples: int, meaning: str) -> Recipe:
    whole = y["blend"] == x["blend"] == 0
    rng, points_of = np.random.default_rng(910), extents_of(np.arange(y["length"] * x["length"]).reshape(
        1, 1, y["length"], x["length"]), y, x)  # fmt: skip
    size = sum(points.shape[-1] for points in points_of)
    drawn = rng.integers(-99, 100, (samples, 1, size)) if whole else rng.standard_normal((samples, 1, size))
    values: Array = drawn.astype(np.float64)
    blended, at = np.zeros((samples, 1, y["length"] * x["length"])), 0
    weight = [np.outer(rows, cols).ravel() for rows in weights(y) for cols in weights(x)]
    for points, w in zip(points_of, weight, strict=True):
        blended[..., points[0, 0].astype(np.intp)] += w * values[..., at : at + len(w)]  # no point twice in a tile
        at += len(w)
    judge: Judge = Exact("integers, weights of 0 and 1")
    if not whole:
        judge = Bound(64, "four products with weights of 16 u each, and their sum", float(np.abs(values).max()))
    return Recipe(
        f"parallel/blend-{name}", "parallel_blend", requirements=("PAR-10", "PAR-11", "TILE-4"), profiles=PARALLEL,
        judge=judge, meaning=meaning, inputs={"values": values},
        params={"mesh": dict(sizes), "y": y, "x": x, "together": 3},
        expected={"blended": blended.reshape(samples, 1, y["length"], x["length"])},
    )  # fmt: skip


def _blends() -> list[Recipe]:
    crop = (axis(8, 4, 2, 0, False), axis(12, 4, 2, 0, True))
    rows: list[tuple[str, str, tuple[Axis, Axis], int, str]] = [
        ("integers", "tile4", crop, 1, "results go to another owner, or points are put in another order"),
        ("corners", "tile2", CORNERS, 1, "what a tile has for its neighbour's seam is lost, or counted twice"),
        ("ring", "tile3", FIVE, 1, "the seam across the date line is not sent"),
        ("shapes", "tile4", SHAPES, 2, "results of several shapes are taken in another order"),
        ("mixed", "ddp2-tile2-tp2", CLOSED, 3, "samples come back in another order, or tp ranks add up"),
    ]
    return [_blend(name, meshes(m)[0][1], *cut, n, meaning) for name, m, cut, n, meaning in rows]


# The network on tiles.

SMALL: dict[str, Any] = {
    "width": 8, "heads": 4, "depth": 1, "mlp_ratio": 2, "position_octaves": 1, "noise_features": 4,
}  # fmt: skip
NARROW: dict[str, Any] = {"width": 4, "heads": 2, "channels": 1}
DENOISE = Chain("a network on tiles and their blend, on many ranks as on one")


def _known(c: Mapping[str, Any], y: Axis, x: Axis, sigma: Sequence[float], seed: int) -> dict[str, Array]:
    """Make the inputs of `denoise_tiled`, every sample with static fields and a history of its own."""
    age = [[6.0 + 5 * i, 30.0 - 4 * i] for i in range(len(sigma))]
    return network_inputs(c, (y["length"], x["length"]), sigma, age, seed)


def _problem(
    cut: tuple[Axis, Axis], sigma: Sequence[float], seed: int, together: int, **changes: Any
) -> tuple[dict[str, Array], dict[str, Any]]:
    y, x = cut
    c = config(**SMALL | changes) | {"patch": [y["patch"], x["patch"]]}
    params = {"config": c, "chunk": 1, "periodic": x["periodic"], "y": y, "x": x, "together": together}
    return _known(c, y, x, sigma, seed), params


Problem = tuple[dict[str, Array], dict[str, Any]]


def _five() -> Problem:
    return _problem(FIVE, (0.6,), 921, 16, window=1, **NARROW)


def _denoises() -> list[Recipe]:
    tp = ("qkv_cut_as_one", "bias_before_sum", "tile_rank_of_world")
    problems: list[tuple[str, Problem, list[str], tuple[str, ...], str]] = [
        ("corners", _problem(CORNERS, (0.05, 0.7, 5.0), 920, 3, width=4),
         ["one", "tile2", "tile4", "tp2", "tp4", "ddp2", "fsdp3", "tile2-tp2", "fsdp2-tile2", "fsdp2-tile2-tp2"],
         ("PAR-2", "PAR-6", "PAR-7", "PAR-9", "PAR-10", "PAR-11", "TILE-6"),
         "halos, corners or samples of another rank, a head too many, or a bias added on each rank"),
        ("five", _five(), ["tile3", "tile4", "tile2-tp2"],
         ("PAR-3", "PAR-8", "PAR-9", "PAR-10"), "tiles that do not come out even, or the date line between two ranks"),
        ("shapes", _problem(SHAPES, (1.7,), 922, 1, sigma_data=0.5, **NARROW), ["tile2", "tile4"],
         ("PAR-8", "PAR-9", "PAR-10"), "memory tokens or extents of several shapes are taken in another order"),
    ]  # fmt: skip
    return [
        Recipe(
            f"parallel/denoise-{name}-{where}", "parallel_denoise", requirements=cited, profiles=PARALLEL,
            judge=DENOISE, meaning=meaning, inputs=inputs, params=params | {"mesh": sizes}, targets=tp,
        )
        for name, (inputs, params), wanted, cited, meaning in problems for where, sizes in meshes(*wanted)
    ]  # fmt: skip


# One training step.


def _masks(shape: tuple[int, ...]) -> Array:
    """Very different numbers of valid points: nearly all, some in one corner alone, every other one, ..."""
    rng = np.random.default_rng(930)
    valid = rng.random(shape) < np.array([0.95, 0.0, 0.5, 0.2, 0.8])[: shape[0], None, None, None]
    valid[1, :, :3, :2] = True
    valid[2:3, :, :, : shape[-1] // 2] = False
    return valid


def _training(
    cut: tuple[Axis, Axis], sigma: Sequence[float], seed: int, clip: float, **changes: Any
) -> tuple[dict[str, Array], dict[str, Any]]:
    inputs, params = _problem(cut, sigma, seed, 2, **changes)
    rng, shape = np.random.default_rng(seed), inputs["x"].shape
    del inputs["x"]
    drawn = {"clean": rng.standard_normal(shape), "noise": rng.standard_normal(shape), "valid": _masks(shape)}
    return inputs | drawn, params | {"clip": clip}


def _batch() -> Problem:
    return _training(PAIR, (0.3, 1.2, 4.0, 0.05, 0.8), 932, 1e6, sigma_data=0.5, **NARROW)


def _steps() -> list[Recipe]:
    chain = Chain("a tiled network, its loss and its derivative by reverse mode, summed over ranks, clipped")
    problems: list[tuple[str, Problem, list[str], tuple[str, ...], str]] = [
        ("step", _training(CLOSED, (0.3, 1.2, 4.0), 931, 0.125, depth=2, width=4),
         ["one", "tile2", "tile4", "tp2", "tp4", "fsdp2", "ddp2", "ddp3", "tile2-tp2", "fsdp2-tile2", "ddp2-tp2",
          "fsdp2-tile2-tp2"],
         ("PAR-5", "PAR-6", "PAR-7", "PAR-9", "PAR-12", "PAR-13", "PAR-14", "EDM-11"),
         "gradients are averaged where they add up, or the reverse; the loss is a mean of means; a norm is a rank's"),
        ("batch", _batch(),
         ["one", "fsdp4", "ddp4", "ddp2-fsdp2"], ("PAR-2", "PAR-12", "PAR-13", "PAR-14", "EDM-11"),
         "batches that do not come out even, or replicas of shards, weigh samples otherwise"),
    ]  # fmt: skip
    targets = (
        "f_without_sum", "g_summed_twice", "tile_gradients_averaged", "tile_gradients_not_summed",
        "data_gradients_summed", "loss_mean_of_ranks", "loss_mean_of_tile_ranks", "norm_of_tp_part",
        "norm_of_fsdp_part", "norm_replicated_twice", "context_without_f", "memory_without_f",
        "ddp_replicas_apart", "halo_detached",
    )  # fmt: skip
    return [
        Recipe(
            f"parallel/{name}-{where}", "parallel_gradients", requirements=cited, profiles=PARALLEL, judge=chain,
            meaning=meaning, inputs=inputs, params=params | {"mesh": sizes}, targets=targets,
        )
        for name, (inputs, params), wanted, cited, meaning in problems for where, sizes in meshes(*wanted)
    ]  # fmt: skip


# Ensembles.


def _drawing(
    cut: tuple[Axis, Axis], members: int, seed: int, churn: float = 0.0, **changes: Any
) -> tuple[dict[str, Array], dict[str, Any]]:
    inputs, params = _problem(cut, (1.0,) * members, seed, 2, **changes)
    known = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
    rng, shape, levels = np.random.default_rng(seed), inputs["x"].shape, np.array([4.0, 1.0, 0.2, 0.0])
    known |= {"sigmas": levels, "latents": rng.standard_normal(shape)}
    if churn:
        known["noises"] = rng.standard_normal((len(levels) - 1, *shape))
    return known, params | {"method": None, "churn": {"s_churn": churn} if churn else {}}


SEEN = bilinear_observations(12, (0, 1, 3), (0, 0, 7), (0, 2, 9))  # astride seams of CIRCLE


def _forecast() -> Problem:
    return _drawing(FIVE, 3, 942, **NARROW)


def _solve() -> Problem:
    inputs, params = _drawing(CIRCLE, 2, 943, **NARROW)
    return inputs | SEEN, params | {"method": "mmps", "steps": 3}


def _ensembles() -> list[Recipe]:
    chain = Chain("three steps of the sampler around a tiled network on many ranks, and guidance in them")
    noisy, churned = _drawing(CIRCLE, 5, 941, 1.0, **NARROW)
    problems: list[tuple[str, Problem, list[str], tuple[str, ...], str]] = [
        ("ensemble", (noisy | SEEN, churned | {"method": "dps"}),
         ["one", "tile3", "tp2", "ddp2", "tile2-tp2", "fsdp2-tile2", "ddp2-fsdp2", "fsdp2-tile2-tp2"],
         ("PAR-5", "PAR-9", "PAR-11", "PAR-18", "GUIDE-2", "TILE-7"),
         "members have the noise of another, come back in another order, or halos are those of an earlier evaluation"),
        ("forecast", _forecast(), ["tile3", "ddp3", "tile2-tp2"], ("PAR-11", "PAR-18", "TILE-7"),
         "tiles are sampled rank by rank, or members in another order"),
        ("solve", _solve(), ["tile2", "tp2"], ("PAR-5", "PAR-11", "GUIDE-5"),
         "sums of the solver are those of a rank's own points, or gradients stay on the rank that makes them"),
    ]  # fmt: skip
    targets = ("member_of_rank", "members_other_order", "halo_kept", "halo_detached", "gradient_of_own_points")
    return [
        Recipe(
            f"parallel/{name}-{where}", "parallel_ensemble", requirements=cited, profiles=PARALLEL, judge=chain,
            meaning=meaning, inputs=inputs, params=params | {"mesh": sizes}, targets=targets,
        )
        for name, (inputs, params), wanted, cited, meaning in problems for where, sizes in meshes(*wanted)
    ]  # fmt: skip


# What does not fit.


def _refusals() -> list[Recipe]:
    (row, tiles), (step, training) = _five(), _batch()
    (few, solving), (free, drawing) = _solve(), _forecast()

    def case(
        name: str,
        op: str,
        why: str,
        meaning: str,
        bad: tuple[Arrays, Params],
        good: tuple[Arrays, Params],
        requirements: tuple[str, ...] = ("PAR-4",),
    ) -> Recipe:
        return Recipe(
            f"parallel/refuses-{name}", op, requirements=requirements, profiles=PARALLEL, judge=MustReject(why),
            meaning=meaning, inputs=bad[0], params=bad[1], valid_counterpart=good,
        )  # fmt: skip

    def on(values: Params, *sizes: int) -> dict[str, Any]:
        return {**values, "mesh": mesh(*sizes)}

    nothing = step | {"valid": np.zeros_like(step["valid"])}
    huge = few | {"latents": few["latents"] * np.array([2.0**1021, 1.0])[:, None, None, None]}
    fails = "a rank fails alone, and the others wait for it"
    return [
        case(
            "heads", "parallel_denoise", "3 tp ranks for 2 heads", "heads are split over ranks, or some rank has none",
            (row, on(tiles, 1, 1, 1, 3)), (row, on(tiles, 1, 1, 1, 2)),
        ),
        case(
            "tiles", "parallel_denoise", "8 tile ranks for 5 tiles", "a rank without a tile idles, or hangs",
            (row, on(tiles, 1, 1, 8, 1)), (row, on(tiles, 1, 1, 4, 1)),
        ),
        case(
            "samples", "parallel_gradients", "8 data ranks for 5 samples", "a rank without a sample idles, or hangs",
            (step, on(training, 2, 4, 1, 1)), (step, on(training, 2, 2, 1, 1)),
        ),
        case(
            "members", "parallel_ensemble", "4 data ranks for 3 members", "a rank without a member idles, or hangs",
            (free, on(drawing, 2, 2, 1, 1)), (free, on(drawing, 1, 3, 1, 1)),
        ),
        case(
            "no-valid-point", "parallel_gradients", why="no point of any rank is valid", meaning=fails,
            bad=(nothing, on(training, 1, 2, 1, 1)), good=(step, on(training, 1, 2, 1, 1)),
            requirements=("PAR-12", "PAR-19"),
        ),
        case(
            "divergence", "parallel_ensemble", why="the state of the first rank's member overflows", meaning=fails,
            bad=(huge, on(solving, 2, 1, 1, 1)), good=(few, on(solving, 2, 1, 1, 1)), requirements=("PAR-19", "DA-6"),
        ),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """Shares, messages, and networks, training steps and ensembles on many meshes; what does not fit."""
    return [
        *_all_shares(), *_refused_shares(), *_gathers(), *_blends(), *_denoises(), *_steps(), *_ensembles(),
        *_refusals(),
    ]  # fmt: skip
