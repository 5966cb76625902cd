"""`python -m conformance lint`: check the suite itself.

It checks that vectors, manifest, cases, laws, operations, profiles, requirements and mutants agree. `--table FILE`
first takes the mutants.json of a full `python -m conformance mutants` into the record of kills, and renders
TRACEABILITY.md anew.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conformance.authoring.traceability import TABLE, coverage, read_kills, record_kills, render, uncovered
from conformance.cases import all_recipes
from conformance.judging.case import Case, Recipe
from conformance.judging.law import Law
from conformance.judging.requirements import requirements
from conformance.judging.runner import Subject, everything
from conformance.judging.vectors import FOLDER, load_cases, manifest
from conformance.laws import all_laws, count_by_profile
from conformance.mutants import MUTANTS
from conformance.protocol.atomic import write_atomically
from conformance.protocol.operations import OPERATIONS, PROFILES

__all__ = ["VECTOR_BYTES", "command", "lint", "problems"]

VECTOR_BYTES = 5_000_000
GENERATE = "python -m conformance generate"
REMAKE = "python -m conformance mutants, then lint --table build/conformance/mutants.json"


def lint(made_from: Path | None = None) -> int:
    """Print what is out of order, or that nothing is. Returns the exit code, 0 or 1.

    made_from: the mutants.json to take into the record of kills first, if any.
    """
    cases, laws = load_cases(), all_laws()
    subjects = everything(cases, laws)
    if made_from is not None:
        record_kills(json.loads(made_from.read_text(encoding="utf-8")))
        write_atomically(TABLE, render(subjects, read_kills()).encode())
    lines = problems(cases, laws, all_recipes())
    for line in lines:
        print(line, file=sys.stderr)
    public = sum(subject.public for subject in subjects)
    print(f"{len(cases)} cases and {len(laws)} laws, {public} of them public; {len(lines)} problems")
    return 1 if lines else 0


def problems(cases: Sequence[Case], laws: Sequence[Law], recipes: Mapping[str, Sequence[Recipe]]) -> list[str]:
    """Return everything that is out of order, one line each."""
    subjects = everything(cases, laws)
    return [
        *_ids(subjects),
        *_vectors(cases, recipes),
        *_targets(subjects),
        *_uncovered_names(cases, laws),
        *_traceability(subjects),
    ]


def _ids(subjects: Sequence[Subject]) -> list[str]:
    ids = [subject.id for subject in subjects]
    return [f"{name} is used twice" for name in sorted({name for name in ids if ids.count(name) > 1})]


def _vectors(cases: Sequence[Case], recipes: Mapping[str, Sequence[Recipe]]) -> list[str]:
    """Compare the stored vectors with the recipes, the manifest with the laws, and the size with its limit."""
    lines = []
    written = [recipe.id for drafts in recipes.values() for recipe in drafts]
    stored = [case.id for case in cases]
    if written != stored:
        different = sorted(set(written) ^ set(stored)) or ["the order"]
        lines.append(f"the vectors are not of these recipes ({', '.join(different)}): {GENERATE}")
    if count_by_profile() != {name: c["laws"] for name, c in manifest()["profiles"].items() if c["laws"]}:
        lines.append(f"the manifest counts other laws than there are: {GENERATE}")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    if size > VECTOR_BYTES:
        lines.append(f"the vectors take {size} bytes, more than {VECTOR_BYTES}")
    return lines


def _targets(subjects: Sequence[Subject]) -> list[str]:
    targets = {mutant for subject in subjects for mutant in subject.targets}
    return [f"{name} is a target and not in the catalogue" for name in sorted(targets - set(MUTANTS))]


def _uncovered_names(cases: Sequence[Case], laws: Sequence[Law]) -> list[str]:
    """Find operations without case or law, and profiles without a public case."""
    used = {case.op for case in cases} | {op for law in laws for op in law.ops}
    judged = {profile for case in cases if case.public for profile in case.profiles}
    return [
        *(f"the operation {name} has neither case nor law" for name in OPERATIONS if name not in used),
        *(f"the profile {name} has no public case" for name in PROFILES if name not in judged),
    ]


def _traceability(subjects: Sequence[Subject]) -> list[str]:
    """Find requirements that nothing holds a port to, and a TRACEABILITY.md that is not what the suite says."""
    try:
        kills = read_kills()
        shown = TABLE.read_text(encoding="utf-8")
    except OSError as error:
        return [f"{error.filename} cannot be read: {REMAKE}"]
    lines = uncovered(requirements(), coverage(subjects), kills)
    if shown != render(subjects, kills):
        lines.append(f"TRACEABILITY.md is not what the suite says: {REMAKE}")
    return lines


def command(args: argparse.Namespace) -> int:
    """`python -m conformance lint`. Returns the exit code."""
    return lint(args.table)
