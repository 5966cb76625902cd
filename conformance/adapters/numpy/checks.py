"""Checks of the NumPy port's inputs, [CONV-10]: each message names the thing, the value seen and the remedy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array

__all__ = ["batch", "falling", "finite", "integer", "positive", "rounding_symmetric", "shape", "variances"]


def integer(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is not too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; give an integer of at least {least}")
    return int(value)


def positive(name: str, value: Any) -> Array:
    """Numbers above zero and finite, as float64."""
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} is {_seen(array, ~((array > 0) & np.isfinite(array)))}; give finite values above 0")
    return array


def finite(name: str, value: Any) -> Array:
    """An array without a NaN or an infinity."""
    array = np.asarray(value)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {_seen(array, ~np.isfinite(array))}; leave out or fill what is missing first")
    return array


def shape(name: str, value: Any, *wanted: int | None) -> Array:
    """An array of the shape wanted, None standing for any size."""
    array = np.asarray(value)
    fits = array.ndim == len(wanted) and all(w in (None, n) for n, w in zip(array.shape, wanted, strict=True))
    if not fits:
        text = ", ".join("any" if n is None else str(n) for n in wanted)
        raise ValueError(f"{name} has the shape {list(array.shape)}; give [{text}]")
    return array


def batch(parts: Mapping[str, Array], size: int | None = None) -> int:
    """The batch that all parts share, each with as many samples or one for all, [NET-6]."""
    samples = max(len(part) for part in parts.values()) if size is None else size
    for name, part in parts.items():
        if len(part) not in (1, samples):
            raise ValueError(
                f"{name} of shape {list(part.shape)} has {len(part)} samples; give {samples}, or 1 for all"
            )
    return samples


def falling(sigmas: Array) -> Array:
    """Noise levels that fall strictly and end in zero, [EDM-12]."""
    levels = finite("sigmas", shape("sigmas", sigmas, None))
    if len(levels) < 2 or not (np.diff(levels) < 0).all() or levels[-1] != 0:
        raise ValueError(f"sigmas are {levels.tolist()}; give at least two levels that fall strictly and end in 0")
    return levels


def variances(value: Array, variance: Array) -> tuple[Array, Array]:
    """Observations and their error variances, one each, [GUIDE-6] and [GUIDE-7]."""
    value = finite("value", shape("value", value, None))
    return value, positive("variance", shape("variance", variance, len(value)))


def rounding_symmetric(name: str, matrix: Array) -> Array:
    """A square matrix that is symmetric but for rounding."""
    square = finite(name, shape(name, matrix, len(matrix), len(matrix)))
    if np.abs(square - square.T).max(initial=0) > 1e-12 * np.abs(square).max(initial=0):
        raise ValueError(f"{name} differs from its transpose by {np.abs(square - square.T).max()}; give a covariance")
    return square


def _seen(array: Array, bad: Array) -> str:
    if array.ndim == 0:
        return str(array)
    return f"{array[bad][0]} at {np.argwhere(bad)[0].tolist()}"
