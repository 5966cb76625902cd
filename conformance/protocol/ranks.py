"""Merge the answers of many ranks: a port that runs as several processes may return what each of them has.

Such a port returns `rank.R.NAME` for every rank R of the mesh in the params, in place of an assembled NAME. What all
ranks have must have the same bits on all of them: ranks that differ by a rounding today differ by more at each step
from now on. APART names outputs that every rank has its own of, which are expected rank by rank.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array, Params

__all__ = [
    "APART",
    "RanksError",
    "file_of",
    "launched",
    "merge",
    "missing_ranks",
    "number",
    "plain",
    "rank_of",
    "ranks_of",
]

APART = frozenset({"extents"})
_NAMED = re.compile(r"rank\.(0|[1-9]\d{0,5})\.(.+)", re.DOTALL)
_FILE = re.compile(r"outputs\.rank(0|[1-9]\d{0,5})\.safetensors")
AXES = ("ddp", "fsdp", "tile", "tp")
# What launchers call the rank of a process and the number of ranks: torchrun, Open MPI, MPICH and Intel MPI, Slurm.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


class RanksError(Exception):
    """Ranks disagree or are missing, or one is none of the mesh's."""


def number(mesh: Mapping[str, Any]) -> int:
    """The number of ranks of a mesh."""
    product = 1
    for axis in AXES:
        product *= int(mesh.get(axis, 1))
    return product


def ranks_of(params: Params) -> int | None:
    """The number of ranks that the params ask for, None where they name no mesh."""
    return number(params["mesh"]) if isinstance(params.get("mesh"), Mapping) else None


def plain(name: str) -> str:
    """The name of an output without the rank before it."""
    match = _NAMED.fullmatch(name)
    return match[2] if match else name


def file_of(rank: int) -> str:
    """The name of the file with a rank's outputs, in a folder of answers."""
    return f"outputs.rank{rank}.safetensors"


def rank_of(file: str) -> int | None:
    """The rank whose outputs a file of a folder of answers has; None for any other file."""
    match = _FILE.fullmatch(file)
    return int(match[1]) if match else None


def launched() -> tuple[int, int]:
    """The rank of this process and the number of ranks, as its launcher says. Raises ValueError when none does."""
    for rank, size in LAUNCHERS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    names = ", ".join(f"{rank} and {size}" for rank, size in LAUNCHERS)
    raise ValueError(f"no launcher started this process: none of {names} is set; use torchrun, mpirun or srun")


def missing_ranks(there: Iterable[int], ranks: int) -> str:
    """Name the missing ranks in words; empty when none is. Raises RanksError for one that the mesh does not have."""
    known = set(there)
    strange = sorted(rank for rank in known if rank >= ranks)
    if strange:
        raise RanksError(f"there is a rank {strange[0]}, and the mesh has ranks 0 to {ranks - 1}")
    missing = [str(rank) for rank in range(ranks) if rank not in known]
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {ranks}" if missing else ""


def merge(result: Mapping[str, Array], params: Params) -> dict[str, Array]:
    """Return the outputs by their plain names; those of APART, and those of a call without a mesh, stay as they are.

    Raises RanksError when ranks disagree, when one is missing, and when an output is there both ways.
    """
    ranks = ranks_of(params)
    if ranks is None:
        return dict(result)
    merged: dict[str, Array] = {}
    parts: dict[str, dict[int, Array]] = {}
    for name, value in result.items():
        match = _NAMED.fullmatch(name)
        if match:
            parts.setdefault(match[2], {})[int(match[1])] = value
        else:
            merged[name] = value
    for name, by_rank in parts.items():
        missing = missing_ranks(by_rank, ranks)
        if missing:
            raise RanksError(f"the output {_short(name)} of {missing} is missing")
        if name in merged:
            raise RanksError(f"the output {_short(name)} is there assembled and by rank: return one of them")
        if name in APART:
            merged |= {f"rank.{rank}.{name}": value for rank, value in by_rank.items()}
        else:
            _check_equal(name, by_rank, ranks)
            merged[name] = by_rank[0]
    return merged


def _check_equal(name: str, by_rank: Mapping[int, Array], ranks: int) -> None:
    first = by_rank[0]
    for rank in range(1, ranks):
        other = by_rank[rank]
        if (first.shape, first.dtype) != (other.shape, other.dtype):
            kinds = f"{first.dtype} {list(first.shape)} and {other.dtype} {list(other.shape)}"
            raise RanksError(f"ranks disagree: {_short(name)} is {kinds} on rank 0 and rank {rank}")
        if first.tobytes() != other.tobytes():
            raise RanksError(
                f"ranks disagree: {_short(name)} differs between rank 0 and rank {rank}, {_difference(first, other)}"
            )


def _difference(first: Array, other: Array) -> str:
    """The largest difference in words, and where the first is. Equal values may differ in the sign of a zero."""
    with np.errstate(all="ignore"):
        apart = np.abs(first.astype(np.float64) - other.astype(np.float64))
    bad = np.argwhere(~(first == other))
    if not len(bad):
        return "by the sign of a zero"
    at = tuple(int(i) for i in bad[0])
    return (
        f"by up to {np.nanmax(apart, initial=0.0):.3g}, first at {list(at)}: {first[at].item()} and {other[at].item()}"
    )


def _short(name: str) -> str:
    clean = "".join(c if c.isprintable() else " " for c in name)
    return clean if len(clean) <= 60 else clean[:57] + "..."
