"""Atomic file replacement: a reader finds the old file or the new one, never a part of either, whoever else writes.

New content goes to a temporary name of its own in the same folder, which ends in `.part`, and is renamed into place
when it is complete. A folder cannot be renamed onto another in one step: the old one first moves to a name that ends in
`.old`, so that for an instant there is none.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

__all__ = ["is_temporary", "remove", "replacing", "temporary_name"]


@contextmanager
def replacing(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name to write a file or a folder to; when the block ends, that takes the place of `path`.

    part: the temporary name, where several processes have to know it; None for one that nobody else has.

    Raises OSError, naming the path and the remedy, when anything fails in the block or after it. The old content is
    intact then, and the temporary is removed; so it is when the block is interrupted.
    """
    part = temporary_name(path) if part is None else part
    try:
        yield part
        if part.is_dir():
            _exchange_folders(part, path)
        else:
            os.replace(part, path)  # refuses to put a file in the place of a folder
    except Exception as error:
        raise OSError(
            f"{path} could not be written ({error}), what was there before is unchanged: free space, check that the "
            "folder exists and may be written, or choose another path"
        ) from error
    finally:
        remove(part)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process or thread uses."""
    return path.with_name(f".{path.name}.{uuid4().hex}.part")


def is_temporary(path: Path) -> bool:
    """Tell whether a file or folder has the name of a temporary, which only a killed process leaves behind."""
    return path.name.startswith(".") and path.name.endswith(".part")


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; do nothing where there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange_folders(part: Path, path: Path) -> None:
    """Move what is at `path` aside, the new folder in, and remove the old; a failure brings the old back."""
    old = part.with_suffix(".old")
    try:
        while True:
            with suppress(FileNotFoundError):
                os.replace(path, old)
            try:
                os.replace(part, path)
                break
            except OSError:
                if not path.exists():
                    raise
                remove(old)  # another writer was faster, so that its folder is the old one now
    finally:
        if path.exists():
            remove(old)
        elif old.exists():
            os.replace(old, path)
