"""The bundled data and weights are found in an installed package and in a source tree."""

from importlib import resources
from pathlib import Path

import pytest

from storm_ref.workbench.cli.commands import main
from storm_ref.workbench.io import bundled

ROOT = Path(__file__).parents[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package, with nothing in it or beside it."""
    folder = tmp_path / "site-packages" / "storm_ref"
    folder.mkdir(parents=True)
    monkeypatch.setattr(resources, "files", lambda name: folder)
    return folder


def test_bundled_files_of_this_source_tree() -> None:
    assert bundled.world().samefile(ROOT / "tiny_data" / "world.nc")
    assert bundled.weights().samefile(ROOT / "tiny_data" / "storm_tiny.safetensors")


def test_bundled_files_prefer_the_package(package: Path) -> None:
    """An installed wheel carries them itself; a source tree has them beside the package."""
    for folder in (package.parent / "tiny_data", package / "tiny_data"):
        folder.mkdir()
        (folder / "world.nc").touch()
        assert bundled.world() == folder / "world.nc"


def test_bundled_files_invalid_absent(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both places are named, also by the command that needs the file; help does without it."""
    with pytest.raises(ValueError, match=r"storm_tiny.safetensors is neither at .* nor at .*: install") as caught:
        bundled.weights()
    assert str(package / "tiny_data") in str(caught.value)
    assert str(package.parent / "tiny_data") in str(caught.value)
    assert main(["forecast"]) == 2
    assert "the bundled world.nc is neither at" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["forecast", "--help"])
    assert stopped.value.code == 0
