"""The requirements of the specification, read from its text.

A requirement is a paragraph or list item of a chapter under spec/ that opens with its id in bold brackets. This module
is the only reader of that form: reports quote requirements, `explain` looks them up, and the authoring tools and the
tests hold cases, laws, code and text to one another by them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conformance.protocol.package_data import SPECIFICATION_FOLDER

__all__ = ["REASONS", "Requirement", "chapter_title", "read_requirements", "requirements"]

_OPENING = re.compile(r"(?:[-*] )?\*\*\[([A-Z]+-\d+)\]\*\* ")
_KEYWORD = re.compile(r"\b(MUST NOT|MUST|SHOULD NOT|SHOULD|MAY)\b")

# Why no case or law reaches some requirements through arrays, or why no mutant can break them.
_SUITE = "a demand on claims or on the suite, not on a port; `tests/test_conformance.py` holds the suite to it"
REASONS: dict[str, str] = {
    "CONV-8": "calendars stand in files, and a port is given arrays; `tests/test_data.py` holds the reference to it",
    "COST-4": "what a port keeps between chunks does not show in arrays; `tests/test_cost.py` counts the reference's",
    "PAR-15": "an optimiser is no operation; `tests/test_parallel_training.py` compares the reference's steps",
    "PAR-17": "checkpoints are files, and a port is given arrays; `tests/test_parallel_training.py` resumes ours",
    "CONF-1": _SUITE,
    "CONF-2": _SUITE,
    "CONF-4": "every case of class must_reject comes with its valid counterpart",
    "CONF-5": "every case and law: names, shapes, dtypes and finiteness are checked first (`ports/checked.py`)",
    "CONF-7": _SUITE,
}


@dataclass(frozen=True)
class Requirement:
    """A requirement's id, its chapter (a file of spec/) and its text, on one line and without the id."""

    id: str
    chapter: str
    text: str

    @property
    def keywords(self) -> frozenset[str]:
        """Every normative keyword of the text; a well-formed requirement has one."""
        return frozenset(_KEYWORD.findall(self.text))

    @property
    def keyword(self) -> str:
        """The first normative keyword of the text, or an empty string."""
        match = _KEYWORD.search(self.text)
        return match.group() if match else ""

    @property
    def binding(self) -> bool:
        """True for a MUST or a MUST NOT."""
        return self.keyword.startswith("MUST")


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and list items, each on one line."""
    for block in re.split(r"\n\s*\n|\n(?=[-*] )", text):
        yield " ".join(block.split())


def read_requirements(folder: Path = SPECIFICATION_FOLDER) -> list[Requirement]:
    """Read every requirement of the chapters in a folder, in their order; an id defined twice is there twice."""
    return [
        Requirement(opening[1], path.name, paragraph[opening.end() :])
        for path in sorted(folder.glob("*.md"))
        for paragraph in _paragraphs(path.read_text(encoding="utf-8"))
        if (opening := _OPENING.match(paragraph))
    ]


@cache
def requirements() -> dict[str, Requirement]:
    """Return the requirements of this specification by id, in the order of the chapters."""
    return {requirement.id: requirement for requirement in read_requirements()}


def chapter_title(file_name: str) -> str:
    """Return the heading of a chapter of the specification, given its file name."""
    with (SPECIFICATION_FOLDER / file_name).open(encoding="utf-8") as chapter:
        return chapter.readline().lstrip("# ").strip()
