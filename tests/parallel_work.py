"""The work of ranks in the tests of chapter 9, and the serial run of the same.

A problem is a few numbers: every rank makes its network and data from them, so that only results are sent. Functions
that take a mesh run in the ranks of a pool.
"""

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from storm_ref.assimilation import Guide, Sampler, draw_members, member_noise
from storm_ref.attention import Block
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.edm import Churn, Denoise, edm_loss, loss_weight, schedule
from storm_ref.guidance import Observations, dps, mmps, pigdm
from storm_ref.parallel import shard
from storm_ref.parallel.ensemble import draw_shared, gather_members
from storm_ref.parallel.halo import Exchange, ShardedTiles, blend_sharded, compress_sharded, on_whole, sharded_denoiser
from storm_ref.parallel.mesh import AXES, Mesh, World
from storm_ref.parallel.pool import world_of
from storm_ref.parallel.tensor import tensor_parallel
from storm_ref.parallel.traffic import Ledger, Traffic
from storm_ref.tiling import Tiling, tiled_denoiser
from storm_ref.tokenisation import sphere_position

MESHES = sorted((Mesh(*s) for s in product((1, 2, 4, 8), repeat=4) if math.prod(s) <= 8), key=lambda mesh: mesh.size)
GUIDES = ("none", "dps", "pigdm", "mmps")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Samples, all in numbers that float32 has too: an error against float64 is then one of arithmetic alone."""

    x: Tensor
    noise: Tensor
    probe: Tensor
    valid: Tensor
    sigma: Tensor
    past: Tensor
    past_static: Tensor
    age: Tensor
    static: Tensor
    position: Tensor

    def own(self, run: range) -> "Data":
        kept = {f.name: getattr(self, f.name)[run.start : run.stop] for f in fields(self) if f.name != "position"}
        return replace(self, **kept)

    @property
    def told(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.past, self.past_static, self.age, self.position


@dataclass(frozen=True)
class Problem:
    """A network of eight heads and its data; `samples` are shared out among data ranks."""

    tiling: Tiling
    samples: int = 8
    depth: int = 2
    frames: int = 2
    chunk: int = 16
    window: int | None = None
    tiles_per_batch: int = 16
    batch: int = 16  # members drawn at a time
    steps: int = 10  # of the sampler
    dtype: torch.dtype = torch.float64
    recomputed: bool = False
    seed: int = 0
    device: str = "cpu"

    @property
    def config(self) -> StormConfig:
        patch = self.tiling.y.patch, self.tiling.x.patch
        more = {"mlp_ratio": 2, "position_octaves": 2, "noise_features": 8, "window": self.window}
        return StormConfig(2, 1, patch, 16, 8, self.depth, **more)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 2, self.tiling.y.length, self.tiling.x.length

    def network(self) -> Storm:
        network = Storm(self.config)
        randomise(network, torch.Generator().manual_seed(self.seed))
        return network.to(self.dtype).to(self.device)

    def data(self, step: int = 0) -> Data:
        generator = torch.Generator().manual_seed(1000 * self.seed + step + 1)
        n, k, (c, h, w) = self.samples, self.frames, self.shape

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).double()

        valid = draw(n, c, h, w) > -0.5
        valid[n // 2 :, :, h // 2 :] = False  # ragged: other samples and other points have more of them
        valid[0, 0, 0, 0] = True
        age = 6 * torch.arange(1, k + 1, dtype=torch.float64).repeat(n, 1)
        latitude, longitude = torch.linspace(-80, 80, h).double(), torch.arange(w).double() * 360 / w
        position = sphere_position(latitude, longitude, self.config.patch)
        data = Data(
            draw(n, c, h, w), draw(n, c, h, w), draw(n, c, h, w), valid, (draw(n) / 2).exp().float().double(),
            draw(n, k, c, h, w), draw(n, k, 1, h, w), age, draw(n, 1, h, w), position,
        )  # fmt: skip
        return replace(data, **{f.name: getattr(data, f.name).to(self.device) for f in fields(data)})

    def observations(self) -> Observations:
        """Seven, of two points each, all over the domain."""
        generator, size = torch.Generator().manual_seed(self.seed + 77), math.prod(self.shape)
        index = torch.randperm(size, generator=generator)[:14].reshape(7, 2) if size >= 14 else torch.zeros(7, 2).long()
        weight = torch.rand(7, 2, generator=generator).double()
        value, variance = torch.randn(7, generator=generator).double(), 1 + torch.rand(7, generator=generator).double()
        return Observations(*(t.to(self.device) for t in (value, variance, index, weight)), self.shape)


# The serial run


def serial_denoise(p: Problem, network: Storm, data: Data) -> Denoise:
    memory = network.compress(*data.told, p.chunk)
    return tiled_denoiser(
        network, Condition(data.static, memory, data.position[None], p.tiling.x.periodic), p.tiling, p.tiles_per_batch
    )


def serial(p: Problem) -> Tensors:
    """Compute serially what `evaluate` assembles."""
    network, data = p.network(), p.data()
    x = data.x.clone().requires_grad_()
    y = serial_denoise(p, network, data)(x, data.sigma)
    (data.probe * y).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {f"weight {name}": w.grad for name, w in network.named_parameters()}


def serial_members(p: Problem, guide: str, members: int | None = None) -> Tensor:
    """Compute serially what `members` returns."""
    network, data = p.network(), p.data().own(range(1))
    with torch.no_grad():
        denoise = serial_denoise(p, network, data)
    return _members(p, denoise, range(p.samples if members is None else members), guide)


def serial_train(p: Problem, steps: int, most: float, kind: str) -> list[Tensors]:
    """Compute serially what `train` returns."""
    network = p.network()
    optimiser = make_optimiser(kind, network)
    records = []
    for step in range(steps):
        data = p.data(step)
        loss = edm_loss(serial_denoise(p, network, data), data.x, data.noise, data.sigma, 1.0, data.valid)
        optimiser.zero_grad()
        loss.backward()
        gradients = {f"gradient {n}": w.grad.clone() for n, w in network.named_parameters()}
        norm = nn.utils.clip_grad_norm_(network.parameters(), most)
        clipped = {f"clipped {n}": w.grad.clone() for n, w in network.named_parameters()}
        optimiser.step()
        after = {f"weight {n}": w.detach().clone() for n, w in network.named_parameters()}
        records.append({"loss": loss.detach(), "norm": norm.detach(), **gradients, **clipped, **after})
    return records


def make_optimiser(kind: str, network: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(network.parameters(), lr=0.01)
    return torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)


def _guide(name: str) -> Guide | None:
    return {
        "none": None,
        "dps": dps,
        "pigdm": lambda denoise, seen: pigdm(denoise, seen, 1.0, 5),
        "mmps": lambda denoise, seen: mmps(denoise, seen, 2),
    }[name]


def _members(p: Problem, denoise: Denoise, run: range, guide: str) -> Tensor:
    """Churn is on."""
    sampler = Sampler(schedule(p.steps, 0.05, 5.0), Churn(4.0), members_per_batch=p.batch)
    noise = torch.stack([member_noise(5, 3, m, p.shape, sampler.draws) for m in run], 1).to(p.device)
    if guide == "none":
        return draw_members(denoise, noise, sampler)
    return draw_members(denoise, noise, sampler, p.observations(), _guide(guide))


# In the ranks


@dataclass(frozen=True)
class Answer:
    """A rank's answer: tensors that all ranks have, from the first alone; its part of weights, or of what is sharded
    like them, from the first of those that hold it; and checksums of both from every rank.
    """

    place: dict[str, int]
    whole: Tensors
    parts: Tensors
    bits: dict[str, str]
    part_bits: dict[str, str]


def answer(world: World, whole: Tensors, parts: Tensors | None = None) -> Answer:
    """parts: by names that end with a space and the weight's; each is gathered where it is judged, without messages."""
    plain = [{n: shard.local(t).detach().cpu().contiguous() for n, t in ts.items()} for ts in (whole, parts or {})]
    bits = [{n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in ts.items()} for ts in plain]
    sends = world.coordinates["ddp"] == world.coordinates["tile"] == 0
    own = {n: t.clone() for n, t in plain[1].items()} if sends else {}
    return Answer(dict(world.coordinates), plain[0] if world.is_main else {}, own, *bits)


