"""Reports, all from one result.json: the terminal here; HTML, Markdown and JUnit beside it."""

from conformance.report.terminal import print_report, requirement_text

__all__ = ["print_report", "requirement_text"]
