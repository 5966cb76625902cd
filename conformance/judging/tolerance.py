"""Tolerances by class of result, each with its derivation in words.

exact         indices, copies and other results without rounding: equal bit for bit, but for the sign of zero
ulp           float64 scalars with an expected value rounded once from high precision: a count of its ULPs
bound         at most k u scale with k derived on paper; u is the unit round-off of the output's dtype
monte_carlo   chains of operations: RMS and largest error at most k times the worst of S runs of the reference whose
              every operation is randomly rounded in the dtype of the run, [NUM-13]
must_reject   the input is to be refused, and its valid counterpart is not
either        the specification allows a refusal as well as the right values

Nothing here is adjustable from outside.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from conformance.adapter import Array
from conformance.protocol.operations import UNIT

__all__ = [
    "Bound",
    "Either",
    "Exact",
    "Limits",
    "Measured",
    "MonteCarlo",
    "MustReject",
    "Tolerance",
    "Ulp",
    "from_json",
    "to_json",
]


@dataclass(frozen=True)
class Measured:
    """The error of one output, its limit, the unit of both, and the index of the worst element."""

    error: float
    limit: float
    unit: str
    where: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """True when the error is within the limit."""
        return self.error <= self.limit

    @property
    def fraction(self) -> float:
        """Error over limit; infinite when the limit is zero and the error is not."""
        return self.error / self.limit if self.limit > 0 else float("inf") if self.error else 0.0


def _worst(error: Array, limit: float, unit: str) -> Measured:
    if error.size == 0:
        return Measured(0.0, limit, unit, ())
    where = np.unravel_index(int(np.argmax(error)), error.shape)
    return Measured(float(error[where]), limit, unit, tuple(int(i) for i in where))


@dataclass(frozen=True)
class Exact:
    """Every element is equal."""

    why: str
    kind: ClassVar[str] = "exact"

    def measure(self, got: Array, expected: Array, dtype: str, name: str) -> Measured:
        different = got != expected
        first = _worst(different.astype(np.float64), 0.0, "")
        return Measured(float(different.sum()), 0.0, "values that differ", first.where)


@dataclass(frozen=True)
class Ulp:
    """Errors of at most `count` units in the last place of the expected float64 value."""

    count: float
    why: str
    kind: ClassVar[str] = "ulp"

    def measure(self, got: Array, expected: Array, dtype: str, name: str) -> Measured:
        return _worst(np.abs(got - expected) / np.spacing(np.abs(expected)), self.count, "ULP")


@dataclass(frozen=True)
class Bound:
    """Errors of at most k u scale; the scale is the largest expected magnitude unless it is given."""

    k: float
    why: str
    scale: float | None = None
    kind: ClassVar[str] = "bound"

    def measure(self, got: Array, expected: Array, dtype: str, name: str) -> Measured:
        scale = self.scale if self.scale is not None else float(np.abs(expected).max(initial=0.0))
        return _worst(np.abs(got - expected), self.k * UNIT[dtype] * scale, "absolute")


@dataclass(frozen=True)
class Limits:
    """Limits of one output in one dtype, with the factor k already in them."""

    rms: float
    largest: float


@dataclass(frozen=True)
class MonteCarlo:
    """Limits by dtype of the run and output, from `runs` randomly rounded runs of the reference."""

    why: str
    limits: Mapping[str, Mapping[str, Limits]]
    k: float
    runs: int
    seed: int
    kind: ClassVar[str] = "monte_carlo"

    def measure(self, got: Array, expected: Array, dtype: str, name: str) -> Measured:
        limits, error = self.limits[dtype][name], np.abs(got - expected)
        largest = _worst(error, limits.largest, "absolute")
        rms = float(np.sqrt((error**2).mean())) if error.size else 0.0
        mean = Measured(rms, limits.rms, "root mean square", largest.where)
        return max(mean, largest, key=lambda measured: measured.fraction)


@dataclass(frozen=True)
class MustReject:
    """The inputs must be refused with a ValueError."""

    why: str
    kind: ClassVar[str] = "must_reject"


Numeric = Exact | Ulp | Bound | MonteCarlo


@dataclass(frozen=True)
class Either:
    """Either the right values or a refusal."""

    inner: Numeric
    why: str
    kind: ClassVar[str] = "either"

    def measure(self, got: Array, expected: Array, dtype: str, name: str) -> Measured:
        return self.inner.measure(got, expected, dtype, name)


Tolerance = Numeric | MustReject | Either
_KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (Exact, Ulp, Bound, MonteCarlo, MustReject, Either)}


def to_json(tolerance: Tolerance) -> dict[str, Any]:
    """Write a tolerance as JSON data, its class under `class`."""
    fields = {f.name: getattr(tolerance, f.name) for f in dataclasses.fields(tolerance)}
    if isinstance(tolerance, Either):
        fields["inner"] = to_json(tolerance.inner)
    if isinstance(tolerance, MonteCarlo):
        fields["limits"] = {
            dtype: {name: [limits.rms, limits.largest] for name, limits in outputs.items()}
            for dtype, outputs in tolerance.limits.items()
        }
    return {"class": tolerance.kind} | fields


def from_json(data: Mapping[str, Any]) -> Tolerance:
    """Read a tolerance from JSON data: the inverse of `to_json`."""
    fields = {name: value for name, value in data.items() if name != "class"}
    if data["class"] == "either":
        fields["inner"] = from_json(fields["inner"])
    if data["class"] == "monte_carlo":
        fields["limits"] = {
            dtype: {name: Limits(*pair) for name, pair in outputs.items()}
            for dtype, outputs in fields["limits"].items()
        }
    tolerance: Tolerance = _KINDS[data["class"]](**fields)
    return tolerance
