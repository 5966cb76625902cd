"""A pool of rank processes on one machine, kept running between calls: for tests, conformance runs and experiments.

The ranks wait for a function, run it together and return its values. When a rank raises, dies or takes too long, the
whole pool is killed and started again at its next use, so that no state of failed work reaches another call.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from storm_ref.parallel.mesh import START_TIMEOUT, Mesh, World, limit_wait

__all__ = ["Pool", "RankError", "world_of"]

# Seconds for which other ranks may still report an error: after the cause is known, and after a symptom of it.
_AFTER_CAUSE = 0.5
_AFTER_SYMPTOM = 10.0
_SYMPTOMS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "socket", "read error")


class RankError(RuntimeError):
    """A rank did not return a value. `rank` is the one that caused it, and `kind` is raised, died or hung."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        self.rank, self.kind, self.text = rank, kind, text
        super().__init__(f"rank {rank} {kind}: {text}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (self.rank, self.kind, self.text)


_worlds: dict[tuple[Mesh, str], World] = {}
_timeout = START_TIMEOUT  # of the worlds in this process; a pool sets its own in its ranks


def world_of(mesh: Mesh, device: str = "cpu") -> World:
    """The world of a mesh in this rank process, created once. All ranks ask for their meshes in the same order."""
    if (mesh, device) not in _worlds:
        _worlds[mesh, device] = World(mesh, device, timeout=_timeout)
    return _worlds[mesh, device]


def _serve(
    pipe: Connection, rank: int, ranks: int, store: str, timeout: float, device: str, inherited: list[Connection]
) -> None:
    """The main loop of a rank process: answer (function, arguments) with a value or an error until the pipe closes.

    inherited: the parent's ends of pipes, of which a fork has copies; while those are open no pipe would ever close.
    """
    global _timeout
    for end in inherited:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    files = dist.FileStore(store, ranks)  # type: ignore[attr-defined]
    wait = timedelta(seconds=max(timeout, START_TIMEOUT))
    dist.init_process_group(backend, store=files, rank=rank, world_size=ranks, timeout=wait)
    limit_wait(dist.group.WORLD, timeout)
    _timeout = timeout
    pipe.send(("ready", None))
    while True:
        try:
            work = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # without a barrier, since other ranks may be gone already
        try:
            function, arguments = pickle.loads(work)
            pipe.send(("value", function(*arguments)))
        except BaseException as error:
            pipe.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


@dataclass
class _Rank:
    process: Any
    pipe: Connection


@dataclass
class Pool:
    """A pool of `ranks` processes. Use it in a with statement, or close it.

    timeout: seconds for which a rank waits for another. method: the way in which processes start, `forkserver` (quick
    once the server runs) or `fork` (they inherit the state of this process, with its patches).
    """

    ranks: int
    timeout: float = 60.0
    method: str = "forkserver"
    device: str = "cpu"
    _live: list[_Rank] = field(default_factory=list)
    _folder: Any = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, deadline: float = START_TIMEOUT) -> None:
        """Start the ranks unless they run. Raises RankError for one that is not ready within `deadline` seconds."""
        if self._live:
            return
        context: Any = multiprocessing.get_context(self.method)
        if self.method == "forkserver":
            context.set_forkserver_preload(
                ["torch", "torch.distributed.fsdp", "torch._dynamo", "storm_ref.parallel.pool"]
            )
        self._folder = tempfile.TemporaryDirectory(prefix="storm-ref-", ignore_cleanup_errors=True)
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.ranks):
            mine, theirs = context.Pipe()
            inherited = [mine, *(other.pipe for other in self._live)] if self.method == "fork" else []
            words = (theirs, rank, self.ranks, store, self.timeout, self.device, inherited)
            process = context.Process(target=_serve, args=words, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._live.append(_Rank(process, mine))
        self._collect(deadline)

    def run(self, function: Callable[..., Any], *arguments: Any, deadline: float = 1200.0) -> list[Any]:
        """The values that `function(*arguments)` returns in each rank. A module-level function, which is sent by name.

        Raises RankError when a rank raises, dies, or does not return within `deadline` seconds. All ranks are killed
        then, and new ones start at the next call.
        """
        self.start()
        work = pickle.dumps((function, arguments))
        for number, rank in enumerate(self._live):
            try:
                rank.pipe.send_bytes(work)
            except OSError as error:
                text = self._death(number)
                self.close()
                raise RankError(number, "died", text) from error
        return self._collect(deadline)

    def close(self) -> None:
        """Kill all ranks and wait until they have ended."""
        for rank in self._live:
            rank.process.kill()
            rank.pipe.close()
        for rank in self._live:
            rank.process.join()
        self._live = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _collect(self, deadline: float) -> list[Any]:
        values: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}  # rank: kind, text
        until = time.monotonic() + deadline
        while len(values) < self.ranks:
            if errors and len(values) + len(errors) == self.ranks:
                break
            pipes = {r.pipe: n for n, r in enumerate(self._live) if n not in values and n not in errors}
            ready = wait(list(pipes), max(until - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                number = pipes[pipe]  # type: ignore[index]
                try:
                    kind, value = self._live[number].pipe.recv()
                except (EOFError, OSError):
                    kind, value = "died", self._death(number)
                if kind in ("value", "ready"):
                    values[number] = value
                else:
                    errors[number] = ("died" if kind == "died" else "raised", value)
                    patience = _AFTER_SYMPTOM if _is_symptom(*errors[number]) else _AFTER_CAUSE
                    until = min(until, time.monotonic() + patience)
        if len(values) == self.ranks:
            return [values[number] for number in range(self.ranks)]
        silent = [n for n in range(self.ranks) if n not in values and n not in errors]
        self.close()
        raise _blame(errors, silent, deadline)

    def _death(self, number: int) -> str:
        process = self._live[number].process
        process.join(60)
        code = process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _is_symptom(kind: str, text: str) -> bool:
    """True for an error that a rank meets when another one has failed."""
    first = text.splitlines()[0].lower()
    return kind == "raised" and any(symptom in first for symptom in _SYMPTOMS)


def _blame(errors: dict[int, tuple[str, str]], silent: list[int], deadline: float) -> RankError:
    """The error of the rank that caused a failure.

    It is a rank that died, else one that raised an error of its own, else one that never answered, else one whose wait
    for another timed out.
    """

    def severity(rank: int) -> int:
        kind, text = errors[rank]
        return 0 if kind == "died" else 2 if _is_symptom(kind, text) else 1

    ranked = sorted(errors, key=lambda rank: (severity(rank), rank))
    if ranked and (severity(ranked[0]) < 2 or not silent):
        return RankError(ranked[0], *errors[ranked[0]])
    if not ranked:
        return RankError(silent[0], "hung", f"no answer within {deadline:g} s")
    symptom = errors[ranked[0]][1].splitlines()[0]
    return RankError(silent[0], "hung", f"no answer; rank {ranked[0]} waited for it: {symptom}")
