"""The interface of a port: `describe()` and `run(op, inputs, params, probes)`, NumPy arrays in and out.

The operations with their inputs, params and outputs are in README.md. A port that refuses an input says so with a
ValueError; one that lacks an operation raises or returns `Unsupported`, which is never a pass. A port that dies, hangs
or breaks the protocol causes a `PortFault`.
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
# Modules of the suite that have moved, and what they are called now.
_MOVED = {
    "conformance.adapters.storm_ref": "conformance.adapters.reference",
    "conformance.adapters.parallel": "conformance.adapters.reference_ranks",
    "conformance.adapters.numpy_port": "conformance.adapters.numpy.port",
}


class Unsupported(Exception):
    """The port has no such operation, or not with these params. May be raised or returned."""


class PortFault(Exception):
    """The port died, ran out of time or broke the protocol; `kind` is crash, timeout or protocol."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class AdapterError(Exception):
    """The adapter cannot be used at all: the suite stops before the first case."""


@dataclass(frozen=True)
class Info:
    """The name of a port and what it claims."""

    name: str
    version: str
    ops: frozenset[str]  # operations that it implements; the others are not called
    dtypes: tuple[str, ...] = ("float64",)  # of the network: float64, float32, bfloat16
    profiles: tuple[str, ...] = ()  # profiles that it claims; empty: every profile that it has an operation for


class Adapter(Protocol):
    """Any object with these two methods is an adapter."""

    def describe(self) -> Info:
        """Return name, version, operations and dtypes."""
        ...

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array] | Unsupported:
        """Run one operation and return its outputs by name. `params["dtype"]` is the dtype of the network in this run.

        `probes` names intermediates that would help a diagnosis; a port returns those it has as `probe.NAME` beside
        the outputs, and may ignore them all. Raises ValueError for inputs that the specification refuses.
        """
        ...


def load_adapter(name: str) -> Adapter:
    """Load the bundled adapter of that name, or `module:object`: an adapter, or what makes one when it is called.

    Modules of the working directory are found. Raises AdapterError with the reason in a sentence.
    """
    module_name, colon, path = BUNDLED.get(name, name).partition(":")
    if not (colon and module_name and path):
        raise AdapterError(f"an adapter is given as MODULE:OBJECT, for instance my_port.adapter:adapter, got {name!r}")
    if module_name in _MOVED:
        raise AdapterError(f"{module_name} has moved: the adapter is now {_MOVED[module_name]}:{path}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loaded: Any = importlib.import_module(module_name)
        for part in path.split("."):
            loaded = getattr(loaded, part)
        return _instance(loaded)
    except AttributeError as error:
        raise AdapterError(f"the adapter {name} is not there: {error}") from error
    except ModuleNotFoundError as error:
        if not module_name.startswith("conformance.") or str(error.name).startswith("conformance"):
            raise AdapterError(f"the adapter {name} cannot be loaded: {type(error).__name__}: {error}") from error
        raise AdapterError(
            f"the adapter {name} needs the packages of the reference, {error.name} is not installed: "
            "pip install 'storm-ref[reference]'"
        ) from error
    except (Exception, SystemExit) as error:
        raise AdapterError(f"the adapter {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _is_adapter(candidate: Any) -> bool:
    methods = (getattr(candidate, name, None) for name in ("describe", "run"))
    return not isinstance(candidate, type) and all(callable(method) for method in methods)


def _instance(loaded: Any) -> Adapter:
    """The object itself if it is an adapter, else what calling it makes. Raises TypeError when that is no adapter."""
    adapter = loaded() if callable(loaded) and not _is_adapter(loaded) else loaded
    if not _is_adapter(adapter):
        raise TypeError(
            "an adapter has the methods describe() and run(op, inputs, params, probes); "
            f"{type(adapter).__name__} has not"
        )
    return adapter  # type: ignore[no-any-return]


def describe(adapter: Adapter) -> Info:
    """Ask a port for its Info. Raises AdapterError when describe() fails or returns something else."""
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
