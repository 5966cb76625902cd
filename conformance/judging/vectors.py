"""Reading of the frozen vectors: every case with its inputs, expected values and limits, from files with checksums.

Two files hold a chapter. `<chapter>.json` has the cases without their arrays (schemas/case.schema.json).
`<chapter>.safetensors` has the arrays, named `case/inputs/x`, `case/expected/y` and `case/neighbour/x`; narrow inputs
are stored in float32, which holds them exactly. A problem that is posed on several meshes is stored once: `shared`
names the case whose arrays or limits another case has too. manifest.json has the checksums, and the number of public
cases and laws of each profile, which are the denominators of every claim.

Judging reads these files and never runs the reference. `conformance/authoring/freeze.py` writes them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from conformance import VECTORS
from conformance.adapter import Array, Arrays
from conformance.judging.case import Case
from conformance.judging.tolerance import from_json
from conformance.protocol.package_data import VECTORS_FOLDER

__all__ = ["FOLDER", "PARTS", "VectorError", "case_from_json", "load_cases", "manifest"]

FOLDER = VECTORS_FOLDER
PARTS = ("inputs", "expected", "neighbour")  # of a case, as the names of stored arrays spell them
_REMEDY = "restore tiny_data/vectors, or run python -m conformance generate"


class VectorError(Exception):
    """The stored vectors are missing or damaged, or a recipe cannot be frozen: the suite cannot judge."""


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest of the stored vectors. Raises VectorError when it cannot be read or is of another version."""
    try:
        data: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VectorError(f"the vectors' manifest cannot be read: {error}; {_REMEDY}") from error
    if data.get("vectors") != VECTORS:
        raise VectorError(f"the vectors are of version {data.get('vectors')}, this suite wants {VECTORS}; {_REMEDY}")
    return data


def _read(folder: Path, name: str, listed: Mapping[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise VectorError(f"the vectors {name} cannot be read: {error}; {_REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != listed.get(name, {}).get("sha256"):
        raise VectorError(f"the vectors {name} are not those of the manifest; {_REMEDY}")
    return data


def case_from_json(data: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> Case:
    """The case of a stored entry; `arrays` has `inputs`, `expected` and `neighbour`."""
    counterpart = None if data["neighbour"] is None else (arrays["neighbour"], data["neighbour"])
    return Case(
        id=data["id"],
        op=data["op"],
        requirements=tuple(data["requirements"]),
        profiles=tuple(data["profiles"]),
        tolerance=from_json(data["tolerance"]),
        meaning=data["meaning"],
        inputs=arrays["inputs"],
        params=data["params"],
        expected=arrays["expected"],
        valid_counterpart=counterpart,
        targets=tuple(data["hunts"]),
        dtype=data["dtype"],
    )


def _chapter_arrays(data: bytes) -> dict[str, dict[str, dict[str, Array]]]:
    """The arrays of a chapter by case, part and name, floats as float64."""
    arrays: dict[str, dict[str, dict[str, Array]]] = {}
    for key, value in load(data).items():
        case, part, name = key.split("/", 2)
        wide = value.astype(np.float64) if value.dtype == np.float32 else value
        arrays.setdefault(case, {}).setdefault(part, {})[name] = wide
    return arrays


def _chapter_cases(entries: list[dict[str, Any]], arrays: Mapping[str, Mapping[str, Arrays]]) -> list[Case]:
    """The cases of a chapter, each with the parts that it shares with an earlier one."""
    cases: list[Case] = []
    tolerances: dict[str, Any] = {}
    for data in entries:
        name = data["id"].split("/")[1]
        shared = data.get("shared", {})
        parts: dict[str, Arrays] = {}
        for part in PARTS:
            source, kind = shared.get(part, f"{name}/{part}").split("/")
            parts[part] = arrays.get(source, {}).get(kind, {})
        tolerances[name] = data.get("tolerance") or tolerances[shared["tolerance"]]
        cases.append(case_from_json(data | {"tolerance": tolerances[name]}, parts))
    return cases


def load_cases(folder: Path = FOLDER) -> list[Case]:
    """Every frozen case, in the order of the chapters. Raises VectorError unless the files are the manifest's."""
    about = manifest(folder)
    cases: list[Case] = []
    for chapter in about["chapters"]:
        arrays = _chapter_arrays(_read(folder, f"{chapter}.safetensors", about["files"]))
        entries = json.loads(_read(folder, f"{chapter}.json", about["files"]))
        cases += _chapter_cases(entries, arrays)
    return cases
