"""Mutants: wrong ports, on which the suite is tried, and honest variants, on which it must raise no alarm.

`python -m conformance mutants` tries them all; `python -m conformance --adapter conformance.mutants:gate_reversed`
shows what the author of one of them would be told. `MUTANTS` has them by name.
"""

from functools import lru_cache

from conformance.adapter import Adapter
from conformance.mutants.catalogue import MUTANTS
from conformance.mutants.mutant import Edit, Mutant, MutantPort, Patch

__all__ = ["MUTANTS", "Edit", "Mutant", "Patch", "adapter_of"]


def adapter_of(mutant: Mutant) -> Adapter:
    """The port with this fault; it calls itself by the mutant's name."""
    return _port(mutant.name) if MUTANTS.get(mutant.name) is mutant else MutantPort(mutant.name, mutant.patches)


@lru_cache(None)
def _port(name: str) -> MutantPort:
    return MutantPort(name, MUTANTS[name].patches)


def __getattr__(name: str) -> Adapter:
    """A mutant as an adapter, by its name: what `--adapter conformance.mutants:NAME` loads."""
    if name in MUTANTS:
        return adapter_of(MUTANTS[name])
    raise AttributeError(f"there is no mutant {name!r}")