class Evaluation(nn.Module):
    """One evaluation on shards, compression of the memory included: FSDP gathers weights around one forward."""

    def __init__(self, network: Storm, parts: ShardedTiles, p: Problem, whole_memory: bool = False) -> None:
        super().__init__()
        self.network, self.parts, self.p, self.whole_memory = network, parts, p, whole_memory

    def forward(self, x: Tensor, data: Data) -> Tensor:
        return bound(self.network, self.parts, self.p, data, self.whole_memory)(x, data.sigma).clone()  # no view


class Told(Evaluation):
    """One evaluation on shards with a memory that is there."""

    def forward(self, x: Tensor, data: Data) -> Tensor:
        memory = torch.zeros(1, *data.position.shape[:2], self.p.config.width, dtype=self.p.dtype)
        condition = Condition(data.static, memory, data.position[None], self.p.tiling.x.periodic)
        return sharded_denoiser(self.network, condition, self.parts)(x, data.sigma).clone()


class Step(Evaluation):
    """The weighted squares of a training step on shards, for the rank's own samples."""

    def forward(self, data: Data) -> Tensor:  # type: ignore[override]
        level = data.sigma[:, None, None, None]
        clean = self.parts.shard(data.x)
        denoised = super().forward(self.parts.shard(data.x + level * data.noise), data)
        return loss_weight(data.sigma, 1.0)[:, None, None] * (denoised - clean) ** 2


