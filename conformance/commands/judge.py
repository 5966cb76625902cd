"""The commands that run cases and laws on a port: run, smoke, explain; and list, which shows what there is to run."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from conformance.adapter import BUNDLED, Adapter, describe, load_adapter
from conformance.explain.command import explain
from conformance.judging.result import result, write_result
from conformance.judging.runner import Run, Subject, everything, run_suite, select
from conformance.judging.vectors import load_cases, manifest
from conformance.laws import all_laws
from conformance.ports.wire import WireAdapter, command_words, serve_words
from conformance.protocol.operations import PROFILES
from conformance.report import print_report
from conformance.report.files import write_reports

__all__ = ["explain_subject", "list_subjects", "profile_counts", "report_run", "run"]


def _chosen_adapter(args: argparse.Namespace) -> Adapter:
    """The port of the command line. One of the user's own runs in a process of its own unless told otherwise."""
    if args.cmd is not None:
        return WireAdapter(command_words(args.cmd), args.timeout)
    if args.adapter in BUNDLED or args.in_process:
        return load_adapter(args.adapter)
    return WireAdapter(serve_words(args.adapter), args.timeout)


def profile_counts() -> dict[str, int]:
    """The number of public cases and laws of each profile, the denominators of every claim, from the manifest."""
    return {name: count["cases"] + count["laws"] for name, count in manifest()["profiles"].items()}


def report_run(run: Run, out: Path, port: list[str] | None = None) -> int:
    """Write result.json and the reports into `out`, print the report, and return the exit code.

    port: how the command line named the port, for the commands in the reports that run a case again.
    """
    data = result(run) | ({} if port is None else {"port": port})
    write_result(out / "result.json", data)
    print_report(Console(), data, write_reports(data, out))
    return int(data["exit"])


def run(args: argparse.Namespace) -> int:
    """`python -m conformance run` and `smoke`: judge a port and write the reports. Returns the exit code."""
    adapter = _chosen_adapter(args)
    try:
        info = describe(adapter)
        asked = ["smoke"] if args.command == "smoke" else args.profile or []
        profiles, cases, laws = select(info, load_cases(), all_laws(), asked)
        with _progress_bar(len(cases) + len(laws)) as advance:
            judged = run_suite(
                adapter=adapter,
                info=info,
                cases=cases,
                laws=laws,
                profiles=profiles,
                dtype=args.dtype,
                seed=args.seed,
                expected=profile_counts(),
                progress=advance,
            )
    finally:
        close = getattr(adapter, "close", None)
        if close is not None:
            close()
    port = ["--cmd", args.cmd] if args.cmd is not None else ["--adapter", args.adapter]
    return report_run(judged, args.out, port)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[Subject], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields the function that advances it by one."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("judging", total=total)

        def advance(subject: Subject) -> None:
            bar.update(task, advance=1, description=subject.chapter.ljust(12))

        yield advance


def explain_subject(args: argparse.Namespace) -> int:
    """`python -m conformance explain CASE`. Returns the exit code."""
    return explain(args.case, _chosen_adapter(args), args)


def list_subjects(args: argparse.Namespace) -> int:
    """`python -m conformance list`: print every case and law of the profiles, one a line. Returns the exit code."""
    asked = set(args.profile or PROFILES)
    for subject in everything(load_cases(), all_laws()):
        if asked & set(subject.profiles):
            kind = getattr(getattr(subject, "tolerance", None), "kind", "law")
            level = "public" if subject.public else "internal"
            profiles, requirements = ",".join(subject.profiles), " ".join(subject.requirements)
            print(f"{subject.id:<44} {subject.op:<16} {level:<9} {kind:<12} {profiles:<16} {requirements}")
    return 0
