"""The cases, one module a chapter, with the stems of spec/ and storm_ref/.

A module has `cases()`, and `RECIPES` where some of its expected values are frozen vectors. Nothing here imports the
reference: expected values are computed in NumPy, fractions or decimals, or read.
"""

from conformance.case import Case
from conformance.cases import (
    assimilation,
    attention,
    denoiser,
    edm,
    guidance,
    memory,
    tiling,
    tokenisation,
    verification,
)
from conformance.vectors import Recipe

__all__ = ["all_cases", "all_recipes"]

CHAPTERS = (tokenisation, memory, attention, denoiser, tiling, edm, guidance, assimilation, verification)


def all_cases() -> list[Case]:
    """Every case, by chapter. Raises VectorError when a frozen vector is missing or damaged."""
    return [case for chapter in CHAPTERS for case in chapter.cases()]


def all_recipes() -> list[Recipe]:
    """Every recipe of a frozen vector."""
    return list(denoiser.RECIPES)
