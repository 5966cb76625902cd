"""Work of which all ranks learn how it ended: if one fails, all raise the same error, and none waits for it in vain."""

from collections.abc import Callable
from typing import TypeVar

from storm_ref.parallel.mesh import World

__all__ = ["on_every_rank", "on_main_rank"]

T = TypeVar("T")


def on_every_rank(world: World, work: Callable[[], T]) -> T:
    """Run `work` on each rank and return this rank's result.

    Raises ValueError on all ranks when `work` raises ValueError or OSError on any of them.
    """
    message = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message = str(error)
    world.raise_together(message)
    return result


def on_main_rank(world: World, work: Callable[[], object]) -> None:
    """Run `work` on the main rank alone, while the others wait. Raises ValueError on all ranks when it fails there."""
    on_every_rank(world, work if world.is_main else _nothing)


def _nothing() -> None:
    """Stand in for the main rank's work on the others."""
