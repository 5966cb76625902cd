"""A port that the suite cannot start, on a cluster for instance: its calls as files, written here, answered there.

`python -m conformance export DIR` writes a folder per call, `calls/NNNNN`, with request.json
(schemas/export_request.schema.json) and inputs.safetensors. The port adds outputs.safetensors, or answer.json
(schemas/export_answer.schema.json) where it has none to give. `python -m conformance check DIR` judges what is there
as a run would. A call without an answer counts as unsupported, so that a folder can be answered piece by piece.

Laws draw the same calls again from the same seed. They are recorded by running each law on an adapter of ours, because
a law stops at its first surprise; at the check an answer is found by a digest of the call.

A port in Python answers a folder with `python -m conformance.ports.folder answer DIR --adapter MODULE:OBJECT`. A port
of many ranks may write a file a rank, outputs.rankR.safetensors, which are merged (ranks.py); its own launcher starts
`answer DIR --launched --adapter MODULE:OBJECT` as many times as the mesh has ranks.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from rich.console import Console

from conformance import SPEC, VECTORS
from conformance.adapter import (
    BUNDLED,
    Adapter,
    AdapterError,
    Array,
    Info,
    Params,
    PortFault,
    Unsupported,
    describe,
    load_adapter,
)
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import Run, run_suite, select
from conformance.ports.checked import printable
from conformance.ports.serve import answer_of
from conformance.ports.wire import WireAdapter, command_words, host_words, plain_json, said
from conformance.protocol.atomic import write_atomically
from conformance.protocol.operations import DTYPES, OPERATIONS, PROFILES
from conformance.protocol.ranks import RanksError, file_of, launched, number, rank_of, ranks_of, without
from conformance.protocol.safe_files import file_to_arrays, parse_object, read_file, safetensors_bytes

__all__ = [
    "Replay",
    "answer",
    "answer_as_rank",
    "check",
    "check_folder",
    "digest",
    "export",
    "main",
    "write_export",
]

FORMAT = "storm-export-1"
ANSWERS = ("outputs.safetensors", "answer.json")
README = """Calls of the STORM conformance suite.

For each folder in calls/: read request.json ("op", "params") and inputs.safetensors, run the operation, and write
beside them ONE of

  outputs.safetensors   the output arrays by name
  answer.json           {"answer": "refused", "message": "..."}       a bad input that the specification refuses
                        {"answer": "unsupported", "reason": "..."}    your port has no such operation
                        {"answer": "error", "type": "...", "message": "..."}    anything else that went wrong

Where params has a mesh and your port runs as many ranks, each may write what it has as outputs.rankR.safetensors (R
from 0), with the plain names of the outputs; or one of them writes outputs.safetensors for all.

Operations with their inputs, params and outputs: conformance/README.md. params["dtype"] is the dtype of the network.
Leave a call without an answer and it counts as unsupported; answers may be added at any time. Write under another name
and rename, so that a job that is cut off leaves no half a file. port.json beside this file, if you like:
{"name": "my port", "version": "1.0"}.

A port in Python:   python -m conformance.ports.folder answer THIS_FOLDER --adapter MODULE:OBJECT
The same as ranks:  torchrun --nproc-per-node 4 -m conformance.ports.folder answer THIS_FOLDER --launched --adapter ...
At the end:         python -m conformance check THIS_FOLDER
"""


def digest(op: str, inputs: Mapping[str, Array], params: Params) -> str:
    """What tells one call from another: the operation, its params with the dtype, every bit of its inputs."""
    found = hashlib.sha256(plain_json({"op": op, "params": dict(sorted(params.items()))}))
    for name, value in sorted(inputs.items()):
        found.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        found.update(np.array(value, order="C").tobytes())
    return found.hexdigest()


class _Recorder:
    """Writes every call that is made into a folder, once, and answers it by the first adapter that can."""

    def __init__(self, folder: Path, adapters: Sequence[Adapter]) -> None:
        self.folder, self.adapters = folder, adapters
        self.calls: dict[str, str] = {}  # digest: name
        self.requests: dict[str, dict[str, Any]] = {}
        self._recent: list[str] = []

    def describe(self) -> Info:
        return Info("recorder", "1", frozenset(OPERATIONS), DTYPES)

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str] = ()
    ) -> Mapping[str, Array] | Unsupported:
        key = digest(op, inputs, params)
        if key not in self.calls:
            name = self.calls[key] = f"{len(self.calls) + 1:05d}"
            write_atomically(self.folder / "calls" / name / "inputs.safetensors", safetensors_bytes(inputs))
            self.requests[name] = {"call": name, "op": op, "params": dict(params), "probes": [], "for": []}
        self._recent.append(self.calls[key])
        result: Mapping[str, Array] | Unsupported = Unsupported(f"no adapter of the suite has {op}")
        for adapter in self.adapters:
            try:
                result = adapter.run(op, {name: value.copy() for name, value in inputs.items()}, dict(params), ())
            except Unsupported as reason:
                result = reason
            if not isinstance(result, Unsupported):
                break
        return result

    def belongs(self, subject: Case | Law) -> None:
        """The calls since the last subject are this one's."""
        for name in dict.fromkeys(self._recent):
            self.requests[name]["for"].append(subject.id)
        self._recent.clear()


