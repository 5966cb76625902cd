"""The recipes of cases, one module a chapter, with the stems of spec/ and storm_ref/.

A module has `recipes()`. Expected values that are not given there come from the reference when vectors are frozen;
judging reads the frozen vectors and imports neither.
"""

import importlib

import numpy as np

from conformance.adapter import Array
from conformance.judging.case import Recipe
from conformance.protocol.operations import round_to

__all__ = ["CHAPTERS", "all_recipes", "chapter_recipes", "draw"]

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


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Standard normal numbers times `scale`, rounded to bfloat16: one set of inputs for every dtype."""
    return round_to(scale * rng.standard_normal(shape), "bfloat16")
