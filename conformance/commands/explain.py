"""The command that explains one case or law on a port."""

import argparse

from conformance.commands.judge import chosen_adapter
from conformance.explain.command import explain

__all__ = ["explain_subject"]


def explain_subject(args: argparse.Namespace) -> int:
    """`python -m conformance explain CASE`. Returns the exit code."""
    return explain(args.case, chosen_adapter(args), args)
