"""The laws of the suite, one module a chapter with the stems of spec/ and storm_ref/; each has a list `LAWS`."""

import importlib
from collections import Counter

from conformance.cases import CHAPTERS
from conformance.judging.law import Law

__all__ = ["all_laws", "count_by_profile"]


def all_laws() -> list[Law]:
    """Every law, in the order of the chapters."""
    return [law for name in CHAPTERS for law in importlib.import_module(f"conformance.laws.{name}").LAWS]


def count_by_profile() -> dict[str, int]:
    """The number of public laws of each profile."""
    return dict(Counter(profile for law in all_laws() if law.public for profile in law.profiles))
