"""[PAR-1] to [PAR-11], [PAR-18], [PAR-19]: values, gradients and ensembles of any mesh are the serial run's.

Errors are of rounding: sums over ranks add in another order, and products of other sizes may. A float64 result is
within 32 eps of its largest number, a gradient of the largest in all weights: where gradients cancel, as those of
queries that see a single key, the rest has the rounding of the terms. A float32 run is held against the float64 truth,
from which it may be thrice as far as the serial float32 run. Where ranks do nothing but move numbers, results have the
serial bits; so they need batches of the same size as the serial ones, hence tiles and members one at a time.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import parallel_work as work
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parallel_work import MESHES, Answer, Problem
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.parallel import mesh as meshes
from storm_ref.parallel.halo import points_of, token_tiling
from storm_ref.parallel.mesh import AXES, Mesh, share
from storm_ref.parallel.pool import Pool
from storm_ref.parallel.tensor import cut_dim, join
from storm_ref.tiling import Axis, Tiling, cores

Pools = Callable[..., Pool]

EPS = torch.finfo(torch.float64).eps
TILING = Tiling(Axis(8, 4, 2, 2, False, 2), Axis(16, 4, 2, 2, True, 2))  # eight tiles of one shape
FIXED = Problem(TILING, samples=5, seed=1)
GUIDED = replace(FIXED, depth=1)  # messages are what takes time here
EXAMPLES = 16


def error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """The largest, in eps of the largest number, or of `scale`."""
    scale = float(expected.abs().max()) if scale is None else scale
    return float((actual - expected).abs().max()) / (EPS * scale) if scale else float(actual.abs().max() > 0)


def note(what: str, value: float) -> None:
    """For whoever wants to see the errors themselves: a file named by the environment takes them."""
    path = os.environ.get("STORM_REF_ERRORS")
    if path:
        with open(path, "a") as file:
            file.write(f"{what}: {value:.3g}\n")


def largest(tensors: Iterable[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def rms(actual: dict[str, Tensor], truth: dict[str, Tensor], names: Iterable[str]) -> float:
    """Root mean square of the differences over all tensors of these names."""
    return float(torch.cat([(actual[n] - truth[n]).double().flatten() for n in names]).square().mean().sqrt())


def agreed(answers: list[Answer]) -> dict[str, Tensor]:
    """Assemble the result of all ranks, and check that every rank has the same bits.

    Weights come from the parts that ranks hold, which have the same bits wherever they are replicated. By [PAR-7] and
    [PAR-16] rows are sharded over fsdp, and heads over tp.
    """
    first, holders = answers[0], {(a.place["fsdp"], a.place["tp"]): a for a in reversed(answers) if a.parts}
    for each in answers:
        assert each.bits == first.bits
        held = holders.get((each.place["fsdp"], each.place["tp"]), each)
        assert each.part_bits == held.part_bits
    tensors = dict(first.whole)
    for name in first.parts:
        rows, heads = (1 + max(place) for place in zip(*holders, strict=True))
        parts = [torch.cat([holders[row, head].parts[name] for row in range(rows)]) for head in range(heads)]
        weight = name.split()[-1]
        if cut_dim(weight) is None:
            assert all(torch.equal(part, parts[0]) for part in parts), name
        tensors[name] = join(weight, parts) if cut_dim(weight) is not None else parts[0]
    return tensors


# Problems


@st.composite
def axes(draw: st.DrawFn, least: int, periodic: bool) -> Axis:
    """At least `least` tiles: even or not, with halos, seams, or neither, or a single tile."""
    patch, core, count = draw(st.sampled_from([1, 2])), draw(st.integers(1, 2)), draw(st.integers(least, least + 2))
    if count == 1:
        return Axis(core * patch, core * patch, periodic=periodic, patch=patch)
    halo = draw(st.integers(0, (count - 1) * core // 2 if periodic else core + 1))
    blend = draw(st.integers(0, min(halo, core // 2)))
    last = core if periodic else draw(st.integers(max(blend, 1), core))
    return Axis(((count - 1) * core + last) * patch, core * patch, halo * patch, blend * patch, periodic, patch)


@st.composite
def problems(draw: st.DrawFn, pool: list[Mesh] = MESHES) -> tuple[Problem, Mesh]:
    """A mesh, and something that can be shared out on it."""
    mesh = draw(st.sampled_from(pool))
    across = draw(st.integers(1, min(mesh.tile, 3)))
    tiling = Tiling(draw(axes(across, False)), draw(axes(-(-mesh.tile // across), draw(st.booleans()))))
    problem = Problem(
        tiling,
        samples=mesh.data + draw(st.integers(0, 1)),
        frames=draw(st.integers(1, 3)),
        chunk=draw(st.sampled_from([1, 2, 16])),
        window=draw(st.sampled_from([None, None, 1])),
        tiles_per_batch=draw(
            st.sampled_from([1, 2, 16] if mesh.tp == 1 else [4, 16])
        ),  # a batch's blocks send 3 messages
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        recomputed=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return problem, mesh


# Mesh


def test_coordinates_are_the_order_of_ranks() -> None:
    """[PAR-1]: ((i_ddp F + i_fsdp) T + i_tile) P + i_tp."""
    for mesh in (*MESHES, Mesh(2, 3, 5, 7)):
        for rank in range(mesh.size):
            at = mesh.coordinates(rank)
            assert list(at) == list(AXES)
            assert all(0 <= at[axis] < getattr(mesh, axis) for axis in AXES)
            tile = (at["ddp"] * mesh.fsdp + at["fsdp"]) * mesh.tile + at["tile"]
            assert tile * mesh.tp + at["tp"] == rank
    assert Mesh(2, 3, 5, 7).size == 210 and Mesh(2, 3, 5, 7).data == 6


@pytest.mark.parametrize("rank", [-1, 4])
def test_coordinates_invalid_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=f"has ranks 0 to 3, got {rank}"):
        Mesh(tile=4).coordinates(rank)


def test_parse_undoes_str() -> None:
    for mesh in MESHES:
        assert Mesh.parse(str(mesh)) == mesh
    assert Mesh.parse(" tp = 2, ddp=3") == Mesh(ddp=3, tp=2)
    assert Mesh.parse("") == Mesh()


@pytest.mark.parametrize("text", ["2x2", "tile", "tile=", "tile=-1", "tile=1.5", "tile=2,tile=2", "pp=2", "tile=²"])
def test_parse_invalid_names_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="a mesh is written like ddp=1,fsdp=2,tile=2,tp=1, each axis once, got"):
        Mesh.parse(text)


def test_mesh_invalid_size() -> None:
    with pytest.raises(ValueError, match="at least one rank, got fsdp=0"):
        Mesh(fsdp=0)
    with pytest.raises(ValueError, match="at least one rank, got tile=0"):
        Mesh.parse("tile=0")


@given(st.integers(0, 50), st.integers(1, 12))
def test_share_partitions(count: int, ranks: int) -> None:
    """[PAR-3]: in order, without gap, sizes at most one apart; nobody idle unless there are fewer things than ranks."""
    runs = [share(count, ranks, rank) for rank in range(ranks)]
    assert [i for run in runs for i in run] == list(range(count))
    assert [run.start for run in runs] == [math.floor(rank * count / ranks) for rank in range(ranks)]
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert (min(map(len, runs)) > 0) == (count >= ranks)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (Mesh(tp=3), "tp=3 does not divide the 8 heads: choose a tp that does"),
        (Mesh(tile=5), "tile=5 ranks for 4 tiles leaves some idle: use fewer, or smaller tiles"),
        (Mesh(ddp=2, fsdp=2), "ddp=2 x fsdp=2 = 4 data ranks for 3 samples or members leaves some idle: use fewer"),
    ],
)
def test_check_refuses_in_words(mesh: Mesh, text: str) -> None:
    """[PAR-4]"""
    config = StormConfig(2, 1, (1, 1), 16, 8, 1)
    with pytest.raises(ValueError, match=text):
        mesh.check(config, 4, 3)
    mesh.check(replace(config, heads=1, width=1) if mesh.tp == 1 else replace(config, heads=3, width=3))
    Mesh(ddp=3, tile=4, tp=8).check(config, 4, 3)


def test_start_invalid_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, and with another number of ranks: before any process group is there."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set\): start it with torchrun"
    ):
        meshes.start(Mesh(tile=2))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    with pytest.raises(ValueError, match="has 2 ranks, but 3 were started: change the mesh, or start with torchrun"):
        meshes.start(Mesh(tile=2))


# Points


@given(problems())
def test_points_of_are_the_cores(drawn: tuple[Problem, Mesh]) -> None:
    """[PAR-8]: every point once, those of a rank's tiles on it; memory tokens lie with their points."""
    problem, mesh = drawn
    tiling = problem.tiling
    owned = points_of(tiling, mesh.tile)
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(tiling.y.length * tiling.x.length))
    owner = torch.empty(tiling.y.length, tiling.x.length, dtype=torch.long)
    for rank, points in enumerate(owned):
        owner.view(-1)[points] = rank
    boxes = [(rows, cols) for rows in cores(tiling.y) for cols in cores(tiling.x)]
    for rank in range(mesh.tile):
        for number in share(len(boxes), mesh.tile, rank):
            (a, b), (c, d) = boxes[number]
            assert bool((owner[a:b, c:d] == rank).all())
    small = token_tiling(tiling, problem.config.patch)
    for rank, tokens in enumerate(points_of(small, mesh.tile)):
        i, j = tokens // small.x.length, tokens % small.x.length
        assert bool((owner[i * tiling.y.patch, j * tiling.x.patch] == rank).all())


