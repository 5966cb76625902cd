"""Mutants are wrong ports that the suite must catch; honest variants are right ports that it must not accuse.

`python -m conformance mutants` tries the suite on all of them, and `python -m conformance --adapter
conformance.mutants:gate_reversed` shows what the author of one would be told. `MUTANTS` has the mutants by name. The
package needs torch, for every mutant is the reference with a fault.
"""

from functools import lru_cache

from conformance.adapter import Adapter
from conformance.mutants.catalogue import MUTANTS
from conformance.mutants.mutant import Edit, Mutant, MutantPort, Patch

__all__ = ["MUTANTS", "Edit", "Mutant", "Patch", "adapter_of"]


def adapter_of(mutant: Mutant) -> Adapter:
    """Return the port with this fault, which calls itself by the mutant's name."""
    return _port(mutant.name) if MUTANTS.get(mutant.name) is mutant else MutantPort(mutant.name, mutant.patches)


@lru_cache(None)
def _port(name: str) -> MutantPort:
    return MutantPort(name, MUTANTS[name].patches)


def __getattr__(name: str) -> Adapter:
    """Return a mutant as an adapter by its name, for `--adapter conformance.mutants:NAME`."""
    if name in MUTANTS:
        return adapter_of(MUTANTS[name])
    raise AttributeError(f"there is no mutant {name!r}")
