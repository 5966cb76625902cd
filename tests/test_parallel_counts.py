"""Messages between ranks: `cost` says how many, of how many bytes, for each rank of any mesh; here they are counted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import parallel_work as work
import pytest
import torch
from parallel_work import MESHES, Problem

from storm_ref.parallel import traffic
from storm_ref.parallel.mesh import AXES, Mesh
from storm_ref.parallel.pool import Pool
from storm_ref.parallel.traffic import Ledger, Traffic
from storm_ref.tiling import Axis, Tiling, tiles

Pools = Callable[..., Pool]

# Nine tiles of three shapes, the columns periodic: no mesh shares out tiles, samples or rows of weights evenly.
TILING = Tiling(Axis(10, 4, 2, 2, False, 2), Axis(12, 4, 2, 2, True, 2))
FIXED = Problem(TILING, samples=9, frames=3, chunk=2, dtype=torch.float32, seed=4)
ROW = replace(FIXED, tiling=Tiling(Axis(4, 4, patch=2), Axis(36, 4, 2, 2, True, 2)), depth=1)  # with few messages
OTHERS = {
    "two at a time": replace(FIXED, tiles_per_batch=2),
    "closed, short last tile": replace(FIXED, tiling=Tiling(Axis(4, 4, patch=1), Axis(14, 3, 4, 1, False, 1))),
    "one across, no halo": replace(
        FIXED, tiling=Tiling(Axis(8, 2, 0, 0, False, 1), Axis(6, 6, periodic=True, patch=1)), chunk=16
    ),
    "hard crop": replace(FIXED, tiling=Tiling(Axis(6, 2, 3, 1, False, 1), Axis(8, 4, 2, 0, True, 1)), frames=1),
}


def expected(problem: Problem, mesh: Mesh, rank: int, name: str) -> list[Ledger]:
    """`counted_all` as `cost` has it."""
    size = 8 if problem.dtype == torch.float64 else 4
    what, _, how = name.partition(", ")
    if what == "step":
        frames = problem.samples, problem.frames, problem.chunk, problem.tiles_per_batch, size
        recomputed = how == "recomputed"
        return [traffic.step_traffic(problem.config, problem.tiling, mesh, rank, *frames, recomputed=recomputed)]
    some, backward = (problem.samples, problem.tiles_per_batch, size), what == "product"
    once = traffic.evaluation_traffic(
        problem.config, problem.tiling, mesh, rank, *some, backward=backward, kept=how == "kept"
    )
    again = {key: value for key, value in once.items() if key[0] != "fsdp"}  # weights are there already
    return [once, again] if how == "kept" else [once]


def compare(problem: Problem, mesh: Mesh, counted: list[dict[str, list[Ledger]]]) -> None:
    """Every rank, every kind: the same keys (so nothing outside the axes), messages and bytes."""
    for rank, of_rank in enumerate(counted):
        for name, ledgers in of_rank.items():
            assert ledgers == expected(problem, mesh, rank, name), (rank, name)
        for ledgers in of_rank.values():
            for axis, _ in (key for ledger in ledgers for key in ledger):
                assert axis in AXES and getattr(mesh, axis) > 1


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_traffic_equals_count(pools: Pools, mesh: Mesh) -> None:
    """Count J^T and a training step; up to four ranks also an evaluation alone, with weights kept, and recomputing."""
    work_of = work.counted_all if mesh.size <= 4 else work.counted_some
    problem = replace(ROW, samples=mesh.data + 1)
    compare(problem, mesh, pools(mesh.size).run(work_of, problem, mesh))


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tile=2,tp=2", "fsdp=2,tile=2"])
@pytest.mark.parametrize("name", OTHERS)
def test_traffic_of_other_problems_equals_count(pools: Pools, name: str, mesh: str) -> None:
    """float64, two blocks; tiles, batches of them and memory in chunks as they come."""
    problem, shape = replace(OTHERS[name], dtype=torch.float64, samples=3), Mesh.parse(mesh)
    compare(problem, shape, pools(shape.size).run(work.counted_some, problem, shape))


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh.size in (4, 8)], ids=str)
def test_traffic_of_whole_states_equals_count(pools: Pools, mesh: Mesh) -> None:
    """Scatter sends nothing forwards and gathers backwards, collect the reverse; members along fsdp, then ddp."""
    point = FIXED.samples * FIXED.config.channels * 8
    once = traffic.collect_traffic(TILING, mesh, point)
    both = traffic.collect_traffic(TILING, mesh, point, backward=True)
    member = FIXED.config.channels * TILING.y.length * TILING.x.length * 8
    for ledgers in pools(mesh.size).run(work.counted_whole, FIXED, mesh):
        assert ledgers["collect"] == once == ledgers["back"]
        assert traffic.added(ledgers["collect"], ledgers["back"]) == both
        assert ledgers["members"] == traffic.ensemble_traffic(mesh, FIXED.samples, member)


@pytest.mark.distributed
def test_messages_see_what_is_of_no_axis(pools: Pools) -> None:
    """The counter itself: a message over all ranks of a mesh of two axes has its own key."""
    for ledger in pools(4).run(work.stray, Mesh(tile=2, tp=2)):
        assert ledger == {("none of the axes", "all-reduce"): Traffic(1, 12)}


def test_traffic_adds() -> None:
    """Ledgers add by axis and kind; what has no message is not in them."""
    one: dict[Any, Traffic] = {("tp", "all-reduce"): Traffic(2, 30), ("tile", "all-to-all"): Traffic()}
    assert traffic.added(one, one) == {("tp", "all-reduce"): 2 * Traffic(2, 30)}
    assert traffic.added() == {}


def test_traffic_of_one_rank_is_none() -> None:
    some = FIXED.samples, FIXED.tiles_per_batch, 4
    assert traffic.evaluation_traffic(FIXED.config, TILING, Mesh(), 0, *some, backward=True) == {}
    assert traffic.step_traffic(FIXED.config, TILING, Mesh(), 0, FIXED.samples, 3, 2, 2, 4) == {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_exchanged_rows_are_the_points(ranks: int) -> None:
    """Ranks exchange one row a point and tile: for the extents, and where weights are positive."""
    every = tiles(TILING)
    for blend, points in (
        (False, sum(tile.weight.numel() for tile in every)),
        (True, sum(int((tile.weight > 0).sum()) for tile in every)),
    ):
        assert sum(map(sum, traffic.exchanged_rows(TILING, ranks, blend))) == points


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=8), Mesh(fsdp=3), Mesh(fsdp=8, tp=8)], ids=str)
def test_part_holds_every_weight(mesh: Mesh) -> None:
    """The ranks' parts make up the network, replicated weights on every tp rank; parts are padded to the first's."""
    shapes = FIXED.config.depth * traffic.block_shapes(FIXED.config, mesh.tp) + traffic.root_shapes(
        FIXED.config, mesh.tp
    )
    held = [traffic.held_numbers(shapes, mesh.fsdp, rank) for rank in range(mesh.fsdp)]
    assert traffic.padded_numbers(shapes, mesh.fsdp) == max(held)
    if mesh.tp == 1:
        assert sum(held) == sum(weight.numel() for weight in FIXED.network().parameters())
