"""A port as the suite sees it: copies in, checked arrays out, and one exception for everything else that can happen.

Nothing that a port returns is trusted: outputs are named, shaped, typed and finite before anybody compares them.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conformance.adapter import Adapter, Array, Arrays, Info, Params, PortFault, Unsupported
from conformance.protocol.operations import OPERATIONS, UNIT, to_dtype
from conformance.protocol.ranks import RanksError, merge

__all__ = ["Fault", "Missing", "Port", "Refused", "Wrong", "printable"]


class Refused(Exception):
    """The port refused the input with a ValueError; the message is the port's."""


class Missing(Exception):
    """The port does not support the operation, or not with these params."""


class Fault(Exception):
    """The port raised what it should not, died, hung, or broke the protocol."""


class Wrong(Exception):
    """The port's answer cannot be compared: an output is missing, of another shape or dtype, or not finite."""


def printable(text: object, limit: int = 300) -> str:
    """Make a string of the port safe to print: one line, no control characters, not too long."""
    try:
        clean = "".join(c if c.isprintable() else " " for c in str(text))
    except Exception:
        return "(cannot be printed)"
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


class Port:
    """An adapter in a run of one dtype; `calls` counts the calls made."""

    def __init__(self, adapter: Adapter, info: Info, dtype: str = "float64") -> None:
        self.adapter = adapter
        self.info = info
        self.dtype = dtype
        self.calls = 0

    def has(self, *ops: str) -> bool:
        """True when the port claims all these operations."""
        return all(op in self.info.ops for op in ops)

    def unit(self, op: str, output: str, dtype: str | None = None) -> float:
        """The unit round-off of an output in this run."""
        return UNIT[(dtype or self.dtype) if OPERATIONS[op].is_narrow(output) else "float64"]

    def call(
        self, op: str, inputs: Arrays, params: Params, probes: Sequence[str] = (), dtype: str | None = None
    ) -> dict[str, Array]:
        """Call one operation. The outputs are a mapping of strings to arrays and otherwise unchecked; ranks are merged.

        Raises Refused, Missing, Fault or Wrong.
        """
        dtype = dtype or self.dtype
        if op not in self.info.ops:
            raise Missing(f"the port does not claim the operation {op}")
        if dtype not in self.info.dtypes:
            raise Missing(f"the port does not claim {dtype}")
        self.calls += 1
        settings = {**copy.deepcopy(dict(params)), "dtype": dtype}
        try:
            result = self.adapter.run(op, to_dtype(op, inputs, dtype), settings, tuple(probes))
        except Unsupported as reason:
            result = reason
        except PortFault as fault:
            raise Fault(f"{fault.kind}: {printable(fault)}") from fault
        except (Exception, SystemExit) as error:
            kind = Refused if isinstance(error, ValueError) else Fault
            message = printable(error)
            name = "" if kind is Refused else f"{type(error).__name__}: " if message else type(error).__name__
            raise kind(name + message) from error
        if isinstance(result, Unsupported):
            raise Missing(printable(result) or f"the port does not support {op} here")
        try:
            return merge(_readable(result), params)
        except RanksError as error:
            raise Wrong(printable(error)) from error

    def outputs(
        self, op: str, inputs: Arrays, params: Params, expected: Arrays, dtype: str | None = None
    ) -> dict[str, Array]:
        """Call one operation and return the outputs that `expected` names, floats as float64.

        They have the shapes of `expected` and the dtypes of this run, and are finite where `expected` is.

        Raises Refused, Missing, Fault, and Wrong with what makes an output incomparable.
        """
        result = self.call(op, inputs, params, (), dtype)
        wanted = to_dtype(op, expected, dtype or self.dtype)
        for name, value in wanted.items():
            _check(name, result, value, np.isfinite(value) if np.issubdtype(value.dtype, np.floating) else None)
        return {name: _wide(result[name]) for name in expected}

    def values(self, op: str, inputs: Arrays, params: Params, *names: str, dtype: str | None = None) -> list[Array]:
        """Call one operation for a law, which has no expected values: the named outputs, finite, floats as float64.

        Raises Refused, Missing, Fault and Wrong.
        """
        result = self.call(op, inputs, params, (), dtype)
        narrow = np.float64 if (dtype or self.dtype) == "float64" else np.float32
        for name in names:
            if name not in result:
                _check(name, result, np.empty(0))
            value = result[name]
            if np.issubdtype(value.dtype, np.floating):
                kind = narrow if OPERATIONS[op].is_narrow(name) else np.float64
                _check(name, result, np.empty(value.shape, kind))
        return [_wide(result[name]) for name in names]


def _wide(value: Array) -> Array:
    return value.astype(np.float64) if np.issubdtype(value.dtype, np.floating) else value


def _readable(result: object) -> dict[str, Array]:
    if not isinstance(result, Mapping):
        raise Wrong(f"the port returned {type(result).__name__} instead of a dict of arrays")
    try:
        return {str(name): _array(name, result[name]) for name in result}
    except Wrong:
        raise
    except Exception as error:  # a mapping that misbehaves when it is read
        raise Wrong(f"the port's result cannot be read: {type(error).__name__}: {printable(error)}") from error


def _array(name: object, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise Wrong(f"the output {printable(name, 40)} is {type(value).__name__}, not a NumPy array")
    return np.array(value)


def _check(name: str, result: Mapping[str, Array], wanted: Array, finite: Array | None = None) -> None:
    if name not in result:
        there = ", ".join(sorted(printable(key, 40) for key in result)) or "none"
        raise Wrong(f"the output {name} is missing; outputs there: {there}")
    got = result[name]
    if got.shape != wanted.shape:
        raise Wrong(f"the output {name} has shape {list(got.shape)}, expected {list(wanted.shape)}")
    if got.dtype != wanted.dtype:
        raise Wrong(f"the output {name} has dtype {got.dtype}, expected {wanted.dtype}")
    if not np.issubdtype(got.dtype, np.floating):
        return
    odd = ~np.isfinite(got) if finite is None else np.isfinite(got) != finite
    if odd.any():
        bad = np.argwhere(odd)
        first = f"{got[tuple(bad[0])].item()} at {bad[0].tolist()}"
        what = "are not finite" if finite is None or finite.all() else "differ in whether they are numbers"
        raise Wrong(f"the output {name} is {first}: {len(bad)} of {got.size} values {what}")
