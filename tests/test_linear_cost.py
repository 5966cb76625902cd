"""[COST-3] [COST-5] [TILE-10] Cost is linear: in the frames of the history, and by tiles in the size of the domain.

test_cost.py holds the formulas used here to counts on running code.
"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cost import configs, domains

from storm_ref import cost
from storm_ref.config import StormConfig, storm_10m
from storm_ref.cost import exponent
from storm_ref.tiling import Axis, Tiling, extents, overhead


@given(configs(), st.integers(1, 100), st.integers(1, 1000), st.integers(1, 1000))
def test_memory_linear_in_frames(c: StormConfig, n: int, frames: int, step: int) -> None:
    """[COST-3] whole chunks add the same each."""
    counts = [cost.memory(c, n, frames + i * step).multiply_adds for i in range(4)]
    assert len({b - a for a, b in pairwise(counts)}) == 1
    chunks = [cost.memory(c, n, i * step, step) for i in range(1, 5)]
    assert {(b.multiply_adds - a.multiply_adds, b.numbers - a.numbers) for a, b in pairwise(chunks)} == {
        (cost.memory_chunk(c, n, step).multiply_adds, cost.memory_chunk(c, n, step).numbers)
    }


@given(domains(), st.integers(1, 50))
def test_tiled_evaluation_affine_in_tiles(domain: tuple[StormConfig, Tiling], step: int) -> None:
    """[TILE-10] second differences are zero; on a periodic axis cost is proportional to the number of tiles."""
    c, tiling = domain
    x = tiling.x
    lengths = [x.length + (4 + i * step) * x.core for i in range(4)]
    longer = [Tiling(tiling.y, Axis(n, x.core, x.halo, x.blend, x.periodic, x.patch)) for n in lengths]
    counts = [cost.tiled_evaluation(c, t).multiply_adds for t in longer]
    assert len({b - a for a, b in pairwise(counts)}) == 1
    if x.periodic:
        assert [count * lengths[0] for count in counts] == [counts[0] * n for n in lengths]


@given(domains())
def test_halo_costs_at_most_its_factor(domain: tuple[StormConfig, Tiling]) -> None:
    """[COST-5] [TILE-10] points at most o times as many, pairs o^2; equal where nothing is clipped."""
    c, tiling = domain
    points, pairs = (
        sum(len(r) ** power for r in extents(tiling.y)) * sum(len(s) ** power for s in extents(tiling.x))
        for power in (1, 2)
    )
    bare = Tiling(*(Axis(a.length, a.core, 0, 0, a.periodic, a.patch) for a in (tiling.y, tiling.x)))
    cores = [sum(len(e) ** 2 for e in extents(a)) for a in (bare.y, bare.x)]
    o, slack = overhead(tiling), 1 + 2**-40
    assert points <= o * tiling.y.length * tiling.x.length * slack
    assert pairs <= o**2 * cores[0] * cores[1] * slack
    if tiling.y.periodic and tiling.x.periodic:
        assert points == pytest.approx(o * tiling.y.length * tiling.x.length, rel=2**-40)
        assert pairs == pytest.approx(o**2 * cores[0] * cores[1], rel=2**-40)
    per_pair = 4 * c.depth * c.width
    area = (c.patch[0] * c.patch[1]) ** 2
    once = cost.tiled_evaluation(c, tiling).multiply_adds - per_pair * pairs // area
    plain = cost.tiled_evaluation(c, bare).multiply_adds - per_pair * cores[0] * cores[1] // area
    assert plain <= once <= o * plain * slack


def test_exponents_of_the_chapter() -> None:
    """The table of chapter 5: tiled 1.000 and 1.049, dense 1.964, divided attention 1.930."""
    c, sides = storm_10m(), [64, 128, 256, 512, 1024]
    sizes = [side**2 for side in sides]

    def tiled(y_periodic: bool) -> list[int]:
        def axis(side: int, periodic: bool) -> Axis:
            return Axis(2 * side, 64, 16, 16, periodic, 2)

        squares = (Tiling(axis(side, y_periodic), axis(side, True)) for side in sides)
        return [cost.tiled_evaluation(c, tiling).multiply_adds for tiling in squares]

    band = [Tiling(Axis(128, 64, 16, 16, False, 2), Axis(2 * 64 * 4**i, 64, 16, 16, True, 2)) for i in range(5)]
    assert exponent([cost.tiled_evaluation(c, t).multiply_adds for t in band], sizes) == pytest.approx(1, abs=1e-12)
    assert exponent(tiled(True), sizes) == pytest.approx(1, abs=1e-12)
    assert round(exponent(tiled(False), sizes), 3) == 1.049
    assert round(exponent(tiled(False)[-2:], sizes[-2:]), 3) == 1.012
    assert round(exponent([cost.evaluation(c, n).multiply_adds for n in sizes], sizes), 3) == 1.964
    assert round(exponent([cost.divided_block(c.width, 8, n).multiply_adds for n in sizes], sizes), 3) == 1.930
    for frames, want in (([96, 384, 1536, 6000], 0.999), ([1000, 6000, 177_500], 1.000)):
        assert round(exponent([cost.memory(c, 32768, k).multiply_adds for k in frames], frames), 3) == want
    bare = cost.tiled_evaluation(c, Tiling(Axis(512, 64, patch=2), Axis(512, 64, patch=2)))
    assert round(tiled(True)[2] / bare.multiply_adds, 2) == 3.65


def test_exponent_value() -> None:
    assert exponent([5 * n**3 for n in (2, 3, 7)], (2, 3, 7)) == pytest.approx(3, abs=1e-12)
    assert exponent([4, 4], (1, 9)) == 0


@given(st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_points_are_affine_in_the_number_of_tiles(core: int, halo: int, periodic: bool) -> None:
    """[TILE-10] points seen by n tiles of one size: every further tile costs the same."""
    halo = min(halo, core)
    axes = [Axis(n * core, core, halo, periodic=periodic) for n in range(4, 9)]
    counts = [sum(len(extent) for extent in extents(axis)) for axis in axes]
    assert {b - a for a, b in pairwise(counts)} == {core + 2 * halo}
