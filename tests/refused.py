"""Run the command line once for each set of options: `python refused.py "OPTIONS;OPTIONS" train ...`.

Each has to be refused; the exit code is that of the last. Each run counts as another attempt of torchrun, so that its
process group has a name of its own.
"""

import os
import sys

import torch.distributed as dist

from storm_ref.workbench.cli.commands import main

if __name__ == "__main__":
    code = 0
    for attempt, options in enumerate(sys.argv[1].split(";")):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        code = main([*sys.argv[2:], *options.split()])
        assert code == 2, options
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)