def bound(network: Storm, parts: ShardedTiles, p: Problem, data: Data, whole_memory: bool = False) -> Denoise:
    if whole_memory:
        condition = Condition(
            data.static, network.compress(*data.told, p.chunk), data.position[None], p.tiling.x.periodic
        )
        return sharded_denoiser(network, condition, parts)
    memory = compress_sharded(network, *data.told, parts, p.chunk)
    nothing = memory.new_zeros(1).expand(1, *data.position.shape[:2], p.config.width)
    return sharded_denoiser(
        network, Condition(data.static, nothing, data.position[None], p.tiling.x.periodic), parts, memory
    )


def setup(p: Problem, mesh: Mesh) -> tuple[World, Storm, ShardedTiles]:
    mesh.check(p.config, None, p.samples)
    world = world_of(mesh, p.device)
    network = tensor_parallel(p.network(), world)
    if p.recomputed:
        shard.recompute(network)
    return world, network, ShardedTiles(p.tiling, world, p.tiles_per_batch)


def evaluate(p: Problem, mesh: Mesh, whole_memory: bool = False, whole_state: bool = True) -> Any:
    """D, and the gradients of <probe, D> in state and weights, assembled."""
    world, network, parts = setup(p, mesh)
    module = Evaluation(network, parts, p, whole_memory)
    shard.shard_weights(module, network, world)
    data = p.data().own(world.share(p.samples))
    x = data.x.clone().requires_grad_()
    if whole_state:
        y = on_whole(lambda z, sigma: module(z, data), parts)(x, data.sigma)
        loss = (data.probe * y).sum()
    else:
        own = module(parts.scatter(x), data)
        loss, y = (parts.shard(data.probe) * own).sum(), parts.collect(own.detach())
    (mesh.data * loss).backward()  # fully_shard takes the mean
    shard.sum_tile_gradients(network, world)
    whole = {"y": y.detach(), "x": x.grad / mesh.data}
    whole = {name: gather_members(t, p.samples, world) for name, t in whole.items()}
    return answer(world, whole, {f"weight {n}": w.grad for n, w in network.named_parameters()})


def members(p: Problem, mesh: Mesh, guide: str) -> Any:
    """The ensemble, guided or not, members shared out over data ranks."""
    world, network, parts = setup(p, mesh)
    shard.shard_weights(network, network, world, keep=True)
    if mesh.data > 1:
        register_fsdp_forward_method(network, "compress")
    with torch.no_grad():
        denoise = on_whole(bound(network, parts, p, p.data().own(range(1)), mesh.tile == 1), parts)
    drawn = draw_shared(lambda run: _members(p, denoise, run, guide), p.samples, world)
    return answer(world, {"members": drawn})


def everything(p: Problem, mesh: Mesh) -> Any:
    """Value, gradients and a guided ensemble."""
    return evaluate(p, mesh), members(p, mesh, "dps")


