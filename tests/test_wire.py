"""Ports in a process of their own: the protocol, and what becomes of ports that break it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from conformance import SPEC, WIRE
from conformance.adapter import AdapterError, Info, PortFault, Unsupported, describe
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import judge, judge_law
from conformance.judging.tolerance import Exact
from conformance.ports import serve as host
from conformance.ports.checked import Port
from conformance.ports.process import PREFIX, STDERR_KEPT
from conformance.ports.wire import WireAdapter, command_words, plain_json, serve_words

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).parent / "ports" / "bad_port.py"
LONG = 30.0  # seconds: never reached by a port that answers, however busy the machine


def schema(name: str) -> jsonschema.Draft202012Validator:
    document = json.loads((ROOT / "conformance" / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-S", str(SCRIPT), *map(str, arguments)]


def case(trick: str | None = None) -> Case:
    """A case whose right answer is three zeros."""
    return Case(
        id="edm/mini",
        op="schedule",
        requirements=("EDM-5",),
        profiles=("edm",),
        tolerance=Exact("zeros"),
        meaning="not three zeros",
        inputs={"x": np.arange(3)},
        params={} if trick is None else {"trick": trick},
        expected={"sigmas": np.zeros(3)},
    )


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    """One adapter for all tricks, which therefore must recover from each."""
    adapter = WireAdapter(words(), LONG)
    yield Port(adapter, describe(adapter))
    adapter.close()


def alive(number: int) -> bool:
    """Return True while a process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
    return state.strip() not in ("",) and not state.strip().startswith("Z")


def wait_for_death(*numbers: int) -> bool:
    for _ in range(100):
        if not any(alive(number) for number in numbers):
            return True
        time.sleep(0.05)
    return False


FAULTS = {
    "segfault": "crash: the port was killed by SIGSEGV before it answered",
    "killed": "crash: the port was killed by SIGKILL",
    "exit": "crash: the port exited with status 7",
    "exit zero": "crash: the port exited with status 0 before it answered",
    "last words": "crash: the port exited with status 3 before it answered; its last words: the cause of it",
    "wrong id": "protocol: the port answered call 999, it was asked call",
    "true id": "protocol: the port answered call True, it was asked call",
    "text id": "protocol: the port answered call 2, it was asked call",
    "no id": "protocol: the port answered call None",
    "garbage": "protocol: the answer is not JSON",
    "list": "protocol: the answer is not a JSON object but list",
    "deep": "protocol: the answer is not JSON",
    "nan": "protocol: the answer is not JSON: NaN is not JSON",
    "huge number": "protocol: the answer is not JSON",
    "not utf-8": "protocol: the answer is not JSON",
    "unknown": "protocol: the port's answer is 'maybe', which the protocol does not know",
    "answer is a list": "protocol: the port's answer is ['outputs'], which",
    "reason is a number": "protocol: the port's answer needs a string 'reason', got 3",
    "no message": "protocol: the port's answer needs a string 'message', got None",
    "info": "protocol: the port's answer is 'info', which",
    "no file": "protocol: the port answered 'outputs' and wrote no",
    "empty file": "protocol: the safetensors file is damaged",
    "truncated": "protocol: the safetensors file is damaged",
    "long header": "protocol: the safetensors file is damaged: its header is longer",
    "offsets": "protocol: the safetensors file is damaged",
    "shape": "protocol: the safetensors file is damaged",
    "bfloat16": "protocol: the safetensors file has arrays of type 'BF16'; bfloat16 travels as float32",
    "sparse": "has 1099511627776 bytes, more than 268435456",
    "absolute": "protocol: outputs belong in",
    "parent": "the port named ../outputs.safetensors",
    "path is a number": "the port named 5",
    "symlink": "cannot be read: it is a link",
    "hard link": "is not a plain file of its own",
    "pipe": "is not a plain file of its own",
    "folder": "is not a plain file of its own",
    "twice": "protocol: the port gave 2 answers to one call",
    "long answer": "protocol: the port's answer is a line of more than 1048576 bytes",
    "endless answer": "protocol: the port's answer is a line of more than 1048576 bytes",
    "close stdout": "protocol: the port closed its standard input or output",
    "key error": "the port raised KeyError: 'x'",
    "silent refusal": "the port refused a valid input: ",
    "refused": "the port refused a valid input: steps must be positive",
}


