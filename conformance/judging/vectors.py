"""Frozen vectors: every case with its inputs, expected values and limits, in files with checksums.

`python -m conformance generate` freezes the recipes, running the reference in float64, [NUM-8]; judging reads the files
and never runs the reference. Two files a chapter: `<chapter>.json` has the cases without their arrays
(schemas/case.schema.json), `<chapter>.safetensors` the arrays, named `case/inputs/x`, `case/expected/y`,
`case/neighbour/x`; narrow inputs are stored in float32, which holds them exactly. One problem on several meshes is
stored once: a case's `shared` names the case whose arrays or limits are its own too. manifest.json has the checksums
and the number of coarse cases and laws of each profile: the denominators of every claim.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from conformance import SPEC, VECTORS
from conformance.adapter import Adapter, Array, Arrays, load_adapter
from conformance.judging.case import Case, Chain, Recipe
from conformance.judging.tolerance import Either, MonteCarlo, Tolerance, from_json, to_json
from conformance.protocol.atomic import write_atomically
from conformance.protocol.operations import DTYPES, OPERATIONS, PROFILES, round_to, to_dtype

__all__ = [
    "FOLDER",
    "REFERENCE",
    "VectorError",
    "case_from_json",
    "case_to_json",
    "freeze",
    "freeze_all",
    "load_cases",
    "manifest",
    "write_vectors",
]

REFERENCE = "conformance.adapters.reference:serial"  # what many ranks must say is frozen from one
PARTS = ("inputs", "expected", "neighbour")
FOLDER = Path(__file__).resolve().parents[2] / "tiny_data" / "vectors"


class VectorError(Exception):
    """The stored vectors are missing or damaged, or a recipe cannot be frozen: the suite cannot judge."""


def freeze(recipe: Recipe, reference: Adapter) -> Case:
    """The case of a recipe: expected values and limits from the reference where the recipe has none of its own.

    Raises VectorError for narrow inputs that bfloat16 cannot represent, and where the reference refuses.
    """
    sides = [(recipe.inputs, recipe.params), *([recipe.valid_counterpart] if recipe.valid_counterpart else [])]
    for name, value in (pair for arrays, _ in sides for pair in arrays.items()):
        if OPERATIONS[recipe.op].is_narrow(name) and not np.array_equal(round_to(value, "bfloat16"), value, True):
            raise VectorError(f"{recipe.id}: input {name} is not representable in bfloat16; make it with cases.draw")
    expected: Arrays = recipe.expected or {}
    tolerance: Tolerance
    if isinstance(recipe.judge, Chain):
        from conformance.authoring.montecarlo import monte_carlo

        expected = recipe.expected or _reference_values(recipe, reference)
        dtypes = DTYPES if recipe.dtype is None else (recipe.dtype,)
        seed = zlib.crc32(recipe.id.encode())
        tolerance = monte_carlo(
            reference, recipe.op, recipe.inputs, recipe.params, expected, recipe.judge.why, seed, dtypes
        )
    else:
        tolerance = recipe.judge
        if recipe.valid_counterpart is None and recipe.expected is None:
            expected = _reference_values(recipe, reference)
    if recipe.or_refused:
        tolerance = Either(tolerance, "the specification allows a refusal as well")  # type: ignore[arg-type]
    return Case(
        recipe.id, recipe.op, recipe.requirements, recipe.profiles, tolerance, recipe.meaning, recipe.inputs,
        recipe.params, expected, recipe.valid_counterpart, recipe.targets, recipe.dtype,
    )  # fmt: skip


def _reference_values(recipe: Recipe, reference: Adapter) -> dict[str, Array]:
    result = reference.run(
        recipe.op, to_dtype(recipe.op, recipe.inputs, "float64"), {**recipe.params, "dtype": "float64"}, ()
    )
    if not isinstance(result, Mapping):
        raise VectorError(f"{recipe.id}: the reference does not support {recipe.op}")
    return dict(result)


def case_to_json(case: Case) -> dict[str, Any]:
    """A case without its arrays."""
    return {
        "id": case.id,
        "op": case.op,
        "requirements": list(case.requirements),
        "profiles": list(case.profiles),
        "level": "coarse" if case.public else "fine",
        "dtype": case.dtype,
        "meaning": case.meaning,
        "hunts": list(case.targets),
        "params": dict(case.params),
        "neighbour": None if case.valid_counterpart is None else dict(case.valid_counterpart[1]),
        "tolerance": to_json(case.tolerance),
    }


def case_from_json(data: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> Case:
    """The inverse of `case_to_json`; `arrays` has `inputs`, `expected` and `neighbour`."""
    neighbour = None if data["neighbour"] is None else (arrays["neighbour"], data["neighbour"])
    return Case(
        data["id"], data["op"], tuple(data["requirements"]), tuple(data["profiles"]), from_json(data["tolerance"]),
        data["meaning"], arrays["inputs"], data["params"], arrays["expected"], neighbour, tuple(data["hunts"]),
        data["dtype"],
    )  # fmt: skip


def manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """The manifest of the stored vectors. Raises VectorError when it cannot be read or is of another version."""
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VectorError(f"the vectors' manifest cannot be read: {error}; {_REMEDY}") from error
    if found.get("vectors") != VECTORS:
        raise VectorError(f"the vectors are of version {found.get('vectors')}, this suite wants {VECTORS}; {_REMEDY}")
    return found


_REMEDY = "restore tiny_data/vectors, or run python -m conformance generate"


def _read(folder: Path, name: str, listed: Mapping[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise VectorError(f"the vectors {name} cannot be read: {error}; {_REMEDY}") from error
    if hashlib.sha256(data).hexdigest() != listed.get(name, {}).get("sha256"):
        raise VectorError(f"the vectors {name} are not those of the manifest; {_REMEDY}")
    return data


def load_cases(folder: Path = FOLDER) -> list[Case]:
    """Every frozen case, in the order of the chapters. Raises VectorError unless the files are the manifest's."""
    listed = manifest(folder)["files"]
    cases: list[Case] = []
    for name in manifest(folder)["chapters"]:
        arrays: dict[str, dict[str, dict[str, Array]]] = {}
        for key, value in load(_read(folder, f"{name}.safetensors", listed)).items():
            case, part, tensor = key.split("/", 2)
            wide = value.astype(np.float64) if value.dtype == np.float32 else value
            arrays.setdefault(case, {}).setdefault(part, {})[tensor] = wide
        tolerances: dict[str, Any] = {}
        for data in json.loads(_read(folder, f"{name}.json", listed)):
            here, shared = data["id"].split("/")[1], data.get("shared", {})
            sources = {part: shared.get(part, f"{here}/{part}").split("/") for part in PARTS}
            parts = {part: arrays.get(case, {}).get(kind, {}) for part, (case, kind) in sources.items()}
            tolerances[here] = data["tolerance"] = data.get("tolerance") or tolerances[shared["tolerance"]]
            cases.append(case_from_json(data, parts))
    return cases


