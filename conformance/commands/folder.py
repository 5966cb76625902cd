"""The commands for a port that the suite cannot start: export writes its calls, answer runs them, check judges them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.adapter import BUNDLED, Adapter, AdapterError, describe, load_adapter
from conformance.commands.judge import profile_counts, report_run
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import Run, Subject, run_suite, select
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.ports.folder import RECORDER, Recorder, Replay, answer_as_rank
from conformance.ports.folder import answer as answer_folder
from conformance.ports.wire import WireAdapter, command_words, serve_words
from conformance.protocol.operations import PROFILES
from conformance.protocol.ranks import launched

__all__ = ["answer", "check", "check_folder", "export", "write_export"]


def write_export(
    folder: Path,
    cases: Sequence[Case],
    laws: Sequence[Law],
    profiles: Sequence[str],
    dtype: str,
    seed: int,
    adapters: Sequence[Adapter],
) -> int:
    """Write all calls of the cases and laws; the manifest last. Returns the number of calls.

    adapters: any that conform; laws are recorded on them. Raises ValueError unless the folder is empty or new.
    """
    recorder = Recorder(folder, adapters)

    def belongs(subject: Subject) -> None:
        recorder.belongs(subject.id)

    run_suite(
        adapter=recorder,
        info=recorder.describe(),
        cases=cases,
        laws=laws,
        profiles=profiles,
        dtype=dtype,
        seed=seed,
        progress=belongs,
        shrink=False,
    )
    recorder.finish(profiles, dtype, seed)
    return len(recorder.calls)


def check_folder(
    replay: Replay, cases: Sequence[Case], laws: Sequence[Law], counts: dict[str, int] | None = None
) -> Run:
    """Judge the answers as a run would, but look for no simpler examples of a broken law: those need other calls.

    counts: the number of public cases and laws of each profile, from the manifest of the vectors.
    """
    info, about = describe(replay), replay.manifest
    profiles, cases, laws = select(info, cases, laws, about["profiles"])
    return run_suite(
        adapter=replay,
        info=info,
        cases=cases,
        laws=laws,
        profiles=profiles,
        dtype=about["dtype"],
        seed=about["seed"],
        expected=counts,
        shrink=False,
    )


def _bundled_adapters() -> list[Adapter]:
    """The suite's own adapters, to record laws on; without PyTorch the one in NumPy serves alone."""
    adapters: list[Adapter] = []
    for name in BUNDLED:
        try:
            adapters.append(load_adapter(name))
        except AdapterError:
            continue
    return adapters


def export(args: argparse.Namespace) -> int:
    """`python -m conformance export DIR`: write the calls of the profiles. Returns the exit code."""
    profiles, cases, laws = select(RECORDER, load_cases(), all_laws(), args.profile or [*PROFILES])
    calls = write_export(args.folder, cases, laws, profiles, args.dtype, args.seed, _bundled_adapters())
    print(f"{calls} calls in {args.folder}; {args.folder / 'README.txt'} says how to answer them")
    return 0


def answer(args: argparse.Namespace) -> int:
    """`python -m conformance answer DIR`: run a port over an exported folder, from where it was left.

    Returns the exit code. Raises ValueError for a folder that is no export, AdapterError for a port that does not run.
    """
    if args.launched:
        if args.adapter is None:
            raise ValueError("--launched needs --adapter: the ranks run in the processes of the launcher")
        rank, ranks = launched()
        answered = answer_as_rank(args.folder, load_adapter(args.adapter), rank, ranks)
        print(f"rank {rank} of {ranks}: {answered} calls answered")
        return 0
    words = command_words(args.cmd) if args.cmd is not None else serve_words(args.adapter)
    adapter = WireAdapter(words, args.timeout)
    try:
        print(f"{answer_folder(args.folder, adapter)} calls answered")
    finally:
        adapter.close()
    return 0


def check(args: argparse.Namespace) -> int:
    """`python -m conformance check DIR`: result.json and the reports, as after a run. Returns the exit code."""
    replay = Replay(args.folder)
    print(f"{replay.answered()} of {len(replay.calls)} calls have an answer", file=sys.stderr)
    return report_run(check_folder(replay, load_cases(), all_laws(), profile_counts()), args.out)
