"""A miniature port for the wire that misbehaves on request: `params["trick"]` names how; without it, it is honest.

It answers one operation, `schedule`, with three zeros, and needs the standard library alone, so that it starts fast.
`bad_port.py TRICK [FILE]` misbehaves from the start; FILE takes what a test wants to know of it afterwards.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REQUEST: dict = {}
NOTES = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.devnull)


def say(answer: object, number: object = None) -> None:
    line = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    if isinstance(answer, dict):
        line = json.dumps({"id": REQUEST.get("id") if number is None else number} | answer).encode()
    raw(b"@storm " + line + b"\n")


def raw(data: bytes, file: int = 1) -> None:
    while data:
        data = data[os.write(file, data) :]


def tensors(dtype: str = "F64", shape: tuple = (3,), data: bytes = bytes(24), end: int | None = None) -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data) if end is None else end]}
    header = json.dumps({"sigmas": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


def write(data: bytes | None = None) -> None:
    Path(REQUEST["outputs"]).write_bytes(tensors() if data is None else data)


def outputs(data: bytes | None = None) -> None:
    write(data)
    say({"answer": "outputs"})


def named(name: str) -> None:
    write()
    say({"answer": "outputs", "outputs": name})


def linked(make: Callable[[str, str], None]) -> None:
    elsewhere = REQUEST["outputs"] + ".elsewhere"
    Path(elsewhere).write_bytes(tensors())
    make(elsewhere, REQUEST["outputs"])
    say({"answer": "outputs"})


def sparse() -> None:
    write()
    os.truncate(REQUEST["outputs"], 2**40)
    say({"answer": "outputs"})


def twice_late() -> None:
    outputs()
    time.sleep(0.05)
    say({"answer": "outputs"})


def flood(file: int, until_answer: int | None) -> None:
    line = (b"x" * 997 + b"\r\n") * 1000
    count = 0
    while until_answer is None or count < until_answer:
        raw(line, file)
        count += 1
    outputs()


def unending_line() -> None:
    raw(b"y" * 5_000_000 + b"\n")
    outputs()


def grandchild() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    NOTES.write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def orphan() -> None:
    """Dies and leaves a child that keeps the pipes open."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    NOTES.write_text(f"{os.getpid()} {child.pid}")
    os._exit(4)


def last_words() -> None:
    raw(b"the cause of it: \x1b[31mno licence\xff\n", 2)
    os._exit(3)


def close(file: int) -> None:
    os.close(file)
    if file == 0:
        outputs()
    time.sleep(600)


def plant() -> None:
    """A link where the suite will write the next call's inputs."""
    ahead = Path(REQUEST["inputs"]).with_name(f"{REQUEST['id'] + 1}.in.safetensors")
    ahead.symlink_to(NOTES)
    outputs()


def swap_folder() -> None:
    """Its folder elsewhere, a link in its place."""
    folder = Path(REQUEST["outputs"]).parent
    folder.rename(str(folder) + ".moved")
    folder.symlink_to(NOTES.parent)
    write()
    say({"answer": "outputs"})


def error(kind: str, **more: object) -> None:
    say({"answer": kind} | more)


def many() -> None:
    write()
    raw(b"".join(b'@storm {"id": %d, "answer": "outputs"}\n' % REQUEST["id"] for _ in range(2)))


