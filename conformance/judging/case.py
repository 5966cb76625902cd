"""Cases: one operation on stated inputs, the values that must come out, how near, and what a failure means.

A *recipe* is a case before it is frozen: the same without the expected values and limits that come from the reference.
The recipes are in `conformance/cases/<chapter>.py`. `conformance/authoring/freeze.py` makes cases of them, and
`conformance/judging/vectors.py` reads these back; judging needs no reference.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.adapter import Arrays
from conformance.judging.tolerance import Bound, Either, Exact, MustReject, Tolerance, Ulp
from conformance.protocol.operations import DTYPES, OPERATIONS, PROFILES

__all__ = ["Case", "Chain", "Judge", "Recipe"]


@dataclass(frozen=True)
class Chain:
    """A chain of operations, to be judged by a Monte-Carlo bound that is measured when the case is frozen.

    why: the operations of the chain, in words.
    """

    why: str


# How a recipe says that it is judged. `Either` around a chain is a Chain with `or_refused`.
Judge = Exact | Ulp | Bound | Chain | MustReject


@dataclass(frozen=True)
class Recipe:
    """An operation with its inputs, and how the result is judged. Raises ValueError when the parts contradict.

    expected: values from elsewhere than the reference (integers, fractions, 50 digits, a closed form); where there are
    none the reference's float64 result is frozen, [NUM-8].
    valid_counterpart: inputs and params that differ from those of a case that must be rejected in the offence alone. A
    port that refuses these too refuses for another reason, or refuses everything, and does not pass.

    Narrow inputs must be representable in bfloat16, so that one expected value serves every dtype: make them with
    `conformance.judging.inputs.draw`.
    """

    id: str  # chapter/name
    op: str
    requirements: tuple[str, ...]  # ids as they stand in the specification: EDM-5
    profiles: tuple[str, ...]
    judge: Judge
    meaning: str  # one line: what a failure says about the port
    inputs: Arrays = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    expected: Arrays | None = None
    valid_counterpart: tuple[Arrays, Mapping[str, Any]] | None = None
    targets: tuple[str, ...] = ()  # names of the mutants that it is made for
    dtype: str | None = None  # the dtype it is always run in; None: that of the run
    or_refused: bool = False  # the specification allows a refusal too

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]+/[a-z0-9-]+", self.id):
            raise ValueError(f"a case id is chapter/name in lower case, got {self.id!r}")
        malformed = [name for name in self.requirements if not re.fullmatch(r"[A-Z]+-\d+", name)]
        if malformed or not self.requirements:
            raise ValueError(f"{self.id}: requirements are ids such as EDM-5, at least one, got {self.requirements}")
        if self.op not in OPERATIONS:
            raise ValueError(f"{self.id}: there is no operation {self.op!r}")
        if not self.profiles or set(self.profiles) - set(PROFILES):
            raise ValueError(f"{self.id}: profiles are some of {', '.join(PROFILES)}, got {self.profiles}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"{self.id}: the dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        rejects = isinstance(self.judge, MustReject)
        if rejects == (self.valid_counterpart is None) or (rejects and (self.expected is not None or self.or_refused)):
            raise ValueError(
                f"{self.id}: a case either expects values, or must be rejected and has a valid counterpart"
            )


@dataclass(frozen=True)
class Case:
    """A frozen recipe: all that judging needs."""

    id: str
    op: str
    requirements: tuple[str, ...]
    profiles: tuple[str, ...]
    tolerance: Tolerance
    meaning: str
    inputs: Arrays
    params: Mapping[str, Any]
    expected: Arrays
    valid_counterpart: tuple[Arrays, Mapping[str, Any]] | None = None
    targets: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def chapter(self) -> str:
        """The chapter the case belongs to, the first part of its id."""
        return self.id.split("/")[0]

    @property
    def public(self) -> bool:
        """True when the case counts for a profile."""
        return OPERATIONS[self.op].public

    @property
    def rejects(self) -> bool:
        """True when the inputs must be refused."""
        return isinstance(self.tolerance, MustReject)

    @property
    def may_refuse(self) -> bool:
        """True when the specification allows a refusal as well as the right values."""
        return isinstance(self.tolerance, Either)
