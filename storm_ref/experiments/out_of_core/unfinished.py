"""The folder of an unfinished run: whose it is, what is finished, and how to leave nothing behind."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storm_ref.denoiser import Storm
from storm_ref.experiments.out_of_core.arrays import ArrayLike, native_dtype, read_piece
from storm_ref.workbench.io.atomic import is_temporary, replacing

__all__ = [
    "Progress",
    "Steps",
    "claim",
    "clear",
    "digest",
    "digest_of_samples",
    "intact_checksums",
    "network_fingerprint",
    "save_checksums",
]

# (steps done, steps in all) of a run; those of an earlier, interrupted call are among the done.
Progress = Callable[[int, int], None]

_CHECKSUMS = "finished.json"
_FINGERPRINT = "fingerprint.json"


class Steps:
    """A count of steps that reports those taken now."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def skip(self, count: int) -> None:
        """Count steps that an earlier call took."""
        self._done += count

    def __call__(self) -> None:
        """Count and report one step."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def claim(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder this run's, or check that it is.

    Raises ValueError for a folder that holds something else, or an unfinished run with other arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FINGERPRINT
    wanted = json.loads(json.dumps(fingerprint))
    if not path.exists():
        if any(not is_temporary(file) for file in folder.iterdir()):
            raise ValueError(f"{folder} holds something else than an unfinished run: choose another folder")
        _write_json(path, wanted)
        return
    there = _read_json(path)
    if not isinstance(there, dict):
        raise ValueError(f"{path} cannot be read: choose another folder, or delete this one to start again")
    names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if names:
        differences = "; ".join(f"{name} {there.get(name)}, now {wanted.get(name)}" for name in names)
        raise ValueError(
            f"{folder} holds an unfinished run with other arguments ({differences}): choose another folder, or delete "
            "this one to start again"
        )


def clear(folder: Path) -> None:
    """Remove what the run kept. Checksums go after the batches, so that a run killed here is known to be finished."""
    if (folder / "batches").exists():
        shutil.rmtree(folder / "batches")
    for name in (_CHECKSUMS, _FINGERPRINT):
        (folder / name).unlink(missing_ok=True)
    for file in folder.iterdir():
        if is_temporary(file):
            file.unlink()


def save_checksums(folder: Path, checksums: list[int]) -> None:
    """Record the checksums of the leading parts of the output, which are then finished."""
    _write_json(folder / _CHECKSUMS, checksums)


def intact_checksums(folder: Path, checksum: Callable[[int], int]) -> list[int]:
    """The recorded checksums of the leading parts of the output that still have them."""
    content = _read_json(folder / _CHECKSUMS)
    recorded: list[int] = content if isinstance(content, list) else []
    for n, value in enumerate(recorded):
        if checksum(n) != value:
            return recorded[:n]
    return recorded


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value))


def network_fingerprint(network: Storm) -> dict[str, Any]:
    """The network's configuration, dtype and weights, and torch's version, since another one may round otherwise."""
    return {
        "config": asdict(network.config),
        "dtype": str(network.final.weight.dtype),
        "weights": digest(*network.state_dict().values()),
        "torch": torch.__version__,
    }


def digest_of_samples(array: ArrayLike, grid_first: bool = False) -> str:
    """The shape and dtype of an array, and a digest of five points: the corners and the middle."""
    height, width = array.shape[:2] if grid_first else array.shape[-2:]
    points = [*product((0, height - 1), (0, width - 1)), (height // 2, width // 2)]
    samples = [read_piece(array, ((i, i + 1),), ((j, j + 1),), grid_first=grid_first) for i, j in points]
    return f"{tuple(array.shape)} {native_dtype(array).name} {digest(*samples)}"


def digest(*tensors: Tensor) -> str:
    """A digest of the bytes of some tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
