"""Run the command line with one rank that fails: `python faulty.py KIND[,KIND] RANK STEP[,STEP] train ...`.

On the first attempt the rank fails by the first kind at the first step; after a restart by torchrun by the second kind
at the second step; later attempts do not fail.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from storm_ref.workbench.cli.commands import main
from storm_ref.workbench.run import training


def fail(kind: str) -> None:
    if kind == "raise":
        raise ValueError("this rank has had enough")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(3600)


def install(kinds: list[str], rank: int, steps: list[int]) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt >= len(kinds):
        return
    kind, step = kinds[attempt], steps[attempt]
    advance = training._Trainer.advance

    def faulty(self: training._Trainer) -> None:
        if self.step == step:
            if kind == "shapes":
                dist.all_reduce(torch.zeros(3 + 1000 * (self.world.rank == rank)))
            elif self.world.rank == rank:
                fail(kind)
        advance(self)

    training._Trainer.advance = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    kinds, who, steps = sys.argv[1:4]
    install(kinds.split(","), int(who), [int(step) for step in steps.split(",")])
    sys.exit(main(sys.argv[4:]))
