"""The mesh: a validated arrangement of ranks on four axes, and the process groups of these axes.

[PAR-1] four axes, outermost first: ddp, fsdp, tile, tp; the number of ranks is the product of their sizes, and
        rank = ((i_ddp F + i_fsdp) T + i_tile) P + i_tp
[PAR-2] ranks that differ in ddp or fsdp have different samples or members; those that differ in tile alone have the
        same samples and different tiles; those that differ in tp alone differ only in their weights
[PAR-3] n items are partitioned over R ranks: rank r has those from floor(r n / R) to floor((r + 1) n / R), and a rank
        without any is refused
[PAR-4] a mesh that does not fit is refused before any work, with a message that says why: heads that tp does not
        divide, fewer tiles than tile ranks, fewer samples or members than data ranks, or another number of ranks than
        the world has

A mesh has axes, and a tensor has dims. The paper: DDP between sub-clusters, FSDP between nodes, tensor and tile
parallelism within them, with tiles innermost. Here tensor parallelism is innermost, since it sends most.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from storm_ref.config import StormConfig

__all__ = ["AXES", "START_TIMEOUT", "TIMEOUT", "CollectiveError", "Mesh", "World", "limit_wait", "share", "start"]

AXES = ("ddp", "fsdp", "tile", "tp")
TIMEOUT = 30.0  # seconds for which a rank waits for another
START_TIMEOUT = 600.0  # seconds within which all ranks must have started and formed their process groups


@dataclass(frozen=True)
class Mesh:
    """The sizes of the four axes. Raises ValueError for a size below one."""

    ddp: int = 1
    fsdp: int = 1
    tile: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"an axis of a mesh has at least one rank, got {axis}={getattr(self, axis)}")

    @staticmethod
    def parse(text: str) -> "Mesh":
        """The mesh of a text such as `ddp=1,fsdp=2,tile=2,tp=1`; an axis that is left out has size 1.

        Raises ValueError for any other text, with the form that is expected.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            axis, _, size = (word.strip() for word in part.partition("="))
            if axis not in AXES or axis in sizes or not size.isascii() or not size.isdigit():
                raise ValueError(f"a mesh is written like ddp=1,fsdp=2,tile=2,tp=1, each axis once, got {text!r}")
            sizes[axis] = int(size)
        return Mesh(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in zip(AXES, self.shape, strict=True))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes as (ddp, fsdp, tile, tp)."""
        return self.ddp, self.fsdp, self.tile, self.tp

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.data * self.tile * self.tp

    @property
    def data(self) -> int:
        """The number of data ranks, ddp x fsdp, over which samples and members are partitioned."""
        return self.ddp * self.fsdp

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank on each axis, [PAR-1]. Raises ValueError for a rank outside the mesh."""
        if not 0 <= rank < self.size:
            raise ValueError(f"the mesh {self} has ranks 0 to {self.size - 1}, got {rank}")
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in AXES}

    def check(self, config: StormConfig | None = None, tiles: int | None = None, samples: int | None = None) -> None:
        """Refuse a network, a number of tiles or a number of samples (or members) that does not fit the mesh, [PAR-4].

        None leaves one of them unchecked. Raises ValueError with a message that says what to change.
        """
        if config is not None and config.heads % self.tp:
            raise ValueError(f"tp={self.tp} does not divide the {config.heads} heads: choose a tp that does")
        if tiles is not None and tiles < self.tile:
            raise ValueError(f"tile={self.tile} ranks for {tiles} tiles leaves some idle: use fewer, or smaller tiles")
        if samples is not None and samples < self.data:
            raise ValueError(
                f"ddp={self.ddp} x fsdp={self.fsdp} = {self.data} data ranks for {samples} samples or members leaves "
                "some idle: use fewer ranks, or draw more"
            )


