"""Which mistake does this port's error look like? The wrong ports of the catalogue are asked to make the same one.

A case on which the port fails is given to every mutant; those whose result is the port's are suspected. Several often
agree on one case, so that these are compared on more: on all cases of the operations that the port has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.adapter import Array, describe
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import FAILED, Outcome, judge, judge_law, measure
from conformance.mutants import MUTANTS, adapter_of
from conformance.mutants.mutant import Place, Traced, codes, in_ranks, place
from conformance.ports.checked import Fault, Missing, Port, Refused, Wrong
from conformance.protocol.operations import ancestors

__all__ = ["LineUp", "Suspect", "named"]

FAR = 0.5  # a mutant whose result is further off than this, in units of the port's own error, is not suspected
TIED = 1e-3


@dataclass(frozen=True)
class Suspect:
    """A mutant and how far its result is from the port's: 0 the same, 1 as far as the port's is from the truth."""

    name: str
    fault: str
    distance: float


@dataclass(frozen=True)
class Answer:
    """What a port does with a case: gives values, or how it fails to."""

    kind: str  # values, accepted, refused, fault, wrong, missing
    values: Mapping[str, Array]
    failed: bool


def answer(port: Port, case: Case) -> Answer:
    """The port's answer, and whether the suite would fail it; a refusal's valid neighbour is asked as well."""
    dtype = case.dtype or port.dtype
    if case.valid_counterpart is not None:
        return Answer(_outcome_of_call(port, case, dtype), {}, judge(port, case).verdict in FAILED)
    try:
        values = port.outputs(case.op, case.inputs, case.params, case.expected, dtype)
    except (Refused, Fault, Wrong, Missing) as error:
        allowed = isinstance(error, Missing) or (isinstance(error, Refused) and case.may_refuse)
        return Answer(type(error).__name__.lower(), {}, not allowed)
    with np.errstate(all="ignore"):
        measured, _ = measure(case, values, dtype)
    return Answer("values", values, measured is not None and not measured.passed)


def _outcome_of_call(port: Port, case: Case, dtype: str) -> str:
    try:
        port.call(case.op, case.inputs, case.params, (), dtype)
    except (Refused, Fault, Wrong, Missing) as error:
        return type(error).__name__.lower()
    return "accepted"


def distance(port: Answer, mutant: Answer, case: Case) -> float:
    """0: the same result; 1: as far from the port's as the port's is from the truth; infinite: another kind of one."""
    if port.kind != mutant.kind:
        return np.inf
    if port.kind != "values":
        return 0.0
    apart = off = 0.0
    for name in port.values:
        truth = np.nan_to_num(case.expected[name].astype(np.float64))
        scale = float(np.sqrt((truth**2).mean())) or 1.0 if truth.size else 1.0
        mine, other = (np.nan_to_num(values[name].astype(np.float64)) for values in (port.values, mutant.values))
        apart += float((((mine - other) / scale) ** 2).sum())
        off += float((((mine - truth) / scale) ** 2).sum())
    if off == 0:
        return 0.0 if apart == 0 else np.inf
    return float(np.sqrt(apart / off))


class LineUp:
    """The catalogue in one dtype; what a mutant answered is kept, since several failures are often asked about.

    A mutant is asked only where the code that it changes runs; elsewhere it is the reference, which is right.
    """

    def __init__(self, cases: Sequence[Case], dtype: str) -> None:
        self.cases, self.dtype = cases, dtype
        self.ports = {name: _port(name, dtype) for name in MUTANTS}
        self._changed = {name: _places(name) for name in MUTANTS}
        self._answers: dict[tuple[str, str], Answer | None] = {}
        self._reached: dict[str, frozenset[Place]] = {}

    def answer(self, name: str, case: Case) -> Answer | None:
        """A mutant's answer; None where it is the reference's."""
        key = (name, case.id)
        if key not in self._answers:
            changed = self._changed[name]
            if in_ranks(MUTANTS[name].patches):
                reached = case.chapter == "parallel"
            else:
                reached = changed is None or bool(changed & self._reach(case))
            self._answers[key] = answer(self.ports[name], case) if reached else None
        return self._answers[key]

    def _reach(self, case: Case) -> frozenset[Place]:
        if case.id not in self._reached:
            traced = Traced()
            judge(Port(traced, describe(traced), self.dtype), case)
            self._reached[case.id] = frozenset(place(code) for code in traced.seen)
        return self._reached[case.id]

    def suspects(self, port: Port, outcome: Outcome) -> list[Suspect]:
        """Mutants that do what this port does, the likeliest first; none when the outcome is a pass."""
        if outcome.verdict not in FAILED:
            return []
        subject = outcome.subject
        near = self._near_law(subject) if isinstance(subject, Law) else self._near(port, subject)
        best = min(near.values(), default=0.0)
        tied = [name for name, far in near.items() if far <= best + TIED]
        agreement = self._agreement(port, tied, subject.op) if len(tied) > 1 else {}
        ranked = sorted(near, key=lambda name: (name not in tied, -agreement.get(name, 0.0), near[name]))
        return [Suspect(name, MUTANTS[name].fault, near[name]) for name in ranked]

    def _near(self, port: Port, case: Case) -> dict[str, float]:
        mine = answer(port, case)
        found = {name: self.answer(name, case) for name in self.ports}
        near = {name: distance(mine, other, case) for name, other in found.items() if other and other.failed}
        return {name: far for name, far in near.items() if far < FAR}

    def _near_law(self, law: Law) -> dict[str, float]:
        """A law has no values to compare: mutants of its chapter, and those it targets, which break it too."""
        known = [name for name in self.ports if name in law.targets or MUTANTS[name].chapter == law.chapter]
        return {n: 0.0 for n in known if judge_law(self.ports[n], law, 0, shrink=False).verdict in FAILED}

    def _agreement(self, port: Port, names: Sequence[str], op: str) -> dict[str, float]:
        """The share of cases of the operation and its parts in which each mutant does what the port does: passes, or
        fails with the same result.
        """
        family = {op} | ancestors(op)
        asked = [case for case in self.cases if case.op in family and port.has(case.op)]
        alike = dict.fromkeys(names, 0)
        answers = [answer(port, case) for case in asked]
        for name in names:  # one after another: ranks of a mutant stay warm while it is asked
            for case, mine in zip(asked, answers, strict=True):
                other = self.answer(name, case)
                if other is None or not other.failed:
                    alike[name] += not mine.failed
                else:
                    alike[name] += mine.failed and distance(mine, other, case) < 0.1
        return {name: count / max(len(asked), 1) for name, count in alike.items()}


def _places(name: str) -> frozenset[Place] | None:
    found = codes(MUTANTS[name].patches)
    return None if found is None else frozenset(place(code) for code in found)


def _port(name: str, dtype: str) -> Port:
    adapter = adapter_of(MUTANTS[name])
    return Port(adapter, describe(adapter), dtype)


def named(lineup: LineUp, mutant: str, case: Case) -> bool:
    """Whether the first suspect for a mutant's own failure is that mutant."""
    port = lineup.ports[mutant]
    found = lineup.suspects(port, judge(port, case))
    return bool(found) and found[0].name == mutant
