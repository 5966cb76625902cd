"""Training states that know of no mesh: a folder that any number of ranks writes and any other number reads.

`torch.distributed.checkpoint` keeps every tensor whole under its serial name, in rows over all ranks; JSON beside it
says what the run is. The folder is written under another name and takes its place when all ranks are done.

The index that torch writes is a pickle: read the checkpoints of your own runs alone. A finished model is a safetensors
file.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Shard

from storm_ref.parallel.mesh import World
from storm_ref.workbench.io.atomic import replacing

__all__ = ["read_folder", "rows", "whole", "write_folder"]

_ABOUT = "about.json"


def rows(tensor: Tensor, world: World) -> Tensor:
    """This rank's rows of a tensor that all ranks have, as a part of the whole; the tensor itself for a single rank."""
    if world.mesh.size == 1:
        return tensor.detach()
    size = -(-len(tensor) // world.mesh.size)
    part = tensor[world.rank * size : (world.rank + 1) * size].detach().clone()
    return DTensor.from_local(part, world.flat, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(part: Tensor) -> Tensor:
    """Undoes `rows`; all ranks call it together."""
    return part.full_tensor() if isinstance(part, DTensor) else part


def write_folder(
    path: Path, kind: str, state: Mapping[str, Tensor], about: Mapping[str, Any], world: World | None = None
) -> None:
    """All ranks write their parts of `state`, from `rows`, together ([PAR-17]).

    Raises ValueError, on every rank, when the folder cannot be written; what was there before is as it was.
    """
    world = world or World.alone()
    aside = path.with_name(f".{path.name}.ranks.part")  # one name for all ranks
    _together(world, lambda: _empty(aside))
    with _quiet():
        dcp.save(dict(state), checkpoint_id=str(aside), no_dist=world.mesh.size == 1)  # type: ignore[attr-defined]

    def finish() -> None:
        (aside / _ABOUT).write_text(json.dumps({"kind": kind, "about": about}))
        with replacing(path) as part:
            aside.rename(part)

    _together(world, finish)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process has no other to talk to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _together(world: World, work: Callable[[], None]) -> None:
    """The first rank does it; if it cannot, all fail."""
    error = None
    if world.is_main:
        try:
            work()
        except OSError as e:
            error = str(e)
    world.raise_together(error)


def read_folder(path: Path, kind: str, world: World | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_folder` wrote, on any mesh or none: this rank's rows of every tensor, and `about`.

    Raises ValueError, naming the folder and the remedy, for one that is not complete or something else.
    """
    world = world or World.alone()
    try:
        found = json.loads((path / _ABOUT).read_text())
        if found["kind"] != kind:
            raise ValueError(f"this is {found['kind']!r}, not {kind!r}")
        stored: Mapping[str, Any] = FileSystemReader(str(path)).read_metadata().state_dict_metadata
        state = {
            name: rows(torch.zeros(entry.size, dtype=entry.properties.dtype, device=world.device), world)
            for name, entry in stored.items()
        }
        with _quiet():
            dcp.load(state, checkpoint_id=str(path), no_dist=world.mesh.size == 1)  # type: ignore[attr-defined]
    except (OSError, KeyError, ValueError, CheckpointException) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error}); give another, or start afresh") from error
    return state, found["about"]