# The network


@pytest.mark.distributed
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=problems(), whole_memory=st.booleans(), whole_state=st.booleans())
def test_evaluate_equals_serial(
    pools: Pools, drawn: tuple[Problem, Mesh], whole_memory: bool, whole_state: bool
) -> None:
    """[PAR-5] to [PAR-13] at once: D and both its gradients, assembled; the same bits on all ranks."""
    problem, mesh = drawn
    actual = agreed(pools(mesh.size).run(work.evaluate, problem, mesh, whole_memory, whole_state))
    expected = serial(problem)
    assert actual.keys() == expected.keys()
    judge(problem, actual, expected)
    if mesh.tp == mesh.data == 1 and problem.tiles_per_batch == 1 and whole_memory:
        assert torch.equal(actual["y"], expected["y"])


def judge(problem: Problem, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """As the module's first lines say: value, gradient in the state, gradient in all weights."""
    groups = [["y"], ["x"], [name for name in expected if name not in ("x", "y")]]
    truth = expected if problem.dtype == torch.float64 else serial(replace(problem, dtype=torch.float64))
    for names in groups:
        if problem.dtype == torch.float64:
            scale = largest(expected[name] for name in names)
            worst = max((error(actual[name], expected[name], scale), name) for name in names)
            assert worst[0] <= 32, worst
            note(f"float64 {names[0] if len(names) == 1 else 'weights'}", worst[0])
        else:
            ratio = rms(actual, truth, names) / max(rms(expected, truth, names), 1e-300)
            assert ratio <= 3, (ratio, names)
            note(f"float32 {names[0] if len(names) == 1 else 'weights'}", ratio)


serial = cache(work.serial)
serial_members = cache(work.serial_members)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_everything_equals_serial(pools: Pools, mesh: Mesh) -> None:
    """Each of the 35 meshes of 1, 2, 4 and 8 ranks: value, gradients, and an ensemble with observations."""
    problem = replace(GUIDED, samples=mesh.data + 1, steps=3)
    answers = pools(mesh.size).run(work.everything, problem, mesh)
    judge(problem, agreed([answer[0] for answer in answers]), serial(problem))
    drawn = agreed([answer[1] for answer in answers])["members"]
    worst = error(drawn, serial_members(problem, "dps"))
    assert worst <= 32
    note("members, short", worst)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tile=2,tp=2", "fsdp=2,tp=2"])
@pytest.mark.parametrize("guide", work.GUIDES)
def test_members_equal_serial(pools: Pools, mesh: str, guide: str) -> None:
    """[PAR-18]: ten steps with churn; J^T goes back through gather and blend, and again at each step of conjugate
    gradients. The sampler takes steps of falling size towards D, which shrinks errors: they stay those of a few D.
    """
    world = Mesh.parse(mesh)
    drawn = agreed(pools(world.size).run(work.members, GUIDED, world, guide))["members"]
    worst = error(drawn, serial_members(GUIDED, guide))
    assert worst <= 32
    note(f"members {guide}", worst)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tile=2", "tile=8", "ddp=2,fsdp=2", "ddp=2,tile=4"])
def test_members_have_the_serial_bits(pools: Pools, mesh: str) -> None:
    """[PAR-10] [PAR-18]: tiles and members one at a time, as the serial run has them."""
    world = Mesh.parse(mesh)
    problem = replace(GUIDED, tiles_per_batch=1, batch=1, samples=world.data)
    actual = agreed(pools(world.size).run(work.members, problem, world, "none"))
    assert torch.equal(actual["members"], work.serial_members(problem, "none"))


@pytest.mark.distributed
@pytest.mark.parametrize("tile", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_evaluate_has_the_serial_bits(pools: Pools, tile: int, dtype: torch.dtype) -> None:
    """[PAR-10]: given the memory, tile parallelism only moves numbers forwards, and adds them in the serial order. A
    memory compressed in shards has other bits where a rank has so few tokens that their product is another kernel's.
    """
    uneven = Tiling(Axis(14, 4, 4, 2, False, 2), Axis(12, 4, 4, 2, False, 2))  # 12 tiles of six shapes
    for tiling in (TILING, uneven):
        problem = Problem(tiling, samples=2, tiles_per_batch=1, dtype=dtype, seed=2)
        actual = agreed(pools(tile).run(work.evaluate, problem, Mesh(tile=tile), True))
        assert torch.equal(actual["y"], work.serial(problem)["y"])


@pytest.mark.distributed
def test_recompute_has_the_same_bits(pools: Pools) -> None:
    """A block that runs twice does the same twice."""
    for mesh in (Mesh(tile=2, tp=2), Mesh(fsdp=2, tp=2), Mesh(fsdp=2, tile=2)):
        once, twice = (
            agreed(pools(4).run(work.evaluate, replace(FIXED, recomputed=recomputed), mesh))
            for recomputed in (False, True)
        )
        assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.distributed
def test_shapes_in_ranks() -> None:
    """Signatures are checked in ranks that are forked from this process, which checks; elsewhere for speed they are
    not."""
    problem, meshes = replace(FIXED, steps=2, frames=3, chunk=2), [Mesh(tile=2, tp=2), Mesh(fsdp=2, tile=2)]
    with Pool(4, method="fork") as pool:
        said = pool.run(work.everything_checked, problem, meshes, torch.zeros(3))
    assert said == ["TypeCheckError"] * 4


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tp=4", "tile=4", "tile=2,tp=2"])
def test_second_derivative_equals_serial(pools: Pools, mesh: str) -> None:
    """f and g of [PAR-5], gather and blend, collect and scatter: each is linear, and so is its gradient."""
    problem = replace(FIXED, samples=2)
    actual = agreed(pools(4).run(work.second_derivative, problem, Mesh.parse(mesh)))
    assert error(actual["curve"], work.second_derivative(problem, None)) <= 32


# Messages of tiles


@pytest.mark.distributed
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=problems([mesh for mesh in MESHES if mesh.tile == mesh.size]))
def test_exchange_is_its_own_adjoint(pools: Pools, drawn: tuple[Problem, Mesh]) -> None:
    """[PAR-9] to [PAR-11], on whole numbers, hence exact: <pull x, y> = <x, push y>, each the other's gradient; collect
    undoes scatter. Blending what was gathered gives the field: weights sum to one within a rounding each.
    """
    problem, mesh = drawn
    for checks in pools(mesh.size).run(work.exchanges, problem, mesh):
        for name in ("extents", "results"):
            left, right = checks[name]["inner products"]
            assert left == right
            assert checks[name]["pull's gradient"]
            left, right = checks[name]["push's gradient"]
            assert left == right
        for name in ("gather", "scatter", "collect", "collect of scatter", "collect's gradient", "scatter's gradient"):
            assert checks[name], name
        assert checks["unity"] <= 8 * EPS


@pytest.mark.distributed
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=problems([mesh for mesh in MESHES if mesh.tile == mesh.size]))
def test_tiled_sharded_pointwise(pools: Pools, drawn: tuple[Problem, Mesh]) -> None:
    """[TILE-8] on shards: tiles do not show in z^3, in 3 z^2 v, nor in 6 z u v; three roundings of each, and the seams'
    four."""
    problem, mesh = drawn
    data = problem.data()
    actual = agreed(pools(mesh.size).run(work.cube, problem, mesh))
    u, v, z = data.noise, data.probe, data.x
    for name, expected in (("y", z**3), ("gradient", 3 * z**2 * v), ("curve", 6 * z * u * v)):
        assert error(actual[name], expected) <= 8, name


