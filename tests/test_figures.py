"""Figures: each is a readable PNG with labelled axes and units, and an old one stays when writing fails."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from storm_ref.workbench.io import figures

LAT, LON = np.linspace(58, 50, 9), np.linspace(-10, 2, 13)
RNG = np.random.default_rng(0)
FIELD = RNG.normal(280, 3, (9, 13))


def _track(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes, in degrees."""
    t = np.arange(6.0)
    return 100 + 2 * t + shift, 40 + t


FIGURES = {
    "maps": lambda: figures.maps(LAT, LON, FIELD, FIELD + 1, FIELD + 0.1, FIELD > 280, "temperature (K)", "t"),
    "crps": lambda: figures.crps_by_fraction({"a": {0.0: 1.0, 0.2: 0.3}, "b": {0.0: 0.9, 0.2: 0.2}}, "K", "t"),
    "spread": lambda: figures.spread_against_error({"a": (RNG.gamma(2, 1, 200), RNG.normal(size=200))}, "K", "t"),
    "tracks": lambda: figures.tracks(_track(0), {"a": [_track(1), _track(2)], "b": [_track(0.1)]}, "t"),
    "intensity": lambda: figures.intensity(30.0, {"a": RNG.normal(25, 2, 16), "b": RNG.normal(30, 1, 16)}, "t"),
    "training": lambda: figures.training({"loss": ([1.0, 2.0, 3.0], [1.0, 0.5, 0.4])}, "t"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_labels_and_save(name: str, tmp_path: Path) -> None:
    """Axes are named, shared ones on the outer panels, and the file is a PNG."""
    figure: Figure = FIGURES[name]()
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert any(axis.get_xlabel() for axis in panels)
    assert any(axis.get_ylabel() for axis in panels)
    figures.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_intensity_density_integrates_to_one() -> None:
    values = RNG.normal(25, 2, 16)
    at = np.linspace(0, 60, 6001)
    assert np.trapezoid(figures._density(values, at), at) == pytest.approx(1, abs=1e-3)


def test_save_keeps_the_old_picture_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "x.png"
    old.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        figures.save(FIGURES["training"](), old)
    assert old.read_bytes() == b"old"
