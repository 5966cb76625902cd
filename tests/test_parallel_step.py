"""[PAR-7] and [PAR-12] to [PAR-17]: a training step on any mesh is the serial step; checkpoints know of no mesh.

Gradients are within 32 eps of the largest in all weights. Adam divides by the gradient's own size and so multiplies an
error where a gradient is small: its step is held, bit for bit, against a serial optimiser that is given the parallel
run's gradients, while descent along the gradient is followed over several steps.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import parallel_work as work
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parallel_work import MESHES, Problem
from test_parallel_equals_serial import TILING, agreed, error, largest, note, problems
from torch import Tensor, nn

from storm_ref.denoiser import Storm
from storm_ref.parallel.mesh import Mesh
from storm_ref.parallel.pool import Pool
from storm_ref.parallel.tensor import cut, cut_dim, join

Pools = Callable[..., Pool]

FIXED = Problem(TILING, samples=5, seed=3)
MOST = 0.5  # below the norm of every gradient here, so that clipping has something to do


# Weights


# [PAR-7] by hand: the dim that is cut; what is not named is on every rank.
CUT = {
    f"blocks.0.{heads}.{name}": dim
    for heads in ("spatial", "temporal")
    for name, dim in {
        "query.weight": 0, "query.bias": 0, "key.weight": 0, "value.weight": 0, "value.bias": 0, "out.weight": 1,
    }.items()
} | {
    "blocks.0.mlp.0.weight": 0, "blocks.0.mlp.0.bias": 0, "blocks.0.mlp.2.weight": 1,
    "blocks.0.gate_alpha": 0, "blocks.0.gate_beta": 0,
    "memory.query": 0, "memory.key.weight": 0, "memory.value.weight": 0, "memory.value.bias": 0,
    "memory.out.weight": 1,
}  # fmt: skip
WHOLE = {
    "blocks.0.adaptive.weight", "blocks.0.adaptive.bias", "blocks.0.spatial.out.bias", "blocks.0.temporal.out.bias",
    "blocks.0.mlp.2.bias", "memory.out.bias", "embed_state.weight", "embed_state.bias", "embed_history.weight",
    "embed_history.bias", "embed_position.weight", "embed_age.weight", "embed_noise.0.weight", "embed_noise.0.bias",
    "embed_noise.2.weight", "embed_noise.2.bias", "final_adaptive.weight", "final_adaptive.bias", "final.weight",
    "final.bias",
}  # fmt: skip


def test_cut_dim_is_the_table() -> None:
    """[PAR-7]: every weight of the network is in the table, and cut as it says; other blocks as the first."""
    network = Storm(replace(FIXED.config, depth=12))
    names = {name for name, _ in network.named_parameters()}
    for number in range(12):
        for name in [*CUT, *WHOLE]:
            own = name.replace("blocks.0", f"blocks.{number}")
            assert cut_dim(own) == CUT.get(name), own
            names.discard(own)
            assert cut_dim(f"network.{own}") == CUT.get(name), own
    assert names == set()


@given(st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=4)
def test_join_undoes_cut(ranks: int) -> None:
    """Parts are of one size, each rank's heads are whole and in order."""
    for name, weight in FIXED.network().named_parameters():
        parts = [cut(name, weight, ranks, rank) for rank in range(ranks)]
        assert torch.equal(join(name, parts), weight)
        dim = cut_dim(name)
        for rank, part in enumerate(parts):
            if dim is not None:
                size = weight.shape[dim] // ranks
                assert torch.equal(part, weight.narrow(dim, rank * size, size))


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4), Mesh(tp=8)], ids=str)
def test_tensor_parallel_equals_torch_plan(pools: Pools, mesh: Mesh) -> None:
    """The MLP and both attentions against torch's own column- and row-wise plan: values, gradients, weights' parts."""
    for differences in pools(mesh.size).run(work.by_plan, mesh):
        assert set(differences) == {"mlp", "spatial", "temporal"}
        assert max(differences.values()) <= 32 * torch.finfo(torch.float64).eps, differences