@pytest.mark.distributed
def test_tiles_invalid_in_words(pools: Pools) -> None:
    """[PAR-4], on every rank."""
    said = pools(4).run(work.tiles_refused, TILING, Mesh(tile=4))
    assert len({tuple(words) for words in said}) == 1
    few, none = said[0]
    assert few == "tile=4 ranks for 1 tiles leaves some idle: use fewer, or smaller tiles"
    assert none == "at least one tile must be evaluated at a time, got tiles_per_batch = 0"


# Ensembles


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp=4", "ddp=2,fsdp=2", "ddp=2,tile=2", "ddp=2,tp=2"])
def test_draw_shared_invalid_not_finite(pools: Pools, mesh: str) -> None:
    """[PAR-19]: on all ranks; members have their numbers in the ensemble, whoever draws them and however batched."""
    for bad in (0, 2, 4):
        said = pools(4).run(work.members_not_finite, FIXED, Mesh.parse(mesh), bad)
        for text in said:
            assert f"members [{bad}] stopped being finite at step 1 of 3" in text
        assert len(set(said)) == 1


@pytest.mark.distributed
def test_draw_shared_invalid_too_few(pools: Pools) -> None:
    """[PAR-4]: nobody idles."""
    said = pools(4).run(work.too_few_members, Mesh(ddp=2, fsdp=2), 3)
    text = "ddp=2 x fsdp=2 = 4 data ranks for 3 samples or members leaves some idle: use fewer ranks, or draw more"
    assert said == [text] * 4


# On accelerators


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["tile=1", "tile=2", "tp=2", "fsdp=2", "ddp=2", "tile=2,tp=2", "fsdp=2,tile=2,tp=2"])
def test_evaluate_on_gpus(pools: Pools, mesh: str) -> None:
    """The same work over NCCL: float64 against the same device's serial run, which has its own order of sums."""
    world = Mesh.parse(mesh)
    if torch.cuda.device_count() < world.size:
        pytest.skip(f"needs {world.size} GPUs, there are {torch.cuda.device_count()}")
    problem = replace(FIXED, device="cuda")
    actual = agreed(pools(world.size, "cuda").run(work.evaluate, problem, world))
    judge(problem, actual, {name: tensor.cpu() for name, tensor in work.serial(problem).items()})
