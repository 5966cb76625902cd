"""Specification, code and tests name the same requirements: the checks, the tree they are run on, and tests of them.

Each check takes the root of a tree and returns what is wrong with it, one line for each problem.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.judging.requirements import Requirement, read_requirements

ROOT = Path(__file__).resolve().parents[1]
PROVENANCE = "B_provenance.md"
LABELS = ("paper", "our interpretation", "literature")

_CITED = re.compile(r"(?<!\*\*)\[([A-Z]+-\d+)\]")  # the bold form defines; in a test it is a made-up chapter
_QUOTED = re.compile(r"""["']([A-Z]+-\d+)["']""")  # as conformance cases give them

Check = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Chapter:
    """A row of the table in spec/README.md: the chapter, its modules and its case files, paths from the root."""

    spec: str
    modules: tuple[str, ...]
    cases: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The chapter's name without its number."""
        return Path(self.spec).stem.split("_", 1)[1]

    @property
    def case_stems(self) -> set[str]:
        return {Path(case).stem for case in self.cases}

    @property
    def module_stems(self) -> set[str]:
        return {Path(module).stem for module in self.modules}


def requirements(root: Path) -> list[Requirement]:
    """Read the requirements of the tree's chapters."""
    return read_requirements(root / "spec")


def chapters(root: Path) -> list[Chapter]:
    """The table of chapters."""
    rows = []
    for line in (root / "spec" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        link = re.fullmatch(r"\[(\w+\.md)\]\((\w+\.md)\)", cells[0])
        if link and len(cells) == 3:
            modules, cases = (tuple(re.findall(r"`([^`]+)`", cell)) for cell in cells[1:])
            rows.append(Chapter(link[2], modules, cases))
    return rows


def _sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def _cited(text: str, families: set[str]) -> set[str]:
    """Bracketed ids, and quoted ones of a known family ("SHA-256" is none)."""
    return {*_CITED.findall(text), *(i for i in _QUOTED.findall(text) if i.split("-")[0] in families)}


def _families(root: Path) -> set[str]:
    return {r.id.split("-")[0] for r in requirements(root)}


def undefined(root: Path) -> list[str]:
    """Ids cited in code, cases, tests or text that no chapter defines."""
    known, families = {r.id for r in requirements(root)}, _families(root)
    files = [*_sources(root, "storm_ref", "conformance", "tests"), *sorted((root / "spec").glob("*.md"))]
    return [
        f"{path.relative_to(root)} cites {i}, which no chapter defines"
        for path in files
        for i in sorted(_cited(path.read_text(), families) - known)
    ]


def doubly_defined(root: Path) -> list[str]:
    """Ids defined more than once."""
    count = Counter(r.id for r in requirements(root))
    places = {i: [r.chapter for r in requirements(root) if r.id == i] for i, n in count.items() if n > 1}
    return [f"{i} is defined {len(where)} times, in {where}" for i, where in places.items()]


def ill_formed(root: Path) -> list[str]:
    """Requirements that do not hold one normative keyword in one sense."""
    return [
        f"{r.id} in {r.chapter} holds {sorted(r.keywords) or 'no keyword'}, want one of MUST, MUST NOT, SHOULD, MAY"
        for r in requirements(root)
        if len(r.keywords) != 1
    ]


def untested(root: Path) -> list[str]:
    """Requirements with MUST or MUST NOT that no test, conformance case or law cites."""
    families = _families(root)
    cited: set[str] = set()
    for path in _sources(root, "tests", "conformance/cases", "conformance/laws"):
        cited |= _cited(path.read_text(), families)
    binding = [r for r in requirements(root) if r.binding]
    return [f"no test and no case cites {r.id} ({r.chapter})" for r in binding if r.id not in cited]


def unprovenanced(root: Path) -> list[str]:
    """Requirements without a row in the table of provenance, and rows without a label or of ids that do not exist."""
    known = {r.id for r in requirements(root)}
    problems, covered = [], set()
    for line in (root / "spec" / PROVENANCE).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        ids = re.findall(r"[A-Z]+-\d+", cells[0]) if line.startswith("|") else []
        if not ids:
            continue
        problems += [f"{PROVENANCE} speaks of {i}, which no chapter defines" for i in ids if i not in known]
        if len(cells) < 3 or cells[2] not in LABELS:
            problems.append(f"{PROVENANCE}: the row of {', '.join(ids)} is labelled by none of {LABELS}")
        else:
            covered.update(ids)
    return [*problems, *(f"{i} has no labelled row in {PROVENANCE}" for i in sorted(known - covered))]


def docstring_drift(root: Path) -> list[str]:
    """Ids that open a line of a module's docstring, its equations, and that its chapter does not define."""
    problems = []
    for chapter in chapters(root):
        defined = {r.id for r in requirements(root) if r.chapter == chapter.spec}
        for module in (file for given in chapter.modules for file in _files(root, given)):
            path = root / module
            doc = (ast.get_docstring(ast.parse(path.read_text())) or "") if path.is_file() else ""
            given = [i for i in re.findall(r"^\[([A-Z]+-\d+)\]", doc, re.MULTILINE) if i not in defined]
            problems += [f"{module} states {i}, which {chapter.spec} does not define" for i in given]
    return problems


def _files(root: Path, module: str) -> list[str]:
    """A module, or those of a package."""
    inside = sorted((root / module).glob("*.py"))
    return [str(path.relative_to(root)) for path in inside] or [module]


def unpaired(root: Path) -> list[str]:
    """Chapters, modules and case files without their row in the table of chapters, and rows that lead nowhere."""
    rows, table = chapters(root), "the table of chapters"
    spec = {f"spec/{path.name}" for path in (root / "spec").glob("*.md")} - {"spec/README.md"}
    there = spec | _modules(root, "storm_ref") | _modules(root, "conformance/cases")
    both = [row for row in rows if row.cases and row.modules]
    named = Counter(part for row in rows for part in (f"spec/{row.spec}", *row.modules, *row.cases))
    return [
        *(f"{part} is in no row of {table}" for part in sorted(there - set(named))),
        *(f"{part} is {count} times in {table}" for part, count in named.items() if count > 1),
        *(f"{table} names {part}, which does not exist" for part in named if not (root / part).exists()),
        *(f"{row.spec} has no module of its stem" for row in both if row.stem not in row.module_stems),
        *(f"{row.spec} has no cases of its stem" for row in rows if row.cases and row.stem not in row.case_stems),
    ]


def _modules(root: Path, folder: str) -> set[str]:
    """The normative modules and packages of a folder: all but private ones, workbench and experiments."""
    files = {path for path in (root / folder).glob("*.py") if not path.name.startswith("_")}
    packages = {path.parent for path in (root / folder).glob("*/__init__.py")}
    normative = {path for path in packages if path.name not in ("workbench", "experiments")}
    return {str(path.relative_to(root)) for path in files | normative}


def dead_names(root: Path) -> list[str]:
    """Code named in a chapter's table of requirement to code (`name` or `module.name`) that is not in its modules."""
    problems = []
    for chapter in chapters(root):
        text = (root / "spec" / chapter.spec).read_text() if (root / "spec" / chapter.spec).is_file() else ""
        table = text.partition("## Requirement to code")[2].partition("\n## ")[0]
        rows = (line.split("|")[2] for line in table.splitlines() if re.match(r"\| [A-Z]+-\d", line))
        for name in sorted({name for row in rows for name in re.findall(r"`([\w.]+)`", row)}):
            if not any(_holds(root / place, parts) for place, parts in _places(name, chapter)):
                problems.append(f"{chapter.spec} names {name}, which is not in the code")
    return problems


def _places(name: str, chapter: Chapter) -> Iterator[tuple[str, list[str]]]:
    """Files that may hold the name, and its parts in each: the chapter's own modules, or the module it starts with."""
    for module in chapter.modules:
        yield module, name.split(".")
        yield f"{module}/{name.split('.')[0]}.py", name.split(".")[1:]
    path = name.replace(".", "/").split("/")
    for length in range(1, len(path) + 1):
        yield f"storm_ref/{'/'.join(path[:length])}.py", path[length:]
    yield f"storm_ref/{'/'.join(path)}/__init__.py", []


def _holds(path: Path, parts: list[str]) -> bool:
    text = path.read_text() if path.is_file() else None
    forms = r"(?:def|class) {0}\b|^{0} *[=:]|self\.{0} = "
    return text is not None and all(re.search(forms.format(part), text, re.MULTILINE) for part in parts)


CHECKS: tuple[Check, ...] = (
    undefined,
    doubly_defined,
    ill_formed,
    untested,
    unprovenanced,
    docstring_drift,
    unpaired,
    dead_names,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository_is_traceable(check: Check) -> None:
    problems = check(ROOT)
    assert not problems, "\n".join(problems)


def test_requirements_are_read() -> None:
    """A check that reads nothing finds nothing: the counts of a specification as large as this one."""
    assert len(requirements(ROOT)) > 90 and len(chapters(ROOT)) > 9
    assert len(_families(ROOT)) >= 11


def test_requirements_of_no_specification(tmp_path: Path) -> None:
    assert requirements(tmp_path) == []


# Tests of the checks, on a small tree with one fault each


def ident(number: int, family: str = "TOY") -> str:
    """An id in brackets; not written out, else this file would cite it."""
    return f"[{family}-{number}]"


README = """| chapter | module | cases |
|---|---|---|
| [01_toy.md](01_toy.md) | `storm_ref/toy.py` | `conformance/cases/toy.py` |
| [B_provenance.md](B_provenance.md) | - | - |
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A sound tree: three requirements, one module, one test, one case, and the files that no check is about."""
    files = {
        "spec/README.md": README,
        "spec/01_toy.md": (
            f"# Toy\n\n**{ident(1)}** A toy MUST be\nround.\n\nProse MAY say more.\n\n"
            f"- **{ident(2)}** It MUST NOT roll.\n- **{ident(3)}** It SHOULD be red, see {ident(1)}.\n\n"
            "## Requirement to code\n\n| id | code |\n|---|---|\n| TOY-1 | `Toy.roll`, `toy.SIZE` |\n\n"
            "## Cost\n\n| TOY-2 | `no` |\n"
        ),
        f"spec/{PROVENANCE}": (
            "| requirements | choice | label | why |\n|---|---|---|---|\n"
            "| TOY-1, TOY-2 | a | paper | |\n| TOY-3 | b | our interpretation | |\n"
        ),
        "storm_ref/__init__.py": "",
        "storm_ref/toy.py": f'"""Toy.\n\n{ident(1)} round = 1, and not {ident(2)}\n"""\n'
        "SIZE = 1\n\n\nclass Toy:\n    def roll(self): ...\n",
        "storm_ref/workbench/__init__.py": "",
        "conformance/cases/__init__.py": "",
        "conformance/cases/toy.py": 'REQUIREMENTS = ("TOY-2",)\nHASH = "SHA-256"\n',
        "tests/test_toy.py": f'"""{ident(1)}"""\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name
    text = path.read_text()
    assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def append(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)


def only(root: Path, check: Check) -> str:
    """The one problem of the tree, which this check finds and no other."""
    problems_of = {other.__name__: other(root) for other in CHECKS}
    assert [name for name, problems in problems_of.items() if problems] == [check.__name__], problems_of
    (problem,) = problems_of[check.__name__]
    return problem


def test_sound_tree_has_no_problem(tree: Path) -> None:
    assert [check(tree) for check in CHECKS] == [[]] * len(CHECKS)
    assert requirements(tree) == [
        Requirement("TOY-1", "01_toy.md", "A toy MUST be round."),
        Requirement("TOY-2", "01_toy.md", "It MUST NOT roll."),
        Requirement("TOY-3", "01_toy.md", f"It SHOULD be red, see {ident(1)}."),
    ]
    assert [r.keyword for r in requirements(tree)] == ["MUST", "MUST NOT", "SHOULD"]


SPEC = "spec/01_toy.md"
CODE = "storm_ref/toy.py"
CASES = "conformance/cases/toy.py"
TEST = "tests/test_toy.py"
TABLE = f"spec/{PROVENANCE}"
NO_ROW = "is in no row of the table of chapters"

# The check that finds a fault, the file that has it, the piece of it that is replaced (none: text is appended), the new
# piece, and what the check says.
FAULTS: list[tuple[Check, str, str, str, str]] = [
    (undefined, "storm_ref/deep/er.py", "", f"# {ident(9)}\n", "storm_ref/deep/er.py cites TOY-9, which no chapter"),
    (undefined, TEST, "", f"# {ident(9)}\n", f"{TEST} cites TOY-9, which no chapter defines"),
    (undefined, SPEC, "", f"# {ident(9)}\n", f"{SPEC} cites TOY-9, which no chapter defines"),
    (undefined, CASES, "", 'MORE = "TOY-10"\n', f"{CASES} cites TOY-10, which no chapter defines"),
    (doubly_defined, SPEC, "", f"\n**{ident(1)}** A toy MUST be square.\n", "TOY-1 is defined 2 times, in"),
    (ill_formed, SPEC, "SHOULD be", "ought to be", "no keyword"),
    (ill_formed, SPEC, "SHOULD be", "SHOULD be red and MAY be", "['MAY', 'SHOULD']"),
    (untested, TEST, ident(1), "", "no test and no case cites TOY-1 (01_toy.md)"),
    (untested, CASES, '"TOY-2",', "", "no test and no case cites TOY-2 (01_toy.md)"),
    (untested, SPEC, "It SHOULD be", "It MUST be", "no test and no case cites TOY-3 (01_toy.md)"),
    (unprovenanced, TABLE, "TOY-1, ", "", f"TOY-1 has no labelled row in {PROVENANCE}"),
    (unprovenanced, TABLE, "", "| TOY-12 | c | literature | |\n", "speaks of TOY-12, which no chapter defines"),
    (unpaired, "storm_ref/lonely.py", "", "", f"storm_ref/lonely.py {NO_ROW}"),
    (unpaired, "storm_ref/parallel/__init__.py", "", "", f"storm_ref/parallel {NO_ROW}"),
    (unpaired, "spec/03_lonely.md", "", "# Lonely\n", f"spec/03_lonely.md {NO_ROW}"),
    (unpaired, "conformance/cases/lonely.py", "", "", f"conformance/cases/lonely.py {NO_ROW}"),
    (unpaired, "spec/README.md", "`storm_ref/toy.py`", "`storm_ref/toy.py`, `storm_ref/toy.py`", "is 2 times in the"),
    (dead_names, CODE, "SIZE = 1", "OVERSIZE = 1", "which is not in the code"),
    (dead_names, CODE, "def roll", "def rollover", "which is not in the code"),
    (dead_names, CODE, "class Toy", "class Toys", "which is not in the code"),
]


@pytest.mark.parametrize(("check", "name", "old", "new", "told"), FAULTS)
def test_check_finds_fault(tree: Path, check: Check, name: str, old: str, new: str, told: str) -> None:
    if old:
        edit(tree, name, old, new)
    else:
        append(tree, name, new)
    assert told in only(tree, check)


def test_unprovenanced_finds_row_without_label(tree: Path) -> None:
    edit(tree, TABLE, "our interpretation", "paper, mostly")
    row, missing = unprovenanced(tree)
    assert "labelled by none" in row and missing == f"TOY-3 has no labelled row in {PROVENANCE}"
    assert all(not check(tree) for check in CHECKS if check is not unprovenanced)


def test_docstring_drift_finds_equation_of_another_chapter(tree: Path) -> None:
    append(tree, "spec/02_other.md", f"**{ident(1, 'OTHER')}** It MAY be.\n")
    append(tree, TABLE, "| OTHER-1 | c | literature | |\n")
    append(tree, "spec/README.md", "| [02_other.md](02_other.md) | - | - |\n")
    edit(tree, CODE, "Toy.\n", f"Toy, see {ident(3)}.\n\n{ident(1, 'OTHER')} an equation\n")
    assert only(tree, docstring_drift) == "storm_ref/toy.py states OTHER-1, which 01_toy.md does not define"


def test_unpaired_finds_row_that_leads_nowhere(tree: Path) -> None:
    (tree / CASES).rename(tree / "tests/toy.py")
    assert only(tree, unpaired) == f"the table of chapters names {CASES}, which does not exist"


def test_unpaired_finds_chapter_of_another_stem(tree: Path) -> None:
    (tree / CODE).rename(tree / "storm_ref/game.py")
    edit(tree, "spec/README.md", "`storm_ref/toy.py`", "`storm_ref/game.py`")
    edit(tree, SPEC, "toy.SIZE", "game.SIZE")
    assert only(tree, unpaired) == "01_toy.md has no module of its stem"
