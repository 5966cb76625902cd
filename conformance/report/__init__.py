"""Reports of a run, all made from one result.json: in the terminal, and as HTML, Markdown and JUnit XML."""

from conformance.report.terminal import print_report

__all__ = ["print_report"]
