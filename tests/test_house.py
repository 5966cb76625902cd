"""The map in CONTRIBUTING.md shows the tree as it is."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAP = ROOT / "CONTRIBUTING.md"


def _mapped() -> list[str]:
    """The folders of the map, in its order."""
    block = MAP.read_text().split("<!-- map -->\n```\n")[1].split("```")[0]
    folders = [line.split(maxsplit=1) for line in block.splitlines()]
    assert all(len(line) == 2 for line in folders), "a line of the map says nothing of its folder"
    return [folder.rstrip("/") for folder, _ in folders]


def _folders() -> set[str]:
    """Every folder that git tracks a file in, but for hidden ones."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    parents = {str(parent) for name in tracked for parent in Path(name).parents}
    return {folder for folder in parents if folder != "." and not folder.startswith(".")}


def test_map_names_every_folder_once() -> None:
    mapped = _mapped()
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == _folders()


def test_map_puts_folders_behind_their_parents() -> None:
    seen: set[str] = set()
    for folder in _mapped():
        parent = str(Path(folder).parent)
        assert parent == "." or parent in seen, f"{folder} stands before {parent}"
        seen.add(folder)
