"""`python -m conformance.ports.serve MODULE:OBJECT` puts a Python adapter behind the wire protocol.

The port runs in a process of its own. What it prints goes to standard error: the protocol keeps private copies of
standard input and output.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from conformance import SPEC, WIRE
from conformance.adapter import Adapter, AdapterError, Array, PortFault, Unsupported, describe, load_adapter
from conformance.ports.checked import printable
from conformance.ports.process import PREFIX
from conformance.protocol.safe_files import file_to_arrays, safetensors_bytes

__all__ = ["answer_of", "main", "serve"]

TEXT_LIMIT = 2000


def answer_of(
    adapter: Adapter, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str] = ()
) -> tuple[dict[str, Any], bytes]:
    """Run an operation. Returns an answer of the protocol without its id, and the bytes of the outputs file, if any."""
    try:
        result = adapter.run(op, inputs, params, probes)
    except Unsupported as reason:
        result = reason
    except PortFault as fault:
        return _error(fault.kind, fault), b""
    except ValueError as error:
        return {"answer": "refused", "message": printable(error, TEXT_LIMIT)}, b""
    except (Exception, SystemExit) as error:
        return _error(type(error).__name__, error), b""
    if isinstance(result, Unsupported):
        return {"answer": "unsupported", "reason": printable(result, TEXT_LIMIT)}, b""
    try:
        return {"answer": "outputs"}, safetensors_bytes(_arrays(result))
    except Exception as error:  # also a mapping that misbehaves when it is read
        return _error(type(error).__name__, error), b""


def _error(kind: str, error: object) -> dict[str, Any]:
    return {"answer": "error", "type": kind, "message": printable(error, TEXT_LIMIT)}


def _arrays(result: object) -> dict[str, Array]:
    if not isinstance(result, Mapping):
        raise TypeError(f"the port returned {type(result).__name__} instead of a dict of arrays")
    for name, value in result.items():
        if not isinstance(value, np.ndarray):
            raise TypeError(f"the output {printable(name, 40)} is {type(value).__name__}, not a NumPy array")
    return {str(name): value for name, value in result.items()}


def _info(adapter: Adapter) -> dict[str, Any]:
    info = describe(adapter)
    lists = {"ops": sorted(info.ops), "dtypes": list(info.dtypes), "profiles": list(info.profiles)}
    return {"answer": "info", "wire": WIRE, "spec": SPEC, "name": info.name, "version": info.version} | lists


def _reply(adapter: Adapter, request: Mapping[str, Any]) -> dict[str, Any]:
    if request["request"] == "describe":
        try:
            return _info(adapter)
        except AdapterError as error:
            return _error("AdapterError", error)
    inputs = file_to_arrays(Path(request["inputs"]).read_bytes())
    # A file's arrays are read-only; a port may work in its inputs.
    copies = {name: value.copy() for name, value in inputs.items()}
    answer, outputs = answer_of(adapter, request["op"], copies, request["params"], tuple(request["probes"]))
    if answer["answer"] == "outputs":
        Path(request["outputs"]).write_bytes(outputs)
    return answer


def serve(name: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more. An adapter that does not load says why when asked to describe itself."""
    adapter: Adapter | None = None
    for line in requests:
        request = json.loads(line)
        if request["request"] == "quit":
            return
        try:
            adapter = adapter or load_adapter(name)
            answer = _reply(adapter, request)
        except AdapterError as error:
            answer = _error("AdapterError", error)
        answers.write(PREFIX + json.dumps({"id": request["id"]} | answer).encode() + b"\n")
        answers.flush()


def main(words: Sequence[str] | None = None) -> int:
    """Serve the adapter that the command line names."""
    words = sys.argv[1:] if words is None else words
    if len(words) != 1:
        print("usage: python -m conformance.ports.serve MODULE:OBJECT", file=sys.stderr)
        return 2
    faulthandler.enable()  # a crash by signal leaves the Python lines it happened in
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    with requests, answers:
        serve(words[0], requests, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
