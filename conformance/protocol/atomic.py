"""Atomic file replacement: a reader finds the old file or the new one, never a part of either, whoever else writes."""

import os
from pathlib import Path
from uuid import uuid4

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name of its own in the same folder, then rename it into place.

    The folder is made where there is none. A failure or an interrupt leaves the old file intact and no temporary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
