"""Start the workbench's command line, `storm_ref.workbench.cli.commands`, by `python -m storm_ref`."""

import sys

from storm_ref.workbench.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
