"""The report in Markdown, short enough for the summary of a CI step or for an issue."""

import html
import re
from typing import Any

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

__all__ = ["code", "markdown"]

MOST = 12  # operations whose failure is told in full


def code(value: object) -> str:
    """Write a string of the port as inline code: neither markup nor a mention, and safe in a table.

    Backticks, pipes and backslashes mean something even inside a code span, so that such strings are written in
    character references instead.
    """
    clean = text(value, 300).strip() or "(empty)"
    if not re.search(r"[`|\\]", clean):
        return f"`{clean}`"
    return "<code>" + "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in clean) + "</code>"


def markdown(data: dict[str, Any]) -> str:
    """Render the report: verdict, profiles, chapters, and what to mend first with the requirements' own words."""
    verdict = VERDICT_TEXT[data["exit"]].partition(":")[0].capitalize()
    adapter = data["adapter"]
    lines = [
        f"# {verdict}: {code(adapter['name'])} {code(adapter['version'])}",
        "",
        f"{passed_text(data)} in {code(data['dtype'])}, seed {code(data['seed'])}.",
        f"Specification {code(data['spec'])}, vectors {code(data['vectors'])}.",
        "",
        *_profiles(data),
        *_chapters(data),
        *_failures(data),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (head, *rows))
    return [first, "|---|" + "---:|" * (len(head) - 2) + "---|", *others, ""]


def _profiles(data: dict[str, Any]) -> list[str]:
    columns = ("expected", "passed", "failed", "unsupported")
    rows = [
        [code(name), *(str(profile[column]) for column in columns), "yes" if profile["conforms"] else "**no**"]
        for name, profile in data["profiles"].items()
    ]
    return ["## Profiles", "", *_table(["profile", *columns, "conforms"], rows)]


def _chapters(data: dict[str, Any]) -> list[str]:
    rows = []
    for name, group in chapters(data).items():
        count = counts(group)
        mend = "**mend**" if count["fail"] + count["error"] else ""
        rows.append([code(name), *(str(count[verdict]) for verdict in VERDICTS), mend])
    return ["## Chapters", "", *_table(["chapter", *VERDICTS, ""], rows)]


def _failures(data: dict[str, Any]) -> list[str]:
    groups = by_operation(mend_first(data))
    rest = blocked(data)
    if not groups:
        return []
    lines = ["## Mend first", ""]
    told: set[str] = set()
    for group in groups[:MOST]:
        lines += _failure(data, group, told, sum(len(rest.get(entry["id"], [])) for entry in group))
    if len(groups) > MOST:
        lines += [f"... and {len(groups) - MOST} more operations, in `report.html`.", ""]
    return lines


def _failure(data: dict[str, Any], group: list[dict[str, Any]], told: set[str], follow: int) -> list[str]:
    """Tell the first failure of an operation in full and the others by name; requirements in `told` are not repeated.

    follow: the number of failures that probably follow from these.
    """
    entry = group[0]
    known = requirements()
    word = {"fail": "fails", "error": "is in error"}[entry["verdict"]]
    lines = [f"### {code(entry['id'])} {word}", "", f"- {code(entry['detail'])}"]
    if entry.get("measured") is not None:
        lines.append(f"- {code(error_text(entry))}")
    for name in entry["requirements"]:
        words = html.escape(known[name].text, quote=False) if name in known else "the specification has no such text"
        lines.append(f"- **{code(name)}** {'see above' if name in told else words}")
        told.add(name)
    lines.append(f"- Likely: {code(entry['meaning'])}")
    if len(group) > 1:
        others = ", ".join(code(other["id"]) for other in group[1 : 1 + MOST])
        lines.append(f"- Also {others}" + (f" and {len(group) - 1 - MOST} more" if len(group) - 1 > MOST else ""))
    if follow:
        lines.append(f"- {follow} other failures probably follow from this")
    return [*lines, f"- {code(reproduce(data, entry))}", ""]
