"""The README is true: its program runs and prints what it says, and the files and commands it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_program_finds_the_posterior(capsys: pytest.CaptureFixture[str]) -> None:
    """Mean 2/3 and variance 1/3, within five standard errors of 20,000 members."""
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    exec(compile(found[1], "README.md", "exec"), {})
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