@pytest.mark.parametrize("trick", FAULTS)
def test_judge_records_fault(port: Port, trick: str) -> None:
    outcome = judge(port, case(trick))
    assert outcome.verdict == "error"
    assert FAULTS[trick] in outcome.detail
    assert judge(port, case()).verdict == "pass", "the next case is judged as if nothing had happened"


WRONG = {
    "wrong shape": "the output sigmas has shape [3, 1], expected [3]",
    "wrong dtype": "the output sigmas has dtype float32, expected float64",
    "not a number": "the output sigmas is nan at [2]",
}


@pytest.mark.parametrize("trick", WRONG)
def test_judge_fails_incomparable_output(port: Port, trick: str) -> None:
    outcome = judge(port, case(trick))
    assert (outcome.verdict, WRONG[trick] in outcome.detail) == ("fail", True), outcome.detail
    assert judge(port, case()).verdict == "pass"


@pytest.mark.parametrize("trick", ["chatter", "unending line", "flood stdout", "flood stderr"])
def test_run_ignores_chatter(port: Port, trick: str) -> None:
    outcome = judge(port, case(trick))
    assert outcome.verdict == "pass", outcome.detail
    assert isinstance(port.adapter, WireAdapter)
    process = port.adapter._process
    assert process is not None
    assert len(process._line) <= len(PREFIX) and len(process._errors) <= STDERR_KEPT, "what is kept has limits"


def test_run_unsupported(port: Port) -> None:
    outcome = judge(port, case("unsupported"))
    assert (outcome.verdict, outcome.detail) == ("unsupported", "no schedule here")


def test_run_hostile_message_is_defused(port: Port) -> None:
    detail = judge(port, case("hostile")).detail
    assert detail.isprintable() and "<script>" in detail and len(detail) < 400
    assert json.dumps(detail).isascii()


def test_run_answered_twice_late_is_noticed(port: Port) -> None:
    assert judge(port, case("twice late")).verdict == "pass"
    time.sleep(0.3)
    outcome = judge(port, case())
    assert outcome.verdict == "error"
    assert "answered before it was asked, or answered the last call twice" in outcome.detail
    assert judge(port, case()).verdict == "pass"


def test_run_closed_input_is_noticed_at_the_next_call(port: Port) -> None:
    assert judge(port, case("close stdin")).verdict == "pass"
    assert "the port closed its standard input or output" in judge(port, case()).detail
    assert judge(port, case()).verdict == "pass"


@pytest.mark.parametrize("trick", ["hang", "endless stdout", "endless stderr"])
def test_run_stops_a_port_that_does_not_answer(trick: str) -> None:
    adapter = WireAdapter(words(), 0.5, LONG)
    port = Port(adapter, describe(adapter))
    outcome = judge(port, case(trick))
    assert outcome.verdict == "error"
    assert "timeout: no answer within 0.5 s; the port was stopped" in outcome.detail
    adapter.timeout = LONG
    assert judge(port, case()).verdict == "pass"
    adapter.close()


def test_law_stops_at_the_first_timeout() -> None:
    adapter = WireAdapter(words(), 0.5, LONG)
    port = Port(adapter, describe(adapter))

    def check(port: Port, draw: Any) -> None:
        port.values("schedule", {}, {"trick": "hang"}, "sigmas")

    law = Law("edm/law-hang", ("EDM-5",), ("edm",), ("schedule",), "hangs", check)
    outcome = judge_law(port, law, 0)
    assert outcome.verdict == "error" and "timeout: no answer within" in outcome.detail
    assert adapter._id == 2, "describe and one call: a hanging port is not asked for simpler examples"
    adapter.close()


@pytest.mark.parametrize("trick", ["grandchild", "orphan"])
def test_run_ends_grandchildren(tmp_path: Path, trick: str) -> None:
    notes = tmp_path / "notes"
    adapter = WireAdapter(words("", notes), 2.0 if trick == "grandchild" else LONG, LONG)
    outcome = judge(Port(adapter, describe(adapter)), case(trick))
    assert ("timeout" if trick == "grandchild" else "exited with status 4") in outcome.detail
    assert wait_for_death(*map(int, notes.read_text().split()))
    adapter.close()


