"""What every report says, worked out from result.json: failures to mend first, requirements and their status.

Nothing here trusts result.json to be tidy: a port gives some of its strings, and the file may come from elsewhere.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from conformance.authoring.traceability import ROOT, Requirement, requirements
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
    "mend_first",
    "passed_text",
    "reproduce",
    "statuses",
    "text",
    "title",
]

Entry = dict[str, Any]

VERDICTS = ("pass", "fail", "error", "unsupported")
FAILED = ("fail", "error")
VERDICT_TEXT = {0: "CONFORMS", 1: "DOES NOT CONFORM", 3: "INCOMPLETE: not every operation is supported"}


def text(value: object, limit: int = 1000) -> str:
    """A string of result.json as one line of printable characters: no control characters, no surrogates, nothing that
    turns the direction of writing; not longer than `limit`."""
    return printable(value, limit)


def entries(data: dict[str, Any]) -> list[Entry]:
    """Cases, then laws."""
    return [*data["cases"], *data["laws"]]


def chapter(entry: Entry) -> str:
    """The chapter of a case or law: the first part of its id."""
    return str(entry["id"]).split("/")[0]


def chapters(data: dict[str, Any]) -> dict[str, list[Entry]]:
    """Cases and laws by chapter, in the order in which the cases stand, which is the specification's."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(data):
        found.setdefault(chapter(entry), []).append(entry)
    return found


def counts(group: Iterable[Entry]) -> dict[str, int]:
    """How many have which verdict."""
    found = dict.fromkeys(VERDICTS, 0)
    for entry in group:
        found[entry["verdict"]] += 1
    return found


def mend_first(data: dict[str, Any]) -> list[Entry]:
    """Failures that follow from no other failure."""
    return [entry for entry in entries(data) if entry["verdict"] in FAILED and entry["blocked_by"] is None]


def by_operation(group: Iterable[Entry]) -> list[list[Entry]]:
    """Grouped by operation, in order of appearance: what is told of the first need not be told of the rest."""
    found: dict[str, list[Entry]] = {}
    for entry in group:
        found.setdefault(entry["op"], []).append(entry)
    return list(found.values())


def passed_text(data: dict[str, Any]) -> str:
    """How many pass of how many."""
    cases, laws = len(data["cases"]), len(data["laws"])
    return f"{counts(entries(data))['pass']} of {cases + laws} pass ({cases} cases, {laws} laws)"


def blocked(data: dict[str, Any]) -> dict[str, list[Entry]]:
    """Failures that follow from another in all likelihood, by the one to mend before them."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(data):
        if entry["verdict"] in FAILED and entry["blocked_by"] is not None:
            found.setdefault(entry["blocked_by"], []).append(entry)
    return found


def failed_claim(data: dict[str, Any], entry: Entry) -> bool:
    """Whether a case or law that is unsupported leaves a profile of this run incomplete: it is coarse, and in one."""
    return bool(entry["level"] == "coarse" and set(entry["profiles"]) & set(data["profiles"]))


def fraction(entry: Entry) -> float | None:
    """Error over limit; None where nothing was measured, infinite where the error is not finite or none is allowed."""
    measured = entry.get("measured")
    if measured is None:
        return None
    error, limit = measured["error"], measured["limit"]
    if error is None or (error > 0 and not limit):
        return math.inf
    return float(error / limit) if limit else 0.0


def error_text(entry: Entry) -> str:
    """Error, limit and unit in words; empty where nothing was measured."""
    measured = entry.get("measured")
    if measured is None:
        return ""
    error, limit = ("not finite" if v is None else f"{v:.4g}" for v in (measured["error"], measured["limit"]))
    unit = {"absolute": "as the values themselves"}.get(measured["unit"], measured["unit"])
    return f"error {error}, limit {limit} ({unit})"


def reproduce(data: dict[str, Any], entry: Entry) -> str:
    """The command that explains a case. `port` in result.json, if there, is how the command line named the port."""
    port = [text(word) for word in data.get("port", [])] or ["--adapter", "MODULE:OBJECT"]
    words = ["explain", text(entry["id"]), *port, "--dtype", text(data["dtype"])]
    if data["seed"]:
        words += ["--seed", text(data["seed"])]
    return "python -m conformance " + shlex.join(words)


def title(file_name: str) -> str:
    """The heading of a chapter of the specification."""
    with (ROOT / "spec" / file_name).open(encoding="utf-8") as chapter:
        return chapter.readline().lstrip("# ").strip()


@dataclass(frozen=True)
class Status:
    """A requirement, and the cases and laws of this run that are about it, by verdict."""

    requirement: Requirement
    by_verdict: dict[str, list[str]]

    @property
    def word(self) -> str:
        """failed, unsupported, passed or not covered: the worst that happened."""
        for verdict, word in (("fail", "failed"), ("error", "failed"), ("unsupported", "unsupported")):
            if self.by_verdict[verdict]:
                return word
        return "passed" if self.by_verdict["pass"] else "not covered"

    @property
    def sentence(self) -> str:
        """The word and how many cases and laws stand behind it."""
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


def statuses(data: dict[str, Any], known: dict[str, Requirement] | None = None) -> list[Status]:
    """Every requirement of the specification with its status in this run."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in entries(data):
        for name in entry["requirements"]:
            found.setdefault(name, {v: [] for v in VERDICTS})[entry["verdict"]].append(entry["id"])
    everything = requirements() if known is None else known
    return [Status(r, found.get(name, {v: [] for v in VERDICTS})) for name, r in everything.items()]
