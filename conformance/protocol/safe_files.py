"""Files and lines that a port wrote are read with limits, never followed out of their folder, and checked before use.

Whatever is wrong with them is a PortFault of kind `protocol` whose message names it. The suite's own files are replaced
atomically.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from conformance.adapter import Array, PortFault

__all__ = [
    "FILE_LIMIT",
    "LINE_LIMIT",
    "file_to_arrays",
    "parse_object",
    "read_file",
    "safetensors_bytes",
    "write_atomically",
]

FILE_LIMIT = 256 * 2**20  # bytes; the largest output of the suite has some 100 KiB
HEADER_LIMIT = 2**20
LINE_LIMIT = 2**20


def read_file(name: str | Path, folder: int | None = None, limit: int = FILE_LIMIT) -> bytes:
    """Read a plain file of at most `limit` bytes; `folder` is the descriptor that a relative name starts from.

    Links, pipes and devices are refused. Raises PortFault, and FileNotFoundError when there is no such file.
    """
    label = Path(name).name
    try:  # without O_NONBLOCK a named pipe would wait for its writer
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else str(error.strerror)
        raise PortFault("protocol", f"the file {label} cannot be read: {why}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise PortFault("protocol", f"{label} is not a plain file of its own")
        if status.st_size > limit:
            raise PortFault("protocol", f"the file {label} has {status.st_size} bytes, more than {limit}")
        return _read(file, status.st_size)
    finally:
        os.close(file)


def _read(file: int, size: int) -> bytes:
    """Read at most `size` bytes: a file that grows meanwhile is cut."""
    parts: list[bytes] = []
    while size > 0 and (part := os.read(file, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole, making its folder if there is none: a reader sees the old contents or the new.

    The temporary file is this process's own, so that two processes that write one file do not mix their contents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def safetensors_bytes(arrays: Mapping[str, Array]) -> bytes:
    """A safetensors file of the arrays; scalars keep their shape []. Raises TypeError for other dtypes than numbers."""
    plain: dict[str, Array] = {}
    for name, value in arrays.items():
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise TypeError(f"the array {name} has dtype {value.dtype}, which the suite does not exchange")
        plain[name] = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
    return save(plain)


def file_to_arrays(data: bytes) -> dict[str, Array]:
    """The arrays of a safetensors file. Raises PortFault when it is damaged."""
    if int.from_bytes(data[:8], "little") > min(len(data), HEADER_LIMIT):
        raise PortFault("protocol", "the safetensors file is damaged: its header is longer than the file or than 1 MiB")
    try:
        return load(data)
    except KeyError as error:
        hint = "; bfloat16 travels as float32" if "BF16" in str(error) else ""
        raise PortFault("protocol", f"the safetensors file has arrays of type {error}{hint}") from error
    except Exception as error:
        raise PortFault("protocol", f"the safetensors file is damaged: {error}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object; bytes that are not UTF-8 become replacement characters. Raises PortFault for anything else."""
    try:
        parsed = json.loads(data.decode("utf-8", "replace"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PortFault("protocol", f"the answer is not JSON: {error}; it begins {data[:40]!r}") from error
    if not isinstance(parsed, dict):
        raise PortFault("protocol", f"the answer is not a JSON object but {type(parsed).__name__}")
    return parsed
