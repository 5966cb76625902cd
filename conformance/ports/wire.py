"""The wire protocol of a port that is a program: JSON lines on its standard streams, arrays in safetensors files.

The suite writes one request a line and waits for one answer, a line that begins with `@storm `. Lines without it are
ignored, so that a port may print what it likes; one that prints without ending its lines starts its answers with a
newline. Schemas: schemas/wire_request.schema.json and schemas/wire_answer.schema.json.

    {"id": 1, "request": "describe", "wire": "1", "spec": "0.2"}
    @storm {"id": 1, "answer": "info", "wire": "1", "spec": "0.2", "name": "my port", "version": "1.0",
            "ops": ["gate"], "dtypes": ["float64"], "profiles": []}                              (on one line)

    {"id": 2, "request": "run", "op": "gate", "params": {"dtype": "float64"}, "probes": [],
     "inputs": "/tmp/x/2.in.safetensors", "outputs": "/tmp/x/2.out.safetensors"}
    @storm {"id": 2, "answer": "outputs"}                      after writing the file that `outputs` names
    @storm {"id": 2, "answer": "refused", "message": "..."}                  a bad input, in place of a ValueError
    @storm {"id": 2, "answer": "unsupported", "reason": "..."}               not an operation of this port
    @storm {"id": 2, "answer": "error", "type": "KeyError", "message": "..."}          anything else went wrong

    {"id": 3, "request": "quit"}                               no answer; the end of the input means the same

A port that dies, runs out of time or breaks these rules costs one call: the next starts the program anew. This protects
a run from a port's mistakes. It is no sandbox: a port runs with the rights of whoever started the suite.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conformance import SPEC, WIRE
from conformance.adapter import AdapterError, Array, Info, PortFault, Unsupported
from conformance.ports.checked import printable
from conformance.ports.process import PortProcess
from conformance.protocol.safe_files import file_to_arrays, parse_object, read_file, safetensors_bytes

__all__ = ["WireAdapter", "command_words", "exception_of", "plain_json", "serve_words"]

START_SECONDS = 60.0  # at least, for a port to start: importing a framework is slow on a busy machine
STARTS = 3  # failed ones in a row before it is left alone
GRACE = 2.0  # seconds to end by itself


def command_words(text: str) -> list[str]:
    """Split a command line into words. Raises ValueError for none, AdapterError when there is no such program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the port's command {text!r} cannot be read: {error}") from error
    if not words:
        raise ValueError("the port's command is empty; give a program, for instance --cmd 'python my_port.py'")
    if shutil.which(words[0]) is None:
        raise AdapterError(f"there is no program {words[0]!r} to run the port with; is it on the PATH and executable?")
    return words


def serve_words(name: str) -> list[str]:
    """The command that serves the Python adapter `module:object` over the wire."""
    return [sys.executable, "-m", "conformance.ports.serve", name]


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def plain_json(data: Mapping[str, Any]) -> bytes:
    """Encode one line of JSON, NumPy scalars as numbers. Raises TypeError for what JSON cannot hold."""
    try:
        return json.dumps(data, allow_nan=False, default=_plain).encode() + b"\n"
    except ValueError as error:
        raise TypeError(f"the suite cannot send this: {error}") from error


def exception_of(answer: Mapping[str, Any]) -> Exception:
    """The exception that an answer without outputs stands for: Unsupported, ValueError, or one named as the port's.

    Raises PortFault when it is none of these.
    """
    kind = answer.get("answer")
    if kind == "unsupported":
        return Unsupported(_text(answer, "reason"))
    if kind == "refused":
        return ValueError(_text(answer, "message"))
    if kind == "error":
        name = _text(answer, "type")
        # An exception of that name, so that the same mistake reads the same in process and over the wire.
        kept = name if name.isidentifier() and len(name) < 60 else "Exception"
        return type(kept, (Exception,), {})(_text(answer, "message"))  # type: ignore[no-any-return]
    raise PortFault("protocol", f"the port's answer is {printable(repr(kind), 60)}, which the protocol does not know")


def _text(answer: Mapping[str, Any], key: str) -> str:
    if not isinstance(answer.get(key), str):
        raise PortFault("protocol", f"the port's answer needs a string {key!r}, got {printable(answer.get(key), 60)}")
    return str(answer[key])


def _texts(answer: Mapping[str, Any], key: str) -> list[str]:
    value = answer.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PortFault("protocol", f"the port's {key} must be a list of strings, got {printable(value, 60)}")
    return [printable(text, 100) for text in value]


def _info(answer: Mapping[str, Any]) -> Info:
    """The Info of an answer to `describe`. Raises AdapterError for another version of the wire or the specification,
    PortFault for a malformed answer.
    """
    if answer.get("answer") == "error":
        raise AdapterError(printable(f"{_text(answer, 'type')}: {_text(answer, 'message')}", 1000))
    if answer.get("answer") != "info":
        raise PortFault("protocol", f"describe is answered by 'info', got {printable(answer.get('answer'), 60)}")
    for what, mine in (("wire", WIRE), ("spec", SPEC)):
        if _text(answer, what) != mine:
            theirs = printable(answer[what], 40)
            raise AdapterError(f"the port is made for version {theirs} of the {what}, this suite judges {mine}")
    name, version = (printable(_text(answer, key), 100) for key in ("name", "version"))
    dtypes, profiles = (tuple(_texts(answer, key)) for key in ("dtypes", "profiles"))
    ops = frozenset(_texts(answer, "ops"))
    return Info(name, version, ops, dtypes or ("float64",), profiles)


