"""The mistakes that a port's error looks like, found by asking the wrong ports of the catalogue to make the same one.

A case on which the port fails is given to every mutant; those whose result is the port's are likely. Several often
agree on one case, and these are compared on more: on all cases of the operations that the port has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.adapter import Array, describe
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import FAILED, Outcome, judge, judge_law, measure
from conformance.mutants import MUTANTS, adapter_of
from conformance.mutants.mutant import Place, Traced, place, shows_in
from conformance.ports.checked import Fault, Missing, Port, Refused, Wrong
from conformance.protocol.operations import ancestors

__all__ = ["Answer", "LikelyMutant", "LineUp", "answer_of", "distance"]

FAR = 0.5  # a mutant is not likely whose result is further off than this, in units of the port's own error
TIED = 1e-3
ALIKE = 0.1  # on further cases, results this near count as the same


@dataclass(frozen=True)
class LikelyMutant:
    """A mutant and how far its result is from the port's: 0 the same, 1 as far as the port's is from the truth."""

    name: str
    fault: str
    distance: float


@dataclass(frozen=True)
class Answer:
    """A port's answer to a case: its values, or how it failed to give any."""

    kind: str  # values, accepted, refused, fault, wrong, missing
    values: Mapping[str, Array]
    failed: bool


def answer_of(port: Port, case: Case) -> Answer:
    """Ask the port, and find out whether the suite would fail it; for a refusal, by its valid counterpart as well."""
    dtype = case.dtype or port.dtype
    if case.valid_counterpart is not None:
        return Answer(_kind_of_call(port, case, dtype), {}, judge(port, case).verdict in FAILED)
    try:
        values = port.outputs(case.op, case.inputs, case.params, case.expected, dtype)
    except (Refused, Fault, Wrong, Missing) as error:
        allowed = isinstance(error, Missing) or (isinstance(error, Refused) and case.may_refuse)
        return Answer(type(error).__name__.lower(), {}, not allowed)
    with np.errstate(all="ignore"):
        measured, _ = measure(case, values, dtype)
    return Answer("values", values, measured is not None and not measured.passed)


def _kind_of_call(port: Port, case: Case, dtype: str) -> str:
    try:
        port.call(case.op, case.inputs, case.params, (), dtype)
    except (Refused, Fault, Wrong, Missing) as error:
        return type(error).__name__.lower()
    return "accepted"


def distance(port: Answer, mutant: Answer, case: Case) -> float:
    """Return the distance of two answers, in units of the port's own error.

    It is 0 for the same result, 1 for one as far from the port's as the port's is from the truth, and infinite for an
    answer of another kind.
    """
    if port.kind != mutant.kind:
        return np.inf
    if port.kind != "values":
        return 0.0
    apart = off = 0.0
    for name, value in port.values.items():
        truth = np.nan_to_num(case.expected[name].astype(np.float64))
        mine = np.nan_to_num(value.astype(np.float64))
        other = np.nan_to_num(mutant.values[name].astype(np.float64))
        scale = float(np.sqrt((truth**2).mean())) or 1.0 if truth.size else 1.0
        apart += float((((mine - other) / scale) ** 2).sum())
        off += float((((mine - truth) / scale) ** 2).sum())
    if off == 0:
        return 0.0 if apart == 0 else np.inf
    return float(np.sqrt(apart / off))


class LineUp:
    """The catalogue in one dtype. Answers of the mutants are kept, for several failures are often asked about.

    A mutant is asked only where the code that it changes runs; elsewhere it is the reference, which is right.
    """

    def __init__(self, cases: Sequence[Case], dtype: str) -> None:
        self.cases = cases
        self.dtype = dtype
        self.ports = {name: _port(name, dtype) for name in MUTANTS}
        self._answers: dict[tuple[str, str], Answer | None] = {}
        self._reached: dict[str, frozenset[Place]] = {}

    def answer(self, name: str, case: Case) -> Answer | None:
        """Return a mutant's answer to a case; None where it is the reference's."""
        key = (name, case.id)
        if key not in self._answers:
            shows = shows_in(MUTANTS[name].patches, case.chapter, self._reach(case))
            self._answers[key] = answer_of(self.ports[name], case) if shows else None
        return self._answers[key]

    def _reach(self, case: Case) -> frozenset[Place]:
        """Return the code that a case runs on the reference."""
        if case.id not in self._reached:
            traced = Traced()
            judge(Port(traced, describe(traced), self.dtype), case)
            self._reached[case.id] = frozenset(place(code) for code in traced.seen)
        return self._reached[case.id]

    def likely(self, port: Port, outcome: Outcome) -> list[LikelyMutant]:
        """Return the mutants that do what this port does, the likeliest first; none when the outcome is a pass."""
        if outcome.verdict not in FAILED:
            return []
        subject = outcome.subject
        near = self._near_law(subject) if isinstance(subject, Law) else self._near(port, subject)
        best = min(near.values(), default=0.0)
        tied = [name for name, far in near.items() if far <= best + TIED]
        agreement = self._agreement(port, tied, subject.op) if len(tied) > 1 else {}
        ranked = sorted(near, key=lambda name: (name not in tied, -agreement.get(name, 0.0), near[name]))
        return [LikelyMutant(name, MUTANTS[name].fault, near[name]) for name in ranked]

    def names_rightly(self, mutant: str, case: Case) -> bool:
        """Tell whether a mutant is itself the likeliest one for its own failure on a case."""
        port = self.ports[mutant]
        likely = self.likely(port, judge(port, case))
        return bool(likely) and likely[0].name == mutant

    def _near(self, port: Port, case: Case) -> dict[str, float]:
        """Return the mutants that fail a case with nearly the port's result, and how near."""
        mine = answer_of(port, case)
        near = {}
        for name in self.ports:
            other = self.answer(name, case)
            if other is not None and other.failed:
                far = distance(mine, other, case)
                if far < FAR:
                    near[name] = far
        return near

    def _near_law(self, law: Law) -> dict[str, float]:
        """Return the mutants of a law's chapter, or among its targets, that break it too: a law has no values."""
        candidates = [name for name in self.ports if name in law.targets or MUTANTS[name].chapter == law.chapter]
        return {
            name: 0.0 for name in candidates if judge_law(self.ports[name], law, seed=0, shrink=False).verdict in FAILED
        }

    def _agreement(self, port: Port, names: Sequence[str], op: str) -> dict[str, float]:
        """Return the share of cases of an operation and its parts on which each mutant does what the port does.

        It does so where both pass, and where both fail with the same result.
        """
        family = {op} | ancestors(op)
        asked = [case for case in self.cases if case.op in family and port.has(case.op)]
        answers = [answer_of(port, case) for case in asked]
        alike = dict.fromkeys(names, 0)
        for name in names:  # one after another: ranks of a mutant stay warm while it is asked
            for case, mine in zip(asked, answers, strict=True):
                other = self.answer(name, case)
                if other is None or not other.failed:
                    alike[name] += not mine.failed
                else:
                    alike[name] += mine.failed and distance(mine, other, case) < ALIKE
        return {name: count / max(len(asked), 1) for name, count in alike.items()}


def _port(name: str, dtype: str) -> Port:
    adapter = adapter_of(MUTANTS[name])
    return Port(adapter, describe(adapter), dtype)
