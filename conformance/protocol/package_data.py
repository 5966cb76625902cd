"""Paths of the suite's own data: the frozen vectors, the text of the specification, and JSON schemas.

An installed suite carries them inside the package. In the source tree the vectors are in `tiny_data/vectors` and the
specification is in `spec`, beside the package.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["SPECIFICATION_FOLDER", "VECTORS_FOLDER"]

_PACKAGE = Path(str(files("conformance")))
_SOURCE_TREE = _PACKAGE.parent


def _folder(packaged: str, in_source_tree: str) -> Path:
    """The folder inside the installed package if it is there, else the one of the source tree."""
    inside = _PACKAGE / packaged
    return inside if inside.is_dir() else _SOURCE_TREE / in_source_tree


VECTORS_FOLDER = _folder("vectors", "tiny_data/vectors")
SPECIFICATION_FOLDER = _folder("spec", "spec")