def test_run_does_not_write_through_a_planted_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    adapter = WireAdapter(words("", precious), LONG)
    port = Port(adapter, describe(adapter))
    assert judge(port, case("plant")).verdict == "pass"
    assert "the port meddled with the suite's files: File exists" in judge(port, case()).detail
    assert precious.read_text() == "mine"
    assert judge(port, case()).verdict == "pass"
    adapter.close()


def test_run_does_not_follow_a_swapped_folder(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    adapter = WireAdapter(words("", tmp_path / "notes"), LONG)
    port = Port(adapter, describe(adapter))
    assert adapter._process is not None
    folder = Path(adapter._process.folder)
    assert "wrote no" in judge(port, case("swap folder")).detail
    assert (tmp_path / "keep").read_text() == "mine"
    assert judge(port, case()).verdict == "pass"
    adapter.close()
    folder.unlink()
    for left in folder.with_name(folder.name + ".moved").iterdir():
        left.unlink()
    folder.with_name(folder.name + ".moved").rmdir()


def test_close_ends_the_port_and_its_folder() -> None:
    adapter = WireAdapter(words(), LONG)
    describe(adapter)
    assert adapter._process is not None
    number, folder = adapter._process.process.pid, adapter._process.folder
    assert os.path.isdir(folder) and alive(number)
    adapter.close()
    assert not os.path.exists(folder) and not alive(number)
    adapter.close()


@pytest.mark.parametrize("how", ["interrupt", "forgotten"])
def test_no_orphan_when_the_suite_ends(tmp_path: Path, how: str) -> None:
    notes = tmp_path / "notes"
    call = "adapter.run('schedule', {}, {'trick': 'grandchild'}, ())"
    script = (
        # A shell starts what runs in its background with interrupts ignored, and that is inherited.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from conformance.ports.wire import WireAdapter\n"
        f"adapter = WireAdapter({words('', notes)!r}, {LONG if how == 'interrupt' else 1.0})\n"
        f"adapter.start = {LONG}\n"
        f"try:\n    {call}\nexcept Exception:\n    pass\nadapter.describe()\n"
    )
    suite = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(400):
        if notes.exists() and len(notes.read_text().split()) == 2:
            break
        time.sleep(0.05)
    if how == "interrupt":
        suite.send_signal(signal.SIGINT)
    suite.wait(LONG)
    assert (suite.returncode == 0) == (how == "forgotten")
    assert wait_for_death(*map(int, notes.read_text().split()))


STARTS = {
    "exit": r"did not describe itself \(crash\): the port exited with status 7",
    "last words": r"\(crash\): .* its last words: the cause of it:  \[31mno licence",
    "early": r"\(protocol\): the port( answered before it was asked| gave 2 answers|'s answer needs a string 'wire')",
    "newer wire": "the port is made for version 99 of the wire, this suite judges 1",
    "older spec": f"the port is made for version 0.0 of the spec, this suite judges {SPEC}",
    "ops is a text": "the port's ops must be a list of strings, got schedule",
}


@pytest.mark.parametrize("start", STARTS)
def test_describe_invalid_start(start: str) -> None:
    adapter = WireAdapter(words(start), LONG)
    with pytest.raises(AdapterError, match=STARTS[start]):
        describe(adapter)
    assert adapter._process is None


def test_describe_invalid_hang() -> None:
    adapter = WireAdapter(words("hang"), 0.5, 0.5)
    with pytest.raises(AdapterError, match=r"\(timeout\): no answer within 0.5 s"):
        describe(adapter)


def test_describe_defuses_names() -> None:
    adapter = WireAdapter(words("hostile name"), LONG)
    info = describe(adapter)
    adapter.close()
    assert info.name.isprintable() and len(info.name) == 100
    assert info.ops == {"schedule", " bell"}


def test_run_leaves_a_port_alone_that_does_not_start_again(tmp_path: Path) -> None:
    adapter = WireAdapter(words("dies later", tmp_path / "notes"), LONG)
    port = Port(adapter, describe(adapter))
    details = [judge(port, case("exit")).detail, *[judge(port, case()).detail for _ in range(4)]]
    assert "exited with status 7" in details[0]
    assert all("exited with status 5" in detail and "the second start fails" in detail for detail in details[1:4])
    assert "failed to start 3 times in a row and is left alone" in details[4]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "empty"),
        ("   ", ValueError, "empty"),
        ("python 'x", ValueError, "No closing quotation"),
        ("no-such-program-here --fast", AdapterError, "there is no program 'no-such-program-here'"),
    ],
)
def test_command_words_invalid(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        command_words(text)


def test_command_words_splits() -> None:
    assert command_words(f"{sys.executable} 'my port.py' -x") == [sys.executable, "my port.py", "-x"]


def test_wire_adapter_invalid_program(tmp_path: Path) -> None:
    program = tmp_path / "port"
    program.write_bytes(b"\x7fnot a program")
    program.chmod(0o700)
    with pytest.raises(AdapterError, match="cannot be started"):
        describe(WireAdapter([str(program)], LONG))


def test_wire_adapter_invalid_timeout() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        WireAdapter(words(), 0)


# A Python adapter behind the host.

ECHO = """
import os, sys
import numpy as np
from conformance.adapter import Info, Unsupported

class Echo:
    def describe(self):
        print("hello")
        os.write(1, b"@storm {}\\n")
        return Info("echo", "1", frozenset({"schedule", "crps"}), ("float64", "float32"), ("edm",))

    def run(self, op, inputs, params, probes):
        print("@storm {}")
        assert sys.stdin.read() == ""
        how = params.get("how")
        if how == "echo":
            for value in inputs.values():
                value[...] = value  # inputs are the port's own to write in
            return inputs
        if how == "threads":
            return {"threads": np.array(int(os.environ["OMP_NUM_THREADS"]))}
        if how == "return unsupported":
            return Unsupported("not so")
        if how == "unsupported":
            raise Unsupported("not so")
        if how == "refuse":
            raise ValueError("bad\\ninput")
        if how == "exit":
            sys.exit(3)
        if how == "abort":
            os.abort()
        if how == "list":
            return [1]
        if how == "float":
            return {"y": 1.0}
        if how == "complex":
            return {"y": np.zeros(2, complex)}
        if how == "object":
            return {"y": np.array([None])}
        if how == "strided":
            return {"y": np.arange(6).reshape(2, 3).T, "z": np.arange(3, dtype=">f8")}
        raise KeyError(how)
"""


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WireAdapter]:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "echo_port.py").write_text(ECHO)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    adapter = WireAdapter(serve_words("echo_port:Echo"), LONG)
    yield adapter
    adapter.close()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_host_describes(echo: WireAdapter) -> None:
    ops = frozenset({"schedule", "crps"})
    assert describe(echo) == Info("echo", "1", ops, ("float64", "float32"), ("edm",))


