"""The reports as files, all made from one result.json."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from conformance.judging.result import read_result
from conformance.protocol.atomic import write_atomically
from conformance.report.html import report_html
from conformance.report.junit import junit
from conformance.report.markdown import markdown
from conformance.report.terminal import print_report

__all__ = ["report", "write_reports"]


def write_reports(data: dict[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and junit.xml into `folder`, and return the one to open first."""
    write_atomically(folder / "junit.xml", junit(data).encode())
    write_atomically(folder / "report.md", markdown(data).encode())
    write_atomically(folder / "report.html", report_html(data).encode())
    return folder / "report.html"


def report(args: argparse.Namespace) -> int:
    """`python -m conformance report`: write the reports of an earlier run again. The exit code is always 0."""
    data = read_result(args.result)
    print_report(Console(), data, write_reports(data, args.out))
    return 0
