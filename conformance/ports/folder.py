"""A port that the suite cannot start, on a cluster for instance: its calls are written to a folder and answered there.

Each call has a folder of its own, `calls/NNNNN`, with request.json (schemas/export_request.schema.json) and
inputs.safetensors. The port adds outputs.safetensors, or answer.json (schemas/export_answer.schema.json) where it has
no outputs to give. A port of many ranks may write one file a rank, outputs.rankR.safetensors, which are merged
(`conformance.protocol.ranks`). A call without an answer counts as unsupported, so that a folder can be answered piece
by piece.

Laws draw the same calls again from the same seed. `Recorder` writes the calls while laws run on an adapter of the
suite's, because a law stops at its first surprise; `Replay` finds the answer to a call by a digest of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np

from conformance import SPEC, VECTORS
from conformance.adapter import Adapter, AdapterError, Array, Info, Params, PortFault, Unsupported, describe
from conformance.ports.checked import printable
from conformance.ports.serve import answer_of
from conformance.ports.wire import exception_of, plain_json
from conformance.protocol.atomic import write_atomically
from conformance.protocol.operations import DTYPES, OPERATIONS, PROFILES
from conformance.protocol.ranks import RanksError, file_of, missing_ranks, number, rank_of, ranks_of
from conformance.protocol.safe_files import file_to_arrays, parse_object, read_file, safetensors_bytes

__all__ = ["RECORDER", "Recorder", "Replay", "answer", "answer_as_rank", "digest"]

FORMAT = "storm-export-1"
OUTPUTS, ANSWER = "outputs.safetensors", "answer.json"
RECORDER = Info("recorder", "1", frozenset(OPERATIONS), DTYPES)  # claims everything, so that every call is written
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

A port in Python:   python -m conformance answer THIS_FOLDER --adapter MODULE:OBJECT
The same as ranks:  torchrun --nproc-per-node 4 -m conformance answer THIS_FOLDER --launched --adapter ...
At the end:         python -m conformance check THIS_FOLDER
"""


def digest(op: str, inputs: Mapping[str, Array], params: Params) -> str:
    """A hash that tells one call from another: of the operation, its params with the dtype, every bit of its inputs."""
    sha = hashlib.sha256(plain_json({"op": op, "params": dict(sorted(params.items()))}))
    for name, value in sorted(inputs.items()):
        sha.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        sha.update(np.array(value, order="C").tobytes())
    return sha.hexdigest()


class Recorder:
    """An adapter that writes every call into a folder, once, and answers it by the first adapter that can.

    Raises ValueError unless the folder is empty or new.
    """

    def __init__(self, folder: Path, adapters: Sequence[Adapter]) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; give a new folder to export to")
        self.folder, self.adapters = folder, adapters
        self.calls: dict[str, str] = {}  # digest: name
        self._requests: dict[str, dict[str, Any]] = {}
        self._recent: list[str] = []

    def describe(self) -> Info:
        """Claim every operation in every dtype."""
        return RECORDER

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str] = ()
    ) -> Mapping[str, Array] | Unsupported:
        """Write the call if it is new, and answer it."""
        key = digest(op, inputs, params)
        if key not in self.calls:
            name = self.calls[key] = f"{len(self.calls) + 1:05d}"
            write_atomically(self.folder / "calls" / name / "inputs.safetensors", safetensors_bytes(inputs))
            self._requests[name] = {"call": name, "op": op, "params": dict(params), "probes": [], "for": []}
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

    def belongs(self, subject: str) -> None:
        """Note the case or law, by its id, that has made the calls since the last one."""
        for name in dict.fromkeys(self._recent):
            self._requests[name]["for"].append(subject)
        self._recent.clear()

    def finish(self, profiles: Sequence[str], dtype: str, seed: int) -> None:
        """Write the requests, a README and, last, the manifest."""
        for name, request in self._requests.items():
            write_atomically(self.folder / "calls" / name / "request.json", plain_json(request))
        write_atomically(self.folder / "README.txt", README.encode())
        about = {"format": FORMAT, "dtype": dtype, "seed": seed, "profiles": list(profiles), "calls": self.calls}
        write_atomically(self.folder / "manifest.json", (json.dumps(about | _versions(), indent=1) + "\n").encode())


def _versions() -> dict[str, str]:
    """The versions that must be equal at export and check, or laws would make other calls."""
    return {"spec": SPEC, "vectors": VECTORS, "hypothesis": hypothesis.__version__}


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export. Raises ValueError when there is none, or it is another suite's."""
    try:
        about = parse_object(read_file(folder / "manifest.json"))
    except (OSError, PortFault) as error:
        raise ValueError(f"{folder} is no complete export: {error}; python -m conformance export makes one") from error
    if not _well_formed(about):
        raise ValueError(f"{folder}/manifest.json is damaged; python -m conformance export makes one")
    for what, mine in _versions().items():
        if about.get(what) != mine:
            raise ValueError(
                f"{folder} was exported with version {printable(about.get(what), 40)} of {what}, here is {mine}: "
                "the calls are others; check it where it was exported, or export again"
            )
    return about


