"""`python -m conformance lint`: is the suite itself in order? Vectors, manifest, laws, requirements, mutants, table.

`--table FILE` takes the mutants.json of a full `python -m conformance mutants` and writes TRACEABILITY.md from it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.authoring.traceability import coverage, requirements, table, uncovered
from conformance.cases import all_recipes
from conformance.judging.case import Case, Recipe
from conformance.judging.law import Law
from conformance.judging.runner import Subject, everything
from conformance.judging.vectors import FOLDER, load_cases, manifest
from conformance.laws import all_laws, count_by_profile
from conformance.protocol.atomic import write_atomically
from conformance.protocol.operations import OPERATIONS, PROFILES

__all__ = ["TABLE", "VECTOR_BYTES", "command", "lint", "problems", "write_table"]

TABLE = Path(__file__).parents[1] / "TRACEABILITY.md"
VECTOR_BYTES = 5_000_000
SHOWN = 4  # mutants of a requirement that none is made for
GENERATE = "python -m conformance generate"
REMAKE = "python -m conformance mutants, then lint --table build/conformance/mutants.json"

OPENING = """# Traceability

For every requirement of the specification: the cases and laws that hold a port to it, and wrong ports of the catalogue
that they catch, those made for it where there are such. A MUST that has none says why. Made by `python -m conformance
lint --table FILE` from the mutants.json of a full `python -m conformance mutants`; a test compares it with the suite.
"""


def lint(made_from: Path | None = None) -> int:
    """Print what is out of order, or say that nothing is. Exit code 0 or 1."""
    cases, laws = load_cases(), all_laws()
    if made_from is not None:
        write_table(json.loads(made_from.read_text(encoding="utf-8")), everything(cases, laws))
    found = problems(cases, laws, all_recipes())
    for line in found:
        print(line, file=sys.stderr)
    coarse = sum(subject.public for subject in everything(cases, laws))
    print(f"{len(cases)} cases and {len(laws)} laws, {coarse} of them coarse; {len(found)} problems")
    return 1 if found else 0


def problems(cases: Sequence[Case], laws: Sequence[Law], recipes: Mapping[str, Sequence[Recipe]]) -> list[str]:
    """Everything that is out of order, one line each."""
    from conformance.mutants import MUTANTS

    ids = [subject.id for subject in everything(cases, laws)]
    found = [f"{name} is used twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    written = [recipe.id for drafts in recipes.values() for recipe in drafts]
    if written != [case.id for case in cases]:
        different = sorted(set(written) ^ {case.id for case in cases}) or ["the order"]
        found.append(f"the vectors are not of these recipes ({', '.join(different)}): {GENERATE}")
    if count_by_profile() != {n: c["laws"] for n, c in manifest()["profiles"].items() if c["laws"]}:
        found.append(f"the manifest counts other laws than there are: {GENERATE}")
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    if size > VECTOR_BYTES:
        found.append(f"the vectors take {size} bytes, more than {VECTOR_BYTES}")
    hunted = {mutant for subject in everything(cases, laws) for mutant in subject.targets}
    found += [f"{name} is hunted and not in the catalogue" for name in sorted(hunted - set(MUTANTS))]
    used = {subject.op for subject in cases} | {op for law in laws for op in law.ops}
    found += [f"the operation {name} has neither case nor law" for name in OPERATIONS if name not in used]
    found += [f"the profile {name} has no coarse case" for name in PROFILES if not _has_case(name, cases)]
    return found + _traceability(everything(cases, laws))


def _has_case(profile: str, cases: Sequence[Case]) -> bool:
    return any(profile in case.profiles and case.public for case in cases)


def _traceability(subjects: Sequence[Subject]) -> list[str]:
    """Problems of TRACEABILITY.md, whose last column is the record of the last full run of the mutants."""
    try:
        text = TABLE.read_text(encoding="utf-8")
    except OSError:
        return [f"TRACEABILITY.md is missing: {REMAKE}"]
    kills = recorded_kills(text)
    known, covered = requirements(), coverage(subjects)
    found = uncovered(known, covered, kills)
    if table(known, covered, kills) not in text:
        found.append(f"TRACEABILITY.md is not what the suite says: {REMAKE}")
    return found


def recorded_kills(text: str) -> dict[str, list[str]]:
    """Requirement to mutants, read back from the table."""
    kills: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 3 and "(" in cells[0]:
            kills[cells[0].split(" (")[0]] = [part.strip("` ") for part in cells[2].split(", ") if part.startswith("`")]
    return kills


def write_table(run: Mapping[str, Any], subjects: Sequence[Subject]) -> None:
    """TRACEABILITY.md from a full run of the mutants. Raises ValueError for a run of some of them."""
    from conformance.mutants import MUTANTS

    if run["mutants"] != len(MUTANTS):
        raise ValueError(f"that run tried {run['mutants']} of {len(MUTANTS)} mutants; the table needs all")
    kills = {
        name: [mutant for mutant in caught if name in MUTANTS[mutant].requirements] or caught[:SHOWN]
        for name, caught in run["requirements"].items()
    }
    text = f"{OPENING}\n{table(requirements(), coverage(subjects), kills)}\n"
    write_atomically(TABLE, text.encode())


def command(args: argparse.Namespace) -> int:
    """`python -m conformance lint`. Returns the exit code."""
    return lint(args.table)
