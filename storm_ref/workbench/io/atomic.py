"""Files that are whole or as before: written under a temporary name beside their own, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file or folder to; when the block ends it takes the place of `path`.

    Raises OSError naming path and remedy when anything fails: the old file is intact then, the temporary one gone.
    """
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        yield part
        _exchange(part, path, old)
    except Exception as error:
        raise OSError(
            f"{path} could not be written ({error}), what was there before is unchanged: free space, check that the "
            "folder exists and may be written, or choose another path"
        ) from error
    finally:
        _remove(part)


def _exchange(part: Path, path: Path, old: Path) -> None:
    if not (part.is_dir() and path.exists()):  # a file never takes the place of a folder: os.replace refuses
        os.replace(part, path)
        return
    os.replace(path, old)  # a folder cannot be renamed onto anything: what is there steps aside until the new one is
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
