"""`python faulty.py KIND RANK STEP train ...`: the command line, in which one rank goes wrong at a step of training.

On the first attempt alone: after a restart by torchrun all is well.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from storm_ref.workbench import parallel_training
from storm_ref.workbench.cli import main


def fail(kind: str) -> None:
    if kind == "raise":
        raise ValueError("this rank has had enough")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)


def install(kind: str, rank: int, step: int) -> None:
    advance = parallel_training._Run.advance

    def faulty(self: parallel_training._Run) -> None:
        if self.step == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if kind == "shapes":
                dist.all_reduce(torch.zeros(3 + 1000 * (self.world.rank == rank)))
            elif self.world.rank == rank:
                fail(kind)
        advance(self)

    parallel_training._Run.advance = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, step = sys.argv[1:4]
    install(kind, int(rank), int(step))
    sys.exit(main(sys.argv[4:]))
