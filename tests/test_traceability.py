"""Specification, code and tests name the same requirements: the checks, the tree they are run on, and tests of them.

A requirement is a paragraph or list item of a chapter that opens with its id in bold brackets. Each check takes the
root of a tree and returns what is wrong with it, one line a problem.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.report import requirement_text

ROOT = Path(__file__).resolve().parents[1]
PROVENANCE = "B_provenance.md"
LABELS = ("paper", "our interpretation", "literature")

_CITED = re.compile(r"(?<!\*\*)\[([A-Z]+-\d+)\]")  # the bold form defines; in a test it is a made-up chapter
_QUOTED = re.compile(r"""["']([A-Z]+-\d+)["']""")  # as conformance cases give them
_DEFINED = re.compile(r"(?:[-*] )?\*\*\[([A-Z]+-\d+)\]\*\* ")
_KEYWORD = re.compile(r"\b(MUST NOT|MUST|SHOULD NOT|SHOULD|MAY)\b")

Check = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Requirement:
    """An id, the chapter that defines it, and its text."""

    id: str
    chapter: str
    text: str

    @property
    def senses(self) -> set[str]:
        """The normative keywords of its text."""
        return set(_KEYWORD.findall(self.text))


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
    """All requirements of all chapters: the text runs to the next blank line or list item."""
    found = []
    for path in sorted((root / "spec").glob("*.md")):
        for block in re.split(r"\n\s*\n|\n(?=[-*] )", path.read_text()):
            if match := _DEFINED.match(block.lstrip("\n")):
                found.append(Requirement(match[1], path.name, block.strip()))
    return found


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
        f"{r.id} in {r.chapter} holds {sorted(r.senses) or 'no keyword'}, want one of MUST, MUST NOT, SHOULD, MAY"
        for r in requirements(root)
        if len(r.senses) != 1
    ]


def untested(root: Path) -> list[str]:
    """Requirements with MUST or MUST NOT that no test, conformance case or law cites."""
    families = _families(root)
    cited: set[str] = set()
    for path in _sources(root, "tests", "conformance/cases", "conformance/laws"):
        cited |= _cited(path.read_text(), families)
    binding = [r for r in requirements(root) if r.senses & {"MUST", "MUST NOT"}]
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
    """Modules and packages of a folder, but for private ones, the workbench and the experiments, which bind nobody."""
    files = {path for path in (root / folder).glob("*.py") if not path.name.startswith("_")}
    packages = {path.parent for path in (root / folder).glob("*/__init__.py")}
    packages -= {root / folder / name for name in ("workbench", "experiments")}
    return {str(path.relative_to(root)) for path in files | packages}


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


def test_report_quotes_requirements_whole() -> None:
    """The suite's report prints a requirement to the next line that looks like a list or a table."""
    for r in requirements(ROOT):
        assert requirement_text(r.id) == " ".join(r.text.split()).partition("]** ")[2], r.id


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
    found = {other.__name__: other(root) for other in CHECKS}
    assert [name for name, problems in found.items() if problems] == [check.__name__], found
    (problem,) = found[check.__name__]
    return problem


def test_sound_tree_has_no_problem(tree: Path) -> None:
    assert [check(tree) for check in CHECKS] == [[]] * len(CHECKS)
    assert [(r.id, r.senses) for r in requirements(tree)] == [
        ("TOY-1", {"MUST"}), ("TOY-2", {"MUST NOT"}), ("TOY-3", {"SHOULD"}),
    ]  # fmt: skip
    assert requirements(tree)[0].text.endswith("round.")


@pytest.mark.parametrize(
    "name", ["storm_ref/deep/er.py", "conformance/judging/runner.py", "tests/test_toy.py", "spec/01_toy.md"]
)
def test_undefined_finds_cited_id_that_no_chapter_defines(tree: Path, name: str) -> None:
    append(tree, name, f"# {ident(9)}\n")
    assert only(tree, undefined) == f"{name} cites TOY-9, which no chapter defines"


def test_undefined_finds_quoted_id_of_known_family(tree: Path) -> None:
    append(tree, "conformance/cases/toy.py", 'MORE = "TOY-10"\n')
    assert "TOY-10" in only(tree, undefined)


def test_doubly_defined_finds_id_of_two_chapters(tree: Path) -> None:
    append(tree, "spec/01_toy.md", f"\n**{ident(1)}** A toy MUST be square.\n")
    assert only(tree, doubly_defined) == "TOY-1 is defined 2 times, in ['01_toy.md', '01_toy.md']"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [("SHOULD be", "ought to be", "no keyword"), ("SHOULD be", "SHOULD be red and MAY be", "['MAY', 'SHOULD']")],
)
def test_ill_formed_finds_no_keyword_and_two_senses(tree: Path, old: str, new: str, told: str) -> None:
    edit(tree, "spec/01_toy.md", old, new)
    assert told in only(tree, ill_formed)


