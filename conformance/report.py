"""What a run says: a table by chapter, each failure with the requirement it breaks, and result.json."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conformance import SPEC
from conformance.adapter import Info
from conformance.runner import VERDICTS, Outcome, exit_code
from conformance.vectors import manifest, write_aside

__all__ = ["chapters", "print_report", "requirement_text", "result", "write_result"]

SPEC_FOLDER = Path(__file__).resolve().parents[1] / "spec"
VERDICT_TEXT = {0: "CONFORMS", 1: "DOES NOT CONFORM", 3: "INCOMPLETE: not every operation is supported"}


def requirement_text(requirement: str, folder: Path = SPEC_FOLDER) -> str | None:
    """The paragraph of the specification that holds **[ID]**, as one line; None when no file of `folder` has it."""
    mark = f"**[{requirement}]**"
    for path in sorted(folder.glob("*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for at, line in enumerate(lines):
            if mark in line:
                text = [line[line.index(mark) + len(mark) :]]
                for more in lines[at + 1 :]:
                    if not more.strip() or "**[" in more or re.match(r"\s*([-*#|>`]|\d+\.\s)", more):
                        break
                    text.append(more)
                return " ".join(" ".join(text).split())
    return None


def chapters(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Verdicts counted by chapter, in the order of the cases."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.case.chapter, Counter())[outcome.verdict] += 1
    return {chapter: {verdict: count[verdict] for verdict in VERDICTS} for chapter, count in counts.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _case(outcome: Outcome) -> dict[str, Any]:
    case, measured = outcome.case, outcome.measured
    error = None
    if measured is not None:
        error = {
            "error": _number(measured.error),
            "limit": _number(measured.limit),
            "unit": measured.unit,
            "where": list(measured.where),
        }
    return {
        "id": case.id,
        "op": case.op,
        "class": case.tolerance.kind,
        "requirements": list(case.requirements),
        "verdict": outcome.verdict,
        "detail": outcome.detail,
        "measured": error,
        "tolerance": case.tolerance.why,
        "meaning": case.meaning,
    }


def result(info: Info, outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything a report says, as JSON data."""
    return {
        "spec": SPEC,
        "vectors": {name: entry["sha256"] for name, entry in manifest()["files"].items()},
        "adapter": {"name": info.name, "version": info.version, "ops": sorted(info.ops), "dtypes": list(info.dtypes)},
        "exit": exit_code(outcomes),
        "chapters": chapters(outcomes),
        "cases": [_case(outcome) for outcome in outcomes],
    }


def write_result(path: Path, info: Info, outcomes: list[Outcome]) -> None:
    """result.json, written aside and renamed."""
    write_aside(path, (json.dumps(result(info, outcomes), indent=1, allow_nan=False) + "\n").encode())


def _failure(outcome: Outcome) -> list[str]:
    case, measured = outcome.case, outcome.measured
    lines = [f"{outcome.verdict.upper()} {case.id} ({case.op})", f"  {outcome.detail}"]
    if measured is not None:
        lines.append(
            f"  error {measured.error:.6g}, limit {measured.limit:.6g} ({measured.unit}); {case.tolerance.why}"
        )
    for requirement in case.requirements:
        lines.append(f"  [{requirement}] {requirement_text(requirement) or 'the specification has no text for it yet'}")
    return [*lines, f"  Likely: {case.meaning}"]


def _say(console: Console, line: str) -> None:
    # Strings of the port are text, never markup.
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_report(console: Console, info: Info, outcomes: list[Outcome], written: Path) -> None:
    """Failures first, then the table by chapter and the verdict: the last lines say the most."""
    for outcome in outcomes:
        if outcome.verdict in ("fail", "error"):
            for line in [*_failure(outcome), ""]:
                _say(console, line)
    _table(console, chapters(outcomes))
    for outcome in outcomes:
        if outcome.verdict == "unsupported":
            _say(console, f"unsupported: {outcome.case.id}: {outcome.detail}")
    passed = sum(outcome.verdict == "pass" for outcome in outcomes)
    _say(console, f"{info.name} {info.version}: {passed} of {len(outcomes)} cases pass (specification {SPEC})")
    _say(console, f"{VERDICT_TEXT[exit_code(outcomes)]}; details in {written}")


def _table(console: Console, counts: dict[str, dict[str, int]]) -> None:
    if console.is_terminal:
        table = Table("chapter", *VERDICTS)
        for chapter, count in counts.items():
            cells = [str(count[v]) if count[v] else "" for v in VERDICTS]
            table.add_row(chapter, *cells, style=None if count["pass"] == sum(count.values()) else "red")
        console.print(table)
        return
    _say(console, f"{'chapter':<14}" + "".join(f"{verdict:>13}" for verdict in VERDICTS))
    for chapter, count in counts.items():
        _say(console, f"{chapter:<14}" + "".join(f"{count[verdict] or '-':>13}" for verdict in VERDICTS))
