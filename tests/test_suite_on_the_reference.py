"""The conformance suite on the reference: every frozen case and every law is a test, in this process and in float64.

The values of the equations are tested here. The other files of tests/ test what arrays cannot show: gradients, dtypes
and modules, files and processes, second forms of an equation, and functions that only Python sees.
"""

from collections.abc import Iterator, Sequence

import pytest

from conformance.adapter import describe
from conformance.adapters import reference_ranks
from conformance.adapters.reference import Reference
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import judge, judge_law
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.ports.checked import Port
from conformance.pytest_plugin import explanation

REFERENCE = Port(Reference(), describe(Reference()))


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left() -> Iterator[None]:
    """The ranks that the parallel cases start end with this module."""
    yield
    reference_ranks.closed()


def parameters(subjects: Sequence[Case | Law]) -> list[object]:
    """One parameter a case or law, under its id; those of chapter 9 start processes."""
    marks = {"parallel": pytest.mark.distributed}
    return [pytest.param(s, id=s.id, marks=[m for c, m in marks.items() if c == s.chapter]) for s in subjects]


@pytest.mark.parametrize("case", parameters(load_cases()))
def test_case(case: Case, request: pytest.FixtureRequest) -> None:
    """With checked shapes, except where the case is a refusal, which must be the function's own."""
    if case.rejects:
        request.getfixturevalue("unchecked")
    outcome = judge(REFERENCE, case)
    assert outcome.verdict == "pass", explanation(outcome)


@pytest.mark.parametrize("law", parameters(all_laws()))
def test_law(law: Law, unchecked: None) -> None:
    outcome = judge_law(REFERENCE, law, seed=0)
    assert outcome.verdict == "pass", explanation(outcome)
