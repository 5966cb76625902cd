"""From requirement to text, code, cases, laws and mutants: what the specification says, and what holds a port to it."""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.judging.case import Case
from conformance.judging.law import Law

__all__ = ["REASONS", "Place", "Requirement", "code_places", "coverage", "requirements", "table", "uncovered"]

ROOT = Path(__file__).resolve().parents[2]
_OPENS = re.compile(r"(?:[-*] )?\*\*\[([A-Z]+-\d+)\]\*\* (.*)")
_KEYWORD = re.compile(r"\b(MUST NOT|MUST|SHOULD NOT|SHOULD|MAY)\b")

# Requirements that no case or law can reach through arrays, or that no mutant can break, and why.
_SUITE = "a demand on claims or on the suite, not on a port; `tests/test_conformance.py` holds the suite to it"
REASONS: dict[str, str] = {
    "CONV-8": "calendars stand in files, and a port is given arrays; `tests/test_data.py` holds the reference to it",
    "COST-4": "what a port keeps between chunks does not show in arrays; `tests/test_cost.py` counts the reference's",
    "PAR-15": "an optimiser is no operation; `tests/test_parallel_training.py` compares the reference's steps",
    "PAR-17": "checkpoints are files, and a port is given arrays; `tests/test_parallel_training.py` resumes ours",
    "CONF-1": _SUITE,
    "CONF-2": _SUITE,
    "CONF-4": "every case of class must_reject, with its valid neighbour",
    "CONF-5": "every case and law: names, shapes, dtypes and finiteness are checked before any value (`port.py`)",
    "CONF-7": _SUITE,
}


@dataclass(frozen=True)
class Requirement:
    """An id, its chapter (a file of spec/), its text in one line, and its keyword."""

    id: str
    chapter: str
    text: str

    @property
    def keyword(self) -> str:
        found = _KEYWORD.search(self.text)
        return found.group() if found else ""

    @property
    def binding(self) -> bool:
        """Whether it is a MUST or a MUST NOT."""
        return self.keyword.startswith("MUST")


@dataclass(frozen=True)
class Place:
    """Code that fulfils a requirement: a file from the root, its lines (from 1, both included), their text."""

    path: str
    first: int
    last: int
    source: str


def requirements(root: Path = ROOT) -> dict[str, Requirement]:
    """Every requirement of the specification, in the order of the chapters."""
    found: dict[str, Requirement] = {}
    for path in sorted((root / "spec").glob("[0-9]*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for at, line in enumerate(lines):
            opening = _OPENS.fullmatch(line)
            if opening:
                text = [opening.group(2)]
                for more in lines[at + 1 :]:
                    if not more.strip() or "**[" in more or re.match(r"\s*([-*#|>`]|\d+\.\s)", more):
                        break
                    text.append(more)
                found[opening.group(1)] = Requirement(opening.group(1), path.name, " ".join(" ".join(text).split()))
    return found


def code_places(requirement: str, root: Path = ROOT) -> list[Place]:
    """Where the chapter's table "Requirement to code" sends the reader."""
    places: list[Place] = []
    for path in sorted((root / "spec").glob("[0-9]*.md")):
        module = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("| id | code"):
                named = re.search(r"`storm_ref/(\w+)\.py`", line)
                module = named.group(1) if named else ""
            elif line.startswith("|") and len(cells) > 1 and requirement in re.split(r"[,\s]+", cells[0]):
                for name in re.findall(r"`([\w.]+)`", cells[1]):
                    places += _place(name, module, root)
    return places


def _place(name: str, module: str, root: Path) -> list[Place]:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = root / "storm_ref" / Path(*parts[:cut]).with_suffix(".py")
        if path.exists():
            return _lines(path, parts[cut:], root)
    path = root / "storm_ref" / f"{module}.py"
    return _lines(path, parts, root) if module and path.exists() else []


def _lines(path: Path, parts: Sequence[str], root: Path) -> list[Place]:
    source = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in parts:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part:
                node = child
                break
        else:
            return []
    assert isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None
    text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    return [Place(str(path.relative_to(root)), node.lineno, node.end_lineno, text)]


def coverage(subjects: Iterable[Case | Law]) -> dict[str, list[str]]:
    """Ids of the cases and laws of each requirement."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        for requirement in subject.requirements:
            found.setdefault(requirement, []).append(subject.id)
    return found


def uncovered(
    known: Mapping[str, Requirement],
    covered: Mapping[str, Sequence[str]],
    kills: Mapping[str, Sequence[str]],
    reasons: Mapping[str, str] = REASONS,
) -> list[str]:
    """What is missing, one line each: a MUST without case or law, or without a mutant killed by one, and no reason why;
    a reason for what needs none; an id that is cited and does not exist.
    """
    strange = [name for name in covered if name not in known]
    problems = [f"{name} is cited by {covered[name][0]} and not in the specification" for name in strange]
    for name, requirement in known.items():
        lacks = "case or law" if name not in covered else "mutant" if not kills.get(name) else ""
        if requirement.binding and lacks and name not in reasons:
            problems.append(f"{name} has no {lacks}, and no reason in conformance/authoring/traceability.py says why")
        if not lacks and name in reasons:
            problems.append(f"{name} has a reason for lacking something, and lacks nothing")
    return problems


def table(
    known: Mapping[str, Requirement],
    covered: Mapping[str, Sequence[str]],
    kills: Mapping[str, Sequence[str]],
    reasons: Mapping[str, str] = REASONS,
) -> str:
    """The table in Markdown: requirement, cases and laws, mutants they kill, or the reason why there are none."""
    lines = ["| requirement | cases and laws | mutants they kill |", "|---|---|---|"]
    for name, requirement in known.items():
        held = ", ".join(f"`{subject}`" for subject in covered.get(name, ()))
        killed = ", ".join(f"`{mutant}`" for mutant in kills.get(name, ()))
        why = reasons.get(name, "" if requirement.binding else f"{requirement.keyword}: not judged")
        lines.append(f"| {name} ({requirement.keyword}) | {held or why} | {killed or (why if held else '')} |")
    return "\n".join(lines)
