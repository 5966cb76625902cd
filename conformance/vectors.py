"""Frozen vectors: inputs and expected values of cases whose truth is a whole network, stored with their checksums.

`python -m conformance generate` makes them from the reference in float64, [NUM-8]; judging reads them and never runs
the reference. A file holds the tensors `inputs.NAME` and `expected.NAME`; manifest.json lists its sha256, size and
number of tensors.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from conformance.adapter import Adapter, Array, Arrays, Unsupported
from conformance.case import Case
from conformance.tolerance import Bound

__all__ = ["FOLDER", "Recipe", "VectorError", "load_vector", "manifest", "write_aside", "write_vectors"]

FOLDER = Path(__file__).resolve().parents[1] / "tiny_data" / "vectors"


class VectorError(Exception):
    """The stored vectors are missing or damaged: the suite cannot judge."""


@dataclass(frozen=True)
class Recipe:
    """A case without its arrays, and how to make its inputs. `tolerance` derives the bound from the inputs."""

    id: str
    op: str
    requirements: tuple[str, ...]
    params: Mapping[str, Any]
    meaning: str
    make: Callable[[], dict[str, Array]]
    tolerance: Callable[[Arrays], Bound]

    def case(self, folder: Path = FOLDER) -> Case:
        """The case, arrays read from `folder`. Raises VectorError."""
        inputs, expected = load_vector(self.id, folder)
        return Case(
            self.id, self.op, self.requirements, self.tolerance(inputs), self.meaning, inputs, self.params, expected
        )


def _file_name(case_id: str) -> str:
    return case_id.replace("/", "-") + ".safetensors"


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest of the stored vectors. Raises VectorError when it cannot be read."""
    try:
        return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise VectorError(
            f"the vectors' manifest cannot be read: {error}; run python -m conformance generate"
        ) from error


def load_vector(case_id: str, folder: Path = FOLDER) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and expected values of a frozen case. Raises VectorError unless the file is the one in the manifest."""
    name = _file_name(case_id)
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise VectorError(f"the vector {name} cannot be read: {error}; run python -m conformance generate") from error
    if hashlib.sha256(data).hexdigest() != manifest(folder).get("files", {}).get(name, {}).get("sha256"):
        raise VectorError(
            f"the vector {name} is not the one in the manifest; restore both, or run python -m conformance generate"
        )
    parts: dict[str, dict[str, Array]] = {"inputs": {}, "expected": {}}
    for key, value in load(data).items():
        part, tensor = key.split(".", 1)
        parts[part][tensor] = value
    return parts["inputs"], parts["expected"]


def write_aside(path: Path, data: bytes) -> None:
    """Write under another name, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(data)
    aside.replace(path)


def write_vectors(recipes: list[Recipe], reference: Adapter, folder: Path = FOLDER) -> dict[str, Any]:
    """Run the reference on every recipe, write the files and, last, the manifest, which is returned."""
    files: dict[str, Any] = {}
    for recipe in recipes:
        inputs = recipe.make()
        result = reference.run(recipe.op, dict(inputs), dict(recipe.params))
        if isinstance(result, Unsupported):
            raise VectorError(f"{recipe.id}: the reference does not support {recipe.op}")
        tensors = {f"inputs.{k}": np.ascontiguousarray(v) for k, v in inputs.items()}
        tensors |= {f"expected.{k}": np.ascontiguousarray(v) for k, v in result.items()}
        data = save(tensors, {"case": recipe.id})
        write_aside(folder / _file_name(recipe.id), data)
        files[_file_name(recipe.id)] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "tensors": len(tensors),
            "case": recipe.id,
        }
    result_manifest = {"format": 1, "files": files}
    write_aside(folder / "manifest.json", (json.dumps(result_manifest, indent=1, sort_keys=True) + "\n").encode())
    return result_manifest
