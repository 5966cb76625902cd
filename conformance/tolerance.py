"""How near is near enough: exact, a count of ULPs, or a bound k eps scale, each with its derivation in words.

exact  indices, copies and other results without rounding: equal bit for bit, but for the sign of zero
ulp    scalars with an expected value rounded once from high precision: |got - expected| <= n spacing(expected)
bound  chains of float64 operations: max |got - expected| <= k eps scale, eps = 2^-52

For long chains k is measured rather than counted, [NUM-3]: the same formula in float32 and in float64 differ by
a eps32 scale, which gives the amplification a of this chain on these inputs. Rounding errors grow in proportion to eps,
so that a float64 port may differ by about a eps scale; k = max(16 a, 16) leaves room for another order of summation and
another formula of the same quantity.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from conformance.adapter import Array

__all__ = ["EPS", "Bound", "Exact", "Measured", "MustReject", "Tolerance", "Ulp", "chain_bound"]

EPS = float(np.finfo(np.float64).eps)
EPS_SINGLE = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Measured:
    """The largest error of one output, its limit, the unit of both, and the index of the worst element."""

    error: float
    limit: float
    unit: str
    where: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def _worst(error: Array, limit: float, unit: str) -> Measured:
    if error.size == 0:
        return Measured(0.0, limit, unit, ())
    where = np.unravel_index(int(np.argmax(error)), error.shape)
    return Measured(float(error[where]), limit, unit, tuple(int(i) for i in where))


@dataclass(frozen=True)
class Exact:
    """Equal, element by element."""

    why: str
    kind: ClassVar[str] = "exact"

    def measure(self, got: Array, expected: Array) -> Measured:
        different = got != expected
        first = _worst(different.astype(np.float64), 0.0, "")
        return Measured(float(different.sum()), 0.0, "values that differ", first.where)


@dataclass(frozen=True)
class Ulp:
    """At most `count` units in the last place of the expected value."""

    count: float
    why: str
    kind: ClassVar[str] = "ulp"

    def measure(self, got: Array, expected: Array) -> Measured:
        return _worst(np.abs(got - expected) / np.spacing(np.abs(expected)), self.count, "ULP")


@dataclass(frozen=True)
class Bound:
    """At most k eps scale; the scale is the largest expected magnitude unless it is given."""

    k: float
    why: str
    scale: float | None = None
    kind: ClassVar[str] = "bound"

    def measure(self, got: Array, expected: Array) -> Measured:
        scale = self.scale if self.scale is not None else float(np.abs(expected).max(initial=0.0))
        return _worst(np.abs(got - expected), self.k * EPS * scale, "absolute")


@dataclass(frozen=True)
class MustReject:
    """The inputs are to be refused with a ValueError."""

    why: str
    kind: ClassVar[str] = "must_reject"


Tolerance = Exact | Ulp | Bound | MustReject


def chain_bound(formula: Callable[[dict[str, Array]], Array], inputs: Mapping[str, Array], what: str) -> Bound:
    """The bound for a long chain, k measured by running `formula` on the inputs in float32 and in float64."""
    single = {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in inputs.items()}
    rounded = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in single.items()}
    fine, coarse = formula(rounded), formula(single)
    if coarse.dtype != np.float32 or fine.dtype != np.float64:
        raise TypeError(f"{what}: the formula must keep the dtype of its inputs, got {coarse.dtype} and {fine.dtype}")
    scale = float(np.abs(fine).max())
    k = 16 * float(np.abs(coarse - fine).max()) / (EPS_SINGLE * scale)
    why = f"{what}: in float32 this chain errs by {k / 16:.3g} eps of its largest value; 16 times that in float64"
    return Bound(max(k, 16.0), why)