@pytest.mark.distributed
@pytest.mark.parametrize(("written", "read"), [(4, 8), (8, 4), (4, 1), (1, 4)])
def test_place_whole_on_another_mesh(pools: Pools, written: int, read: int) -> None:
    """[PAR-17]: weights and moments, gathered on one mesh and placed on another, come back bit for bit."""
    shapes = {1: "tp=1", 4: "fsdp=2,tp=2", 8: "ddp=2,fsdp=2,tp=2"}
    problem = replace(FIXED, samples=8, depth=1)
    other = {1: "tp=1", 4: "fsdp=4", 8: "fsdp=4,tile=2"}
    state = agreed(pools(written).run(work.placed, problem, Mesh.parse(shapes[written]), None))
    assert state.keys() == {
        f"{kind} {n}" for n, _ in problem.network().named_parameters() for kind in ("weight", "moment")
    }
    network = problem.network()
    optimiser = work.make_optimiser("adamw", network)
    for weight in network.parameters():
        weight.grad = weight.detach() * 3 + 1
    optimiser.step()
    for name, weight in network.named_parameters():
        assert torch.equal(state[f"weight {name}"], weight)
        assert torch.equal(state[f"moment {name}"], optimiser.state[weight]["exp_avg_sq"])
    marked = {key: value + torch.arange(value.numel()).view_as(value) for key, value in state.items()}
    placed = agreed(pools(read).run(work.placed, problem, Mesh.parse(other[read]), marked))
    assert all(torch.equal(placed[key], marked[key]) for key in marked)


# Loss


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp=4", "tile=4", "ddp=2,tile=2", "fsdp=2,tp=2"])
def test_scaled_loss_invalid_no_point(pools: Pools, mesh: str) -> None:
    """[EDM-11]: on every rank."""
    said = pools(4).run(work.no_point, FIXED, Mesh.parse(mesh))
    assert said == ["no point is valid: a loss over nothing is not zero; leave the sample out"] * 4


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp=4", "tile=4", "ddp=2,tile=2"])
def test_scaled_loss_counts_the_whole_batch(pools: Pools, mesh: str) -> None:
    """[PAR-12]: ranks without a valid point are no error, and none of them enters a mean of means."""
    for rank in range(4):
        assert pools(4).run(work.one_point, Mesh.parse(mesh), rank) == [7.0] * 4


# Steps


def judge(actual: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1) -> None:
    """Each within 32 eps of the largest of its kind: loss, norm, gradients, clipped gradients, weights."""
    for kind in {name.split()[0] for name in expected}:
        names = [name for name in expected if name.split()[0] == kind]
        scale = largest(expected[name] for name in names)
        worst = max((error(actual[name], expected[name], scale), name) for name in names)
        assert worst[0] <= 32 * factor, worst
        note(f"step {kind}", worst[0])


def serial_given(problem: Problem, steps: list[dict[str, Tensor]], kind: str) -> None:
    """[PAR-15]: a serial optimiser, given each step's clipped gradients, makes the same bits of weights and moments."""
    network = problem.network()
    optimiser = work.make_optimiser(kind, network)
    for step in steps:
        for name, weight in network.named_parameters():
            weight.grad = step[f"clipped {name}"].clone()
        optimiser.step()
        for name, weight in network.named_parameters():
            assert torch.equal(step[f"weight {name}"], weight), name
            for moment in optimiser.state[weight].keys() & {"exp_avg", "exp_avg_sq"}:
                assert torch.equal(step[f"{moment} {name}"], optimiser.state[weight][moment]), (name, moment)


def clipped_by_hand(step: dict[str, Tensor], most: float) -> None:
    """[PAR-14]: the norm of the whole gradient, and what torch's clipping makes of it."""
    names = [name.removeprefix("gradient ") for name in step if name.startswith("gradient ")]
    weights = [nn.Parameter(torch.zeros_like(step[f"gradient {name}"])) for name in names]
    for name, weight in zip(names, weights, strict=True):
        weight.grad = step[f"gradient {name}"].clone()
    norm = nn.utils.clip_grad_norm_(weights, most)
    assert error(step["norm"].double(), norm.double()) <= 32
    for name, weight in zip(names, weights, strict=True):
        assert error(step[f"clipped {name}"], weight.grad) <= 32, name