def _well_formed(about: Mapping[str, Any]) -> bool:
    calls, profiles = about.get("calls"), about.get("profiles")
    return (
        about.get("format") == FORMAT
        and about.get("dtype") in DTYPES
        and isinstance(about.get("seed"), int)
        and isinstance(profiles, list)
        and all(profile in PROFILES for profile in profiles)
        and isinstance(calls, dict)
        and all(re.fullmatch(r"\d{5}", str(name)) for name in calls.values())
    )


def _answer_files(folder: Path, name: str) -> dict[str, bytes]:
    """The files that the port wrote for a call. Raises PortFault for links and for anything but plain files."""
    place = folder / "calls" / name
    if place.resolve() != folder.resolve() / "calls" / name:
        raise PortFault("protocol", f"calls/{name} is a link to somewhere else")
    by_rank = [path.name for path in place.glob("outputs.rank*") if rank_of(path.name) is not None]
    files: dict[str, bytes] = {}
    for file in (OUTPUTS, ANSWER, *sorted(by_rank)):
        try:
            files[file] = read_file(place / file)
        except FileNotFoundError:
            continue
    return files


def _outputs(name: str, files: Mapping[str, bytes], params: Params) -> dict[str, Array]:
    """The arrays of a call, those of ranks by `rank.R.NAME`. Raises PortFault when a rank of the mesh has no file."""
    outputs = file_to_arrays(files[OUTPUTS]) if OUTPUTS in files else {}
    by_rank = {rank: files[file] for file in files if (rank := rank_of(file)) is not None}
    if not by_rank:
        return outputs
    ranks = ranks_of(params) or 0
    try:
        missing = missing_ranks(by_rank, ranks)
    except RanksError as error:
        raise PortFault("protocol", f"calls/{name} has files of ranks: {error}") from error
    if missing:
        absent = ", ".join(file_of(rank) for rank in range(ranks) if rank not in by_rank)
        raise PortFault("protocol", f"calls/{name} has no {absent}: {missing} did not answer")
    for rank, data in by_rank.items():
        outputs |= {f"rank.{rank}.{key}": value for key, value in file_to_arrays(data).items()}
    return outputs


class Replay:
    """An answered folder as an adapter. Raises ValueError when the folder is no export of this suite."""

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
        if ANSWER not in files:
            return _outputs(name, files, params)
        if len(files) > 1:
            raise PortFault("protocol", f"calls/{name} has both {' and '.join(sorted(files, reverse=True))}")
        raise exception_of(parse_object(files[ANSWER]))

    def answered(self) -> int:
        """The number of calls that have an answer, or a part of one."""
        places = [self.folder / "calls" / name for name in self.calls.values()]
        return sum(any((place / file).exists() for file in (OUTPUTS, ANSWER, file_of(0))) for place in places)


def answer(folder: Path, adapter: Adapter) -> int:
    """Answer every call of an exported folder that has no answer yet. Returns the number of those."""
    calls, info = _manifest(folder)["calls"], describe(adapter)
    _write_port(folder, info)
    todo = [name for name in calls.values() if not _answer_files(folder, name)]
    for name in todo:
        _answer_call(folder / "calls" / name, adapter, info)
    return len(todo)


def answer_as_rank(folder: Path, adapter: Adapter, rank: int, ranks: int) -> int:
    """Answer, as one rank of so many, the calls for a mesh of that size that not all ranks have answered.

    Every rank runs the same calls in the same order, each with the whole inputs, and writes what it has. A call that
    some ranks had answered before is run by all, since they may have to communicate. Returns the number of calls.
    """
    calls, info = _manifest(folder)["calls"], describe(adapter)
    todo = [name for name in calls.values() if _is_open(folder, name, ranks)]
    if rank == 0:
        _write_port(folder, info)
    for name in todo:
        _answer_call(folder / "calls" / name, adapter, info, rank)
    return len(todo)


def _is_open(folder: Path, name: str, ranks: int) -> bool:
    """True for a call on a mesh of so many ranks that not all of them have answered."""
    mesh = parse_object(read_file(folder / "calls" / name / "request.json"))["params"].get("mesh")
    if mesh is None or number(mesh) != ranks:
        return False
    files = _answer_files(folder, name)
    whole = OUTPUTS in files or ANSWER in files
    return not whole and sum(rank_of(file) is not None for file in files) < ranks


def _write_port(folder: Path, info: Info) -> None:
    write_atomically(folder / "port.json", plain_json({"name": info.name, "version": info.version}))


def _answer_call(place: Path, adapter: Adapter, info: Info, rank: int | None = None) -> None:
    """Run a call and write its answer.

    rank: whose outputs these are, None for a port in one process. An answer without outputs is written by rank 0 alone.
    """
    request = parse_object(read_file(place / "request.json"))
    op, params = request["op"], request["params"]
    if op not in info.ops or params["dtype"] not in info.dtypes:
        lacking = op if op not in info.ops else params["dtype"]
        reply, outputs = {"answer": "unsupported", "reason": f"the port does not claim {lacking}"}, b""
    else:
        inputs = {name: value.copy() for name, value in file_to_arrays(read_file(place / "inputs.safetensors")).items()}
        reply, outputs = answer_of(adapter, op, inputs, params)
    if reply["answer"] == "outputs":
        write_atomically(place / (OUTPUTS if rank is None else file_of(rank)), outputs)
    elif not rank:
        write_atomically(place / ANSWER, plain_json(reply))
