"""Run cases and laws on a port and judge them, trusting nothing that the port returns.

pass         every expected output is there, of the right shape and dtype, finite, within its tolerance; a bad input was
             refused; a law held on every example
fail         an output is not, a bad input was accepted, or a law is broken
error        the port raised an exception where it should have returned, died, hung, or broke the protocol
unsupported  the port says it has no such operation or dtype; never a pass
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from conformance.adapter import Adapter, Array, Arrays, Info
from conformance.judging.case import Case
from conformance.judging.law import Broken, Law, check_law
from conformance.judging.tolerance import Either, Measured, MonteCarlo, MustReject
from conformance.ports.checked import Fault, Missing, Port, Refused, Wrong, printable
from conformance.protocol.operations import OPERATIONS, PROFILES, ancestors

__all__ = [
    "FAILED",
    "VERDICTS",
    "Outcome",
    "ProfileResult",
    "Run",
    "Subject",
    "everything",
    "exit_code",
    "judge",
    "judge_law",
    "mark_blocked",
    "measure",
    "profile_result",
    "run_suite",
    "select",
]

Subject = Case | Law
VERDICTS = ("pass", "fail", "error", "unsupported")
FAILED = ("fail", "error")


@dataclass(frozen=True)
class Outcome:
    """The verdict on one case or law; `measured` is the error of the worst output, None where none was compared."""

    subject: Subject
    verdict: str
    detail: str
    dtype: str
    measured: Measured | None = None
    output: str | None = None  # the output that `measured` is of
    seconds: float = 0.0
    blocked_by: str | None = None  # an earlier failure that this one follows from, in all likelihood


@dataclass(frozen=True)
class ProfileResult:
    """Counts of the public cases and laws of a profile.

    An internal one that fails counts as failed; one that is unsupported does not count.
    """

    expected: int
    passed: int
    failed: int
    unsupported: int

    @property
    def conforms(self) -> bool:
        """True when all public cases and laws pass and no internal one fails."""
        return self.failed == 0 and self.unsupported == 0 and self.passed == self.expected > 0


@dataclass(frozen=True)
class Run:
    """The outcomes of a run, and the profiles they make up."""

    info: Info
    dtype: str
    seed: int
    profiles: dict[str, ProfileResult]
    outcomes: list[Outcome]


def everything(cases: Iterable[Case], laws: Iterable[Law]) -> list[Subject]:
    """Return cases, then laws, in one list."""
    return [*cases, *laws]


def judge(port: Port, case: Case) -> Outcome:
    """Run one case and judge it. Whatever the port does becomes an outcome; nothing is raised."""
    start = time.perf_counter()
    dtype = case.dtype or port.dtype
    verdict, detail, measured, output = _judged(port, case, dtype)
    return Outcome(case, verdict, detail, dtype, measured, output, time.perf_counter() - start)


_Judged = tuple[str, str, Measured | None, str | None]


def _judged(port: Port, case: Case, dtype: str) -> _Judged:
    try:
        if case.valid_counterpart is not None:
            try:
                port.call(case.op, *case.valid_counterpart, dtype=dtype)
            except (Refused, Fault) as error:
                return "error", f"the valid counterpart of this case raised {type(error).__name__}: {error}", None, None
        if isinstance(case.tolerance, MustReject):
            return _judge_rejection(port, case, dtype)
        got = port.outputs(case.op, case.inputs, case.params, case.expected, dtype)
    except Missing as reason:
        return "unsupported", str(reason), None, None
    except Refused as error:
        if case.may_refuse and str(error):
            return "pass", f"refused: {error}", None, None
        return "error", f"the port refused a valid input: {error}", None, None
    except Fault as error:
        return "error", f"the port raised {error}", None, None
    except Wrong as error:
        return "fail", str(error), None, None
    with np.errstate(all="ignore"):
        measured, output = measure(case, got, dtype)
    if measured is None or measured.passed:
        return "pass", "", measured, output
    assert output is not None
    at = "" if not measured.where else f" at {list(measured.where)}"
    value, right = (values[output][measured.where].item() for values in (got, case.expected))
    return "fail", f"{output} is off{at} (got {value:.17g}, expected {right:.17g})", measured, output


def _judge_rejection(port: Port, case: Case, dtype: str) -> _Judged:
    assert isinstance(case.tolerance, MustReject)
    try:
        port.call(case.op, case.inputs, case.params, dtype=dtype)
    except Refused as error:
        if not str(error):
            return "fail", "the port refused the input without saying why", None, None
        return "pass", f"refused: {error}", None, None
    except Fault as error:
        return "error", f"a refusal is a ValueError, the port raised {error}", None, None
    except Wrong:
        pass
    return "fail", f"a bad input was accepted: {case.tolerance.why}", None, None


def measure(case: Case, got: Arrays, dtype: str) -> tuple[Measured | None, str | None]:
    """Measure the outputs against their limits. Returns the worst error and the name of its output, None for no output.

    Where a value that is not finite is expected, the error is 0: Port has checked that it is there.
    """
    tolerance = case.tolerance.inner if isinstance(case.tolerance, Either) else case.tolerance
    assert not isinstance(tolerance, MustReject)
    worst: tuple[Measured | None, str | None] = (None, None)
    for name, expected in case.expected.items():
        numbers = np.isfinite(expected) if np.issubdtype(expected.dtype, np.floating) else np.True_
        # Limits that were measured know what a narrow network does to a wide output; a derived bound has one unit.
        unit = dtype if isinstance(tolerance, MonteCarlo) or OPERATIONS[case.op].is_narrow(name) else "float64"
        measured = tolerance.measure(_numbers(got[name], numbers), _numbers(expected, numbers), unit, name)
        if worst[0] is None or measured.fraction > worst[0].fraction:
            worst = measured, name
    return worst


def _numbers(value: Array, numbers: Array | np.bool_) -> Array:
    return np.where(numbers, value, np.zeros((), value.dtype))


def judge_law(port: Port, law: Law, seed: int, shrink: bool = True) -> Outcome:
    """Check one law and judge it. Whatever the port does becomes an outcome; nothing is raised."""
    start = time.perf_counter()
    dtype = law.dtype or port.dtype

    def outcome(verdict: str, detail: str) -> Outcome:
        return Outcome(law, verdict, detail, dtype, seconds=time.perf_counter() - start)

    if not port.has(*law.ops):
        lacking = ", ".join(op for op in law.ops if not port.has(op))
        return outcome("unsupported", f"the port does not claim the operation {lacking}")
    own = Port(port.adapter, port.info, dtype)
    try:
        with np.errstate(all="ignore"):
            check_law(law, own, seed, shrink)
    except Missing as reason:
        return outcome("unsupported", str(reason))
    except (Broken, Wrong) as error:
        return outcome("fail", f"{error}{_example(error)}")
    except Refused as error:
        return outcome("error", f"the port refused a valid input: {error}{_example(error)}")
    except Fault as error:
        return outcome("error", f"the port raised {error}{_example(error)}")
    except Exception as error:  # shapes that the law's own arithmetic cannot take
        what = f"the law cannot be computed from what the port returned: {type(error).__name__}: {printable(error)}"
        return outcome("fail", f"{what}{_example(error)}")
    return outcome("pass", f"held on {law.examples} examples")


def _example(error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    return f"; with {', '.join(notes)}" if notes else ""


def select(
    info: Info, cases: Iterable[Case], laws: Iterable[Law], profiles: Sequence[str]
) -> tuple[list[str], list[Case], list[Law]]:
    """Select the profiles to run, and their cases and laws.

    The profiles are those asked for, else those that the port claims, else all that it has an operation for.
    """
    cases, laws = list(cases), list(laws)
    chosen = list(profiles or info.profiles)
    if not chosen:
        touched = {p for case in cases if case.op in info.ops for p in case.profiles}
        touched |= {p for law in laws if law.op in info.ops for p in law.profiles}
        chosen = [name for name in PROFILES if name in touched] or list(PROFILES)
    wanted = set(chosen)
    return chosen, [c for c in cases if wanted & set(c.profiles)], [law for law in laws if wanted & set(law.profiles)]


def run_suite(
    adapter: Adapter,
    info: Info,
    cases: Sequence[Case],
    laws: Sequence[Law],
    profiles: Sequence[str],
    dtype: str = "float64",
    seed: int = 0,
    expected: dict[str, int] | None = None,
    progress: Callable[[Subject], None] | None = None,
    shrink: bool = True,
) -> Run:
    """Judge every case, then every law, of the profiles.

    expected: the number of public cases and laws of each profile, from the manifest; None: count them here.
    progress: called with each case or law that is done.
    shrink: look for the simplest example that breaks a law, which makes calls that no one can foresee.
    """
    port = Port(adapter, info, dtype)
    outcomes: list[Outcome] = []
    for subject in everything(cases, laws):
        outcomes.append(judge(port, subject) if isinstance(subject, Case) else judge_law(port, subject, seed, shrink))
        if progress is not None:
            progress(subject)
    outcomes = mark_blocked(outcomes)
    results = {name: profile_result(name, outcomes, (expected or {}).get(name)) for name in profiles}
    return Run(info, dtype, seed, results, outcomes)


def profile_result(name: str, outcomes: Iterable[Outcome], expected: int | None) -> ProfileResult:
    """Count the outcomes of a profile.

    expected: the number of its public cases and laws; None: as many as there are outcomes of such.
    """
    mine = [o for o in outcomes if name in o.subject.profiles]
    public = [o for o in mine if o.subject.public]
    return ProfileResult(
        expected=len(public) if expected is None else expected,
        passed=sum(o.verdict == "pass" for o in public),
        failed=sum(o.verdict in FAILED for o in mine),
        unsupported=sum(o.verdict == "unsupported" for o in public),
    )


def mark_blocked(outcomes: list[Outcome]) -> list[Outcome]:
    """Mark failures of operations that are made of an operation that fails too: the earliest is the one to mend."""
    first: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.verdict in FAILED:
            first.setdefault(outcome.subject.op, outcome.subject.id)
    order = [op for op in OPERATIONS if op in first]

    def cause(outcome: Outcome) -> str | None:
        if outcome.verdict not in FAILED:
            return None
        return next((first[op] for op in order if op in ancestors(outcome.subject.op)), None)

    return [replace(outcome, blocked_by=cause(outcome)) for outcome in outcomes]


def exit_code(run: Run) -> int:
    """The exit code of a run: 0 conforms, 1 something fails, 3 nothing fails but something is unsupported."""
    if any(outcome.verdict in FAILED for outcome in run.outcomes):
        return 1
    return 0 if all(profile.conforms for profile in run.profiles.values()) else 3