def everything_checked(p: Problem, meshes: list[Mesh], wrong: Tensor) -> str:
    """Value, gradients, an ensemble and a training step on each mesh; what is said of a tensor of a wrong shape."""
    for mesh in meshes:
        everything(p, mesh)
        train(p, mesh, 1, 0.5, "adamw")
    try:
        setup(p, meshes[0])[2].gather(wrong)
    except Exception as error:
        return type(error).__name__
    return ""


def tiles_refused(tiling: Tiling, mesh: Mesh) -> list[str]:
    """Return the messages that refuse one tile for many ranks, and no tile at a time."""
    said, world = [], world_of(mesh)
    for tiles, tiles_per_batch in ((Tiling.whole((4, 4), False), 1), (tiling, 0)):
        try:
            ShardedTiles(tiles, world, tiles_per_batch)
        except ValueError as error:
            said.append(str(error))
    return said


def members_not_finite(p: Problem, mesh: Mesh, bad: int) -> str:
    """Return the message raised where member `bad` stops being finite."""
    world = world_of(mesh, p.device)

    def draw(run: range) -> Tensor:
        noise = torch.zeros(1, len(run), *p.shape, dtype=torch.float64)
        for place, member in enumerate(run):
            noise[:, place] = torch.inf if member == bad else 0
        return draw_members(lambda x, sigma: x, noise, Sampler(schedule(3), members_per_batch=2))

    try:
        draw_shared(draw, p.samples, world)
    except ValueError as error:
        return str(error)
    return ""


def too_few_members(mesh: Mesh, count: int) -> str:
    try:
        draw_shared(lambda run: torch.zeros(len(run), 1), count, world_of(mesh))
    except ValueError as error:
        return str(error)
    return ""


def second_derivative(p: Problem, mesh: Mesh | None) -> Any:
    """The gradient in x of <noise, J^T probe>: backward through backward. Without a mesh, the serial run."""
    data = p.data()
    x = data.x.clone().requires_grad_()
    world = None
    if mesh is None:
        denoise = serial_denoise(p, p.network(), data)
    else:
        world, network, parts = setup(p, mesh)
        denoise = on_whole(bound(network, parts, p, data), parts)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        gradient = torch.autograd.grad((data.probe * denoise(x, data.sigma)).sum(), x, create_graph=True)[0]
        curve = torch.autograd.grad((gradient * data.noise).sum(), x)[0]
    return curve if world is None else answer(world, {"curve": curve})


def cube(p: Problem, mesh: Mesh) -> Any:
    """D(z) = z^3 by tiles: value, J^T v and the gradient of <u, J^T v>."""
    world, data = world_of(mesh, p.device), p.data()
    parts = ShardedTiles(p.tiling, world, p.tiles_per_batch)
    denoise = on_whole(blend_sharded(lambda z, sigma, batch: z**3, parts), parts)
    x = data.x.clone().requires_grad_()
    y = denoise(x, data.sigma)
    gradient = torch.autograd.grad((data.probe * y).sum(), x, create_graph=True)[0]
    curve = torch.autograd.grad((data.noise * gradient).sum(), x)[0]
    return answer(world, {"y": y, "gradient": gradient, "curve": curve})


