"""[TILE-1] to [TILE-10]: refusals, order, gradients, the cone of the network, and the bound on seams."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_problems import (
    CONFIG,
    EPS,
    NETWORK,
    World,
    integers,
    local_mixing,
    naive_cone,
    normal,
    support,
    world,
)
from torch import Tensor

from storm_ref.edm import euler_sample, sample
from storm_ref.tiling import (
    Axis,
    Tile,
    Tiling,
    batches,
    blend_tiles,
    extents,
    overhead,
    seam_bound,
    shapes,
    spans,
    tile_conditions,
    tiled_denoiser,
    tiles,
    weights,
)


@st.composite
def axes(draw: st.DrawFn, longest: int = 8, least_halo: int = 0) -> Axis:
    """Any axis that [TILE-1] to [TILE-3] allow: a core of 1..`longest` patches, 2..5 tiles, or one tile."""
    patch = draw(st.integers(1, 3))
    core = draw(st.integers(1, longest))
    count = draw(st.integers(2, 5))
    if draw(st.booleans()):
        assume(least_halo <= (count - 1) * core // 2)
        halo = draw(st.integers(least_halo, (count - 1) * core // 2))
        blend = draw(st.integers(0, min(halo, core // 2)))
        return Axis(count * core * patch, core * patch, halo * patch, blend * patch, True, patch)
    last = draw(st.integers(1, core))
    halo = draw(st.integers(least_halo, 2 * core + 1))
    blend = draw(st.integers(0, min(halo, core // 2, last)))
    return Axis(((count - 1) * core + last) * patch, core * patch, halo * patch, blend * patch, False, patch)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """A closed latitude and any longitude, small."""
    y = draw(axes(longest=3).filter(lambda a: not a.periodic))
    return Tiling(y, draw(axes(longest=3)))


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], dtype=torch.float64)


# Geometry


def test_weights_of_a_known_seam() -> None:
    """[TILE-4] b = 1: sin^2(pi / 8) and sin^2(3 pi / 8) = cos^2(pi / 8) around the only boundary of 0..3 | 4..7."""
    low, high = (2 - math.sqrt(2)) / 4, (2 + math.sqrt(2)) / 4
    left, right = weights(Axis(8, 4, 2, 1))
    assert (left - torch.tensor([1, 1, 1, high, low, 0], dtype=torch.float64)).abs().max() <= 4 * EPS
    assert (right - torch.tensor([0, low, high, 1, 1, 1], dtype=torch.float64)).abs().max() <= 4 * EPS


@given(tilings())
def test_tiles_are_products_in_row_major_order(tiling: Tiling) -> None:
    """[TILE-4] [TILE-6] for every pair of tiles of the axes."""
    ys, xs = (
        list(zip(extents(tiling.y), weights(tiling.y), strict=True)),
        list(zip(extents(tiling.x), weights(tiling.x), strict=True)),
    )
    made = tiles(tiling)
    assert len(made) == len(ys) * len(xs)
    for n, tile in enumerate(made):
        (rows, wy), (cols, wx) = ys[n // len(xs)], xs[n % len(xs)]
        assert torch.equal(tile.rows, rows) and torch.equal(tile.cols, cols)
        for a in range(len(rows)):
            for b in range(len(cols)):
                assert tile.weight[a, b] == wy[a] * wx[b]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 10, "core": 4, "patch": 4}, "length 10 is not a multiple"),
        ({"length": 12, "core": 3, "patch": 2}, "core 3 is not a multiple"),
        ({"length": 12, "core": 4, "halo": 3, "patch": 2}, "halo 3 is not a multiple"),
        ({"length": 12, "core": 4, "halo": 2, "blend": 1, "patch": 2}, "blend 1 is not a multiple"),
        ({"length": 12, "core": 4, "patch": 0}, "patch must be at least 1"),
        ({"length": 12, "core": 0}, "core must be between 1 and the length 12, got 0"),
        ({"length": 12, "core": 13}, "core must be between 1 and the length 12, got 13"),
        ({"length": 12, "core": 4, "halo": 1, "blend": 2}, "blend 2 and halo 1"),
        ({"length": 12, "core": 4, "halo": 1, "blend": -1}, "blend -1 and halo 1"),
        ({"length": 12, "core": 4, "halo": -1}, "halo -1"),
        ({"length": 12, "core": 4, "halo": 3, "blend": 3}, "blend 3 is too wide"),
        ({"length": 9, "core": 4, "halo": 2, "blend": 2}, "last core of 1"),
        ({"length": 10, "core": 4, "periodic": True}, "4 does not divide 10"),
        ({"length": 12, "core": 6, "halo": 4, "periodic": True}, "wraps onto itself"),
    ],
)
def test_axis_invalid(arguments: dict[str, int], message: str) -> None:
    """[TILE-1] [TILE-2] [TILE-3] every refusal says what was seen."""
    with pytest.raises(ValueError, match=message):
        Axis(**arguments)


def test_axis_limits_are_allowed() -> None:
    """[TILE-1] [TILE-3] equality everywhere: blend = halo, 2 blend = core, blend = last core, c + 2 h = n."""
    Axis(10, 4, 2, 2)
    Axis(12, 6, 3, 3, periodic=True)
    Axis(12, 12, halo=5, periodic=True)


def test_tiling_of_makes_one_tile_of_a_short_axis() -> None:
    """[TILE-1] by size: the same sizes serve any grid; latitude is closed."""
    made = Tiling.of((8, 12), (8, 4), (4, 2), (2, 2), True, (2, 2))
    assert made == Tiling(Axis(8, 8, patch=2), Axis(12, 4, 2, 2, True, 2))
    assert Tiling.of((8, 12), (20, 20), (4, 4), (2, 2), True) == Tiling.whole((8, 12), True)
    assert Tiling.of((8, 12), (4, 4), (1, 2), (1, 2), False) == Tiling(Axis(8, 4, 1, 1), Axis(12, 4, 2, 2))


# Batches of tiles


def test_batches_value() -> None:
    """Shapes in the order of their first tile, tiles in their own order, at most so many at a time."""
    assert batches(["a", "b", "a", "a", "c", "b"], 2) == [[0, 2], [3], [1, 5], [4]]
    assert batches(["a", "b", "a", "a", "c", "b"]) == [[0, 2, 3], [1, 5], [4]]
    assert batches([], 1) == []


@pytest.mark.parametrize("tiles_per_batch", [0, -1])
def test_batches_invalid_number_of_tiles(tiles_per_batch: int) -> None:
    with pytest.raises(ValueError, match="at least one tile must be evaluated at a time"):
        batches(["a"], tiles_per_batch)


@given(tilings())
def test_shapes_are_those_of_the_tiles(tiling: Tiling) -> None:
    """[TILE-3] the lengths of extents, counted without their indices."""
    assert shapes(tiling) == [tile.shape for tile in tiles(tiling)] == [tuple(t.weight.shape) for t in tiles(tiling)]
    for axis in (tiling.y, tiling.x):
        assert spans(axis) == [len(extent) for extent in extents(axis)]


def test_tile_conditions_are_made_once_for_the_same_tiles() -> None:
    """A batch is known by the places of its tiles and the number of members, not by the list that holds them."""
    condition = world((8, 12), True, batch=1).condition
    condition_of = tile_conditions(condition, CONFIG.patch)
    soft = tiles(Tiling(Axis(8, 4, 2, 2, patch=2), Axis(12, 4, 2, 2, True, 2)))
    hard = tiles(Tiling(Axis(8, 4, 2, 0, patch=2), Axis(12, 4, 2, 0, True, 2)))
    first = condition_of(soft[:2], 2)
    assert condition_of(soft[:2], 2) is first and condition_of(hard[:2], 2) is first
    others = [condition_of(soft[1:3], 2), condition_of(soft[:2], 4), condition_of(soft[1::-1], 2)]
    for tile, part in ((soft[0], slice(0, 2)), (soft[1], slice(2, 4))):
        want = condition.crop(tile.rows, tile.cols, CONFIG.patch)
        for name in ("static", "memory", "position"):
            assert torch.equal(getattr(first, name)[part], getattr(want, name).expand(2, -1, -1, -1)), name
    assert all(other is not first for other in others)
    assert not torch.equal(others[2].position, first.position)


# The operator


@given(tilings(), st.integers(-9, 9))
def test_tiled_keeps_constants_and_identity(tiling: Tiling, constant: int) -> None:
    """[TILE-5] [TILE-8] the identity and a constant, to rounding in seams and exactly where one tile has all the
    weight."""
    x = integers(2, 1, tiling.y.length, tiling.x.length)
    same = blend_tiles(lambda z, s, t: z, tiling)(x, ones(x))
    flat = blend_tiles(lambda z, s, t: torch.full_like(z, constant), tiling)(x, ones(x))
    assert (same - x).abs().max() <= 16 * EPS * 8
    assert (flat - constant).abs().max() <= 16 * EPS * abs(constant)
    single = torch.zeros(tiling.y.length, tiling.x.length, dtype=torch.bool)
    for tile in tiles(tiling):
        single[tile.rows[:, None], tile.cols] |= tile.weight == 1
    assert torch.equal(same[..., single], x[..., single])
    if tiling.y.blend == tiling.x.blend == 0:
        assert bool(single.all())


@given(tilings(), st.integers(1, 40))
@settings(max_examples=20)
def test_tiled_batching_is_irrelevant(tiling: Tiling, tiles_per_batch: int) -> None:
    """[TILE-6] how many tiles are evaluated together: bit for bit, because tiles are blended in the same order."""
    x = normal(2, 2, tiling.y.length, tiling.x.length)
    assert torch.equal(
        blend_tiles(local_mixing, tiling, tiles_per_batch)(x, ones(x)), blend_tiles(local_mixing, tiling, 1)(x, ones(x))
    )


def test_tiled_order_of_tiles_is_irrelevant(monkeypatch: pytest.MonkeyPatch) -> None:
    """[TILE-6] reversed and shuffled tiles: bit for bit on a hard crop of integers, to rounding on a soft one."""
    for tiling, bound in (
        (Tiling(Axis(8, 4, 2), Axis(12, 4, 4, periodic=True)), 0.0),
        (Tiling(Axis(8, 4, 2, 2), Axis(12, 4, 4, 2, periodic=True)), 16 * EPS * 4000),
    ):
        x = integers(2, 2, 8, 12)
        want = blend_tiles(local_mixing, tiling)(x, ones(x))
        for order in ([5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]):
            with monkeypatch.context() as patch:
                made = tiles(tiling)
                patch.setattr("storm_ref.tiling.tiles", lambda _, made=made, order=order: [made[i] for i in order])
                got = blend_tiles(local_mixing, tiling, 2)(x, ones(x))
            assert (got - want).abs().max() <= bound


def test_tiled_invalid_grid() -> None:
    denoise = blend_tiles(lambda z, s, t: z, Tiling(Axis(8, 4), Axis(12, 4)))
    with pytest.raises(ValueError, match=r"\(12, 8\) but the tiling is for \(8, 12\)"):
        denoise(torch.zeros(1, 1, 12, 8), torch.ones(1))


def test_tiled_invalid_together() -> None:
    with pytest.raises(ValueError, match="tiles_per_batch = 0"):
        blend_tiles(lambda z, s, t: z, Tiling(Axis(8, 4), Axis(12, 4)), 0)


def test_tiled_has_a_gradient() -> None:
    """[TILE-6] the transpose of T, which guidance needs: <v, T x> = <T^T v, x> for a linear D."""
    tiling = Tiling(Axis(8, 4, 2, 1), Axis(12, 4, 4, 2, periodic=True))
    x, v = normal(1, 2, 8, 12).requires_grad_(), normal(1, 2, 8, 12, seed=1)
    out = blend_tiles(lambda z, s, t: z.cumsum(-1) + z.sum(-2, keepdim=True), tiling)(x, ones(x))
    (back,) = torch.autograd.grad(out, x, v)
    assert abs((out * v).sum().item() - (back * x).sum().item()) <= 1e3 * EPS * out.detach().abs().max().item()


# The network


def test_bind_tiled_serves_another_number_of_members() -> None:
    """[TILE-6] conditions are kept between evaluations: a later, smaller batch gets its own."""
    tiling = Tiling(Axis(8, 4, 2, 2, patch=2), Axis(12, 4, 2, 2, periodic=True, patch=2))
    w = world((8, 12), True)
    shared = replace(w.condition, static=w.condition.static[:1], memory=w.condition.memory[:1])
    denoise = tiled_denoiser(w.network, shared, tiling)
    both, first = denoise(w.x, w.sigma), denoise(w.x[:1], w.sigma[:1])
    again = denoise(w.x, w.sigma)
    assert torch.equal(both, again)
    assert (both[:1] - first).abs().max() <= NETWORK * both.abs().max()


def rolled(w: World, shift: int) -> World:
    """The same world seen from `shift` points further east: everything turns but the network and the latitudes."""
    condition = replace(
        w.condition, static=w.condition.static.roll(shift, -1), memory=w.condition.memory.roll(shift // 2, 2)
    )
    return replace(w, condition=condition, x=w.x.roll(shift, -1))


@pytest.mark.parametrize("window", [None, 1])
def test_longitude_shifts_by_cores_commute(window: int | None) -> None:
    """[TILE-6] latitude-only positions: turning the globe by c points turns the answer; by one patch it does not."""
    w = world((8, 12), True, "latitude", config=replace(CONFIG, window=window))
    tiling = Tiling(Axis(8, 4, 2, 2, patch=2), Axis(12, 4, 2, 2, True, 2))
    want = tiled_denoiser(w.network, w.condition, tiling)(w.x, w.sigma)
    for shift in (4, 8):
        r = rolled(w, shift)
        got = tiled_denoiser(r.network, r.condition, tiling)(r.x, r.sigma)
        assert (got - want.roll(shift, -1)).abs().max() <= NETWORK * want.abs().max()
    r = rolled(w, 2)
    got = tiled_denoiser(r.network, r.condition, tiling)(r.x, r.sigma)
    assert (got - want.roll(2, -1)).abs().max() > 1e-5
    r = rolled(replace(w, condition=replace(w.condition, position=world((8, 12), True).condition.position[..., :1])), 4)
    assert (tiled_denoiser(r.network, r.condition, tiling)(r.x, r.sigma) - want.roll(4, -1)).abs().max() > 1e-5


# The cone


def dense(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
    """Each point of the tile weighs in at each other, never with weight zero, differently from evaluation to
    evaluation."""
    return z / 2 + z.mean((-2, -1), keepdim=True) / (1 + sigma[:, None, None, None])


@given(axes(longest=4, least_halo=1), st.integers(1, 3))
@settings(max_examples=25)
def test_context_travels_one_tile_an_evaluation(axis: Axis, evaluations: int) -> None:
    """[TILE-9] the support of the Jacobian after so many Euler steps is the cone: all of it and nothing beyond."""
    assume(0 < axis.halo + axis.blend <= axis.core)
    denoise = blend_tiles(dense, Tiling(Axis(1, 1), axis))
    sigmas = torch.linspace(2, 0, evaluations + 1, dtype=torch.float64)
    probes = torch.eye(axis.length, dtype=torch.float64)[:, None, None, :]
    out = euler_sample(denoise, probes, sigmas)[:, 0, 0]
    assert support(out) == naive_cone(axis, evaluations)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_heun_sampler_fills_the_cone_of_its_evaluations(steps: int) -> None:
    """[TILE-7] [TILE-9] n Heun steps apply T at all of their 2 n - 1 evaluations, on the blended state."""
    axis = Axis(40, 4, 2, 1)
    sigmas = torch.linspace(2, 0, steps + 1, dtype=torch.float64)
    probes = torch.eye(40, dtype=torch.float64)[:, None, None, :]
    out = sample(blend_tiles(dense, Tiling(Axis(1, 1), axis)), probes, sigmas)[:, 0, 0]
    assert support(out) == naive_cone(axis, 2 * steps - 1)
    assert steps == 3 or naive_cone(axis, 2 * steps - 1)[0] != set(range(40))


def test_cone_is_wider_beyond_the_condition() -> None:
    """[TILE-9] the condition h + b <= c is needed: with a longer halo context travels two tiles an evaluation."""
    axis = Axis(40, 4, 6, 1)
    probes = torch.eye(40, dtype=torch.float64)[:, None, None, :]
    out = euler_sample(blend_tiles(dense, Tiling(Axis(1, 1), axis)), probes, torch.tensor([2.0, 1.0, 0.0]).double())
    reach, cone = support(out[:, 0, 0]), naive_cone(axis, 2)
    assert all(a >= b for a, b in zip(reach, cone, strict=True)) and reach != cone


@pytest.mark.parametrize("evaluations", [1, 2])
def test_cone_of_the_network(evaluations: int) -> None:
    """[TILE-9] the real network with dense attention in the tile, both axes at once."""
    y, x = Axis(8, 4, 2, 2, patch=2), Axis(16, 4, 2, 2, True, 2)
    w = world((8, 16), True, batch=1)
    denoise = tiled_denoiser(w.network, w.condition, Tiling(y, x))

    def run(z: Tensor) -> Tensor:
        for _ in range(evaluations):
            z = denoise(z, w.sigma)
        return z

    state = w.x.clone().requires_grad_()
    out = run(state)
    rows, cols = naive_cone(y, evaluations), naive_cone(x, evaluations)
    for row, col in ((0, 0), (3, 5), (4, 7), (7, 15), (1, 9)):
        (reach,) = torch.autograd.grad(out[0, 0, row, col], state, retain_graph=True)
        want = torch.zeros(8, 16, dtype=torch.bool)
        want[torch.tensor(sorted(rows[row]))[:, None], torch.tensor(sorted(cols[col]))] = True
        assert torch.equal((reach[0] != 0).any(0), want), f"cone of point {row}, {col}"


# Seams and cost


@given(axes(longest=6, least_halo=1), st.integers(0, 2**31))
def test_seam_bound_holds(axis: Axis, seed: int) -> None:
    """[TILE-4] neighbours of a blend differ by no more than the bound, for any outputs of the tiles."""
    assume(axis.blend > 0)
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(1, generator=generator).item()
    outputs = [torch.randn(len(e), generator=generator).double().cumsum(0) * smooth for e in extents(axis)]
    outputs = [u + 3 * torch.randn(1, generator=generator).double() for u in outputs]
    blended = torch.zeros(axis.length, dtype=torch.float64)
    for e, w, u in zip(extents(axis), weights(axis), outputs, strict=True):
        blended[e] += w * u
    slope = max(u.diff().abs().max().item() for u in outputs)
    values = [dict(zip(e.tolist(), u.tolist(), strict=True)) for e, u in zip(extents(axis), outputs, strict=True)]
    jump = max(abs(a[q] - b[q]) for a in values for b in values for q in a.keys() & b.keys())
    around = torch.cat([blended, blended[:1]]) if axis.periodic else blended
    limit = seam_bound(slope, jump, axis.blend)
    assert around.diff().abs().max().item() <= limit + 16 * EPS * max(u.abs().max().item() for u in outputs)


@pytest.mark.parametrize("blend", [1, 2, 3, 8])
def test_seam_bound_is_attained(blend: int) -> None:
    """[TILE-4] two tiles of constants 1 and 0: the largest step is the bound itself."""
    axis = Axis(32, 16, 8, blend)
    blended = torch.zeros(32, dtype=torch.float64)
    e, w = extents(axis)[0], weights(axis)[0]
    blended[e] = w
    assert abs(blended.diff().abs().max().item() - seam_bound(0.0, 1.0, blend)) <= 8 * EPS
    assert seam_bound(2.0, 0.5, blend) == 2.0 + math.sin(math.pi / (4 * blend)) * 0.5


def test_seam_bound_invalid_hard_crop() -> None:
    with pytest.raises(ValueError, match="hard crop"):
        seam_bound(1.0, 1.0, 0)


@given(tilings())
def test_overhead_counts_points(tiling: Tiling) -> None:
    """[TILE-10] exact on periodic axes; on closed ones the clipped halos come off."""
    work = sum(t.weight.numel() for t in tiles(tiling)) / (tiling.y.length * tiling.x.length)
    assert work <= overhead(tiling) * (1 + 4 * EPS)
    circle = replace(tiling, y=Axis(6, 6))
    work = sum(t.weight.numel() for t in tiles(circle)) / (6 * tiling.x.length)
    if tiling.x.periodic:
        assert abs(work - (1 + 2 * tiling.x.halo / tiling.x.core)) <= 4 * EPS * work
        assert abs(overhead(circle) - work) <= 4 * EPS * work


def test_overhead_value() -> None:
    """[TILE-10]"""
    assert overhead(Tiling(Axis(12, 4, 1), Axis(12, 3, 3, periodic=True))) == 1.5 * 3.0
    assert overhead(Tiling(Axis(12, 12, 4), Axis(12, 3, 3, periodic=True))) == 3.0
