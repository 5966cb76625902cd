"""Print the lowest versions that pyproject.toml admits, one a line, for `pip install -r`.

Names of extras are the arguments: `python .ci/lowest.py reference`; without one, the default install.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = [
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
]
print("\n".join(re.sub(r">=", "==", line) for line in wanted if not line.startswith("storm-ref")))