def write_export(
    folder: Path,
    cases: Sequence[Case],
    laws: Sequence[Law],
    profiles: Sequence[str],
    dtype: str,
    seed: int,
    adapters: Sequence[Adapter],
) -> int:
    """Write all calls of the cases and laws; the manifest last. Returns their number.

    adapters: any that conform; laws are recorded on them. Raises ValueError unless the folder is empty or new.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder to export to")
    recorder = _Recorder(folder, adapters)
    run_suite(recorder, recorder.describe(), cases, laws, profiles, dtype, seed, {}, recorder.belongs, shrink=False)
    for name, request in recorder.requests.items():
        write_atomically(folder / "calls" / name / "request.json", plain_json(request))
    write_atomically(folder / "README.txt", README.encode())
    about = {"format": FORMAT, "dtype": dtype, "seed": seed, "profiles": list(profiles), "calls": recorder.calls}
    write_atomically(folder / "manifest.json", (json.dumps(about | _versions(), indent=1) + "\n").encode())
    return len(recorder.calls)


def _versions() -> dict[str, str]:
    """What must be the same at export and check for laws to make the same calls."""
    return {"spec": SPEC, "vectors": VECTORS, "hypothesis": hypothesis.__version__}


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError when there is none, or it is another suite's."""
    try:
        found = parse_object(read_file(folder / "manifest.json"))
    except (OSError, PortFault) as error:
        raise ValueError(f"{folder} is no complete export: {error}; python -m conformance export makes one") from error
    calls = found.get("calls")
    names = calls.values() if isinstance(calls, dict) else [None]
    good = found.get("format") == FORMAT and found.get("dtype") in DTYPES and isinstance(found.get("seed"), int)
    good = good and isinstance(found.get("profiles"), list) and all(p in PROFILES for p in found["profiles"])
    if not good or not all(re.fullmatch(r"\d{5}", str(name)) for name in names):
        raise ValueError(f"{folder}/manifest.json is damaged; python -m conformance export makes one")
    for what, mine in _versions().items():
        if found.get(what) != mine:
            raise ValueError(
                f"{folder} was exported with version {printable(found.get(what), 40)} of {what}, here is {mine}: "
                "the calls are others; check it where it was exported, or export again"
            )
    return found


def _answer_files(folder: Path, name: str) -> dict[str, bytes]:
    """What the port wrote for a call. Raises PortFault when that leads elsewhere or is no plain file."""
    place = folder / "calls" / name
    if place.resolve() != folder.resolve() / "calls" / name:
        raise PortFault("protocol", f"calls/{name} is a link to somewhere else")
    by_rank = [path.name for path in place.glob("outputs.rank*") if rank_of(path.name) is not None]
    found: dict[str, bytes] = {}
    for file in (*ANSWERS, *sorted(by_rank)):
        try:
            found[file] = read_file(place / file)
        except FileNotFoundError:
            continue
    return found


