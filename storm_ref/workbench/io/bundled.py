"""The data and weights that come with storm_ref: package data of an installed wheel, `tiny_data/` of a source tree."""

from importlib import resources
from pathlib import Path

__all__ = ["TRAINING_END", "weights", "world"]

TRAINING_END = "2000-09-28"  # the bundled weights were trained on the world before it, three quarters of the record


def world() -> Path:
    """The bundled record, a small synthetic atmosphere. Raises ValueError when it is missing."""
    return _find("world.nc")


def weights() -> Path:
    """The bundled model, trained on the bundled world. Raises ValueError when it is missing."""
    return _find("storm_tiny.safetensors")


def _find(name: str) -> Path:
    package = Path(str(resources.files("storm_ref")))
    places = [package / "tiny_data" / name, package.parent / "tiny_data" / name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"the bundled {name} is neither at {places[0]} nor at {places[1]}: install storm-ref again, run it from its "
        "source tree, or name a file of your own"
    )