@pytest.mark.parametrize(("name", "number"), [("tests/test_toy.py", 1), ("conformance/cases/toy.py", 2)])
def test_untested_finds_must_that_nothing_cites(tree: Path, name: str, number: int) -> None:
    (tree / name).write_text("")
    append(tree, "storm_ref/toy.py", f"# {ident(number)}: code is no test\n")
    assert only(tree, untested) == f"no test and no case cites TOY-{number} (01_toy.md)"


def test_untested_wants_the_whole_id(tree: Path) -> None:
    (tree / "tests/test_toy.py").write_text(f"# {ident(11)}\n")
    assert untested(tree) == ["no test and no case cites TOY-1 (01_toy.md)"]


def test_untested_lets_should_pass_and_must_not(tree: Path) -> None:
    edit(tree, "spec/01_toy.md", "It SHOULD be", "It MUST be")
    assert "TOY-3" in only(tree, untested)


@pytest.mark.parametrize("label", ["", "folklore", "paper, mostly"])
def test_unprovenanced_finds_row_without_label(tree: Path, label: str) -> None:
    edit(tree, f"spec/{PROVENANCE}", "our interpretation", label)
    row, missing = unprovenanced(tree)
    assert "labelled by none" in row and missing == f"TOY-3 has no labelled row in {PROVENANCE}"
    assert all(not check(tree) for check in CHECKS if check is not unprovenanced)


def test_unprovenanced_finds_requirement_without_row(tree: Path) -> None:
    edit(tree, f"spec/{PROVENANCE}", "TOY-1, ", "")
    assert only(tree, unprovenanced) == f"TOY-1 has no labelled row in {PROVENANCE}"


def test_unprovenanced_finds_row_of_unknown_id(tree: Path) -> None:
    append(tree, f"spec/{PROVENANCE}", "| TOY-12 | c | literature | |\n")
    assert only(tree, unprovenanced) == f"{PROVENANCE} speaks of TOY-12, which no chapter defines"


def test_docstring_drift_finds_equation_of_another_chapter(tree: Path) -> None:
    append(tree, "spec/02_other.md", f"**{ident(1, 'OTHER')}** It MAY be.\n")
    append(tree, f"spec/{PROVENANCE}", "| OTHER-1 | c | literature | |\n")
    append(tree, "spec/README.md", "| [02_other.md](02_other.md) | - | - |\n")
    edit(tree, "storm_ref/toy.py", "Toy.\n", f"Toy, see {ident(3)}.\n\n{ident(1, 'OTHER')} an equation\n")
    assert only(tree, docstring_drift) == "storm_ref/toy.py states OTHER-1, which 01_toy.md does not define"


def test_unpaired_finds_module_without_chapter(tree: Path) -> None:
    append(tree, "storm_ref/lonely.py", "")
    assert only(tree, unpaired) == "storm_ref/lonely.py is in no row of the table of chapters"


def test_unpaired_finds_package_without_chapter(tree: Path) -> None:
    append(tree, "storm_ref/parallel/__init__.py", "")
    assert only(tree, unpaired) == "storm_ref/parallel is in no row of the table of chapters"


def test_unpaired_finds_chapter_without_row(tree: Path) -> None:
    append(tree, "spec/03_lonely.md", "# Lonely\n")
    assert only(tree, unpaired) == "spec/03_lonely.md is in no row of the table of chapters"


def test_unpaired_finds_case_file_without_row(tree: Path) -> None:
    append(tree, "conformance/cases/lonely.py", "")
    assert only(tree, unpaired) == "conformance/cases/lonely.py is in no row of the table of chapters"


def test_unpaired_finds_row_that_leads_nowhere(tree: Path) -> None:
    (tree / "conformance/cases/toy.py").rename(tree / "tests/toy.py")
    assert only(tree, unpaired) == "the table of chapters names conformance/cases/toy.py, which does not exist"


def test_unpaired_finds_module_named_twice(tree: Path) -> None:
    edit(tree, "spec/README.md", "`storm_ref/toy.py`", "`storm_ref/toy.py`, `storm_ref/toy.py`")
    assert only(tree, unpaired) == "storm_ref/toy.py is 2 times in the table of chapters"


def test_unpaired_finds_chapter_of_another_stem(tree: Path) -> None:
    (tree / "storm_ref/toy.py").rename(tree / "storm_ref/game.py")
    edit(tree, "spec/README.md", "`storm_ref/toy.py`", "`storm_ref/game.py`")
    edit(tree, "spec/01_toy.md", "toy.SIZE", "game.SIZE")
    assert only(tree, unpaired) == "01_toy.md has no module of its stem"


@pytest.mark.parametrize(
    ("old", "new"), [("SIZE = 1", "OVERSIZE = 1"), ("def roll", "def rollover"), ("class Toy", "class Toys")]
)
def test_dead_names_finds_renamed_code(tree: Path, old: str, new: str) -> None:
    edit(tree, "storm_ref/toy.py", old, new)
    assert "which is not in the code" in only(tree, dead_names)
