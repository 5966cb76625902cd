"""Start the command line of the workbench: `python -m storm_ref`."""

import sys

from storm_ref.workbench.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