serial_train = cache(work.serial_train)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_train_step_equals_serial(pools: Pools, mesh: Mesh) -> None:
    """On each of the 35 meshes: loss, gradients, norm, clipped gradients; the optimiser's bits; the same bits on all
    ranks. AdamW's up to four ranks: on DTensors its first step on a mesh is slow.
    """
    problem, kind = replace(FIXED, samples=mesh.data + 1, depth=1), "adamw" if mesh.size < 8 else "sgd"
    answers = pools(mesh.size).run(work.train, problem, mesh, 1, MOST, kind)
    actual, expected = agreed([answer[0] for answer in answers]), serial_train(problem, 1, MOST, kind)[0]
    judge(actual, {name: t for name, t in expected.items() if not name.startswith("weight")})
    assert float(actual["norm"]) > MOST
    clipped_by_hand(actual, MOST)
    serial_given(problem, [actual], kind)


@pytest.mark.distributed
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(drawn=problems(), most=st.sampled_from([1e-3, 0.5, 1e6]))
def test_train_step_of_any_problem(pools: Pools, drawn: tuple[Problem, Mesh], most: float) -> None:
    """Tiles, memory in chunks, windows and recomputation as they come; float64, or float32 judged by its own serial
    run's error: clipping and the optimiser's step are held against the gradients that they were given.
    """
    problem, mesh = drawn
    actual = agreed([answer[0] for answer in pools(mesh.size).run(work.train, problem, mesh, 1, most, "adamw")])
    expected = work.serial_train(problem, 1, most, "adamw")[0]
    if problem.dtype == torch.float64:
        judge(actual, {name: t for name, t in expected.items() if not name.startswith("weight")})
        clipped_by_hand(actual, most)
    serial_given(problem, [actual], "adamw")


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["ddp=2,fsdp=2", "tile=2,tp=2"])
def test_train_three_steps_equal_serial(pools: Pools, mesh: str) -> None:
    """Descent along the gradient: errors add up, a step's bound for each. AdamW: step by step, given gradients."""
    problem = replace(FIXED, depth=1)
    expected = serial_train(problem, 3, MOST, "sgd")
    answers = pools(4).run(work.train, problem, Mesh.parse(mesh), 3, MOST, "sgd")
    for step in range(3):
        judge(agreed([answer[step] for answer in answers]), expected[step], step + 1)
    answers = pools(4).run(work.train, problem, Mesh.parse(mesh), 3, MOST, "adamw")
    serial_given(problem, [agreed([answer[step] for answer in answers]) for step in range(3)], "adamw")


@pytest.mark.distributed
def test_recompute_steps_have_the_same_bits(pools: Pools) -> None:
    runs: list[Any] = [
        pools(4).run(work.train, replace(FIXED, recomputed=recomputed), Mesh(fsdp=2, tp=2), 2, MOST, "adamw")
        for recomputed in (False, True)
    ]
    for step in range(2):
        once, twice = (agreed([answer[step] for answer in answers]) for answers in runs)
        assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.distributed
def test_clip_gradients_leaves_small_ones_alone(pools: Pools) -> None:
    """Below the most that is allowed, not a bit changes."""
    answers = pools(4).run(work.train, FIXED, Mesh(fsdp=2, tp=2), 1, math.inf, "sgd")
    actual = agreed([answer[0] for answer in answers])
    for name in (name for name in actual if name.startswith("gradient")):
        assert torch.equal(actual[name], actual[name.replace("gradient", "clipped")])


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp=2", "tile=2", "tp=2", "ddp=2,fsdp=2,tp=2"])
def test_train_on_gpus(pools: Pools, mesh: str) -> None:
    """The same step over NCCL."""
    world = Mesh.parse(mesh)
    if torch.cuda.device_count() < world.size:
        pytest.skip(f"needs {world.size} GPUs, there are {torch.cuda.device_count()}")
    problem = replace(FIXED, device="cuda")
    answers = pools(world.size, "cuda").run(work.train, problem, world, 1, MOST, "adamw")
    actual = agreed([answer[0] for answer in answers])
    expected = work.serial_train(problem, 1, MOST, "adamw")[0]
    judge(actual, {name: t.cpu() for name, t in expected.items() if not name.startswith("weight")})