class WireAdapter:
    """The port that the command `words` starts.

    timeout: seconds that a call may take.
    start: seconds until the port has described itself; by default `timeout`, but START_SECONDS at least.
    """

    def __init__(self, words: Sequence[str], timeout: float, start: float | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"the time limit of a call must be positive, got {timeout}")
        self.words = list(words)
        self.timeout = timeout
        self.start = max(timeout, START_SECONDS) if start is None else start
        self._process: PortProcess | None = None
        self._id = 0  # of the last request
        self._failed = 0  # starts in a row

    def describe(self) -> Info:
        """Start the program if it is not running. Raises AdapterError when it does not start or describe itself."""
        try:
            return self._describe(self._process or self._begin())
        except PortFault as fault:
            raise AdapterError(f"the port did not describe itself ({fault.kind}): {printable(fault, 1000)}") from fault

    def run(
        self, op: str, inputs: Mapping[str, Array], params: Mapping[str, Any], probes: Sequence[str] = ()
    ) -> Mapping[str, Array]:
        """Make one call. Raises what the port answered (Unsupported, ValueError or an exception named as the port's),
        and PortFault when it did not answer.
        """
        process = self._running()
        request = {"request": "run", "op": op, "params": params, "probes": list(probes)}
        try:
            answer = self._call(process, request, inputs)
            if answer.get("answer") != "outputs":
                error = exception_of(answer)
            else:
                return self._outputs(process, answer)
        except BaseException:  # also Ctrl-C: whatever the program says next belongs to no call
            self._stop()
            raise
        finally:
            self._tidy(process)
        raise error

    def close(self) -> None:
        """End the program and remove its folder."""
        if self._process is not None:
            self._process.close(plain_json({"id": self._id + 1, "request": "quit"}), GRACE)
            self._process = None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _begin(self) -> PortProcess:
        self._process = PortProcess(self.words)
        return self._process

    def _describe(self, process: PortProcess) -> Info:
        try:
            return _info(self._ask(process, {"request": "describe", "wire": WIRE, "spec": SPEC}, self.start))
        except BaseException:
            self._stop()
            raise

    def _running(self) -> PortProcess:
        """The running program; a fresh one describes itself first, so that no call's time is spent on its start."""
        if self._process is not None:
            return self._process
        if self._failed >= STARTS:
            raise PortFault("crash", f"the port failed to start {STARTS} times in a row and is left alone")
        self._failed += 1
        process = self._begin()
        self._describe(process)
        self._failed = 0
        return process

    def _ask(self, process: PortProcess, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        self._id += 1
        answers = process.exchange(plain_json({"id": self._id} | dict(request)), seconds)
        if len(answers) > 1:
            raise PortFault("protocol", f"the port gave {len(answers)} answers to one call")
        answer = parse_object(answers[0])
        number = answer.get("id")
        if type(number) is not int or number != self._id:
            raise PortFault("protocol", f"the port answered call {printable(number, 40)}, it was asked call {self._id}")
        return answer

    def _call(self, process: PortProcess, request: dict[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        names = self._names()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(names[0], flags, 0o600, dir_fd=process.descriptor)
        except OSError as error:  # there already: made by the port, perhaps a link to somewhere else
            raise PortFault("protocol", f"the port meddled with the suite's files: {error.strerror}") from error
        with os.fdopen(file, "wb") as stream:
            stream.write(safetensors_bytes(inputs))
        paths = [os.path.join(process.folder, name) for name in names]
        return self._ask(process, request | dict(zip(("inputs", "outputs"), paths, strict=True)), self.timeout)

    def _outputs(self, process: PortProcess, answer: Mapping[str, Any]) -> dict[str, Array]:
        """Read the file that was asked for; an answer may repeat its name, and may name no other."""
        name = f"{self._id}.out.safetensors"
        named = answer.get("outputs", name)
        if named not in (name, os.path.join(process.folder, name)):
            raise PortFault("protocol", f"outputs belong in {name}, the port named {printable(named, 80)}")
        try:
            return file_to_arrays(read_file(name, process.descriptor))
        except FileNotFoundError:
            raise PortFault("protocol", f"the port answered 'outputs' and wrote no {name}") from None

    def _names(self) -> list[str]:
        """The files of the next call."""
        return [f"{self._id + 1}.{part}.safetensors" for part in ("in", "out")]

    def _tidy(self, process: PortProcess) -> None:
        """Remove the files of the last call, if the folder is still there."""
        if self._process is process:
            for part in ("in", "out"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._id}.{part}.safetensors", dir_fd=process.descriptor)
