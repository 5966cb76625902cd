"""`python -m conformance generate`: freeze the recipes into vectors, running the reference in float64, [NUM-8].

A case whose recipe asks for the same as the stored case keeps its stored values and limits. What a recipe computes with
NumPy or PyTorch differs in the last bits from one processor to the next, so "the same" allows such differences; drawn
inputs, and expected values that come from exact or 50-digit arithmetic, must be equal.
"""

import argparse
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from conformance import SPEC, VECTORS
from conformance.adapter import Adapter, Array, Arrays, Params, load_adapter
from conformance.authoring.montecarlo import monte_carlo
from conformance.cases import all_recipes, chapter_recipes
from conformance.judging.case import Case, Chain, Recipe
from conformance.judging.tolerance import Either, Exact, MonteCarlo, Tolerance, Ulp, to_json
from conformance.judging.vectors import FOLDER, PARTS, VectorError, load_cases
from conformance.laws import count_by_profile
from conformance.protocol.operations import DTYPES, LEVEL, OPERATIONS, PROFILES, round_to, to_dtype
from conformance.protocol.safe_files import write_atomically

__all__ = [
    "REFERENCE",
    "case_to_json",
    "freeze",
    "freeze_all",
    "generate",
    "kept_case",
    "same_but_for_rounding",
    "write_vectors",
]

REFERENCE = "conformance.adapters.reference:serial"  # what many ranks must return is frozen from one process
ROUNDING = 2.0**-44  # relative to the largest value: more than processors differ by, less than any change that is meant


# One recipe


def freeze(recipe: Recipe, reference: Adapter) -> Case:
    """The case of a recipe: expected values and limits from the reference where the recipe has none of its own.

    Raises VectorError for narrow inputs that bfloat16 cannot represent, and where the reference refuses.
    """
    for inputs, _ in _sides(recipe):
        for name, value in inputs.items():
            if OPERATIONS[recipe.op].is_narrow(name) and not np.array_equal(round_to(value, "bfloat16"), value, True):
                raise VectorError(
                    f"{recipe.id}: input {name} is not representable in bfloat16; "
                    "make it with conformance.judging.inputs.draw"
                )
    expected = recipe.expected or {}
    if recipe.expected is None and recipe.valid_counterpart is None:
        expected = _reference_values(recipe, reference)
    tolerance = _limits(recipe, expected, reference) if isinstance(recipe.judge, Chain) else recipe.judge
    if recipe.or_refused:
        tolerance = Either(tolerance, "the specification allows a refusal as well")  # type: ignore[arg-type]
    return Case(
        id=recipe.id,
        op=recipe.op,
        requirements=recipe.requirements,
        profiles=recipe.profiles,
        tolerance=tolerance,
        meaning=recipe.meaning,
        inputs=recipe.inputs,
        params=recipe.params,
        expected=expected,
        valid_counterpart=recipe.valid_counterpart,
        targets=recipe.targets,
        dtype=recipe.dtype,
    )


def _sides(recipe: Recipe | Case) -> list[tuple[Arrays, Params]]:
    """Inputs and params, and those of the valid counterpart where there is one."""
    sides: list[tuple[Arrays, Params]] = [(recipe.inputs, recipe.params)]
    if recipe.valid_counterpart is not None:
        sides.append(recipe.valid_counterpart)
    return sides


def _reference_values(recipe: Recipe, reference: Adapter) -> dict[str, Array]:
    inputs = to_dtype(recipe.op, recipe.inputs, "float64")
    result = reference.run(recipe.op, inputs, {**recipe.params, "dtype": "float64"}, ())
    if not isinstance(result, Mapping):
        raise VectorError(f"{recipe.id}: the reference does not support {recipe.op}")
    return dict(result)


def _limits(recipe: Recipe, expected: Arrays, reference: Adapter) -> Tolerance:
    assert isinstance(recipe.judge, Chain)
    return monte_carlo(
        reference=reference,
        op=recipe.op,
        inputs=recipe.inputs,
        params=recipe.params,
        expected=expected,
        why=recipe.judge.why,
        seed=zlib.crc32(recipe.id.encode()),
        dtypes=DTYPES if recipe.dtype is None else (recipe.dtype,),
    )


# All recipes, in several processes


