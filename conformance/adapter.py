"""What a port shows to the suite: `describe()` and `run(op, inputs, params, probes)`, NumPy arrays in and out.

The operations with their inputs, params and outputs are in README.md. A port that refuses an input says so with a
ValueError; one that lacks an operation raises or returns `Unsupported`, which is never a pass. Whatever else goes wrong
between suite and port (it dies, hangs, or breaks the protocol) is a `PortFault`.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

__all__ = [
    "BUNDLED",
    "Adapter",
    "AdapterError",
    "Array",
    "Arrays",
    "Info",
    "Params",
    "PortFault",
    "Unsupported",
    "describe",
    "load_adapter",
]

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Params = Mapping[str, Any]


# Adapters that come with the suite, by the names that --adapter takes.
BUNDLED = {
    "storm_ref": "conformance.adapters.reference:adapter",
    "numpy": "conformance.adapters.numpy.port:adapter",
}


class Unsupported(Exception):
    """The port has no such operation, or not with these params. May be raised or returned."""


class PortFault(Exception):
    """The port did not answer as it must: it died, ran out of time or broke the protocol. `kind` is one word."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind  # crash, timeout, protocol
        super().__init__(message)


class AdapterError(Exception):
    """The adapter cannot be used at all: the suite stops before the first case."""


@dataclass(frozen=True)
class Info:
    """Who the port is and what it claims."""

    name: str
    version: str
    ops: frozenset[str]  # operations it implements; the others are not called
    dtypes: tuple[str, ...] = ("float64",)  # of the network: float64, float32, bfloat16
    profiles: tuple[str, ...] = ()  # profiles it claims; none named: every profile it has an operation for


class Adapter(Protocol):
    """The protocol: any object with these two methods will do."""

    def describe(self) -> Info:
        """Name, version, operations and dtypes."""
        ...

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array] | Unsupported:
        """One operation: its outputs by name. `params["dtype"]` is the dtype of the network in this run.

        `probes` names intermediates that would help a diagnosis; a port returns those it has as `probe.NAME`, beside
        the outputs, and may ignore them all. Raises ValueError for inputs that the specification refuses.
        """
        ...


def load_adapter(name: str) -> Adapter:
    """The bundled adapter of that name, or `module:object`: an adapter, or what makes one when it is called.

    Modules of the working directory are found. Raises AdapterError with the reason in a sentence.
    """
    module_name, colon, path = BUNDLED.get(name, name).partition(":")
    if not (colon and module_name and path):
        raise AdapterError(f"an adapter is given as MODULE:OBJECT, for instance my_port.adapter:adapter, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
        return _instance(found)
    except AttributeError as error:
        raise AdapterError(f"the adapter {name} is not there: {error}") from error
    except (Exception, SystemExit) as error:
        raise AdapterError(f"the adapter {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _instance(found: Any) -> Adapter:
    complete = callable(getattr(found, "describe", None)) and callable(getattr(found, "run", None))
    adapter = found if complete and not isinstance(found, type) else found() if callable(found) else found
    if isinstance(adapter, type) or not all(callable(getattr(adapter, part, None)) for part in ("describe", "run")):
        raise TypeError(
            "an adapter has the methods describe() and run(op, inputs, params, probes); "
            f"{type(adapter).__name__} has not"
        )
    return adapter  # type: ignore[no-any-return]


def describe(adapter: Adapter) -> Info:
    """The port's Info. Raises AdapterError when describe() fails or returns something else."""
    try:
        info = adapter.describe()
    except AdapterError:
        raise
    except (Exception, SystemExit) as error:
        raise AdapterError(f"the adapter's describe() failed: {type(error).__name__}: {error}") from error
    if not isinstance(info, Info):
        raise AdapterError(f"the adapter's describe() must return conformance.adapter.Info, got {type(info).__name__}")
    if not all(isinstance(text, str) for text in (info.name, info.version, *info.ops, *info.dtypes, *info.profiles)):
        raise AdapterError(f"name, version, ops, dtypes and profiles of the adapter's Info must be strings, got {info}")
    return info
