"""The README is true: its program prints what it says, and the files, commands and options it names exist."""

import re
import shlex
from pathlib import Path

import pytest

from storm_ref.workbench.cli.options import RENAMED, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_program_finds_the_posterior(capsys: pytest.CaptureFixture[str]) -> None:
    """The mean is 2/3 and the variance 1/3, within five standard errors of 20,000 members."""
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert program is not None
    exec(compile(program[1], "README.md", "exec"), {})
    mean, variance = (float(word) for word in capsys.readouterr().out.split())
    assert abs(mean - 2 / 3) < 5 * (1 / 3 / 20000) ** 0.5
    assert abs(variance - 1 / 3) < 5 * (1 / 3) * (2 / 20000) ** 0.5


def test_readme_links_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 10
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README names files that are not there: {missing}"


def test_readme_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= targets, f"README names commands that make does not have: {named - targets}"


@pytest.mark.parametrize("page", ["README.md", "Makefile", "docs", "storm_ref"])
def test_commands_of_the_pages_are_understood(page: str) -> None:
    """Every `python -m storm_ref COMMAND ...`, also under torchrun, has options that the command line knows."""
    path = ROOT / page
    pages = path.rglob("*.md") if path.is_dir() else [path]
    text = "\n".join(p.read_text() for p in pages).replace("\\\n", " ")
    text = re.sub(r"\$\(if .*\)", "", text)  # an option of make
    commands = re.findall(r"-m storm_ref (?:-- )?((?:train|assimilate|forecast|verify|trial) .*)", text)
    assert commands or page == "storm_ref"
    for command in commands:
        words = [word for word in shlex.split(command) if word != "$common"]
        assert parse(words).command == words[0]
    for old, new in RENAMED.items():
        assert not re.search(rf"{old}[ `=]", text), f"{page} has {old}, which is {new} now"


def test_readme_module_table_is_complete() -> None:
    """Every chapter of the specification stands in the reading order."""
    for chapter in (ROOT / "spec").glob("[01]*_*.md"):
        assert f"spec/{chapter.name}" in README, f"{chapter.name} is missing from the reading order"


def test_readme_counts_are_those_of_the_suite() -> None:
    from conformance.judging.vectors import load_cases
    from conformance.laws import all_laws
    from conformance.mutants import MUTANTS
    from conformance.mutants.honest import HONEST

    words = " ".join(README.split())
    assert f"{len(load_cases())} cases and {len(all_laws())} laws" in words
    assert f"{len(MUTANTS)} wrong ports of a catalogue" in words and f"{len(HONEST)} honest variants" in words
