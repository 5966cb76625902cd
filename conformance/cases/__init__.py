"""The recipes of cases, one module a chapter, with the stems of spec/ and storm_ref/.

A module has `recipes()`. Expected values that are not given there come from the reference when vectors are frozen;
judging reads the frozen vectors and imports neither.
"""

import importlib

from conformance.judging.case import Recipe

__all__ = ["CHAPTERS", "all_recipes", "chapter_recipes"]

CHAPTERS = (
    "tokenisation", "memory", "attention", "denoiser", "tiling", "edm", "guidance", "assimilation", "verification",
    "parallel", "numerics", "cost",
)  # fmt: skip


def chapter_recipes(chapter: str) -> list[Recipe]:
    """The recipes of one chapter."""
    found: list[Recipe] = importlib.import_module(f"conformance.cases.{chapter}").recipes()
    return found


def all_recipes() -> dict[str, list[Recipe]]:
    """Every recipe, by chapter."""
    return {name: chapter_recipes(name) for name in CHAPTERS}