def freeze_all(
    recipes: Mapping[str, Sequence[Recipe]], jobs: int, stored: Iterable[Case] = ()
) -> dict[str, list[Case]]:
    """Every case of every chapter. Those whose recipe asks for the same as a stored case keep its values and limits;
    the others are frozen by `jobs` processes. Raises VectorError.
    """
    known = {case.id: case for case in stored}
    cases = {name: [kept_case(recipe, known.get(recipe.id)) for recipe in drafts] for name, drafts in recipes.items()}
    twins = {name: _twins(drafts) for name, drafts in recipes.items()}
    places = [
        (name, at)
        for name, kept in cases.items()
        for at, case in enumerate(kept)
        if case is None and at == twins[name][at]
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
    return {name: [case for case in frozen if case is not None] for name, frozen in cases.items()}


def _freeze_at(chapter: str, at: int) -> Case:
    """Freeze one recipe, named by its place, in a process that has to make the recipe first."""
    return freeze(chapter_recipes(chapter)[at], load_adapter(REFERENCE))


def _words(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that no value or limit depends on."""
    return {name: getattr(recipe, name) for name in ("requirements", "profiles", "meaning", "targets")}


def kept_case(recipe: Recipe, case: Case | None) -> Case | None:
    """The stored case under the recipe's words if it was frozen from the same question, else None."""
    if case is None or (recipe.op, recipe.dtype) != (case.op, case.dtype) or not _same_judge(recipe, case):
        return None
    if not _same_expected(recipe, case):
        return None
    asked, stored = _sides(recipe), _sides(case)
    if len(asked) != len(stored):
        return None
    for (inputs, params), (stored_inputs, stored_params) in zip(asked, stored, strict=True):
        if not _same_inputs(recipe.op, inputs, stored_inputs) or json.loads(json.dumps(dict(params))) != stored_params:
            return None
    return replace(case, **_words(recipe))


def _same_judge(recipe: Recipe, case: Case) -> bool:
    tolerance = case.tolerance.inner if isinstance(case.tolerance, Either) else case.tolerance
    if recipe.or_refused != case.may_refuse:
        return False
    if isinstance(recipe.judge, Chain):
        return isinstance(tolerance, MonteCarlo) and tolerance.why == recipe.judge.why
    return tolerance == recipe.judge


def _same_expected(recipe: Recipe, case: Case) -> bool:
    """Compare expected values: equal where the judge allows no error to speak of, else the same but for rounding."""
    if recipe.expected is None:
        return True
    same = _same if isinstance(recipe.judge, Exact | Ulp) else same_but_for_rounding
    return same(recipe.expected, case.expected)


def _same_inputs(op: str, some: Arrays, others: Arrays) -> bool:
    """Compare inputs: narrow ones are drawn and equal, wide ones may be computed and the same but for rounding."""
    narrow = {name: value for name, value in some.items() if OPERATIONS[op].is_narrow(name)}
    return same_but_for_rounding(some, others) and _same(narrow, {name: others[name] for name in narrow})


def _same(some: Arrays, others: Arrays) -> bool:
    """True for the same names, dtypes and values; a NaN equals a NaN."""
    return set(some) == set(others) and all(
        np.asarray(value).dtype == others[name].dtype
        and np.array_equal(value, others[name], equal_nan=bool(np.issubdtype(others[name].dtype, np.floating)))
        for name, value in some.items()
    )


def same_but_for_rounding(some: Arrays, others: Arrays) -> bool:
    """True for the same names, dtypes and shapes, and values that differ in no more than their last bits.

    Integers and booleans must be equal, and so must what is not finite.
    """
    return set(some) == set(others) and all(_close(np.asarray(value), others[name]) for name, value in some.items())


def _close(some: Array, other: Array) -> bool:
    if (some.dtype, some.shape) != (other.dtype, other.shape):
        return False
    if not np.issubdtype(other.dtype, np.floating):
        return np.array_equal(some, other)
    finite = np.isfinite(other)
    scale = float(np.abs(other[finite]).max(initial=0.0))
    return np.allclose(some, other, rtol=0.0, atol=ROUNDING * scale, equal_nan=True)


# One problem on several meshes


def _twins(drafts: Sequence[Recipe]) -> list[int]:
    """For each recipe, the place of the first that poses the same problem on another mesh and so has the same values
    and limits; its own place where there is none.
    """
    twins = list(range(len(drafts)))
    first: list[int] = []
    for at, recipe in enumerate(drafts):
        if "mesh" in recipe.params and isinstance(recipe.judge, Chain):
            same = next((other for other in first if _same_problem(recipe, drafts[other])), None)
            if same is None:
                first.append(at)
            else:
                twins[at] = same
    return twins


def _same_problem(some: Recipe, other: Recipe) -> bool:
    params, other_params = ({**dict(recipe.params), "mesh": None} for recipe in (some, other))
    alike = (some.op, some.judge, some.dtype, some.or_refused) == (other.op, other.judge, other.dtype, other.or_refused)
    return alike and params == other_params and _same(some.inputs, other.inputs)


def _shared(cases: Iterable[Case]) -> dict[str, dict[str, str]]:
    """The parts of cases with a mesh that are stored already, by case and part: `other/part` for arrays, and the name
    of the other case for limits.
    """
    shared: dict[str, dict[str, str]] = {}
    earlier: list[Case] = []
    stored: list[tuple[str, str, Arrays]] = []  # operation, place, arrays
    for case in (case for case in cases if "mesh" in case.params):
        shared[case.id] = {}
        for part, arrays in _parts(case).items():
            place = next((p for op, p, known in stored if op == case.op and _same(arrays, known)), None)
            if arrays and place is not None:
                shared[case.id][part] = place
            elif arrays:
                stored.append((case.op, f"{case.id.split('/')[1]}/{part}", arrays))
        limits = (o for o in earlier if isinstance(o.tolerance, MonteCarlo) and "tolerance" not in shared[o.id])
        alike = next((other for other in limits if other.tolerance == case.tolerance), None)
        if alike is not None:
            shared[case.id]["tolerance"] = alike.id.split("/")[1]
        earlier.append(case)
    return {name: parts for name, parts in shared.items() if parts}


# Files


def case_to_json(case: Case) -> dict[str, Any]:
    """A case without its arrays: the inverse of `conformance.judging.vectors.case_from_json`."""
    return {
        "id": case.id,
        "op": case.op,
        "requirements": list(case.requirements),
        "profiles": list(case.profiles),
        "level": LEVEL[case.public],
        "dtype": case.dtype,
        "meaning": case.meaning,
        "hunts": list(case.targets),
        "params": dict(case.params),
        "neighbour": None if case.valid_counterpart is None else dict(case.valid_counterpart[1]),
        "tolerance": to_json(case.tolerance),
    }


def _parts(case: Case) -> dict[str, Arrays]:
    counterpart = case.valid_counterpart[0] if case.valid_counterpart else {}
    return dict(zip(PARTS, (case.inputs, case.expected, counterpart), strict=True))


def _stored_form(op: str, part: str, name: str, value: Array) -> Array:
    """An array as stored. Narrow inputs are bfloat16 numbers and lose nothing in float32; scalars stay scalars."""
    halved = part != "expected" and OPERATIONS[op].is_narrow(name) and np.issubdtype(value.dtype, np.floating)
    return np.array(value, np.float32 if halved else value.dtype, order="C")


def _chapter_arrays(cases: Iterable[Case], shared: Mapping[str, Mapping[str, str]]) -> bytes:
    tensors: dict[str, Array] = {}
    for case in cases:
        for part, arrays in _parts(case).items():
            if part not in shared.get(case.id, {}):
                for name, value in arrays.items():
                    tensors[f"{case.id.split('/')[1]}/{part}/{name}"] = _stored_form(case.op, part, name, value)
    return save(tensors)


def _chapter_lines(cases: Iterable[Case], shared: Mapping[str, Mapping[str, str]]) -> bytes:
    entries = [case_to_json(case) | ({"shared": shared[case.id]} if case.id in shared else {}) for case in cases]
    for data in entries:
        if "tolerance" in data.get("shared", {}):
            del data["tolerance"]
    lines = ",\n".join(json.dumps(data, sort_keys=True, allow_nan=False) for data in entries)
    return f"[\n{lines}\n]\n".encode()


def write_vectors(
    chapters: Mapping[str, Sequence[Case]], laws: Mapping[str, int], folder: Path = FOLDER
) -> dict[str, Any]:
    """Write the files of each chapter's cases and, last, the manifest, which is returned.

    laws: the number of public laws of each profile.
    """
    files: dict[str, Any] = {}
    public: Counter[str] = Counter()
    total = 0
    for chapter, cases in chapters.items():
        total += len(cases)
        public.update(profile for case in cases if case.public for profile in case.profiles)
        shared = _shared(cases)
        contents = {
            f"{chapter}.safetensors": _chapter_arrays(cases, shared),
            f"{chapter}.json": _chapter_lines(cases, shared),
        }
        for name, data in contents.items():
            write_atomically(folder / name, data)
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    about = {
        "vectors": VECTORS,
        "spec": SPEC,
        "chapters": list(chapters),
        "cases": total,
        "profiles": {name: {"cases": public[name], "laws": laws.get(name, 0)} for name in PROFILES},
        "files": files,
    }
    write_atomically(folder / "manifest.json", (json.dumps(about, indent=1) + "\n").encode())
    return about


# The command


def _stored_cases(folder: Path) -> list[Case]:
    """The cases of the folder; none where they cannot be read."""
    try:
        return load_cases(folder)
    except VectorError as error:
        print(f"starting anew: {error}", file=sys.stderr)
        return []


def generate(args: argparse.Namespace) -> int:
    """`python -m conformance generate`: write the vectors and print their checksums. Returns the exit code."""
    stored = [] if args.all else _stored_cases(args.out)
    cases = freeze_all(all_recipes(), os.cpu_count() or 1, stored)
    written = write_vectors(cases, count_by_profile(), args.out)
    for name, entry in written["files"].items():
        print(f"{name}: {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}")
    print(f"{written['cases']} cases")
    return 0
