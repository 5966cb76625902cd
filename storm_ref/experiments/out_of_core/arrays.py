"""Arrays on disk: what they must offer, and reading pieces of them."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import zarr
from torch import Tensor

__all__ = [
    "ArrayLike",
    "Runs",
    "WritableArray",
    "checksum",
    "create",
    "expect",
    "native_dtype",
    "open_array",
    "read_piece",
]

Runs = tuple[tuple[int, int], ...]  # [start, stop) of neighbouring indices; a tile across the date line has two


@runtime_checkable
class ArrayLike(Protocol):
    """Numbers on disk, such as a zarr.Array or a numpy.memmap."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""

    @property
    def dtype(self) -> Any:
        """A numpy dtype."""

    def __getitem__(self, key: Any, /) -> Any:
        """A piece, by slices as numpy takes them."""


@runtime_checkable
class WritableArray(ArrayLike, Protocol):
    """Numbers on disk that can be replaced."""

    def __setitem__(self, key: Any, value: Any, /) -> None:
        """Write a piece, by slices as numpy takes them."""


def create(path: Path, shape: Sequence[int], chunks: Sequence[int], dtype: str) -> zarr.Array[Any]:
    """Make a Zarr v3 array of zeros, uncompressed because noise does not shrink.

    Raises ValueError (zarr's) where there is one already.
    """
    return zarr.create_array(path, shape=tuple(shape), chunks=tuple(chunks), dtype=dtype, compressors=None)


def open_array(path: Path) -> zarr.Array[Any]:
    """Open a Zarr array of either version for reading and writing."""
    return zarr.open_array(path, mode="r+")


def native_dtype(array: ArrayLike) -> np.dtype[Any]:
    """The dtype of an array in the byte order of this machine."""
    native: np.dtype[Any] = np.dtype(array.dtype).newbyteorder("=")
    return native


def checksum(values: np.ndarray, before: int = 0) -> int:
    """The checksum of some values, or of these after others whose checksum is `before`."""
    return zlib.crc32(np.ascontiguousarray(values).data, before)


def read_piece(
    array: ArrayLike, rows: Runs, cols: Runs, before: tuple[slice, ...] = (), grid_first: bool = False
) -> Tensor:
    """A copy of array[*before, ..., rows, cols], or of array[rows, cols] for arrays whose first axes are the grid's."""
    axes = (0, 1) if grid_first else (-2, -1)
    index: tuple[Any, ...] = () if grid_first else (*before, ...)
    parts = [np.concatenate([np.asarray(array[(*index, slice(*r), slice(*c))]) for c in cols], axes[1]) for r in rows]
    whole = np.concatenate(parts, axes[0], dtype=native_dtype(array))
    return torch.from_numpy(np.ascontiguousarray(whole))


def expect(name: str, array: ArrayLike, shape: tuple[int, ...], dtypes: set[str] | None = None) -> None:
    """Raise ValueError unless an array has this shape and, if given, one of these dtypes."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(array.shape)}, but the network on this grid wants {shape}")
    dtype = native_dtype(array).name
    if dtypes is not None and dtype not in dtypes:
        allowed = " or ".join(sorted(dtypes))
        raise ValueError(f"{name}: dtype {dtype}, but it must be {allowed}; convert it, or make anew")
