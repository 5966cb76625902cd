"""`python -m conformance new-adapter KIND DIR`: write a small port that runs at once, for its author to grow.

The port has one operation that is right and one with a wrong line, so that the first run shows what a failure looks
like, and the second, with the line mended, shows it gone. The other operations are unsupported. It needs the installed
suite and nothing of its source tree.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from conformance import SPEC, WIRE
from conformance.protocol.atomic import write_atomically

__all__ = ["MENDED", "WRONG", "command", "new_adapter"]

WRONG = "    levels = high + t * (low - high)\n"
MENDED = "    levels = (high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho\n"

OPERATIONS = f'''

def gate(inputs, params):
    """The share of each head that attends to the past, [b, a], by noise level, [ATT-4]."""
    sigma = inputs["sigma"]
    if not (sigma > 0).all():
        raise ValueError(f"sigma must be positive, got {{sigma.min()}}")
    slope = np.logaddexp(0, inputs["alpha"])  # softplus
    t = slope * (np.log(sigma)[:, None] - inputs["beta"])
    return {{"gamma": np.exp(-np.logaddexp(0, -t))}}  # sigmoid


def schedule(inputs, params):
    """The sampler's noise levels, [steps + 1], [EDM-5]."""
    steps = params["steps"]
    low = params.get("sigma_min", 0.002)
    high = params.get("sigma_max", 80.0)
    rho = params.get("rho", 7.0)
    if steps < 1 or not rho > 0 or not 0 < low < high < np.inf:
        raise ValueError(f"no schedule of {{steps}} steps from {{high}} to {{low}} with rho {{rho}}")
    t = np.arange(steps) / max(steps - 1, 1)
    # The next line is wrong on purpose: it ignores rho. See the suite say so, then put this one in its place:
    # {MENDED.strip()}
{WRONG}    return {{"sigmas": np.append(levels, 0.0)}}


# "python -m conformance list" names all operations; conformance/README.md of storm-ref has a table of their inputs,
# params and outputs.
OPERATIONS = {{"gate": gate, "schedule": schedule}}
'''

PYTHON = (
    '''"""My port of STORM, as the conformance suite sees it."""

import numpy as np

from conformance.adapter import Info, Unsupported
'''
    + OPERATIONS
    + '''

class Port:
    def describe(self):
        return Info("my port", "0.1", frozenset(OPERATIONS), dtypes=("float64",))

    def run(self, op, inputs, params, probes):
        """NumPy arrays in and out; a ValueError refuses bad input."""
        if op not in OPERATIONS:
            raise Unsupported(op)
        return OPERATIONS[op](inputs, params)


adapter = Port()
'''
)

WIRE_PORT = (
    '''"""My port of STORM as a program: a model for any language. It needs NumPy and safetensors, nothing of the suite.

One request a line comes in, one answer a line goes out, behind "@storm "; other lines are ignored.
"""

import json
import sys

import numpy as np
from safetensors.numpy import load_file, save_file
'''
    + OPERATIONS
    + f'''

def describe():
    claims = {{"ops": sorted(OPERATIONS), "dtypes": ["float64"], "profiles": []}}
    return {{"answer": "info", "wire": "{WIRE}", "spec": "{SPEC}", "name": "my port", "version": "0.1"}} | claims


def run(request):
    op = request["op"]
    if op not in OPERATIONS:
        return {{"answer": "unsupported", "reason": op}}
    try:
        outputs = OPERATIONS[op](load_file(request["inputs"]), request["params"])
    except ValueError as error:
        return {{"answer": "refused", "message": str(error)}}
    except Exception as error:
        return {{"answer": "error", "type": type(error).__name__, "message": str(error)}}
    save_file({{name: np.array(value, order="C") for name, value in outputs.items()}}, request["outputs"])
    return {{"answer": "outputs"}}


for line in sys.stdin:
    request = json.loads(line)
    if request["request"] == "quit":
        break
    answer = describe() if request["request"] == "describe" else run(request)
    print("@storm " + json.dumps({{"id": request["id"]}} | answer), flush=True)
'''
)

FILES = {"python": ("adapter.py", PYTHON), "wire": ("port.py", WIRE_PORT)}


def _interpreter() -> str:
    """Return `python` where that is the interpreter running now, else its path."""
    on_path = shutil.which("python")
    if on_path is not None:
        folders = (os.path.realpath(os.path.dirname(program)) for program in (on_path, sys.executable))
        if len(set(folders)) == 1:
            return "python"
    return shlex.quote(sys.executable)


def _command(kind: str, path: Path) -> str:
    """Return the command that judges the new port from the working directory."""
    python = _interpreter()
    if kind == "wire":
        program = shlex.quote(f"{python} {shlex.quote(str(path))}")
        return f"{python} -m conformance --cmd {program}"
    parts = path.with_suffix("").parts
    if not path.is_absolute() and all(part.isidentifier() for part in parts):
        return f"{python} -m conformance --adapter {'.'.join(parts)}:adapter"
    return f"cd {shlex.quote(str(path.parent))} && {python} -m conformance --adapter adapter:adapter"


def new_adapter(kind: str, folder: Path) -> int:
    """Write the stub of `kind`, python or wire, and print the command that judges it.

    Returns the exit code, 0. Raises ValueError where there is such a file already.
    """
    name, text = FILES[kind]
    path = folder / name
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} is there already; give another folder")
    write_atomically(path, text.encode())
    print(
        f"{path}: gate is right, schedule has one wrong line, which is marked; all else is unsupported.\n"
        f"Judge it:\n\n  {_command(kind, path)}\n\n"
        "It fails where the line is wrong. Mend the line and judge it again; then add operations of your own.\n"
        "The command storm-conformance is short for python -m conformance."
    )
    return 0


def command(args: argparse.Namespace) -> int:
    """Run `python -m conformance new-adapter` and return the exit code."""
    return new_adapter(args.kind, args.folder)
