"""Run the cases against a port and judge them, trusting nothing that the port returns.

pass         every expected output is there, of the right shape and dtype, finite, within its tolerance; or a bad
             input was refused
fail         an output is not, or a bad input was accepted
error        the port raised an exception where it should have returned
unsupported  the port says it has no such operation; never a pass
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.adapter import Adapter, Array, Arrays, Info, Params, Unsupported, to_arrays
from conformance.case import Case
from conformance.tolerance import Measured, MustReject

__all__ = ["Outcome", "Raised", "exit_code", "judge", "run_cases"]

VERDICTS = ("pass", "fail", "error", "unsupported")


@dataclass(frozen=True)
class Outcome:
    """The verdict on one case; `measured` is of the worst output, None where nothing could be compared."""

    case: Case
    verdict: str
    detail: str
    measured: Measured | None = None


@dataclass(frozen=True)
class Raised:
    """What came out of a call instead of a result."""

    name: str
    message: str
    refusal: bool  # a ValueError: the port's way to refuse an input

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.message else self.name


def _printable(text: str, limit: int = 300) -> str:
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def _message(error: BaseException) -> str:
    try:
        return _printable(str(error))
    except Exception:
        return "(its message cannot be printed)"


def _call(adapter: Adapter, op: str, inputs: Arrays, params: Params) -> object:
    """The port's result, an Unsupported, or what it raised. A port that exits is recorded like one that raises."""
    try:
        return adapter.run(op, to_arrays(inputs), copy.deepcopy(dict(params)))
    except Unsupported as reason:
        return reason
    except (Exception, SystemExit) as error:
        return Raised(type(error).__name__, _message(error), isinstance(error, ValueError))


def judge(adapter: Adapter, info: Info, case: Case) -> Outcome:
    """Run one case and judge it. Whatever the port does short of killing the process becomes an outcome."""
    if case.op not in info.ops:
        return Outcome(case, "unsupported", f"the port does not claim the operation {case.op}")
    if case.neighbour is not None:
        valid = _call(adapter, case.op, *case.neighbour)
        if isinstance(valid, Raised):
            return Outcome(case, "error", f"the valid neighbour of this case raised {valid}")
    result = _call(adapter, case.op, case.inputs, case.params)
    if isinstance(result, Unsupported):
        return Outcome(case, "unsupported", _message(result) or f"the port does not support {case.op} here")
    if isinstance(case.tolerance, MustReject):
        return _judge_rejection(case, result)
    if isinstance(result, Raised):
        return Outcome(case, "error", f"the port raised {result}")
    try:
        with np.errstate(all="ignore"):
            return _judge_values(case, result)
    except Exception as error:  # a mapping or an array that misbehaves when it is read
        return Outcome(case, "error", f"the port's result cannot be read: {type(error).__name__}: {_message(error)}")


def _judge_rejection(case: Case, result: object) -> Outcome:
    if not isinstance(result, Raised):
        return Outcome(case, "fail", f"a bad input was accepted: {case.tolerance.why}")
    if not result.refusal:
        return Outcome(case, "error", f"a refusal is a ValueError, the port raised {result}")
    if not result.message:
        return Outcome(case, "fail", "the port refused the input without saying why")
    return Outcome(case, "pass", f"refused: {result.message}")


def _judge_values(case: Case, result: object) -> Outcome:
    assert not isinstance(case.tolerance, MustReject)
    if not isinstance(result, Mapping):
        return Outcome(case, "fail", f"the port returned {type(result).__name__} instead of a dict of arrays")
    worst: Measured | None = None
    for name, expected in case.expected.items():
        problem = _problem(name, result, expected)
        if problem:
            return Outcome(case, "fail", problem)
        got = np.array(result[name])
        measured = case.tolerance.measure(got, expected)
        if not measured.passed:
            at = "" if not measured.where else f" at {list(measured.where)}"
            said = f" (got {got[measured.where].item():.17g}, expected {expected[measured.where].item():.17g})"
            return Outcome(case, "fail", f"{name} is off{at}{said}", measured)
        worst = measured if worst is None or _fraction(measured) > _fraction(worst) else worst
    return Outcome(case, "pass", "", worst)


def _fraction(measured: Measured) -> float:
    return measured.error / measured.limit if measured.limit > 0 else measured.error


def _problem(name: str, result: Mapping[Any, Any], expected: Array) -> str:
    """What makes an output incomparable, in a sentence; empty when nothing does."""
    if name not in result:
        there = ", ".join(sorted(_printable(str(key), 40) for key in result)) or "none"
        return f"the output {name} is missing; outputs there: {there}"
    got = result[name]
    if not isinstance(got, np.ndarray):
        return f"the output {name} is {type(got).__name__}, not a NumPy array"
    if got.shape != expected.shape:
        return f"the output {name} has shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"the output {name} has dtype {got.dtype}, expected {expected.dtype}"
    if np.issubdtype(got.dtype, np.floating) and not np.isfinite(got).all():
        bad = np.argwhere(~np.isfinite(got))
        first = f"{got[tuple(bad[0])].item()} at {bad[0].tolist()}"
        return f"the output {name} is {first}: {len(bad)} of {got.size} values are not finite"
    return ""


def run_cases(adapter: Adapter, info: Info, cases: Iterable[Case]) -> list[Outcome]:
    """Every case, in order."""
    return [judge(adapter, info, case) for case in cases]


def exit_code(outcomes: list[Outcome]) -> int:
    """0 conforms, 1 a case fails, 3 nothing fails but something is unsupported."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if verdicts & {"fail", "error"}:
        return 1
    return 3 if "unsupported" in verdicts else 0
