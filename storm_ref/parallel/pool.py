"""A world of ranks on this machine, kept warm: for tests, the conformance suite and whoever tries things out.

Ranks are processes that wait for work, do it together and return values; judging those is the caller's. A world in
which anything went wrong (a rank raises, dies or takes too long) is killed as a whole and started again when it is next
used: what one piece of work left behind never reaches another.
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

from storm_ref.parallel.mesh import Mesh, World

__all__ = ["Pool", "RankError", "world_of"]

_PATIENCE = 0.5  # seconds in which other ranks may say what they met, once one has failed
_SYMPTOMS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe", "socket", "read error")


class RankError(RuntimeError):
    """A rank did not return. `rank` is the one to blame, `kind` how it failed: raised, died or hung."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        self.rank, self.kind, self.text = rank, kind, text
        super().__init__(f"rank {rank} {kind}: {text}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (self.rank, self.kind, self.text)


_worlds: dict[tuple[Mesh, str], World] = {}


def world_of(mesh: Mesh, device: str = "cpu") -> World:
    """In a rank: the world of this mesh, made once. All ranks ask for their meshes in the same order."""
    if (mesh, device) not in _worlds:
        _worlds[mesh, device] = World(mesh, device)
    return _worlds[mesh, device]


def _serve(
    pipe: Connection, rank: int, ranks: int, store: str, timeout: float, device: str, inherited: list[Connection]
) -> None:
    """A rank: answer (function, arguments) with (value) or (error) until the pipe closes.

    inherited: the parent's ends of pipes, of which a fork has copies; with those open no pipe would ever close.
    """
    for end in inherited:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    files = dist.FileStore(store, ranks)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=files, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    pipe.send(("ready", None))
    while True:
        try:
            work = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # no farewell to ranks that may be gone already
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
    """`ranks` processes. Use it in a with statement, or close it.

    timeout: seconds that a rank waits for another; method: how processes start, `forkserver` (quick once it is warm) or
    `fork` (they run what this process runs, patches included).
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

    def start(self, deadline: float = 120.0) -> None:
        """Have all ranks running; nothing is done where they are. Raises RankError for one that does not come up."""
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

    def run(self, function: Callable[..., Any], *arguments: Any, deadline: float = 300.0) -> list[Any]:
        """What `function(*arguments)` returns in each rank. A module-level function: it is sent by name.

        Raises RankError when a rank does not return within `deadline` seconds; the world is gone then, and a new one
        starts with the next call.
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
        """Kill all ranks and wait until they are gone."""
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
                    until = min(until, time.monotonic() + _PATIENCE)
        if len(values) == self.ranks:
            return [values[number] for number in range(self.ranks)]
        silent = [n for n in range(self.ranks) if n not in values and n not in errors]
        self.close()
        raise _blame(errors, silent, deadline)

    def _death(self, number: int) -> str:
        process = self._live[number].process
        process.join(1)
        code = process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _blame(errors: dict[int, tuple[str, str]], silent: list[int], deadline: float) -> RankError:
    """Who started it: a rank that died, else one that raised of itself, else one that never answered, else one that
    waited in vain for another.
    """

    def severity(rank: int) -> int:
        kind, text = errors[rank]
        first = text.splitlines()[0].lower()
        return 0 if kind == "died" else 2 if any(symptom in first for symptom in _SYMPTOMS) else 1

    ranked = sorted(errors, key=lambda rank: (severity(rank), rank))
    if ranked and (severity(ranked[0]) < 2 or not silent):
        return RankError(ranked[0], *errors[ranked[0]])
    others = f"; rank {ranked[0]} waited for it: {errors[ranked[0]][1].splitlines()[0]}" if ranked else ""
    return RankError(silent[0], "hung", f"no answer within {deadline:g} s{others}")