def test_host_arrays_survive(echo: WireAdapter) -> None:
    arrays = {
        "scalar": np.array(-0.0),
        "count": np.array(2**62),
        "flag": np.array(True),
        "empty": np.zeros((0, 3)),
        "bits": np.array([[True, False], [False, True]]),
        "single": np.array([1.1, np.inf, np.nan, 1e-45], np.float32),
        "double": np.array([5e-324, -np.inf, np.nan, 0.1]),
        "weights.a.b": np.arange(24.0).reshape(2, 3, 4)[:, ::-1],
    }
    outputs = echo.run("crps", arrays, {"how": "echo"})
    assert sorted(outputs) == sorted(arrays)
    for name, value in arrays.items():
        assert (outputs[name].dtype, outputs[name].shape) == (value.dtype, value.shape), name
        assert outputs[name].tobytes() == value.tobytes(), f"{name} bit for bit"


def test_host_makes_arrays_contiguous(echo: WireAdapter) -> None:
    outputs = echo.run("crps", {}, {"how": "strided"})
    np.testing.assert_array_equal(outputs["y"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(outputs["z"], [0.0, 1, 2])


def test_host_pins_threads(echo: WireAdapter) -> None:
    assert echo.run("crps", {}, {"how": "threads"})["threads"] == 1


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("unsupported", Unsupported, "not so"),
        ("return unsupported", Unsupported, "not so"),
        ("refuse", ValueError, "bad input"),
        ("list", Exception, "the port returned list instead of a dict of arrays"),
        ("float", Exception, "the output y is float, not a NumPy array"),
        ("complex", Exception, "dtype complex128, which the suite does not exchange"),
        ("object", Exception, "dtype object, which the suite does not exchange"),
        ("exit", Exception, "3"),
        ("abort", PortFault, "killed by SIGABRT.*Fatal Python error: Aborted"),
        ("nonsense", Exception, "'nonsense'"),
    ],
)
def test_host_passes_on(echo: WireAdapter, how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        echo.run("crps", {}, {"how": how})
    names = {"list": "TypeError", "exit": "SystemExit", "nonsense": "KeyError"}
    assert names.get(how) in (None, type(caught.value).__name__)
    assert isinstance(caught.value, ValueError) == (how == "refuse")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:x", "cannot be loaded: ModuleNotFoundError"),
        ("nocolon", "MODULE:OBJECT"),
        ("json:gone", "not there"),
    ],
)
def test_host_invalid_adapter(name: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        describe(WireAdapter(serve_words(name), LONG))


def test_host_invalid_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main([]) == 2
    assert "usage" in capsys.readouterr().err


# The schemas say what really travels.


Traffic = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Requests and answers as they pass."""
    seen: Traffic = []
    ask = WireAdapter._ask

    def record(self: WireAdapter, process: Any, request: Any, seconds: float) -> dict[str, Any]:
        answer = ask(self, process, request, seconds)
        seen.append(({"id": self._id} | dict(request), answer))
        return answer

    monkeypatch.setattr(WireAdapter, "_ask", record)
    return seen


def test_schema_fits_the_traffic(echo: WireAdapter, traffic: Traffic) -> None:
    describe(echo)
    for how in ("echo", "unsupported", "refuse", "list"):
        try:
            echo.run("crps", {"x": np.zeros(2)}, {"how": how, "dtype": "float64"}, ("gamma",))
        except (Exception, Unsupported) as error:
            assert how != "echo", error
    assert {answer["answer"] for _, answer in traffic} == {"info", "outputs", "unsupported", "refused", "error"}
    for request, answer in traffic:
        schema("wire_request").validate(request)
        schema("wire_answer").validate(answer)
    schema("wire_request").validate(json.loads(plain_json({"id": 9, "request": "quit"})))


@pytest.mark.parametrize(
    "answer",
    [
        {"answer": "outputs"},
        {"id": "1", "answer": "outputs"},
        {"id": 1, "answer": "maybe"},
        {"id": 1, "answer": "refused"},
        {"id": 1, "answer": "error", "type": "KeyError"},
        {"id": 1, "answer": "unsupported", "reason": 3},
        {"id": 1, "answer": "info", "wire": WIRE, "spec": SPEC, "name": "x", "version": "1", "ops": "gate"},
        {"id": 1, "answer": "info", "wire": WIRE, "name": "x", "version": "1", "ops": []},
        [],
    ],
)
def test_schema_invalid_answer(answer: object) -> None:
    assert not schema("wire_answer").is_valid(answer)


@pytest.mark.parametrize(
    "request_",
    [
        {"id": 1, "request": "describe"},
        {"id": 1, "request": "run", "op": "gate", "params": {}, "probes": [], "inputs": "x"},
        {"id": 1, "request": "sing"},
        {"request": "quit"},
    ],
)
def test_schema_invalid_request(request_: object) -> None:
    assert not schema("wire_request").is_valid(request_)


def test_plain_json_invalid_constant() -> None:
    with pytest.raises(TypeError, match="the suite cannot send this"):
        plain_json({"x": float("nan")})
    with pytest.raises(TypeError, match="object is not JSON"):
        plain_json({"x": object()})
    assert json.loads(plain_json({"x": np.int64(3), "y": (1, 2)})) == {"x": 3, "y": [1, 2]}
