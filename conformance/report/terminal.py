"""What a run says in the terminal: the failures to mend first, then profiles and chapters, then the verdict."""

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.protocol.package_data import SPECIFICATION_FOLDER
from conformance.report.summary import (
    VERDICT_TEXT,
    VERDICTS,
    blocked,
    by_operation,
    chapters,
    counts,
    error_text,
    mend_first,
    passed_text,
    reproduce,
    text,
)  # fmt: skip

__all__ = ["print_report", "requirement_text"]

MOST = 6  # operations whose failure is told in full; the files have them all


def requirement_text(requirement: str, folder: Path = SPECIFICATION_FOLDER) -> str | None:
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


def _say(console: Console, line: str) -> None:
    # Strings of the port are text, never markup.
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _failure(data: dict[str, Any], group: list[dict[str, Any]], told: set[str], follow: int) -> list[str]:
    """The first failure of an operation in full, the others by name. A requirement in `told` is not told again."""
    entry = group[0]
    lines = [f"{entry['verdict'].upper()} {text(entry['id'])} ({text(entry['op'])}, {text(entry['dtype'])})"]
    lines.append(f"  {text(entry['detail'])}")
    if entry.get("measured") is not None:
        lines.append(f"  {text(error_text(entry))}; {text(entry['tolerance'])}")
    for requirement in entry["requirements"]:
        words = requirement_text(requirement) or "the specification has no text for it"
        lines.append(f"  [{text(requirement)}] {'see above' if requirement in told else words}")
        told.add(requirement)
    lines.append(f"  Likely: {text(entry['meaning'])}")
    if len(group) > 1:
        lines.append(f"  Also {', '.join(text(other['id']) for other in group[1:])}")
    if follow:
        lines.append(f"  {follow} other failures probably follow from this")
    return [*lines, f"  {reproduce(data, entry)}", ""]


def print_report(console: Console, data: dict[str, Any], written: Path) -> None:
    """What to mend first, then the tables and the verdict: the last lines say the most."""
    groups, rest = by_operation(mend_first(data)), blocked(data)
    told: set[str] = set()
    for group in groups[:MOST]:
        for line in _failure(data, group, told, sum(len(rest.get(entry["id"], [])) for entry in group)):
            _say(console, line)
    for group in groups[MOST:]:
        _say(console, f"{text(group[0]['op'])} fails too: {', '.join(text(entry['id']) for entry in group)}")
    _table(console, "chapter", VERDICTS, {
        name: [str(count or "-") for count in counts(group).values()] for name, group in chapters(data).items()
    })  # fmt: skip
    columns = ("expected", "passed", "failed", "unsupported", "conforms")
    _table(console, "profile", columns, {
        name: [("yes" if p[c] else "NO") if c == "conforms" else str(p[c] or "-") for c in columns]
        for name, p in data["profiles"].items()
    })  # fmt: skip
    who = f"{text(data['adapter']['name'], 120)} {text(data['adapter']['version'], 60)}"
    _say(console, f"{who} in {text(data['dtype'])}: {passed_text(data)}; specification {text(data['spec'])}")
    _say(console, f"{VERDICT_TEXT[data['exit']]}; details in {written}")


def _table(console: Console, first: str, columns: tuple[str, ...], rows: dict[str, list[str]]) -> None:
    if console.is_terminal:
        table = Table(first)
        for column in columns:
            table.add_column(column, justify="right")
        for name, cells in rows.items():
            table.add_row(Text(text(name, 40)), *cells, style="red" if "NO" in cells else None)
        console.print(table)
        return
    _say(console, f"{first:<14}" + "".join(f"{column:>13}" for column in columns))
    for name, cells in rows.items():
        _say(console, f"{text(name, 40):<14}" + "".join(f"{cell:>13}" for cell in cells))
