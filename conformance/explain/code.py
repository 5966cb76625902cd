"""The code of the reference that fulfils a requirement, found by each chapter's table "Requirement to code"."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.protocol.package_data import SPECIFICATION_FOLDER

__all__ = ["Place", "code_places"]

ROOT = Path(__file__).resolve().parents[2]  # of the source tree, or of the installed packages


@dataclass(frozen=True)
class Place:
    """A function or class: its file from the root, its first and last line (from 1, both included), its source."""

    path: str
    first: int
    last: int
    source: str


def code_places(requirement: str) -> list[Place]:
    """Return the functions and classes that the chapter's table names beside a requirement; none without sources."""
    places: list[Place] = []
    for path in sorted(SPECIFICATION_FOLDER.glob("[0-9]*.md")):
        module = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("| id | code"):
                named = re.search(r"`storm_ref/(\w+)\.py`", line)
                module = named.group(1) if named else ""
            elif line.startswith("|") and len(cells) > 1 and requirement in re.split(r"[,\s]+", cells[0]):
                for name in re.findall(r"`([\w.]+)`", cells[1]):
                    places += _place(name, module)
    return places


def _place(name: str, module: str) -> list[Place]:
    """Look a dotted name up in the module that it starts with, else in the chapter's own."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = ROOT / "storm_ref" / Path(*parts[:cut]).with_suffix(".py")
        if path.exists():
            return _definition(path, parts[cut:])
    path = ROOT / "storm_ref" / f"{module}.py"
    return _definition(path, parts) if module and path.exists() else []


def _definition(path: Path, parts: Sequence[str]) -> list[Place]:
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
    return [Place(str(path.relative_to(ROOT)), node.lineno, node.end_lineno, text)]