def share(count: int, ranks: int, rank: int) -> range:
    """The indices, out of `count`, that belong to a rank, [PAR-3]."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


class CollectiveError(ValueError):
    """An error that every rank of the world raises."""


class World:
    """A mesh with its process groups, as one rank sees them. Every rank of the mesh creates it.

    timeout: seconds for which a rank waits for another in a collective, of any axis and of the whole world. Raises
    ValueError when the process group has another number of ranks than the mesh.
    """

    def __init__(self, mesh: Mesh, device: str = "cpu", store: Any = None, timeout: float = TIMEOUT) -> None:
        if dist.get_world_size() != mesh.size:
            raise ValueError(
                f"the mesh {mesh} has {mesh.size} ranks, but {dist.get_world_size()} were started: change the mesh, or "
                f"start with torchrun --nproc-per-node {mesh.size}"
            )
        self.mesh = mesh
        self.device = torch.device(device)
        self.rank = dist.get_rank()
        self.store = store  # of the rendezvous, which still works when a process group has failed
        self.devices: DeviceMesh = init_device_mesh(self.device.type, mesh.shape, mesh_dim_names=AXES)
        self.coordinates = mesh.coordinates(self.rank)
        # A subgroup that a device mesh makes has torch's default of half an hour, not the timeout of the whole group.
        for group in (dist.group.WORLD, *(self.group(axis) for axis in AXES)):
            limit_wait(group, timeout)

    @staticmethod
    def alone() -> "World":
        """The world of a single process that belongs to no process group: a mesh of one rank."""
        return _Alone()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one in `axis` alone, in the order of the axis."""
        return self.devices.get_group(axis)

    @property
    def data_rank(self) -> int:
        """The number of this data rank, ddp before fsdp."""
        return self.coordinates["ddp"] * self.mesh.fsdp + self.coordinates["fsdp"]

    @cached_property
    def flat(self) -> DeviceMesh:
        """A mesh of one axis with all ranks, for checkpoints. All ranks call this together."""
        return init_device_mesh(self.device.type, (self.mesh.size,))

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes files for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The indices of this rank's samples or members, [PAR-2]."""
        return share(count, self.mesh.data, self.data_rank)

    def sum(self, value: torch.Tensor, *axes: str) -> torch.Tensor:
        """The sum over the ranks of these axes, with equal bits on all of them; it is not differentiated."""
        total = value.detach().clone()
        for axis in axes:
            if getattr(self.mesh, axis) > 1:
                dist.all_reduce(total, group=self.group(axis))
        return total

    def raise_together(self, error: str | None) -> None:
        """Raise CollectiveError on every rank if any of them has an error, with the first of these errors."""
        errors: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(errors, error)
        for rank, text in enumerate(errors):
            if text is not None:
                raise CollectiveError(text if len(set(errors)) == 1 else f"rank {rank}: {text}")

    def unresponsive_ranks(self, wait: float = 10.0) -> list[int]:
        """After a failure, the ranks that did not call this within `wait` seconds, because they have died or hang."""
        if self.store is None:
            return []
        self.store.set(f"storm-ref/failed/{self.rank}", "1")
        end = time.monotonic() + wait
        while missing := [r for r in range(self.mesh.size) if not self.store.check([f"storm-ref/failed/{r}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return missing

    def close(self) -> None:
        """Barrier, then destroy the process group."""
        dist.barrier()
        dist.destroy_process_group()


def limit_wait(group: dist.ProcessGroup | None, timeout: float) -> None:
    """Let the ranks of a process group wait for one another for at most `timeout` seconds from now on."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


class _Alone(World):
    """A world of one rank without process groups, where every sum over ranks is the identity."""

    def __init__(self) -> None:
        self.mesh = Mesh()
        self.device = torch.device("cpu")
        self.rank = 0
        self.store = None
        self.coordinates = self.mesh.coordinates(0)

    def raise_together(self, error: str | None) -> None:
        if error is not None:
            raise CollectiveError(error)

    def close(self) -> None:
        pass


def start(mesh: Mesh, timeout: float = TIMEOUT, device: str | None = None) -> World:
    """The world of a process that torchrun has started, over NCCL where every rank has its own GPU, else over gloo.

    timeout: seconds for which a rank waits for another. device: `cpu` or `cuda`; None leaves the choice to this
    function. Raises ValueError when torchrun did not start this process, or
    started another number of ranks than the mesh has.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"--mesh {mesh} needs {mesh.size} processes, and this one is alone ({', '.join(missing)} not set): start "
            f"it with torchrun --nproc-per-node {mesh.size} -m storm_ref -- ..."
        )
    if int(os.environ["WORLD_SIZE"]) != mesh.size:
        raise ValueError(
            f"the mesh {mesh} has {mesh.size} ranks, but {os.environ['WORLD_SIZE']} were started: change the mesh, or "
            f"start with torchrun --nproc-per-node {mesh.size}"
        )
    local = int(os.environ.get("LOCAL_RANK", 0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size))
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local)
    backend = "nccl" if device == "cuda" else "gloo"
    wait = timedelta(seconds=max(timeout, START_TIMEOUT))
    store, rank, ranks = next(dist.rendezvous("env://", timeout=wait))  # type: ignore[attr-defined]
    # torchrun's store outlives a restart, and must not hand on the addresses of ranks that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
    return World(mesh, device, store, timeout)