def _parts(case: Case) -> dict[str, Arrays]:
    return dict(
        zip(
            PARTS,
            (case.inputs, case.expected, case.valid_counterpart[0] if case.valid_counterpart else {}),
            strict=True,
        )
    )


def _shared(cases: Iterable[Case]) -> dict[str, dict[str, str]]:
    """Which parts of a case with a mesh are stored already, and where: case, part, `other/part`; limits by the other's
    name.
    """
    found: dict[str, dict[str, str]] = {}
    earlier: list[Case] = []
    there: list[tuple[str, str, Arrays]] = []  # operation, place, arrays
    for case in (case for case in cases if "mesh" in case.params):
        found[case.id] = {}
        for part, arrays in _parts(case).items():
            place = next((p for op, p, known in there if op == case.op and _same(arrays, known)), None)
            if arrays and place is not None:
                found[case.id][part] = place
            elif arrays:
                there.append((case.op, f"{case.id.split('/')[1]}/{part}", arrays))
        limits = (o for o in earlier if isinstance(o.tolerance, MonteCarlo) and "tolerance" not in found[o.id])
        alike = next((other for other in limits if other.tolerance == case.tolerance), None)
        if alike is not None:
            found[case.id]["tolerance"] = alike.id.split("/")[1]
        earlier.append(case)
    return {name: parts for name, parts in found.items() if parts}


def _chapter_arrays(cases: Iterable[Case], shared: Mapping[str, Mapping[str, str]]) -> bytes:
    tensors: dict[str, Array] = {}
    for case in cases:
        for part, arrays in _parts(case).items():
            if part not in shared.get(case.id, {}):
                for name, value in arrays.items():
                    tensors[f"{case.id.split('/')[1]}/{part}/{name}"] = _stored(case.op, part, name, value)
    return save(tensors)


def _chapter_lines(cases: Iterable[Case], shared: Mapping[str, Mapping[str, str]]) -> bytes:
    found = [case_to_json(case) | ({"shared": shared[case.id]} if case.id in shared else {}) for case in cases]
    for data in found:
        if "tolerance" in data.get("shared", {}):
            del data["tolerance"]
    lines = ",\n".join(json.dumps(data, sort_keys=True, allow_nan=False) for data in found)
    return f"[\n{lines}\n]\n".encode()


def _stored(op: str, part: str, name: str, value: Array) -> Array:
    """Narrow inputs are bfloat16 numbers and lose nothing in float32. Scalars stay scalars."""
    halved = part != "expected" and OPERATIONS[op].is_narrow(name) and np.issubdtype(value.dtype, np.floating)
    return np.array(value, np.float32 if halved else value.dtype, order="C")


def _freeze_at(chapter: str, at: int) -> Case:
    """One recipe by its place, for a process that has to make it first."""
    from conformance.cases import chapter_recipes

    return freeze(chapter_recipes(chapter)[at], load_adapter(REFERENCE))


