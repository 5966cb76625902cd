"""Atomic file replacement, in the workbench and in the suite: whole files whoever else writes, and no leftovers."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conformance.protocol.atomic import write_atomically
from storm_ref.workbench.io.atomic import is_temporary, remove, replacing, temporary_name

SIZE = 200_000  # characters: a write of so many takes several system calls
WRITES = 40


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


def write_bytes(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


WRITERS = pytest.mark.parametrize("write", [replace_text, write_bytes])


def test_replacing_puts_the_new_in_place(tmp_path: Path) -> None:
    """The old content is there until the block ends; a folder takes the place of a folder with all its content."""
    for name in ("file", "folder"):
        path = tmp_path / name
        for text in ("old", "new"):
            with replacing(path) as part:
                if name == "folder":
                    part.mkdir()
                (part if name == "file" else part / text).write_text(text)
                assert part.parent == tmp_path and is_temporary(part)
                assert not path.exists() or text == "new"
        assert path.read_text() == "new" if name == "file" else os.listdir(path) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_replacing_invalid_keeps_the_old(tmp_path: Path) -> None:
    """Half a file, and a file in the place of a folder: the old content stays and nothing is left behind."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("old")
    with (
        pytest.raises(OSError, match=r"file could not be written \(half\), .* unchanged: free space"),
        replacing(tmp_path / "file") as part,
    ):
        part.write_text("ha")
        raise RuntimeError("half")
    with pytest.raises(OSError, match="folder could not be written"), replacing(tmp_path / "folder") as part:
        part.write_text("new")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "precious").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_replacing_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    """An interrupt stays an interrupt, and the temporary file or folder goes."""
    (tmp_path / "file").write_text("old")
    for make in (Path.touch, Path.mkdir):
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as part:
            make(part)
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_replacing_brings_the_old_folder_back(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames fails, or is interrupted, while the old folder stands aside."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = os.replace

    def fail_to_move_in(source: Path, target: Path) -> None:
        if target == path and not (source / "old").exists():
            raise failure
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_to_move_in)
    with pytest.raises((OSError, KeyboardInterrupt)), replacing(path) as part:
        part.mkdir()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["old"]


def test_replacing_takes_a_name_that_others_know(tmp_path: Path) -> None:
    part = temporary_name(tmp_path / "folder")
    part.mkdir()
    (part / "by-another").touch()
    with replacing(tmp_path / "folder", part):
        (part / "by-this").touch()
    assert os.listdir(tmp_path) == ["folder"]
    assert sorted(os.listdir(tmp_path / "folder")) == ["by-another", "by-this"]


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path) -> None:
    """A link is removed, and what it points to is not."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("link", "folder", "absent"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == ["file"]


def _write_often(write: Callable[[Path, str], None], path: Path, letter: str) -> None:
    for _ in range(WRITES):
        write(path, json.dumps(letter * SIZE))


@WRITERS
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_concurrent_writers_never_tear_a_read(kind: str, write: Callable[[Path, str], None], tmp_path: Path) -> None:
    """Two writers and a reader of one file: each read is the whole text of one of them, and no temporary remains."""
    path = tmp_path / "file"
    write(path, json.dumps("a" * SIZE))
    start: Callable[..., threading.Thread | multiprocessing.Process] = threading.Thread
    if kind == "processes":
        start = multiprocessing.get_context("spawn").Process  # type: ignore[assignment]
    writers = [start(target=_write_often, args=(write, path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    reads = set()
    while any(writer.is_alive() for writer in writers):
        text = json.loads(path.read_text())
        assert len(text) == SIZE and len(set(text)) == 1
        reads.add(text[0])
        time.sleep(0.0005)
    for writer in writers:
        writer.join()
    assert reads <= {"a", "b"}
    assert os.listdir(tmp_path) == ["file"]
    if kind == "processes":
        assert [writer.exitcode for writer in writers] == [0, 0]  # type: ignore[union-attr]


def test_concurrent_writers_of_a_folder_leave_one_whole(tmp_path: Path) -> None:
    """Whichever writer is last, the folder is that of one of them alone."""
    path = tmp_path / "folder"
    errors: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            for _ in range(WRITES):
                with replacing(path) as part:
                    part.mkdir()
                    for number in range(3):
                        np.save(part / f"{letter}{number}.npy", np.zeros(3))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert os.listdir(tmp_path) == ["folder"]
    names = sorted(os.listdir(path))
    assert names in [[f"{letter}{number}.npy" for number in range(3)] for letter in "abc"]


def test_write_atomically_makes_the_folder_and_keeps_the_mode(tmp_path: Path) -> None:
    """Others may read a report as they may any other file."""
    write_atomically(tmp_path / "new" / "report.md", b"text")
    (tmp_path / "plain").write_text("text")
    assert (tmp_path / "new" / "report.md").read_bytes() == b"text"
    assert (tmp_path / "new" / "report.md").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_atomically_invalid_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")

    def half(part: Path, data: bytes) -> None:
        with part.open("wb") as file:
            file.write(data[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["result.json"] and path.read_bytes() == b"old"
