"""`python -m conformance`: judge a port. Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete."""

import conformance.protocol.threads  # noqa: F401  # isort: skip  # before anything that imports numpy

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from conformance.adapter import AdapterError
from conformance.judging.vectors import FOLDER, VectorError
from conformance.protocol.operations import DTYPES, PROFILES

__all__ = ["main"]

OUT = Path("build/conformance")

# Each command is a function of the parsed arguments that returns an exit code. It is imported when it is asked for,
# because judging a port needs neither PyTorch nor Matplotlib, which other commands load.
COMMANDS = {
    "run": "conformance.commands.judge:run",
    "smoke": "conformance.commands.judge:run",
    "explain": "conformance.commands.explain:explain_subject",
    "export": "conformance.commands.folder:export",
    "answer": "conformance.commands.folder:answer",
    "check": "conformance.commands.folder:check",
    "mutants": "conformance.mutants.trial:trial",
    "report": "conformance.report.files:report",
    "new-adapter": "conformance.authoring.new_adapter:command",
    "list": "conformance.commands.judge:list_subjects",
    "lint": "conformance.authoring.lint:command",
    "generate": "conformance.authoring.freeze:generate",
}


def _adapter_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    port = parser.add_mutually_exclusive_group(required=default is None)
    port.add_argument(
        "--adapter",
        default=default,
        metavar="NAME|MODULE:OBJECT",
        help="the port: storm_ref, numpy, or an object of a module of yours"
        + (f"; default {default}" if default is not None else ""),
    )
    port.add_argument("--cmd", metavar="PROGRAM", help="the port as a program that speaks the wire protocol on stdio")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="time limit of one call of the port; default 60"
    )


def _judging_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="dtype of the network; default float64")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the laws' examples; default 0")


def _port_options(parser: argparse.ArgumentParser) -> None:
    _adapter_options(parser, default="storm_ref")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run MODULE:OBJECT in this process, for a debugger; a port that crashes then ends the suite, too",
    )
    _judging_options(parser)


def _profile_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--profile",
        action="append",
        choices=[*PROFILES],
        help=f"profile to judge, may be given several times; default: {default}",
    )


def _out_option(parser: argparse.ArgumentParser, content: str) -> None:
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder for {content}; default {OUT}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description="Judge an implementation of STORM against the specification. Without a command: run.",
        epilog="Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete (something is unsupported).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="judge a port (the default)")
    _port_options(run)
    _profile_option(run, "those that the port claims")
    _out_option(run, "result.json and the reports")
    smoke = commands.add_parser("smoke", help="judge a port by one case of each public operation, in seconds")
    _port_options(smoke)
    _out_option(smoke, "result.json and the reports")
    explain = commands.add_parser("explain", help="show where a port first goes wrong in a case or law, and why")
    explain.add_argument("case", metavar="CASE", help="a case or law, as list names it")
    _port_options(explain)
    _out_option(explain, "the picture")
    export = commands.add_parser("export", help="write all inputs to a folder, for a port that the suite cannot start")
    export.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    _profile_option(export, "all")
    _judging_options(export)
    answer = commands.add_parser("answer", help="run a port over an exported folder; an interrupted run resumes")
    answer.add_argument("folder", type=Path, metavar="DIR", help="an exported folder")
    _adapter_options(answer, default=None)
    answer.add_argument(
        "--launched", action="store_true", help="this process is one rank of many, started by torchrun, mpirun or srun"
    )
    check = commands.add_parser("check", help="judge the outputs that a port wrote into an exported folder")
    check.add_argument("folder", type=Path, metavar="DIR", help="an exported folder")
    _out_option(check, "result.json and the reports")
    mutants = commands.add_parser("mutants", help="try the suite on wrong ports, and on honest variants")
    mutants.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="dtype to try, may be given several times; default: float64 and float32",
    )
    mutants.add_argument(
        "--only", action="append", metavar="NAME", help="try this mutant alone; may be given several times"
    )
    mutants.add_argument("--jobs", type=int, default=0, metavar="N", help="number of processes; default: one a core")
    _out_option(mutants, "mutants.json")
    report = commands.add_parser("report", help="write the reports of an earlier run again")
    report.add_argument(
        "--result",
        type=Path,
        default=OUT / "result.json",
        metavar="FILE",
        help=f"result.json of that run; default {OUT / 'result.json'}",
    )
    _out_option(report, "the reports")
    new = commands.add_parser("new-adapter", help="write a stub of an adapter that runs at once")
    new.add_argument("kind", choices=("python", "wire"), help="a module, or a program in any language")
    new.add_argument("folder", type=Path, metavar="DIR", help="folder for the stub; its name is the name of the module")
    listing = commands.add_parser("list", help="list cases and laws")
    _profile_option(listing, "all")
    lint = commands.add_parser("lint", help="check the suite itself: vectors, manifest, traceability")
    lint.add_argument("--table", type=Path, metavar="FILE", help="write TRACEABILITY.md from this mutants.json first")
    generate = commands.add_parser("generate", help="freeze the vectors from the reference")
    generate.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="folder for the vectors; default tiny_data/vectors"
    )
    generate.add_argument(
        "--all", action="store_true", help="freeze again also the cases whose recipes have not changed (minutes)"
    )
    return parser


def _run_command(args: argparse.Namespace) -> int:
    module, function = COMMANDS[args.command].split(":")
    try:
        command = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("conformance", "storm_ref")):
            raise
        raise ValueError(
            f"{args.command} needs the reference and the tools of its authors, {error.name} is not installed: "
            "pip install 'storm-ref[dev]'"
        ) from error
    exit_code: int = command(args)
    return exit_code


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
        return _run_command(args)
    except (AdapterError, VectorError, OSError, ValueError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except Exception:  # else Python would exit with 1, which says that the port fails
        traceback.print_exc()
        print("conformance: the suite itself failed; this says nothing about the port", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
