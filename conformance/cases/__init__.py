"""The recipes of the cases, one module a chapter with the stems of spec/ and storm_ref/; each has `recipes()`.

Expected values that are not given there come from the reference when vectors are frozen. Judging reads the frozen
vectors and imports neither recipes nor reference.
"""

import importlib

from conformance.judging.case import Recipe

__all__ = ["CHAPTERS", "all_recipes", "chapter_recipes"]

CHAPTERS = (
    "tokenisation",
    "memory",
    "attention",
    "denoiser",
    "tiling",
    "edm",
    "guidance",
    "assimilation",
    "verification",
    "parallel",
    "numerics",
    "cost",
)


def chapter_recipes(chapter: str) -> list[Recipe]:
    """Make the recipes of one chapter."""
    recipes: list[Recipe] = importlib.import_module(f"conformance.cases.{chapter}").recipes()
    return recipes


def all_recipes() -> dict[str, list[Recipe]]:
    """Make every recipe, by chapter."""
    return {name: chapter_recipes(name) for name in CHAPTERS}
