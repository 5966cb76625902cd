"""A pytest plugin that makes a test of each case and law: `-p conformance.pytest_plugin --conformance-adapter NAME`.

An unsupported case is skipped, but fails where it counts for a profile that was asked for.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from conformance.adapter import AdapterError, describe
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import FAILED, Outcome, judge, judge_law, select
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.ports.checked import Port
from conformance.ports.wire import WireAdapter, command_words, serve_words
from conformance.protocol.operations import DTYPES, PROFILES

ADAPTER = pytest.StashKey[WireAdapter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options named as those of the command line."""
    group = parser.getgroup("conformance", "conformance to the STORM specification")
    group.addoption("--conformance-adapter", metavar="MODULE:OBJECT", help="the port, in a process of its own")
    group.addoption("--conformance-cmd", metavar="PROGRAM", help="the port as a program that speaks the wire protocol")
    group.addoption("--conformance-profile", action="append", choices=[*PROFILES], help="default: those of the port")
    group.addoption("--conformance-dtype", choices=DTYPES, default="float64")
    group.addoption("--conformance-seed", type=int, default=0, help="of the laws' examples")
    group.addoption("--conformance-timeout", type=float, default=60.0, metavar="SECONDS")


def explanation(outcome: Outcome) -> str:
    """Explain what is wrong, by how much, what that likely means, and the requirements that it breaks: a line each."""
    lines = [f"{outcome.verdict}: {outcome.detail}"]
    if outcome.measured is not None:
        lines.append(f"error {outcome.measured.error:.6g}, limit {outcome.measured.limit:.6g} {outcome.measured.unit}")
    requirements = ", ".join(outcome.subject.requirements)
    return "\n".join([*lines, f"likely: {outcome.subject.meaning}", f"requirements: {requirements}"])


class NotConforming(Exception):
    """A case or law that the port does not pass."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        super().__init__(outcome.detail)


class Subject(pytest.Item):
    """A case or law as a test."""

    def __init__(self, *, subject: Case | Law, port: Port, seed: int, claimed: set[str], **more: Any) -> None:
        super().__init__(**more)
        self.subject, self.port, self.seed = subject, port, seed
        self.counts = subject.public and bool(claimed & set(subject.profiles))

    def runtest(self) -> None:
        """Judge the case or law."""
        subject = self.subject
        outcome = judge(self.port, subject) if isinstance(subject, Case) else judge_law(self.port, subject, self.seed)
        if outcome.verdict in FAILED or (outcome.verdict == "unsupported" and self.counts):
            raise NotConforming(outcome)
        if outcome.verdict == "unsupported":
            pytest.skip(outcome.detail)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Describe the failure and the requirements it breaks, without a traceback through the suite."""
        if not isinstance(excinfo.value, NotConforming):
            return super().repr_failure(excinfo, style)
        return explanation(excinfo.value.outcome)

    def reportinfo(self) -> tuple[Any, None, str]:
        """Name the case or law; it has no line in the port's files."""
        return self.path, None, self.subject.id


class Suite(pytest.Collector):
    """The cases and laws of the profiles, for one port."""

    def collect(self) -> Iterator[Subject]:
        """Collect those of the profiles asked for, else of those that the port claims."""
        option = self.config.getoption
        adapter = self.config.stash[ADAPTER]
        info = describe(adapter)
        asked = option("--conformance-profile") or []
        port = Port(adapter, info, option("--conformance-dtype"))
        _, cases, laws = select(info, load_cases(), all_laws(), asked)
        more = {"port": port, "seed": option("--conformance-seed"), "claimed": {*asked, *info.profiles}}
        subjects: list[Case | Law] = [*cases, *laws]
        for subject in subjects:
            yield Subject.from_parent(self, name=subject.id, subject=subject, **more)


@pytest.hookimpl(tryfirst=True)  # before -k and -m select
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the suite's items to the tests that were collected."""
    name, command = config.getoption("--conformance-adapter"), config.getoption("--conformance-cmd")
    if not name and not command:
        return
    try:
        words = command_words(command) if command else serve_words(name)
        config.stash[ADAPTER] = WireAdapter(words, config.getoption("--conformance-timeout"))
        items.extend(Suite.from_parent(session, name="conformance", nodeid="conformance").collect())
    except (AdapterError, ValueError) as error:
        raise pytest.UsageError(f"conformance: {error}") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the port's process."""
    adapter = config.stash.get(ADAPTER, None)
    if adapter is not None:
        adapter.close()
