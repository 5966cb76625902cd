"""The report in the terminal: the failures to mend first, then chapters and profiles, then the verdict."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.judging.requirements import requirements
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
)

__all__ = ["print_report"]

MOST = 6  # operations whose failure is told in full; the files have them all


def _say(console: Console, line: str) -> None:
    # Strings of the port are text, never markup.
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _failure(data: dict[str, Any], group: list[dict[str, Any]], told: set[str], follow: int) -> list[str]:
    """Tell the first failure of an operation in full and the others by name; requirements in `told` are not repeated.

    follow: the number of failures that probably follow from these.
    """
    entry = group[0]
    known = requirements()
    lines = [f"{entry['verdict'].upper()} {text(entry['id'])} ({text(entry['op'])}, {text(entry['dtype'])})"]
    lines.append(f"  {text(entry['detail'])}")
    if entry.get("measured") is not None:
        lines.append(f"  {text(error_text(entry))}; {text(entry['tolerance'])}")
    for name in entry["requirements"]:
        words = known[name].text if name in known else "the specification has no text for it"
        lines.append(f"  [{text(name)}] {'see above' if name in told else words}")
        told.add(name)
    lines.append(f"  Likely: {text(entry['meaning'])}")
    if len(group) > 1:
        lines.append(f"  Also {', '.join(text(other['id']) for other in group[1:])}")
    if follow:
        lines.append(f"  {follow} other failures probably follow from this")
    return [*lines, f"  {reproduce(data, entry)}", ""]


def print_report(console: Console, data: dict[str, Any], written: Path) -> None:
    """Print what to mend first, then the tables and the verdict: the last lines say the most.

    written: the report to open, which the last line names.
    """
    groups = by_operation(mend_first(data))
    rest = blocked(data)
    told: set[str] = set()
    for group in groups[:MOST]:
        for line in _failure(data, group, told, sum(len(rest.get(entry["id"], [])) for entry in group)):
            _say(console, line)
    for group in groups[MOST:]:
        _say(console, f"{text(group[0]['op'])} fails too: {', '.join(text(entry['id']) for entry in group)}")
    by_chapter = {
        name: [str(count or "-") for count in counts(group).values()] for name, group in chapters(data).items()
    }
    _table(console, "chapter", VERDICTS, by_chapter)
    numbers = ("expected", "passed", "failed", "unsupported")
    by_profile = {
        name: [*(str(profile[number] or "-") for number in numbers), "yes" if profile["conforms"] else "NO"]
        for name, profile in data["profiles"].items()
    }
    _table(console, "profile", (*numbers, "conforms"), by_profile)
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
