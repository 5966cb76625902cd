"""The contents that all reports share, worked out from result.json: what to mend first, and each requirement's status.

Nothing here trusts result.json to be tidy: a port gives some of its strings, and the file may come from elsewhere.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from conformance.judging.requirements import Requirement, requirements
from conformance.ports.checked import printable

__all__ = [
    "FAILED",
    "VERDICTS",
    "VERDICT_TEXT",
    "Status",
    "blocked",
    "by_operation",
    "chapter",
    "chapters",
    "counts",
    "entries",
    "error_text",
    "failed_claim",
    "fraction",
    "level",
    "mend_first",
    "passed_text",
    "reproduce",
    "statuses",
    "text",
]

Entry = dict[str, Any]

VERDICTS = ("pass", "fail", "error", "unsupported")
FAILED = ("fail", "error")
VERDICT_TEXT = {0: "CONFORMS", 1: "DOES NOT CONFORM", 3: "INCOMPLETE: not every operation is supported"}


def text(value: object, limit: int = 1000) -> str:
    """Make a string of result.json one line of at most `limit` printable characters.

    Control characters, surrogates and what turns the direction of writing become spaces.
    """
    return printable(value, limit)


def entries(data: dict[str, Any]) -> list[Entry]:
    """Return cases, then laws."""
    return [*data["cases"], *data["laws"]]


def chapter(entry: Entry) -> str:
    """Return the chapter of a case or law, which is the first part of its id."""
    return str(entry["id"]).split("/")[0]


def chapters(data: dict[str, Any]) -> dict[str, list[Entry]]:
    """Group cases and laws by chapter, in the order in which the cases stand, which is the specification's."""
    by_chapter: dict[str, list[Entry]] = {}
    for entry in entries(data):
        by_chapter.setdefault(chapter(entry), []).append(entry)
    return by_chapter


def counts(group: Iterable[Entry]) -> dict[str, int]:
    """Count the entries of each verdict."""
    number = dict.fromkeys(VERDICTS, 0)
    for entry in group:
        number[entry["verdict"]] += 1
    return number


def mend_first(data: dict[str, Any]) -> list[Entry]:
    """Return the failures that follow from no other failure."""
    return [entry for entry in entries(data) if entry["verdict"] in FAILED and entry["blocked_by"] is None]


def by_operation(group: Iterable[Entry]) -> list[list[Entry]]:
    """Group by operation, in order of appearance: what is told of the first need not be told of the rest."""
    by_name: dict[str, list[Entry]] = {}
    for entry in group:
        by_name.setdefault(entry["op"], []).append(entry)
    return list(by_name.values())


def passed_text(data: dict[str, Any]) -> str:
    """Say how many cases and laws pass, and of how many."""
    cases = len(data["cases"])
    laws = len(data["laws"])
    return f"{counts(entries(data))['pass']} of {cases + laws} pass ({cases} cases, {laws} laws)"


def blocked(data: dict[str, Any]) -> dict[str, list[Entry]]:
    """Group the failures that follow from another in all likelihood, by the one to mend before them."""
    by_cause: dict[str, list[Entry]] = {}
    for entry in entries(data):
        if entry["verdict"] in FAILED and entry["blocked_by"] is not None:
            by_cause.setdefault(entry["blocked_by"], []).append(entry)
    return by_cause


def level(entry: Entry) -> str:
    """Return the level of the entry's operation in words: public, or internal."""
    return {"coarse": "public", "fine": "internal"}.get(entry["level"], str(entry["level"]))


def failed_claim(data: dict[str, Any], entry: Entry) -> bool:
    """Tell whether an unsupported case or law leaves a profile of this run incomplete: it is public, and in one."""
    return bool(entry["level"] == "coarse" and set(entry["profiles"]) & set(data["profiles"]))


def fraction(entry: Entry) -> float | None:
    """Return error over limit: None where nothing was measured, infinite where it is not finite or none is allowed."""
    measured = entry.get("measured")
    if measured is None:
        return None
    error, limit = measured["error"], measured["limit"]
    if error is None or (error > 0 and not limit):
        return math.inf
    return float(error / limit) if limit else 0.0


def error_text(entry: Entry) -> str:
    """Put error, limit and unit into words; empty where nothing was measured."""
    measured = entry.get("measured")
    if measured is None:
        return ""
    error, limit = ("not finite" if v is None else f"{v:.4g}" for v in (measured["error"], measured["limit"]))
    unit = {"absolute": "as the values themselves"}.get(measured["unit"], measured["unit"])
    return f"error {error}, limit {limit} ({unit})"


def reproduce(data: dict[str, Any], entry: Entry) -> str:
    """Return the command that explains a case. `port` in result.json, if there, is what the command line named."""
    port = [text(word) for word in data.get("port", [])] or ["--adapter", "MODULE:OBJECT"]
    words = ["explain", text(entry["id"]), *port, "--dtype", text(data["dtype"])]
    if data["seed"]:
        words += ["--seed", text(data["seed"])]
    return "python -m conformance " + shlex.join(words)


@dataclass(frozen=True)
class Status:
    """A requirement, and the cases and laws of this run that are about it, by verdict."""

    requirement: Requirement
    by_verdict: dict[str, list[str]]

    @property
    def word(self) -> str:
        """The worst that happened: failed, unsupported, passed or not covered."""
        for verdict, word in (("fail", "failed"), ("error", "failed"), ("unsupported", "unsupported")):
            if self.by_verdict[verdict]:
                return word
        return "passed" if self.by_verdict["pass"] else "not covered"

    @property
    def sentence(self) -> str:
        """The verdicts, and how many cases and laws stand behind each."""
        if self.word == "not covered":
            return "not covered by this run"
        names = {"pass": "passed by", "fail": "failed by", "error": "in error in", "unsupported": "unsupported in"}
        order = [*FAILED, "unsupported", "pass"]
        parts = [f"{names[v]} {_kinds(self.by_verdict[v])}" for v in order if self.by_verdict[v]]
        return ", ".join(parts)


def _kinds(ids: list[str]) -> str:
    laws = sum("/law-" in name for name in ids)
    words = ((len(ids) - laws, "case"), (laws, "law"))
    return " and ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in words if n)


def statuses(data: dict[str, Any]) -> list[Status]:
    """Return every requirement of the specification with its status in this run."""
    by_verdict: dict[str, dict[str, list[str]]] = {
        name: {verdict: [] for verdict in VERDICTS} for name in requirements()
    }
    for entry in entries(data):
        for name in entry["requirements"]:
            if name in by_verdict:
                by_verdict[name][entry["verdict"]].append(entry["id"])
    return [Status(requirement, by_verdict[name]) for name, requirement in requirements().items()]