NOT_A_NUMBER = bytes(16) + struct.pack("<d", float("nan"))
TRICKS: dict[str, Callable[[], None]] = {
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(7),
    "exit zero": lambda: os._exit(0),
    "last words": last_words,
    "hang": lambda: time.sleep(600),
    "grandchild": grandchild,
    "orphan": orphan,
    "wrong id": lambda: say({"answer": "outputs"}, 999),
    "true id": lambda: say({"answer": "outputs"}, True),
    "text id": lambda: say({"answer": "outputs"}, "2"),
    "no id": lambda: say(b'{"answer": "outputs"}'),
    "garbage": lambda: say(b"{]"),
    "list": lambda: say(b"[1, 2]"),
    "deep": lambda: say(b"[" * 100_000),
    "nan": lambda: say(b'{"id": NaN, "answer": "outputs"}'),
    "huge number": lambda: say(b'{"id": ' + b"9" * 10_000 + b', "answer": "outputs"}'),
    "not utf-8": lambda: say(b'{"id": \xff}'),
    "unknown": lambda: error("maybe"),
    "answer is a list": lambda: say({"answer": ["outputs"]}),
    "reason is a number": lambda: error("unsupported", reason=3),
    "no message": lambda: error("error", type="KeyError"),
    "info": lambda: error("info", name="x"),
    "no file": lambda: say({"answer": "outputs"}),
    "empty file": lambda: outputs(b""),
    "truncated": lambda: outputs(tensors()[:-5]),
    "long header": lambda: outputs(struct.pack("<Q", 2**62) + b"{}"),
    "offsets": lambda: outputs(tensors(end=2**40)),
    "shape": lambda: outputs(tensors(shape=(2**40, 2**40))),
    "bfloat16": lambda: outputs(tensors("BF16", (3,), bytes(6))),
    "sparse": sparse,
    "wrong shape": lambda: outputs(tensors(shape=(3, 1))),
    "wrong dtype": lambda: outputs(tensors("F32", (3,), bytes(12))),
    "not a number": lambda: outputs(tensors(data=NOT_A_NUMBER)),
    "absolute": lambda: named("/etc/passwd"),
    "parent": lambda: named("../outputs.safetensors"),
    "path is a number": lambda: say({"answer": "outputs", "outputs": 5}),
    "symlink": lambda: linked(os.symlink),
    "hard link": lambda: linked(os.link),
    "pipe": lambda: (os.mkfifo(REQUEST["outputs"]), say({"answer": "outputs"})),
    "folder": lambda: (os.mkdir(REQUEST["outputs"]), say({"answer": "outputs"})),
    "plant": plant,
    "swap folder": swap_folder,
    "twice": many,
    "twice late": twice_late,
    "long answer": lambda: say(b'{"id": "' + b"z" * 3_000_000 + b'"}'),
    "endless answer": lambda: raw(b"@storm " + b"z" * 3_000_000),
    "chatter": lambda: (raw(b"loading\r\n\x00\xff\n{}\n @storm {}\n@stormy\n"), outputs()),
    "unending line": unending_line,
    "flood stdout": lambda: flood(1, 10),
    "flood stderr": lambda: flood(2, 10),
    "endless stdout": lambda: flood(1, None),
    "endless stderr": lambda: flood(2, None),
    "close stdin": lambda: close(0),
    "close stdout": lambda: close(1),
    "hostile": lambda: error("error", type="Bad\x1b[2J", message="\x1b[31m\x00" + "<script>\ud800" + "w" * 10_000),
    "key error": lambda: error("error", type="KeyError", message="'x'"),
    "refused": lambda: error("refused", message="steps must be positive"),
    "silent refusal": lambda: error("refused", message=""),
    "unsupported": lambda: error("unsupported", reason="no schedule here"),
}


def describe(start: str) -> None:
    info = {"answer": "info", "wire": REQUEST["wire"], "spec": REQUEST["spec"], "name": "mini", "version": "1"}
    info |= {"ops": ["schedule"], "dtypes": ["float64"], "profiles": []}
    if start == "newer wire":
        info["wire"] = "99"
    if start == "older spec":
        info["spec"] = "0.0"
    if start == "hostile name":
        info |= {"name": "\x1b[31m<b>evil</b>\n" + "n" * 500, "ops": ["schedule", "\x07bell"]}
    if start == "ops is a text":
        info["ops"] = "schedule"
    say(info)


def main() -> None:
    start = sys.argv[1] if len(sys.argv) > 1 else ""
    if start == "dies later" and NOTES.exists():
        raw(b"the second start fails\n", 2)
        os._exit(5)
    if start == "dies later":
        NOTES.write_text("started")
    if start == "early":
        say({"answer": "info"}, 1)
    if start in TRICKS:
        TRICKS[start]()
    for line in sys.stdin.buffer:
        REQUEST.clear()
        REQUEST.update(json.loads(line))
        if REQUEST["request"] == "quit":
            return
        if REQUEST["request"] == "describe":
            describe(start)
        else:
            TRICKS.get(REQUEST["params"].get("trick", ""), outputs)()


if __name__ == "__main__":
    main()
