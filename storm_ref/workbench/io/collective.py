"""Work of which all ranks learn how it ended: if one fails, all raise the same error, and none waits for it in vain.

Without a world, or in a world of one rank, there is one process, which does everything.
"""

from collections.abc import Callable
from typing import TypeVar

from storm_ref.parallel.mesh import World

__all__ = ["is_alone", "is_main", "on_every_rank", "on_main_rank"]

T = TypeVar("T")


def is_alone(world: World | None) -> bool:
    """Tell whether there is no other rank to talk to."""
    return world is None or world.mesh.size == 1


def is_main(world: World | None) -> bool:
    """Tell whether this process writes and prints for all."""
    return world is None or world.is_main


def on_every_rank(world: World | None, work: Callable[[], T]) -> T:
    """Run `work` on each rank and return this rank's result.

    Raises ValueError on all ranks when `work` raises ValueError or OSError on any of them.
    """
    message = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        if world is None:
            raise ValueError(str(error)) from error
        message = str(error)
    if world is not None:
        world.raise_together(message)
    return result


def on_main_rank(world: World | None, work: Callable[[], object]) -> None:
    """Run `work` on the main rank alone, while the others wait. Raises ValueError on all ranks when it fails there."""
    on_every_rank(world, work if is_main(world) else _nothing)


def _nothing() -> None:
    """Stand in for the main rank's work on the others."""