def _whole_numbers(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randint(-9, 10, size, generator=generator).double()


def exchanges(p: Problem, mesh: Mesh) -> dict[str, Any]:
    """Evaluate both sides of the identities of [PAR-9] and [PAR-10] on whole numbers, for extents and results."""
    world = world_of(mesh, p.device)
    parts = ShardedTiles(p.tiling, world, p.tiles_per_batch)
    generator = torch.Generator().manual_seed(world.rank)
    checks: dict[str, Any] = {}
    for name, exchange in (("extents", parts.extents), ("results", parts.results)):
        checks[name] = _exchange(exchange, world, parts.counts[parts.rank], generator)
    h, w = p.tiling.y.length, p.tiling.x.length
    one = torch.arange(2 * 3 * h * w, dtype=torch.float64).reshape(2, 3, h, w).requires_grad_()
    own = parts.shard(one.detach()).requires_grad_()
    gradient = _whole_numbers(torch.Generator().manual_seed(5), 2, 3, h, w)
    checks["scatter"] = torch.equal(parts.scatter(one), parts.shard(one))
    checks["collect"] = torch.equal(parts.collect(own), one)
    checks["collect of scatter"] = torch.equal(parts.collect(parts.scatter(one)), one)
    checks["collect's gradient"] = torch.equal(
        torch.autograd.grad(parts.collect(own), own, gradient)[0], parts.shard(gradient)
    )
    checks["scatter's gradient"] = torch.equal(
        torch.autograd.grad(parts.scatter(one), one, parts.shard(gradient))[0], gradient
    )
    rows = torch.randn(parts.shard(gradient).shape, generator=generator).double()
    checks["unity"] = float((parts.blend(parts.gather(rows)) - rows).abs().max() / rows.abs().max())
    flat = [torch.arange(h * w, dtype=torch.float64).reshape(1, 1, h, w)] * 2
    extents = [t for batch in parts.gather(parts.shard(torch.cat(flat, 1))) for t in batch]
    wanted = [
        torch.cat(flat, 1)[0][:, tile.rows[:, None], tile.cols] for batch in parts.batches for tile in batch.tiles
    ]
    checks["gather"] = all(torch.equal(a, b) for a, b in zip(extents, wanted, strict=True))
    return checks


def _exchange(exchange: Exchange, world: World, size: int, generator: torch.Generator) -> dict[str, Any]:
    x = _whole_numbers(generator, size, 3).requires_grad_()
    pulled = exchange.pull(x)
    y = _whole_numbers(generator, *pulled.shape).requires_grad_()
    pushed = exchange.push(y)
    adjoint = torch.zeros_like(x).index_add(0, exchange.shard_rows, pushed)
    left, right = world.sum((pulled * y).sum(), "tile"), world.sum((x * adjoint).sum(), "tile")
    z = _whole_numbers(generator, *pushed.shape)
    back = torch.autograd.grad(pushed, y, z)[0]
    return {
        "inner products": (left.item(), right.item()),
        "pull's gradient": torch.equal(torch.autograd.grad(pulled, x, y)[0], adjoint),
        "push's gradient": (world.sum((pushed * z).sum(), "tile").item(), world.sum((back * y).sum(), "tile").item()),
    }


def train(p: Problem, mesh: Mesh, steps: int, most: float, kind: str) -> list[Any]:
    """Loss and norm, and parts of gradients before and after clipping, of weights and moments, of each step."""
    world, network, shares = setup(p, mesh)
    module = Step(network, shares, p)
    shard.shard_weights(module, network, world)
    optimiser = make_optimiser(kind, network)
    answers = []

    def parts(what: str, of: Callable[[nn.Parameter], Any]) -> Tensors:
        return {f"{what} {n}": shard.local(of(w)).detach().clone() for n, w in network.named_parameters()}

    for step in range(steps):
        data = p.data(step).own(world.share(p.samples))
        loss = shard.scaled_loss(module(data), shares.shard(data.valid), world)
        optimiser.zero_grad()
        loss.backward()
        shard.sum_tile_gradients(network, world)
        gradients = parts("gradient", lambda w: w.grad)
        norm = shard.clip_gradients(network, most, world)
        clipped = parts("clipped", lambda w: w.grad)
        optimiser.step()
        record = {"loss": torch.tensor(shard.whole_loss(loss, world), dtype=torch.float64), "norm": norm}
        after = parts("weight", lambda w: w)
        if kind == "adamw":
            for moment in ("exp_avg", "exp_avg_sq"):
                after |= parts(moment, lambda w, m=moment: optimiser.state[w][m])
        answers.append(answer(world, record, gradients | clipped | after))
    return answers


def no_point(p: Problem, mesh: Mesh) -> str:
    """Return the message of the error that a loss over no point raises."""
    try:
        shard.scaled_loss(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), world_of(mesh))
    except ValueError as error:
        return str(error)
    return ""


def one_point(mesh: Mesh, rank: int) -> Any:
    """The mean of a loss of which one rank alone has a valid point."""
    world = world_of(mesh)
    valid = torch.zeros(2, 3, dtype=torch.bool)
    valid[0, 0] = world.rank == rank
    loss = shard.scaled_loss(torch.full((2, 3), 7.0), valid, world)
    return shard.whole_loss(loss, world)


