"""python -m storm_ref: see storm_ref.workbench.cli."""

import sys

from storm_ref.workbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
