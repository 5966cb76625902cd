"""`python -m conformance`: judge a port. Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete."""

import conformance.protocol.threads  # noqa: F401  # isort: skip  # before anything that imports numpy

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from conformance.adapter import BUNDLED, Adapter, AdapterError, Info, describe, load_adapter
from conformance.judging.case import Case
from conformance.judging.vectors import FOLDER, VectorError, load_cases, manifest
from conformance.protocol.operations import DTYPES, PROFILES

__all__ = ["main"]

OUT = Path("build/conformance")


def _port_options(parser: argparse.ArgumentParser) -> None:
    port = parser.add_mutually_exclusive_group()
    port.add_argument(
        "--adapter",
        default="storm_ref",
        metavar="NAME|MODULE:OBJECT",
        help="the port: storm_ref (the default), numpy, or an object of a module of yours",
    )
    port.add_argument("--cmd", metavar="PROGRAM", help="the port as a program that speaks the wire protocol on stdio")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run MODULE:OBJECT in this process, for a debugger; a port that dies then takes the suite along",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for one call of the port; default 60"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="of the network; default float64")
    parser.add_argument("--seed", type=int, default=0, help="of the laws' examples; default 0")


def _out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where {what} goes; default {OUT}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description="Is this implementation of STORM right? Without a command: run.",
        epilog="Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete (something is unsupported).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("run", "judge a port (the default)"), ("smoke", "one case of each operation, in seconds")):
        run = commands.add_parser(name, help=text)
        _port_options(run)
        if name == "run":
            run.add_argument(
                "--profile",
                action="append",
                choices=[*PROFILES],
                help="a profile to judge, as often as wanted; default: those that the port claims",
            )
        _out(run, "result.json and the reports")
    explain = commands.add_parser("explain", help="one case or law: where the port first goes wrong, and likely why")
    explain.add_argument("case", metavar="CASE")
    _port_options(explain)
    _out(explain, "the picture")
    export = commands.add_parser("export", help="write all inputs to a folder, to be run anywhere")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--profile", action="append", choices=[*PROFILES])
    export.add_argument("--dtype", choices=DTYPES, default="float64")
    export.add_argument("--seed", type=int, default=0)
    check = commands.add_parser("check", help="judge the outputs that a port wrote into an exported folder")
    check.add_argument("folder", type=Path, metavar="DIR")
    _out(check, "result.json and the reports")
    mutants = commands.add_parser("mutants", help="try the suite on wrong ports, and on honest variants")
    mutants.add_argument("--dtype", action="append", choices=DTYPES, help="default: float64 and float32")
    mutants.add_argument("--only", action="append", metavar="NAME", help="these mutants alone")
    mutants.add_argument("--jobs", type=int, default=0, help="processes; default: one a core")
    _out(mutants, "mutants.json")
    report = commands.add_parser("report", help="write the reports of an earlier run again")
    report.add_argument("--result", type=Path, default=OUT / "result.json", metavar="FILE")
    _out(report, "the reports")
    new = commands.add_parser("new-adapter", help="write a stub of an adapter that runs at once")
    new.add_argument("kind", choices=("python", "wire"))
    new.add_argument("folder", type=Path, metavar="DIR")
    listing = commands.add_parser("list", help="list cases and laws")
    listing.add_argument("--profile", action="append", choices=[*PROFILES])
    lint = commands.add_parser("lint", help="check the suite itself: vectors, manifest, traceability")
    lint.add_argument("--table", type=Path, metavar="FILE", help="write TRACEABILITY.md from this mutants.json first")
    generate = commands.add_parser("generate", help="freeze the vectors from the reference")
    generate.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default tiny_data/vectors")
    generate.add_argument("--all", action="store_true", help="also those whose recipe has not changed (minutes)")
    return parser


def _adapter(args: argparse.Namespace) -> Adapter:
    """The port of the command line. One of the user's own runs in a process of its own unless told otherwise."""
    if args.cmd is not None:
        from conformance.ports.wire import WireAdapter, command_words

        return WireAdapter(command_words(args.cmd), args.timeout)
    if args.adapter in BUNDLED:
        return load_adapter(args.adapter)
    if args.in_process:
        return load_adapter(args.adapter)
    from conformance.ports.wire import WireAdapter, host_words

    return WireAdapter(host_words(args.adapter), args.timeout)