def placed(p: Problem, mesh: Mesh, state: Tensors | None) -> Any:
    """Weights and moments put into a fresh network's ranks, and gathered again; None: those that this mesh makes."""
    world, network, parts = setup(p, mesh)
    shard.shard_weights(Step(network, parts, p), network, world)
    optimiser = make_optimiser("adamw", network)
    gathered = {}
    for weight in network.parameters():
        weight.grad = weight.detach() * 3 + 1
    optimiser.step()
    for name, weight in network.named_parameters():
        for key, part in (("weight", weight), ("moment", optimiser.state[weight]["exp_avg_sq"])):
            if state is not None:
                with torch.no_grad():
                    shard.local(part).zero_()
                shard.place_whole(name, state[f"{key} {name}"], part, world)
            gathered[f"{key} {name}"] = shard.gather_whole(name, part, world)
    with torch.no_grad():
        for weight in network.parameters():
            shard.local(weight).fill_(-1)  # what was gathered must not notice
    return answer(world, gathered)


def by_plan(mesh: Mesh) -> dict[str, Any]:
    """A block's parts by hand and by torch's plan for DTensors: largest errors in eps."""
    world = world_of(mesh)
    config = StormConfig(2, 1, (1, 1), 16, 8, 1, mlp_ratio=2, position_octaves=2, noise_features=8)
    network = Storm(config)
    randomise(network, torch.Generator().manual_seed(3))
    network.double()
    plain = Block(config.width, config.heads, config.mlp_ratio).double()
    plain.load_state_dict(network.blocks[0].state_dict())
    parallelize_module(
        plain,
        world.devices["tp"],
        {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
        | {f"{a}.{m}": ColwiseParallel() for a in ("spatial", "temporal") for m in ("query", "key", "value")}
        | {f"{a}.out": RowwiseParallel() for a in ("spatial", "temporal")},
    )
    for heads in (plain.spatial, plain.temporal):
        heads.heads //= mesh.tp
    hand: Any = tensor_parallel(network, world).blocks[0]
    generator = torch.Generator().manual_seed(4)
    x, context, probe = (torch.randn(2, 6, config.width, generator=generator).double() for _ in range(3))
    differences = {}
    for part in ("mlp", "spatial", "temporal"):
        sides = []
        for block in (hand, plain):
            a, b = x.clone().requires_grad_(), context.clone().requires_grad_()
            given = (a,) if part == "mlp" else (a, a) if part == "spatial" else (a, b)
            y = getattr(block, part)(*given)
            (probe * y).sum().backward()
            weights = {n: shard.local(w.grad) for n, w in getattr(block, part).named_parameters()}
            more = {"context": b.grad} if part == "temporal" else {}
            sides.append({"y": y.detach(), "x": a.grad} | more | weights)
        one, two = sides
        differences[part] = max(float((one[k] - two[k]).abs().max() / two[k].abs().max()) for k in two)
    return differences


# Messages


_KINDS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
}


