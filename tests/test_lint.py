"""The suite's own order: every MUST has its case or law and a mutant that these catch, and the table says so."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.__main__ import COMMANDS, main
from conformance.authoring.lint import problems
from conformance.authoring.traceability import coverage, read_kills, record_kills, table, uncovered
from conformance.cases import all_recipes
from conformance.judging.requirements import REASONS, Requirement, requirements
from conformance.judging.runner import everything
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.mutants import MUTANTS

CASES, LAWS = load_cases(), all_laws()


def test_main_lint_says_that_nothing_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """Vectors, manifest, targets, operations, profiles and TRACEABILITY.md agree."""
    assert main(["lint"]) == 0
    assert re.search(r"\d+ cases and \d+ laws, \d+ of them public; 0 problems", capsys.readouterr().out)


def test_main_names_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lean install lacks the packages of the suite's authors: the message has the remedy, and no traceback."""
    monkeypatch.setitem(COMMANDS, "lint", "absent_package.authoring:command")
    assert main(["lint"]) == 2
    message = capsys.readouterr().err
    assert "absent_package is not installed" in message and "storm-ref[dev]" in message and "Traceback" not in message


def test_reasons_are_for_requirements_that_need_one() -> None:
    known, covered = requirements(), coverage(everything(CASES, LAWS))
    assert set(REASONS) <= set(known) and not set(REASONS) & set(covered)
    assert all(known[name].binding for name in REASONS)


def test_traceability_kills_are_of_the_catalogue() -> None:
    """The recorded mutants exist, and most requirements that one is made for have it in their row."""
    kills = read_kills()
    assert {mutant for caught in kills.values() for mutant in caught} <= set(MUTANTS)
    made = {name for mutant in MUTANTS.values() for name in mutant.requirements}
    assert sum(bool(kills.get(name)) for name in made) > 0.95 * len(made)


TOY = {
    name: Requirement(name, "00_toy.md", f"A thing {word} be.")
    for name, word in (("TOY-1", "MUST"), ("TOY-2", "MUST NOT"), ("TOY-3", "SHOULD"))
}


def test_uncovered_finds_what_is_missing() -> None:
    full = {"TOY-1": ["a/one"], "TOY-2": ["a/two"]}
    kills = {"TOY-1": ["m"], "TOY-2": ["m"]}
    assert uncovered(TOY, full, kills, {}) == []
    assert "TOY-2 has no case or law" in uncovered(TOY, {"TOY-1": ["a/one"]}, kills, {})[0]
    assert "TOY-2 has no mutant" in uncovered(TOY, full, {"TOY-1": ["m"]}, {})[0]
    assert uncovered(TOY, {"TOY-1": ["a/one"]}, {"TOY-1": ["m"]}, {"TOY-2": "why"}) == []
    assert "lacks nothing" in uncovered(TOY, full, kills, {"TOY-1": "why"})[0]
    assert "TOY-9 is cited by a/one" in uncovered(TOY, full | {"TOY-9": ["a/one"]}, kills, {})[0]


def test_table_has_a_row_for_each_requirement() -> None:
    kills = {"TOY-1": ["first", "second"]}
    text = table(TOY, {"TOY-1": ["a/one", "a/two"]}, kills, {"TOY-2": "because"})
    rows = text.splitlines()[2:]
    assert rows[0] == "| TOY-1 (MUST) | `a/one`, `a/two` | `first`, `second` |"
    assert rows[1] == "| TOY-2 (MUST NOT) | because |  |"
    assert rows[2] == "| TOY-3 (SHOULD) | SHOULD: not judged |  |"


def test_record_kills_wants_a_full_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="that run tried 2 of"):
        record_kills({"mutants": 2, "requirements": {}}, tmp_path / "kills.json")
    assert not list(tmp_path.iterdir())


def test_record_kills_prefers_mutants_made_for_the_requirement(tmp_path: Path) -> None:
    """A requirement without mutants of its own lists the first few that its cases caught. Each mutant has one line."""
    path = tmp_path / "kills.json"
    record_kills({"mutants": len(MUTANTS), "requirements": {"ATT-4": ["gate_reversed", "schedule_over_n"]}}, path)
    assert read_kills(path) == {"ATT-4": ["gate_reversed"]}
    others = [name for name, mutant in MUTANTS.items() if "CONV-1" not in mutant.requirements][:6]
    caught = {"ATT-4": ["gate_reversed"], "CONV-1": sorted(others)}
    record_kills({"mutants": len(MUTANTS), "requirements": caught}, path)
    assert read_kills(path) == {"ATT-4": ["gate_reversed"], "CONV-1": sorted(others)[:4]}
    assert len(path.read_text().splitlines()) == 2 + len({"gate_reversed", *sorted(others)[:4]})


@pytest.mark.slow
def test_problems_finds_a_changed_recipe_and_an_unknown_target() -> None:
    fewer = {name: drafts[1:] for name, drafts in all_recipes().items()}
    assert any("not of these recipes" in line for line in problems(CASES, LAWS, fewer))
    strange = [replace(CASES[0], targets=("nobody",)), *CASES[1:]]
    assert "nobody is a target and not in the catalogue" in problems(strange, LAWS, all_recipes())
    assert any("used twice" in line for line in problems([*CASES, CASES[0]], LAWS, all_recipes()))


def test_problems_finds_a_table_that_is_not_of_the_suite() -> None:
    """A case more, and its row of TRACEABILITY.md is out of date."""
    more = [*CASES, replace(CASES[0], id=f"{CASES[0].id}-again")]
    assert any("TRACEABILITY.md is not what the suite says" in line for line in problems(more, LAWS, all_recipes()))
