"""`python -m conformance mutants`: try the suite on wrong ports, which it must catch, and on honest ones, which it must
not accuse.

A mutant is killed in a dtype when a case or law fails, and counts as killed when it is in every dtype of the trial.

Not everything is run on everything. Cases and laws that do not reach the code with the fault see the reference itself,
whose verdict is known. On a mutant that is killed already, laws of other chapters are left out; so are, once ENOUGH
have failed, all others in every dtype but the first. Mutants whose fault is in ranks take longer, and ENOUGH failures
end their trial in every dtype. A law is tried on EXAMPLES examples. Survivors are argued equivalent in the catalogue,
or show that a case is missing.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from conformance import SPEC
from conformance.adapter import Adapter, describe
from conformance.judging.case import Case
from conformance.judging.runner import FAILED, Subject, judge, judge_law
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.mutants import MUTANTS, Mutant, adapter_of
from conformance.mutants.honest import HONEST, honest_adapter
from conformance.mutants.likely_mutants import LineUp
from conformance.mutants.mutant import Patch, Place, Traced, in_ranks, place, replaced_code, shows_in
from conformance.ports.checked import Port
from conformance.protocol.atomic import write_atomically

__all__ = ["Finding", "reach", "subjects", "summary", "trial", "try_port"]

DTYPES = ("float64", "float32")
ENOUGH = 10
EXAMPLES = 6  # of a law; judging a port takes more, but there are a thousand ports here


@dataclass(frozen=True)
class Finding:
    """The ids of the cases and laws that failed on one port in one dtype."""

    name: str
    dtype: str
    failed: tuple[str, ...]
    first: str  # the first of them, and what it said
    seconds: float


def subjects() -> list[Subject]:
    """Return every frozen case and every law, the laws with fewer examples."""
    laws = [replace(law, examples=min(law.examples, EXAMPLES)) for law in all_laws()]
    return [*load_cases(), *laws]


def _judged(port: Port, subject: Subject) -> tuple[str, str]:
    outcome = judge(port, subject) if isinstance(subject, Case) else judge_law(port, subject, 0, shrink=False)
    return outcome.verdict, outcome.detail


def reach(tested: Iterable[Subject], wanted: Iterable[Place]) -> dict[str, frozenset[Place]]:
    """Return which of the wanted pieces of code each case or law runs on the reference."""
    interesting = frozenset(wanted)
    reached = {}
    for subject in tested:
        traced = Traced()
        _judged(Port(traced, describe(traced)), subject)
        reached[subject.id] = interesting & {place(code) for code in traced.seen}
    return reached


def try_port(name: str, adapter: Adapter, dtype: str, tested: Iterable[Subject], enough: int | None = None) -> Finding:
    """Judge a port by cases and laws until `enough` have failed, a public one among them; None: by all.

    Hypothesis does not look for the smallest example.
    """
    start = time.process_time()
    port = Port(adapter, describe(adapter), dtype)
    failed: list[Subject] = []
    first = ""
    for subject in tested:
        if enough is not None and len(failed) >= enough and any(other.public for other in failed):
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wrong port may warn of what is wrong with it
            verdict, detail = _judged(port, subject)
        if verdict in FAILED:
            failed.append(subject)
            first = first or f"{subject.id}: {detail}"
    return Finding(name, dtype, tuple(subject.id for subject in failed), first, time.process_time() - start)


_SUBJECTS: dict[str, Subject] = {}  # those of a worker process, by id


def _start() -> None:
    torch.set_num_threads(1)
    _SUBJECTS.update({subject.id: subject for subject in subjects()})


@dataclass(frozen=True)
class Task:
    """A port to try in a dtype: on the cases and laws `ids`, and on `others` if none of those fails."""

    name: str
    dtype: str
    ids: tuple[str, ...]
    others: tuple[str, ...] = ()
    enough: int | None = None


def _work(task: Task) -> Finding:
    wrong = task.name in MUTANTS
    adapter = adapter_of(MUTANTS[task.name]) if wrong else honest_adapter(task.name)
    finding = try_port(task.name, adapter, task.dtype, [_SUBJECTS[i] for i in task.ids], task.enough)
    if finding.failed or not task.others:
        return finding
    more = try_port(task.name, adapter, task.dtype, [_SUBJECTS[i] for i in task.others], enough=1)
    return replace(more, seconds=finding.seconds + more.seconds)


def _tasks(
    mutants: Sequence[Mutant], honest: Sequence[str], dtypes: Sequence[str], tested: Sequence[Subject]
) -> list[Task]:
    """List what to run, the longest first, so that no process is left with a long one at the end."""
    changes = {name: HONEST[name].changes() for name in honest}
    every = [*(mutant.patches for mutant in mutants), *changes.values()]
    reached = reach(tested, [code for patches in every for code in replaced_code(patches) or ()])

    def relevant(patches: Sequence[Patch]) -> list[Subject]:
        return [subject for subject in tested if shows_in(patches, subject.chapter, reached[subject.id])]

    tasks = []
    for name, patches in changes.items():
        cases = [subject for subject in tested if isinstance(subject, Case)]  # threads wait more than they compute
        ids = tuple(subject.id for subject in (relevant(patches) if patches else cases))
        tasks += [Task(name, dtype, ids) for dtype in dtypes]
    for mutant in mutants:
        own = sorted(relevant(mutant.patches), key=lambda subject: subject.chapter != mutant.chapter)
        soon = tuple(s.id for s in own if isinstance(s, Case) or s.chapter == mutant.chapter)
        late = tuple(s.id for s in own if s.id not in set(soon))
        few = ENOUGH if in_ranks(mutant.patches) else None
        tasks += [Task(mutant.name, dtype, soon, late, few if dtype == dtypes[0] else ENOUGH) for dtype in dtypes]
    return sorted(tasks, key=lambda task: -len(task.ids))


def _run(tasks: Iterable[Task], jobs: int, done: Callable[[Finding], None]) -> None:
    if jobs == 1:
        _start()
        for task in tasks:
            done(_work(task))
        return

    def finished(future: Future[Finding]) -> None:
        if future.exception() is None:
            done(future.result())

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conformance.mutants.trial"])
    with ProcessPoolExecutor(jobs, context, _start) as pool:
        waiting = [pool.submit(_work, task) for task in tasks]
        for future in waiting:
            future.add_done_callback(finished)
        for future in waiting:
            future.result()


@cache
def _lineup() -> LineUp:
    """Return the one line-up of a worker process, which remembers what every mutant answered."""
    return LineUp(load_cases(), DTYPES[0])


def _named(case_id: str, mutants: Sequence[str]) -> list[str]:
    """Return those of the mutants that `explain` names first when it is asked about their failure on this case."""
    torch.set_num_threads(1)
    lineup = _lineup()
    case = next(case for case in lineup.cases if case.id == case_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [name for name in mutants if lineup.names_rightly(name, case)]


def naming(findings: Sequence[Finding], jobs: int) -> dict[str, Any]:
    """Count the mutants that `explain` calls by their names, each asked about by the first case that it fails."""
    by_case: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        first = next((i for i in finding.failed if "/law-" not in i), None)
        if finding.dtype == DTYPES[0] and finding.name in MUTANTS and first is not None:
            by_case[first].append(finding.name)
    if not by_case:
        return {"asked": 0, "named": 0, "misnamed": []}
    cases = sorted(by_case)  # cases of one chapter follow one another, and go to one process
    mutants = [by_case[case] for case in cases]
    chunk = -(-len(cases) // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        answers = pool.map(_named, cases, mutants, chunksize=chunk)
        right = {name for names in answers for name in names}
    asked = sorted(name for names in mutants for name in names)
    return {"asked": len(asked), "named": len(right), "misnamed": [name for name in asked if name not in right]}


def summary(mutants: Sequence[Mutant], findings: Sequence[Finding], tested: Sequence[Subject]) -> dict[str, Any]:
    """Return mutants.json: who was killed, by what, who survived, and who was accused without cause."""
    known = {subject.id: subject for subject in tested}
    wrong = {mutant.name for mutant in mutants}
    of = {(f.name, f.dtype): f for f in findings if f.name in wrong}
    dtypes = sorted({f.dtype for f in findings}, reverse=True)

    def killed(mutant: Mutant, *which: str, public: bool = False) -> bool:
        return all(any(not public or known[i].public for i in of[mutant.name, dtype].failed) for dtype in which)

    by_requirement: dict[str, set[str]] = defaultdict(set)
    for finding in of.values():
        for i in finding.failed:
            for requirement in known[i].requirements:
                by_requirement[requirement].add(finding.name)
    honest = [f for f in findings if f.name not in wrong]
    return {
        "spec": SPEC,
        "dtypes": dtypes,
        "mutants": len(mutants),
        "killed": sum(killed(m, *dtypes) for m in mutants),
        **{f"killed_{dtype}": sum(killed(m, dtype) for m in mutants) for dtype in dtypes},
        "killed_by_public": sum(killed(m, *dtypes, public=True) for m in mutants),
        "survivors": [
            {"name": m.name, "dtype": dtype, "fault": m.fault, "equivalent": m.equivalent}
            for m in mutants
            for dtype in dtypes
            if not killed(m, dtype)
        ],
        "honest_variants": len({f.name for f in honest}),
        "false_alarms": [
            {"name": f.name, "dtype": f.dtype, "failed": list(f.failed), "first": f.first} for f in honest if f.failed
        ],
        "kills": {m.name: {dtype: list(of[m.name, dtype].failed[:10]) for dtype in dtypes} for m in mutants},
        "requirements": {name: sorted(by_requirement[name]) for name in sorted(by_requirement)},
    }


def _print(data: Mapping[str, Any], mutants: Sequence[Mutant], console: Console) -> None:
    table = Table("chapter", "mutants", *data["dtypes"])
    survived = {(s["name"], s["dtype"]) for s in data["survivors"]}
    total = Counter(m.chapter for m in mutants)
    for chapter, count in total.items():
        names = [m.name for m in mutants if m.chapter == chapter]
        table.add_row(chapter, str(count), *(str(sum((n, d) not in survived for n in names)) for d in data["dtypes"]))
    console.print(table)
    killed, public = data["killed"], data["killed_by_public"]
    console.print(f"killed {killed} of {data['mutants']} in every dtype, {public} by public cases and laws")
    counts = [f"{name}: {len(names)}" for name, names in data["requirements"].items()]
    console.print("mutants killed by requirement: " + ", ".join(counts), highlight=False)
    for s in data["survivors"]:
        why = f"equivalent: {s['equivalent']}" if s["equivalent"] else "a case is missing"
        console.print(f"survivor {s['name']} in {s['dtype']}: {s['fault']}; {why}", highlight=False, markup=False)
    for alarm in data["false_alarms"]:
        console.print(
            f"false alarm on {alarm['name']} in {alarm['dtype']}: {alarm['first']}", highlight=False, markup=False
        )
    explained = data["explain"]
    share = f"{explained['named']} of {explained['asked']}"
    console.print(f"explain names {share} mutants, by the first case that each fails")
    console.print(f"{data['honest_variants']} honest variants, {len(data['false_alarms'])} false alarms")


def _chosen(only: Sequence[str] | None) -> tuple[list[Mutant], list[str]]:
    unknown = [name for name in only or () if name not in MUTANTS and name not in HONEST]
    if unknown:
        raise ValueError(
            f"there is no mutant or honest variant {', '.join(unknown)}; conformance/mutants has their names"
        )
    mutants = [m for m in MUTANTS.values() if not only or m.name in only]
    return mutants, [name for name in HONEST if not only or name in only]


def trial(args: argparse.Namespace) -> int:
    """Try the suite, print what came of it, and write mutants.json.

    Returns the exit code: 0 when all but equivalent mutants are killed and no honest variant is accused, else 1.
    """
    mutants, honest = _chosen(args.only)
    dtypes = args.dtype or list(DTYPES)
    jobs = args.jobs or os.cpu_count() or 1
    torch.set_num_threads(1)
    tested = subjects()
    findings: list[Finding] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("mutants", total=(len(mutants) + len(honest)) * len(dtypes))

        def done(finding: Finding) -> None:
            findings.append(finding)
            bar.update(shown, advance=1, description=finding.name[:32].ljust(32))

        _run(_tasks(mutants, honest, dtypes, tested), jobs, done)
    data = summary(mutants, findings, tested) | {"explain": naming(findings, jobs)}
    write_atomically(args.out / "mutants.json", (json.dumps(data, indent=1) + "\n").encode())
    _print(data, mutants, Console())
    open_survivors = [s for s in data["survivors"] if not s["equivalent"]]
    return 1 if open_survivors or data["false_alarms"] else 0