class Messages(TorchDispatchMode):
    """Every collective that torch runs while this is active, by axis of the mesh and kind, in `ledger`.

    One that is of none of the four axes' groups, or of another kind, has its own key.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.ledger = {}
        sizes = {axis: getattr(world.mesh, axis) for axis in AXES}
        self.axes = {world.group(axis).group_name: axis for axis in sorted(AXES, key=sizes.__getitem__)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace and func.overloadpacket.__name__ != "wait_tensor":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        axis, kind = "none of the axes", _KINDS.get(name, name)
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                axis = self.axes.get(dist.ProcessGroup.unbox(arg).group_name, axis)
        given = args[0] if kind == "all-reduce" else args[1] if kind in _KINDS.values() else ()
        tensors = [given] if isinstance(given, Tensor) else list(given)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if kind == "all-to-all":
            rows, splits = tensors[0], args[4]
            own = splits[self.world.coordinates["tile"]] * math.prod(rows.shape[1:]) * rows.element_size()
            size -= own
        self.ledger[axis, kind] = self.ledger.get((axis, kind), Traffic()) + Traffic(1, size)


def counted_evaluation(p: Problem, mesh: Mesh, backward: bool, keep: bool) -> list[Ledger]:
    """Messages of an evaluation on shards, and of its J^T; where weights are kept, of another one too."""
    world, network, parts = setup(p, mesh)
    module = Told(network, parts, p)
    data = p.data().own(world.share(p.samples))
    shard.shard_weights(module, network, world, keep)
    x = parts.shard(data.x).requires_grad_(backward)
    ledgers = []
    for _ in range(1 + keep):
        with Messages(world) as messages, torch.set_grad_enabled(backward):
            y = module(x, data)
            if backward:
                torch.autograd.grad(y, x, torch.ones_like(y))
        ledgers.append(messages.ledger)
    return ledgers


def counted_step(p: Problem, mesh: Mesh) -> Ledger:
    """Messages of one training step."""
    world, network, parts = setup(p, mesh)
    module = Step(network, parts, p)
    shard.shard_weights(module, network, world)
    optimiser = make_optimiser("adamw" if mesh.size < 8 else "sgd", network)
    data = p.data().own(world.share(p.samples))
    with Messages(world) as messages:
        loss = shard.scaled_loss(module(data), parts.shard(data.valid), world)
        loss.backward()
        shard.sum_tile_gradients(network, world)
        shard.clip_gradients(network, 1.0, world)
        optimiser.step()
        shard.whole_loss(loss, world)
    return messages.ledger


def counted_some(p: Problem, mesh: Mesh) -> dict[str, Any]:
    """J^T, of which an evaluation is the first half, and a step."""
    return {"product": counted_evaluation(p, mesh, True, False), "step": [counted_step(p, mesh)]}


def counted_all(p: Problem, mesh: Mesh) -> dict[str, Any]:
    """Evaluations and steps of every kind."""
    more = {
        "evaluation": counted_evaluation(p, mesh, False, False),
        "evaluation, kept": counted_evaluation(p, mesh, False, True),
        "product, kept": counted_evaluation(p, mesh, True, True),
        "step, recomputed": [counted_step(replace(p, recomputed=True), mesh)],
    }
    return counted_some(p, mesh) | more


def counted_whole(p: Problem, mesh: Mesh) -> dict[str, Ledger]:
    """Count messages of whole states: scatter and collect with their gradients, and an ensemble from all data ranks."""
    world, _, parts = setup(p, mesh)
    data = p.data()
    x = data.x.requires_grad_()
    ledgers = {}
    with Messages(world) as messages:
        y = parts.collect(parts.scatter(x))
    ledgers["collect"] = messages.ledger
    with Messages(world) as messages:
        y.sum().backward()
    ledgers["back"] = messages.ledger
    mine = world.share(p.samples)
    with Messages(world) as messages:
        gather_members(data.x[mine.start : mine.stop].detach(), p.samples, world)
    ledgers["members"] = messages.ledger
    return ledgers


def stray(mesh: Mesh) -> Ledger:
    """A message over all ranks, which is no axis's."""
    with Messages(world_of(mesh)) as messages:
        dist.all_reduce(torch.zeros(3))
    return messages.ledger


# For the pool


def rank_and_size(factor: int) -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), factor * os.getpid()


def fails(kind: str, rank: int) -> int:
    """One rank goes wrong, the others wait for it in a collective."""
    if dist.get_rank() == rank:
        if kind == "raise":
            raise ValueError("this rank has had enough")
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        if kind == "hang":
            time.sleep(3600)
        if kind == "unpicklable":
            raise Unpicklable(lambda: 0)
        if kind == "value":
            return lambda: 0  # type: ignore[return-value]
    total = torch.ones(2 + 1000 * (kind == "shapes" and dist.get_rank() == rank))
    dist.all_reduce(total)
    return int(total[0])


def hangs_on_axis(mesh: Mesh, axis: str, rank: int) -> int:
    """One rank hangs before a collective of one axis."""
    world = world_of(mesh)
    if world.rank == rank:
        time.sleep(3600)
    return int(world.sum(torch.ones(2), axis)[0])


class Unpicklable(Exception):
    """Holds something that cannot be sent."""


def wrong_world(mesh: Mesh) -> str:
    try:
        World(mesh)
    except ValueError as error:
        return str(error)
    return ""


def gelu_of(value: float) -> float:
    return float(F.gelu(torch.tensor(value)))
