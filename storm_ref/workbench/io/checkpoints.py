"""Mesh-independent training checkpoints: a folder that any number of ranks writes and any other number reads.

`torch.distributed.checkpoint` keeps every tensor whole under its serial name, its rows divided among all ranks; a JSON
file beside it describes the run. All ranks write into one temporary folder, which replaces the old checkpoint when the
last of them is done.

The index that torch writes is a pickle, which can run code: read only checkpoints of your own runs. A finished model is
a safetensors file, which cannot.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Shard

from storm_ref.parallel.mesh import World
from storm_ref.workbench.io.atomic import remove, replacing, temporary_name
from storm_ref.workbench.io.collective import on_main_rank

__all__ = ["read_folder", "rows", "whole", "write_folder"]

_ABOUT = "about.json"


def rows(tensor: Tensor, world: World) -> Tensor:
    """This rank's rows of a tensor that all ranks have, as a shard of the whole; the tensor itself of a single rank."""
    if world.mesh.size == 1:
        return tensor.detach()
    size = -(-len(tensor) // world.mesh.size)
    part = tensor[world.rank * size : (world.rank + 1) * size].detach().clone()
    return DTensor.from_local(part, world.flat, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(part: Tensor) -> Tensor:
    """The tensor that `rows` divided. A collective call: all ranks make it."""
    return part.full_tensor() if isinstance(part, DTensor) else part


def write_folder(
    path: Path, kind: str, state: Mapping[str, Tensor], about: Mapping[str, Any], world: World | None = None
) -> None:
    """Write a checkpoint from each rank's part of `state`, made by `rows`, [PAR-17]. A collective call.

    kind: what the checkpoint is of, which `read_folder` asks for. about: anything JSON can hold.

    Raises ValueError on all ranks when the folder cannot be written; the old checkpoint is intact then.
    """
    world = world or World.alone()
    part = _agreed_name(path, world)

    def make_room() -> None:
        for leftover in path.parent.glob(f".{path.name}.*.part"):  # of a run that was killed while it wrote
            remove(leftover)
        part.mkdir(parents=True)

    def finish() -> None:
        with replacing(path, part):
            (part / _ABOUT).write_text(json.dumps({"kind": kind, "about": about}))

    on_main_rank(world, make_room)
    try:
        with _quiet():
            dcp.save(dict(state), checkpoint_id=str(part), no_dist=world.mesh.size == 1)  # type: ignore[attr-defined]
        on_main_rank(world, finish)
    finally:
        if world.is_main:
            remove(part)


def _agreed_name(path: Path, world: World) -> Path:
    """One temporary name for all ranks: the main rank's."""
    names = [temporary_name(path)]
    if world.mesh.size > 1:
        dist.broadcast_object_list(names)
    return names[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that a single process has no others to talk to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def read_folder(path: Path, kind: str, world: World | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this rank's rows of every tensor, and `about`, from a checkpoint that any mesh wrote. A collective call.

    Raises ValueError, naming the folder and the remedy, when it is incomplete or a checkpoint of something else.
    """
    world = world or World.alone()
    try:
        description = json.loads((path / _ABOUT).read_text())
        if description["kind"] != kind:
            raise ValueError(f"this is {description['kind']!r}, not {kind!r}")
        stored: Mapping[str, Any] = FileSystemReader(str(path)).read_metadata().state_dict_metadata
        state = {
            name: rows(torch.zeros(entry.size, dtype=entry.properties.dtype, device=world.device), world)
            for name, entry in stored.items()
        }
        with _quiet():
            dcp.load(state, checkpoint_id=str(path), no_dist=world.mesh.size == 1)  # type: ignore[attr-defined]
    except (OSError, KeyError, ValueError, CheckpointException) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error}); give another, or start afresh") from error
    return state, description["about"]
