"""Ensembles: members are partitioned over data ranks and gathered on all of them.

[PAR-18] member m has the noise of (seed, analysis, m), [DA-3], on whichever rank it is drawn, so that the ensemble does
         not depend on the mesh
[PAR-19] ranks fail together: an error on one rank is raised on all, and names that rank, and members by the numbers
         that they have in the serial run

The paper: ensembles of thousands of members, one per accelerator (Table IV).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from storm_ref.edm import NotFiniteError
from storm_ref.parallel.mesh import World, share

__all__ = ["draw_shared", "gather_members"]


def gather_members(own: Float[Tensor, "m *s"], count: int, world: World) -> Float[Tensor, "n *s"]:
    """Gather all `count` members, in order and on every rank, from the members of each data rank.

    This takes one all-gather along fsdp and one along ddp. All ranks call it together.
    """
    shares = [len(share(count, world.mesh.data, rank)) for rank in range(world.mesh.data)]
    most = max(shares)
    rows = own.new_zeros(most, *own.shape[1:])
    rows[: len(own)] = own
    for axis in ("fsdp", "ddp"):
        if getattr(world.mesh, axis) > 1:
            every = [torch.empty_like(rows) for _ in range(getattr(world.mesh, axis))]
            dist.all_gather(every, rows, group=world.group(axis))
            rows = torch.cat(every)
    return torch.cat([part[:n] for part, n in zip(torch.split(rows, most), shares, strict=True)])


def draw_shared(draw: Callable[[range], Float[Tensor, "m *s"]], count: int, world: World) -> Float[Tensor, "n *s"]:
    """`count` members on every rank, [PAR-18]; `draw` draws the members whose numbers it is given.

    Raises ValueError, on all ranks, for fewer members than data ranks, and with the error that any rank raises,
    [PAR-19].
    """
    world.mesh.check(samples=count)
    if world.mesh.size == 1:  # an error keeps its type where no other rank has to hear of it
        return draw(range(count))
    own = None
    error = None
    mine = world.share(count)
    try:
        own = draw(mine)
    except NotFiniteError as e:
        error = str(NotFiniteError([mine[m] for m in e.members], e.step, e.steps, e.sigma))
    except ValueError as e:
        error = str(e)
    world.raise_together(error)
    assert own is not None
    return gather_members(own, count, world)