def _outputs(name: str, files: Mapping[str, bytes], params: Params) -> dict[str, Array]:
    """All arrays of a call, those of ranks by `rank.R.NAME`. Raises PortFault when a rank of the mesh has no file."""
    found = file_to_arrays(files[ANSWERS[0]]) if ANSWERS[0] in files else {}
    by_rank = {rank: files[file] for file in files if (rank := rank_of(file)) is not None}
    if not by_rank:
        return found
    try:
        missing = without(by_rank, ranks_of(params) or 0)
    except RanksError as error:
        raise PortFault("protocol", f"calls/{name} has files of ranks: {error}") from error
    if missing:
        absent = ", ".join(file_of(rank) for rank in range(ranks_of(params) or 0) if rank not in by_rank)
        raise PortFault("protocol", f"calls/{name} has no {absent}: {missing} did not answer")
    for rank, data in by_rank.items():
        found |= {f"rank.{rank}.{key}": value for key, value in file_to_arrays(data).items()}
    return found


class Replay:
    """An answered folder as a port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, _manifest(folder)
        self.calls: dict[str, str] = self.manifest["calls"]

    def describe(self) -> Info:
        """Named by port.json, else by the folder. Every operation: those without answers say so call by call."""
        try:
            about = parse_object(read_file(self.folder / "port.json"))
        except FileNotFoundError:
            about = {}
        except PortFault as fault:
            raise AdapterError(f"{self.folder}/port.json cannot be read: {fault}") from fault
        name, version = about.get("name", self.folder.resolve().name), about.get("version", "unknown")
        return Info(printable(name, 100), printable(version, 100), frozenset(OPERATIONS), DTYPES)

    def run(
        self, op: str, inputs: Mapping[str, Array], params: Mapping[str, Any], probes: Sequence[str] = ()
    ) -> Mapping[str, Array]:
        """The answer in the folder to this very call."""
        name = self.calls.get(digest(op, inputs, params))
        if name is None:
            raise Unsupported(f"the export has no such call of {op}; export it again with this suite")
        files = _answer_files(self.folder, name)
        if not files:
            raise Unsupported(f"calls/{name} has no answer")
        if ANSWERS[1] not in files:
            return _outputs(name, files, params)
        if len(files) > 1:
            raise PortFault("protocol", f"calls/{name} has both {' and '.join(sorted(files, reverse=True))}")
        raise said(parse_object(files[ANSWERS[1]]))

    def answered(self) -> int:
        """How many calls have something for an answer."""
        places = [self.folder / "calls" / name for name in self.calls.values()]
        files = (*ANSWERS, file_of(0))
        return sum(any((place / file).exists() for file in files) for place in places)


def check_folder(replay: Replay, cases: Sequence[Case], laws: Sequence[Law], counts: dict[str, int] | None) -> Run:
    """Judge the answers as a run would; without simpler examples of a broken law, which would need other calls."""
    info, about = describe(replay), replay.manifest
    profiles, cases, laws = select(info, cases, laws, about["profiles"])
    return run_suite(replay, info, cases, laws, profiles, about["dtype"], about["seed"], counts, shrink=False)


def answer(folder: Path, adapter: Adapter) -> int:
    """Answer every call of an exported folder that has no answer yet. Returns how many that were."""
    calls, info = _manifest(folder)["calls"], describe(adapter)
    write_atomically(folder / "port.json", plain_json({"name": info.name, "version": info.version}))
    done = 0
    for name in calls.values():
        if not _answer_files(folder, name):
            _answer_call(folder / "calls" / name, adapter, info)
            done += 1
    return done


def _answer_call(place: Path, adapter: Adapter, info: Info, rank: int | None = None) -> None:
    """rank: whose outputs these are; what it says in place of outputs is the first rank's to write."""
    request = parse_object(read_file(place / "request.json"))
    op, params = request["op"], request["params"]
    if op not in info.ops or params["dtype"] not in info.dtypes:
        lacking = op if op not in info.ops else params["dtype"]
        said_, outputs = {"answer": "unsupported", "reason": f"the port does not claim {lacking}"}, b""
    else:
        inputs = {name: value.copy() for name, value in file_to_arrays(read_file(place / "inputs.safetensors")).items()}
        said_, outputs = answer_of(adapter, op, inputs, params)
    if said_["answer"] == "outputs":
        write_atomically(place / (ANSWERS[0] if rank is None else file_of(rank)), outputs)
    elif not rank:
        write_atomically(place / ANSWERS[1], plain_json(said_))


