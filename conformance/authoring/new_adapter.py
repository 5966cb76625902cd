"""`python -m conformance new-adapter KIND DIR`: a small port that runs at once, for its author to grow.

It has one operation that is right and one with a wrong line, so that the first run shows a failure as it will look, and
the second, with the line mended, shows it gone. The other operations are unsupported.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from conformance import SPEC, WIRE
from conformance.protocol.safe_files import write_atomically

__all__ = ["MENDED", "WRONG", "command", "new_adapter"]

WRONG = "    levels = high + t * (low - high)\n"
MENDED = "    levels = (high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho\n"

OPERATIONS = f'''

def gate(inputs, params):
    """[ATT-4]: how much a head listens to the past, [b, a], by noise level."""
    sigma, alpha, beta = inputs["sigma"], inputs["alpha"], inputs["beta"]
    if not (sigma > 0).all():
        raise ValueError(f"sigma must be positive, got {{sigma.min()}}")
    softplus = np.logaddexp(0, alpha)
    t = softplus * (np.log(sigma)[:, None] - beta)
    return {{"gamma": np.exp(-np.logaddexp(0, -t))}}


def schedule(inputs, params):
    """[EDM-5]: the sampler's noise levels, [steps + 1]."""
    low, high = params.get("sigma_min", 0.002), params.get("sigma_max", 80.0)
    steps, rho = params["steps"], params.get("rho", 7.0)
    if steps < 1 or not rho > 0 or not 0 < low < high < np.inf:
        raise ValueError(f"no schedule of {{steps}} steps from {{high}} to {{low}} with rho {{rho}}")
    t = np.arange(steps) / max(steps - 1, 1)
    # The next line is wrong on purpose: it ignores rho. See the suite say so, then put this one in its place:
    # {MENDED.strip()}
{WRONG}    return {{"sigmas": np.append(levels, 0.0)}}


# Every operation with its inputs, params and outputs is in the table of conformance/README.md.
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
    """`python` where that is the one running now, else its path."""
    found = shutil.which("python")
    same = found is not None and os.path.realpath(os.path.dirname(found)) == os.path.realpath(
        os.path.dirname(sys.executable)
    )
    return "python" if same else shlex.quote(sys.executable)


def _command(kind: str, path: Path) -> str:
    """The command that judges the new port, to be typed where the user is."""
    python = _interpreter()
    if kind == "wire":
        program = shlex.quote(f"{python} {shlex.quote(str(path))}")
        return f"{python} -m conformance --cmd {program}"
    parts = path.with_suffix("").parts
    if not path.is_absolute() and all(part.isidentifier() for part in parts):
        return f"{python} -m conformance --adapter {'.'.join(parts)}:adapter"
    return f"cd {shlex.quote(str(path.parent))} && {python} -m conformance --adapter adapter:adapter"


def new_adapter(kind: str, folder: Path) -> int:
    """Write the stub of `kind`, python or wire, and say what to type next. Raises ValueError rather than overwrite."""
    name, text = FILES[kind]
    path = folder / name
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} is there already; give another folder")
    write_atomically(path, text.encode())
    print(
        f"{path}: gate is right, schedule has a wrong line, marked; the other operations are unsupported.\n"
        f"Judge it:\n\n  {_command(kind, path)}\n\n"
        "Its failures are red. Mend the line, judge again and see them gone; then add operations of your own."
    )
    return 0


def command(args: argparse.Namespace) -> int:
    """`python -m conformance new-adapter`. Returns the exit code."""
    return new_adapter(args.kind, args.folder)
