"""The process of a port: started in a session of its own, called with time limits, ended with all its descendants.

Its standard output is searched for lines that begin with PREFIX; all others are chatter and dropped. The end of its
standard error is kept for the moment it dies. Neither is ever stored beyond a limit, however much the port writes.
"""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import IO

from conformance.adapter import AdapterError, PortFault
from conformance.ports.checked import printable
from conformance.protocol.safe_files import LINE_LIMIT

__all__ = ["PREFIX", "PortProcess"]

PREFIX = b"@storm "
STDERR_KEPT = 8192
CHUNK = 65536
POLL = 0.2  # seconds between checks that it lives: its pipes may stay open in a grandchild
# One thread: results do not depend on the machine, and ports do not fight the suite for its cores.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "JULIA_NUM_THREADS": "1",
}


def _end(process: "subprocess.Popen[bytes]", folder: str, descriptor: int) -> None:
    """Kill the process and its group, close its pipes, remove its folder. Also runs when the suite exits."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)


def _start(words: Sequence[str]) -> "subprocess.Popen[bytes]":
    if sys.platform == "win32":
        raise AdapterError("a port in a process of its own needs Linux, macOS or WSL; use export and check instead")
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=os.environ | ONE_THREAD,
            start_new_session=True,  # a group to kill as one, which Ctrl-C does not reach
        )
    except (OSError, ValueError) as error:
        raise AdapterError(f"the port {words[0]} cannot be started: {error}") from error


class PortProcess:
    """A running port with a private `folder` for files; `descriptor` is the folder itself, wherever its name leads.

    Raises AdapterError when it cannot be started.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="storm-conformance-")
        try:
            self.process = _start(words)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._finish = weakref.finalize(self, _end, self.process, self.folder, self.descriptor)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._stdin = self.process.stdin
        self._stdout = self.process.stdout
        self._stderr = self.process.stderr
        self._open: list[IO[bytes]] = [self._stdout, self._stderr]
        for pipe in (self._stdin, *self._open):
            os.set_blocking(pipe.fileno(), False)
        self._line = b""
        self._errors = b""
        self._answers: list[bytes] = []

    def exchange(self, request: bytes, seconds: float) -> list[bytes]:
        """Send a line and return the answers that arrive together, without their prefix: there should be one.

        Raises PortFault: crash, timeout or protocol.
        """
        deadline = time.monotonic() + seconds
        self._pump(b"", 0)
        if self._answers:
            raise PortFault("protocol", "the port answered before it was asked, or answered the last call twice")
        while not self._answers:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PortFault("timeout", f"no answer within {seconds:g} s; the port was stopped{self.last_words()}")
            request = self._pump(request, min(left, POLL))
        answers, self._answers = self._answers, []
        return answers

    def _pump(self, request: bytes, seconds: float) -> bytes:
        """Wait until something can be read or written, and do it once. Returns the part of the request left to send."""
        with selectors.DefaultSelector() as selector:
            for pipe in self._open:
                selector.register(pipe, selectors.EVENT_READ)
            if request:
                selector.register(self._stdin, selectors.EVENT_WRITE)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        for pipe in [pipe for pipe in self._open if pipe in ready]:
            self._read(pipe)
        if not ready and seconds and self.process.poll() is not None:
            raise self._death()
        return self._write(request) if self._stdin in ready else request

    def _read(self, pipe: IO[bytes]) -> None:
        data = os.read(pipe.fileno(), CHUNK)
        if pipe is self._stderr:
            self._errors = (self._errors + data)[-STDERR_KEPT:]
        else:
            self._take(data)
        if not data:
            self._open.remove(pipe)
            if pipe is self._stdout and not self._answers:
                raise self._death()

    def _take(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        self._answers += [line[len(PREFIX) :] for line in lines if line.startswith(PREFIX)]
        if not self._line.startswith(PREFIX):
            self._line = self._line[: len(PREFIX)]  # enough to know the rest of the line for chatter
        elif len(self._line) > LINE_LIMIT:
            raise PortFault("protocol", f"the port's answer is a line of more than {LINE_LIMIT} bytes")

    def _write(self, request: bytes) -> bytes:
        try:
            return request[os.write(self._stdin.fileno(), request) :]
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> PortFault:
        """The fault of a process whose pipes closed: it died, or it only closed them."""
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return PortFault("protocol", f"the port closed its standard input or output{self.last_words()}")
        if self._stderr in self._open:
            with contextlib.suppress(BlockingIOError):
                self._errors = (self._errors + os.read(self._stderr.fileno(), CHUNK))[-STDERR_KEPT:]
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal(-status)}"
        return PortFault("crash", f"the port {how} before it answered{self.last_words()}")

    def last_words(self, limit: int = 180) -> str:
        """The end of standard error, ready to append to a sentence; empty when there is none."""
        text = " ".join(self._errors.decode("utf-8", "replace").split())
        fatal = text.rfind("Fatal Python error")  # Python's report of a crash has its cause first, not last
        words = text[fatal : fatal + limit] if fatal >= 0 else text[-limit:]
        return f"; its last words: {printable(words, limit)}" if text else ""

    def close(self, farewell: bytes = b"", grace: float = 0.0) -> None:
        """Send a last line, give it time to end by itself, then end it and whatever it started."""
        if grace and self._finish.alive:
            with contextlib.suppress(OSError):
                os.write(self._stdin.fileno(), farewell)
                self._stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self._finish()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