def answer_as_rank(folder: Path, adapter: Adapter, rank: int, ranks: int) -> int:
    """Answer, as one rank of so many, the calls for a mesh of that size that not all ranks have answered.

    Every rank runs the same calls in the same order, each with the whole inputs, and writes what it has. Returns how
    many. A call that some ranks had answered before is run by all, since they may have to talk about it.
    """
    calls, info = _manifest(folder)["calls"], describe(adapter)
    todo = []
    for name in calls.values():
        mesh = parse_object(read_file(folder / "calls" / name / "request.json"))["params"].get("mesh")
        files = _answer_files(folder, name) if mesh is not None and number(mesh) == ranks else {}
        whole = any(file in files for file in ANSWERS) or sum(rank_of(file) is not None for file in files) == ranks
        if mesh is not None and number(mesh) == ranks and not whole:
            todo.append(name)
    if rank == 0:
        write_atomically(folder / "port.json", plain_json({"name": info.name, "version": info.version}))
    for name in todo:
        _answer_call(folder / "calls" / name, adapter, info, rank)
    return len(todo)


def _bundled() -> list[Adapter]:
    """The suite's own adapters, to record laws on."""

    found: list[Adapter] = []
    for name in BUNDLED.values():
        try:
            found.append(load_adapter(name))
        except AdapterError:  # without torch the other one will do
            continue
    return found


def export(args: argparse.Namespace) -> int:
    """`python -m conformance export DIR`."""
    from conformance.judging.vectors import load_cases
    from conformance.laws import all_laws

    profiles = args.profile or [*PROFILES]
    recorder = Info("recorder", "1", frozenset(OPERATIONS), DTYPES)
    profiles, cases, laws = select(recorder, load_cases(), all_laws(), profiles)
    number = write_export(args.folder, cases, laws, profiles, args.dtype, args.seed, _bundled())
    print(f"{number} calls in {args.folder}; {args.folder / 'README.txt'} says how to answer them")
    return 0


def check(args: argparse.Namespace) -> int:
    """`python -m conformance check DIR`: result.json and the reports, as after a run."""
    from conformance.judging.result import result, write_result
    from conformance.judging.vectors import load_cases, manifest
    from conformance.laws import all_laws
    from conformance.report import print_report
    from conformance.report.files import write_reports

    replay = Replay(args.folder)
    print(f"{replay.answered()} of {len(replay.calls)} calls have an answer", file=sys.stderr)
    counts = {name: c["cases"] + c["laws"] for name, c in manifest()["profiles"].items()}
    data = result(check_folder(replay, load_cases(), all_laws(), counts))
    write_result(args.out / "result.json", data)
    print_report(Console(), data, write_reports(data, args.out))
    return int(data["exit"])


def main(words: Sequence[str] | None = None) -> int:
    """`python -m conformance.ports.folder answer DIR`: run a port over an exported folder, from where it was left."""
    parser = argparse.ArgumentParser(prog="python -m conformance.ports.folder")
    parser.add_argument("command", choices=["answer"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    port = parser.add_mutually_exclusive_group(required=True)
    port.add_argument("--adapter", metavar="MODULE:OBJECT")
    port.add_argument("--cmd", metavar="PROGRAM")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument(
        "--launched", action="store_true", help="this process is one rank of many, started by torchrun, mpirun or srun"
    )
    args = parser.parse_args(words)
    try:
        if args.launched:
            if args.adapter is None:
                raise ValueError("--launched needs --adapter: the ranks run in the processes of the launcher")
            rank, ranks = launched()
            done = answer_as_rank(args.folder, load_adapter(args.adapter), rank, ranks)
            print(f"rank {rank} of {ranks}: {done} calls answered")
            return 0
        words = command_words(args.cmd) if args.cmd is not None else host_words(args.adapter)
        adapter = WireAdapter(words, args.timeout)
        try:
            print(f"{answer(args.folder, adapter)} calls answered")
        finally:
            adapter.close()
    except (AdapterError, OSError, ValueError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
