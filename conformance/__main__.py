"""`python -m conformance`: judge a port. Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from conformance.adapter import AdapterError, describe, load_adapter
from conformance.cases import all_cases, all_recipes
from conformance.report import print_report, write_result
from conformance.runner import exit_code, run_cases
from conformance.vectors import FOLDER, VectorError, write_vectors

__all__ = ["main"]

REFERENCE = "conformance.adapters.storm_ref:adapter"
COMMANDS = ("run", "list", "generate")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conformance",
        description="Is this implementation of STORM right? Without a command: run.",
        epilog="Exit codes: 0 conforms, 1 fails, 2 the suite could not judge, 3 incomplete (something is unsupported).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="judge a port (the default)")
    run.add_argument("--adapter", default=REFERENCE, metavar="MODULE:OBJECT", help=f"the port; default {REFERENCE}")
    run.add_argument(
        "--out", type=Path, default=Path("build/conformance"), metavar="DIR", help="where result.json goes"
    )
    commands.add_parser("list", help="list the cases")
    generate = commands.add_parser("generate", help="make the frozen vectors from the reference")
    generate.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="where they go; default tiny_data/vectors"
    )
    return parser


def _run(adapter_name: str, out: Path) -> int:
    adapter = load_adapter(adapter_name)
    info = describe(adapter)
    outcomes = run_cases(adapter, info, all_cases())
    written = out / "result.json"
    write_result(written, info, outcomes)
    print_report(Console(), info, outcomes, written)
    return exit_code(outcomes)


def _list() -> int:
    for case in all_cases():
        print(f"{case.id:<38} {case.op:<16} {case.tolerance.kind:<12} {' '.join(case.requirements)}")
    return 0


def _generate(out: Path) -> int:
    for name, entry in write_vectors(all_recipes(), load_adapter(REFERENCE), out)["files"].items():
        print(f"{name}: {entry['tensors']} tensors, {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "run")
    try:
        args = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if args.command == "run":
            return _run(args.adapter, args.out)
        return _list() if args.command == "list" else _generate(args.out)
    except (AdapterError, VectorError, OSError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except Exception:  # else Python would exit with 1, which says that the port fails
        traceback.print_exc()
        print("conformance: the suite itself failed; this says nothing about the port", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
