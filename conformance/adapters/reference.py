"""The reference as a port: every operation of storm_ref behind the protocol, `--adapter storm_ref`."""

from collections.abc import Mapping, Sequence
from typing import Any

import storm_ref
from conformance.adapter import Array, Info
from conformance.adapters import reference_operations, reference_ranks
from conformance.adapters.reference_operations import Operation, run_as
from conformance.protocol.operations import DTYPES

__all__ = ["OPERATIONS", "Reference", "Serial", "adapter", "serial"]

OPERATIONS: dict[str, Operation] = reference_operations.OPERATIONS | reference_ranks.OVER_RANKS


class Reference:
    """storm_ref behind the protocol; the operations of chapter 9 run on a pool of ranks on this machine."""

    def describe(self) -> Info:
        """Claim every operation in every dtype."""
        return Info("storm_ref", storm_ref.__version__, frozenset(OPERATIONS), DTYPES)

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes_asked: Sequence[str]
    ) -> Mapping[str, Array]:
        """Run one operation in the dtype of the run, NumPy arrays in and out."""
        return run_as(OPERATIONS, op, inputs, params, probes_asked)


class Serial(Reference):
    """The reference in one process, whatever the mesh; expected values of chapter 9 are frozen from it."""

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes_asked: Sequence[str]
    ) -> Mapping[str, Array]:
        """Run one operation; those of chapter 9 by the chapters before it."""
        return run_as(OPERATIONS | reference_ranks.SERIAL, op, inputs, params, probes_asked)


adapter = Reference()
serial = Serial()
