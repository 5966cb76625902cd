"""A case: one operation on stated inputs, what must come out, how near, and what a failure means."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.adapter import Array
from conformance.tolerance import MustReject, Tolerance

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """What to run and what must come out. Raises ValueError when the parts contradict one another.

    A case that must be rejected has a valid `neighbour`, inputs and params that differ in the offence alone: a port
    that refuses those too refuses for another reason, or refuses everything, and does not pass.
    """

    id: str  # chapter/name
    op: str
    requirements: tuple[str, ...]  # ids as they stand in the specification: EDM-5
    tolerance: Tolerance
    meaning: str  # one line: what a failure says about the port
    inputs: Mapping[str, Array] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Array] = field(default_factory=dict)
    neighbour: tuple[Mapping[str, Array], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]+/[a-z0-9-]+", self.id):
            raise ValueError(f"a case id is chapter/name in lower case, got {self.id!r}")
        wrong = [r for r in self.requirements if not re.fullmatch(r"[A-Z]+-\d+", r)]
        if wrong or not self.requirements:
            raise ValueError(f"{self.id}: requirements are ids such as EDM-5, at least one, got {self.requirements}")
        rejects = isinstance(self.tolerance, MustReject)
        if rejects == bool(self.expected) or rejects != (self.neighbour is not None):
            raise ValueError(f"{self.id}: a case either expects values, or must be rejected and has a valid neighbour")

    @property
    def chapter(self) -> str:
        """The chapter the case belongs to, the first part of its id."""
        return self.id.split("/")[0]