def _run(args: argparse.Namespace) -> int:
    from conformance.judging.result import result, write_result
    from conformance.judging.runner import run_suite, select
    from conformance.laws import all_laws
    from conformance.report import print_report
    from conformance.report.files import write_reports

    adapter = _adapter(args)
    try:
        info = describe(adapter)
        wanted = ["smoke"] if args.command == "smoke" else args.profile or []
        profiles, cases, laws = select(info, load_cases(), all_laws(), wanted)
        counts = {name: c["cases"] + c["laws"] for name, c in manifest()["profiles"].items()}
        with _progress(info, len(cases) + len(laws)) as tick:
            run = run_suite(adapter, info, cases, laws, profiles, args.dtype, args.seed, counts, tick)
    finally:
        close = getattr(adapter, "close", None)
        if close is not None:
            close()
    port = ["--cmd", args.cmd] if args.cmd is not None else ["--adapter", args.adapter]
    data = result(run) | {"port": port}  # for the reports' commands to reproduce
    write_result(args.out / "result.json", data)
    written = write_reports(data, args.out)
    print_report(Console(), data, written)
    return int(data["exit"])


class _progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, info: Info, total: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.total = total

    def __enter__(self) -> Callable[[object], None]:
        self.bar.start()
        task = self.bar.add_task("judging", total=self.total)

        def tick(subject: object) -> None:
            self.bar.update(task, advance=1, description=str(getattr(subject, "chapter", "")).ljust(12))

        return tick

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _list(args: argparse.Namespace) -> int:
    from conformance.judging.runner import everything
    from conformance.laws import all_laws

    wanted = set(args.profile or PROFILES)
    for subject in everything(load_cases(), all_laws()):
        if wanted & set(subject.profiles):
            kind = getattr(getattr(subject, "tolerance", None), "kind", "law")
            level = "coarse" if subject.public else "fine"
            profiles, requirements = ",".join(subject.profiles), " ".join(subject.requirements)
            print(f"{subject.id:<44} {subject.op:<16} {level:<7} {kind:<12} {profiles:<16} {requirements}")
    return 0


def _stored(folder: Path) -> list[Case]:
    """The cases that are there; none where they cannot be read."""
    try:
        return load_cases(folder)
    except VectorError as error:
        print(f"starting anew: {error}", file=sys.stderr)
        return []


def _generate(args: argparse.Namespace) -> int:
    from conformance.cases import all_recipes
    from conformance.judging.vectors import freeze_all, write_vectors
    from conformance.laws import count_by_profile

    cases = freeze_all(all_recipes(), os.cpu_count() or 1, [] if args.all else _stored(args.out))
    written = write_vectors(cases, count_by_profile(), args.out)
    for name, entry in written["files"].items():
        print(f"{name}: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}")
    print(f"{written['cases']} cases")
    return 0


def _command(args: argparse.Namespace) -> int:
    """Each command loads what it needs and no more: judging a port needs no torch."""
    if args.command in ("run", "smoke"):
        return _run(args)
    if args.command == "list":
        return _list(args)
    if args.command == "generate":
        return _generate(args)
    if args.command == "explain":
        from conformance.explain.command import explain

        return explain(args.case, _adapter(args), args)
    if args.command in ("export", "check"):
        from conformance.ports import folder as directory

        return directory.export(args) if args.command == "export" else directory.check(args)
    if args.command == "mutants":
        from conformance.mutants.trial import trial

        return trial(args)
    if args.command == "report":
        from conformance.report.files import report

        return report(args)
    if args.command == "new-adapter":
        from conformance.authoring.new_adapter import new_adapter

        return new_adapter(args.kind, args.folder)
    from conformance.authoring.lint import lint

    return lint(args.table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    try:
        args = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _command(args)
    except (AdapterError, VectorError, OSError, ValueError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except Exception:  # else Python would exit with 1, which says that the port fails
        traceback.print_exc()
        print("conformance: the suite itself failed; this says nothing about the port", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
