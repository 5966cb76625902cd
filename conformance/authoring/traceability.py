"""From each requirement to its cases and laws, and to the wrong ports that they catch.

The record of what they catch is `conformance/mutants/kills.json`, one line for each mutant with the requirements that
its failures speak for, taken from a full `python -m conformance mutants`. `conformance/TRACEABILITY.md` is rendered
from that record, the specification, the cases and the laws.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.requirements import REASONS, Requirement, requirements
from conformance.mutants import MUTANTS
from conformance.protocol.atomic import write_atomically

__all__ = ["KILLS", "TABLE", "coverage", "read_kills", "record_kills", "render", "table", "uncovered"]

Kills = Mapping[str, Sequence[str]]  # requirement to mutants

KILLS = Path(__file__).parents[1] / "mutants" / "kills.json"
TABLE = Path(__file__).parents[1] / "TRACEABILITY.md"
SHOWN = 4  # mutants recorded for a requirement that no mutant is made for

OPENING = """# Traceability

For every requirement of the specification, this table lists the cases and laws that hold a port to it, and the wrong
ports of the catalogue that they catch: those made for the requirement, or a few others where none is. Where a MUST has
no case, law or wrong port, its row gives the reason. `python -m conformance lint --table FILE` renders the table from
the mutants.json of a full `python -m conformance mutants`; a test compares it with the suite.
"""


def coverage(subjects: Iterable[Case | Law]) -> dict[str, list[str]]:
    """Return the ids of the cases and laws of each requirement."""
    covered: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        for requirement in subject.requirements:
            covered[requirement].append(subject.id)
    return dict(covered)


def uncovered(
    known: Mapping[str, Requirement],
    covered: Mapping[str, Sequence[str]],
    kills: Kills,
    reasons: Mapping[str, str] = REASONS,
) -> list[str]:
    """Return what is missing, one line each.

    Missing is: for a MUST, a case or law, a mutant that these catch, or a reason why not; for a reason, something that
    the requirement lacks; for an id that a case or law cites, a requirement.
    """
    unknown = [name for name in covered if name not in known]
    problems = [f"{name} is cited by {covered[name][0]} and not in the specification" for name in unknown]
    for name, requirement in known.items():
        lacks = "case or law" if name not in covered else "mutant" if not kills.get(name) else ""
        if requirement.binding and lacks and name not in reasons:
            problems.append(f"{name} has no {lacks}, and no reason in conformance/judging/requirements.py says why")
        if not lacks and name in reasons:
            problems.append(f"{name} has a reason for lacking something, and lacks nothing")
    return problems


def table(
    known: Mapping[str, Requirement],
    covered: Mapping[str, Sequence[str]],
    kills: Kills,
    reasons: Mapping[str, str] = REASONS,
) -> str:
    """Render the table in Markdown: requirement, cases and laws, mutants they kill, or why there are none."""
    lines = ["| requirement | cases and laws | mutants they kill |", "|---|---|---|"]
    for name, requirement in known.items():
        subjects = ", ".join(f"`{subject}`" for subject in covered.get(name, ()))
        killed = ", ".join(f"`{mutant}`" for mutant in kills.get(name, ()))
        why = reasons.get(name, "" if requirement.binding else f"{requirement.keyword}: not judged")
        lines.append(f"| {name} ({requirement.keyword}) | {subjects or why} | {killed or (why if subjects else '')} |")
    return "\n".join(lines)


def render(subjects: Iterable[Case | Law], kills: Kills) -> str:
    """Render TRACEABILITY.md."""
    return f"{OPENING}\n{table(requirements(), coverage(subjects), kills)}\n"


def read_kills(path: Path = KILLS) -> dict[str, list[str]]:
    """Return the recorded mutants of each requirement, sorted. Raises OSError when there is no record."""
    kills: dict[str, list[str]] = defaultdict(list)
    for mutant, names in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        for requirement in names:
            kills[requirement].append(mutant)
    return dict(kills)


def record_kills(run: Mapping[str, Any], path: Path = KILLS) -> None:
    """Write the record from the mutants.json of a full run. Raises ValueError for a run of some mutants only."""
    if run["mutants"] != len(MUTANTS):
        raise ValueError(f"that run tried {run['mutants']} of {len(MUTANTS)} mutants; the table needs all")
    recorded: dict[str, list[str]] = defaultdict(list)
    for requirement, caught in sorted(run["requirements"].items()):
        made_for_it = [mutant for mutant in caught if requirement in MUTANTS[mutant].requirements]
        for mutant in made_for_it or caught[:SHOWN]:
            recorded[mutant].append(requirement)
    lines = ",\n".join(f"{json.dumps(mutant)}: {json.dumps(recorded[mutant])}" for mutant in sorted(recorded))
    write_atomically(path, f"{{\n{lines}\n}}\n".encode())