def freeze_all(
    recipes: Mapping[str, Sequence[Recipe]], jobs: int, stored: Iterable[Case] = ()
) -> dict[str, list[Case]]:
    """Every case of every chapter. Those whose recipe asks for the same as a stored case keep its values and limits;
    the others are frozen by `jobs` processes. Raises VectorError.
    """
    known = {case.id: case for case in stored}
    cases = {name: [_kept(recipe, known.get(recipe.id)) for recipe in drafts] for name, drafts in recipes.items()}
    twins = {name: _twins(drafts) for name, drafts in recipes.items()}
    places = [
        (name, at)
        for name, found in cases.items()
        for at, case in enumerate(found)
        if case is None
        if at == twins[name][at]
    ]
    if places:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            for (name, at), case in zip(places, pool.map(_freeze_at, *zip(*places, strict=True)), strict=True):
                cases[name][at] = case
    for name, first in twins.items():
        for at, other in enumerate(first):
            twin = cases[name][other]
            if at != other and twin is not None:
                recipe = recipes[name][at]
                cases[name][at] = replace(twin, id=recipe.id, params=recipe.params, **_words(recipe))
    return {name: [case for case in found if case is not None] for name, found in cases.items()}


def _kept(recipe: Recipe, case: Case | None) -> Case | None:
    """The stored case under the recipe's words, if it was frozen from the same question; else None."""
    if case is None or (recipe.op, recipe.dtype) != (case.op, case.dtype) or not _same_judge(recipe, case):
        return None
    asked = [(recipe.inputs, recipe.params), *([recipe.valid_counterpart] if recipe.valid_counterpart else [])]
    stored = [(case.inputs, case.params), *([case.valid_counterpart] if case.valid_counterpart else [])]
    if len(asked) != len(stored) or (recipe.expected is not None and not _same(recipe.expected, case.expected)):
        return None
    for (inputs, params), (others, settings) in zip(asked, stored, strict=True):
        if not _same(inputs, others) or json.loads(json.dumps(dict(params))) != settings:
            return None
    return replace(case, **_words(recipe))


def _words(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in ("requirements", "profiles", "meaning", "hunts")}


def _twins(drafts: Sequence[Recipe]) -> list[int]:
    """The place of the first recipe that poses the same problem on another mesh, whose values and limits are this
    one's too; its own for any other.
    """
    found = list(range(len(drafts)))
    first: list[int] = []
    for at, recipe in enumerate(drafts):
        if "mesh" in recipe.params and isinstance(recipe.judge, Chain):
            same = next((other for other in first if _same_problem(recipe, drafts[other])), None)
            if same is None:
                first.append(at)
            else:
                found[at] = same
    return found


def _same_problem(some: Recipe, other: Recipe) -> bool:
    asked, told = ({**dict(r.params), "mesh": None} for r in (some, other))
    alike = (some.op, some.judge, some.dtype, some.or_refused) == (other.op, other.judge, other.dtype, other.or_refused)
    return alike and asked == told and _same(some.inputs, other.inputs)


def _same_judge(recipe: Recipe, case: Case) -> bool:
    tolerance = case.tolerance.inner if isinstance(case.tolerance, Either) else case.tolerance
    if recipe.or_refused != case.may_refuse:
        return False
    if isinstance(recipe.judge, Chain):
        return isinstance(tolerance, MonteCarlo) and tolerance.why == recipe.judge.why
    return tolerance == recipe.judge


def _same(some: Arrays, others: Arrays) -> bool:
    return set(some) == set(others) and all(
        np.asarray(value).dtype == others[name].dtype
        and np.array_equal(value, others[name], equal_nan=bool(np.issubdtype(others[name].dtype, np.floating)))
        for name, value in some.items()
    )


def write_vectors(
    chapters: Mapping[str, Sequence[Case]], laws: Mapping[str, int], folder: Path = FOLDER
) -> dict[str, Any]:
    """Write the files of each chapter's cases and, last, the manifest, which is returned.

    laws: the number of coarse laws of each profile.
    """
    files: dict[str, Any] = {}
    coarse: Counter[str] = Counter()
    total = 0
    for chapter, cases in chapters.items():
        total += len(cases)
        coarse.update(profile for case in cases if case.public for profile in case.profiles)
        shared = _shared(cases)
        contents = {
            f"{chapter}.safetensors": _chapter_arrays(cases, shared),
            f"{chapter}.json": _chapter_lines(cases, shared),
        }
        for name, data in contents.items():
            write_atomically(folder / name, data)
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    found = {
        "vectors": VECTORS,
        "spec": SPEC,
        "chapters": list(chapters),
        "cases": total,
        "profiles": {name: {"cases": coarse[name], "laws": laws.get(name, 0)} for name in PROFILES},
        "files": files,
    }
    write_atomically(folder / "manifest.json", (json.dumps(found, indent=1) + "\n").encode())
    return found
