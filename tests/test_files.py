"""Files that are whole or as before."""

import os
from pathlib import Path

import pytest

from storm_ref.workbench.io.atomic import replacing


def test_replacing_puts_the_new_in_place(tmp_path: Path) -> None:
    """The old is there until the block ends; a folder takes the place of a folder, its old content gone."""
    for name in ("file", "folder"):
        path = tmp_path / name
        for text in ("old", "new"):
            with replacing(path) as part:
                if name == "folder":
                    part.mkdir()
                (part if name == "file" else part / text).write_text(text)
                assert part.parent == tmp_path and (not path.exists() or text == "new")
        assert path.read_text() == "new" if name == "file" else os.listdir(path) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_replacing_invalid_keeps_the_old(tmp_path: Path) -> None:
    """Half a file, and a file in the place of a folder: neither harms what was there, nor is left behind."""
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
