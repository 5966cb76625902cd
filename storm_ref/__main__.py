"""python -m storm_ref: see storm_ref.workbench.cli.commands."""

import sys

from storm_ref.workbench.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
