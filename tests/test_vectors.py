"""Frozen vectors: the recipes give the stored values again on any processor, and nothing damaged is used.

Kernels of NumPy, BLAS and PyTorch differ in the last bits from one processor to the next. Values that they compute are
compared within what a port is allowed; drawn values and those of exact arithmetic are compared bit for bit.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conformance.__main__ import main
from conformance.adapter import Array
from conformance.adapters.reference import Reference, Serial
from conformance.authoring.freeze import (
    case_to_json,
    freeze,
    freeze_all,
    kept_case,
    same_but_for_rounding,
    write_vectors,
)
from conformance.cases import CHAPTERS, all_recipes, chapter_recipes
from conformance.judging.case import Case, Chain, Recipe
from conformance.judging.runner import measure
from conformance.judging.tolerance import Exact, MonteCarlo, MustReject
from conformance.judging.vectors import FOLDER, VectorError, case_from_json, load_cases, manifest
from conformance.laws import all_laws, count_by_profile
from conformance.protocol.operations import OPERATIONS, PROFILES, round_to, to_dtype

CASES = load_cases()
BY_ID = {case.id: case for case in CASES}
RECIPES = {recipe.id: recipe for drafts in all_recipes().values() for recipe in drafts}
VECTOR_BYTES = 5_000_000


def _equal(got: Array, stored: Array) -> bool:
    return got.dtype == stored.dtype and got.shape == stored.shape and np.array_equal(got, stored, equal_nan=_real(got))


def _real(value: Array) -> bool:
    return bool(np.issubdtype(value.dtype, np.floating))


def test_vectors_are_those_of_the_recipes() -> None:
    assert [case.id for case in CASES] == list(RECIPES)
    for case in CASES:
        recipe = RECIPES[case.id]
        assert (case.op, case.requirements, case.profiles) == (recipe.op, recipe.requirements, recipe.profiles), case.id
        assert (case.meaning, case.targets, case.dtype) == (recipe.meaning, recipe.targets, recipe.dtype), case.id
        assert json.loads(json.dumps(recipe.params)) == case.params, case.id
        assert kept_case(recipe, case) is not None, f"{case.id} would be frozen anew"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_inputs_are_made_again(chapter: str) -> None:
    """Inputs of a network are drawn and equal; matrix products among the others may differ in their last bits."""
    for recipe in chapter_recipes(chapter):
        case = BY_ID[recipe.id]
        assert same_but_for_rounding(recipe.inputs, case.inputs), recipe.id
        for name, value in recipe.inputs.items():
            if OPERATIONS[recipe.op].is_narrow(name):
                assert _equal(np.asarray(value), case.inputs[name]), f"{recipe.id}: {name}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_expected_values_are_made_again(chapter: str) -> None:
    """[NUM-8] Values given or computed now are within half of what a port is allowed; exact ones are equal."""
    for recipe in chapter_recipes(chapter):
        case = BY_ID[recipe.id]
        if isinstance(recipe.judge, MustReject):
            assert not case.expected
            continue
        values = recipe.expected
        if values is None:
            inputs = to_dtype(recipe.op, recipe.inputs, "float64")
            values = Serial().run(recipe.op, inputs, {**recipe.params, "dtype": "float64"}, ())
        again = {name: np.asarray(value) for name, value in values.items()}
        assert set(again) == set(case.expected), recipe.id
        for name, value in again.items():
            assert (value.dtype, value.shape) == (case.expected[name].dtype, case.expected[name].shape), recipe.id
        measured, _ = measure(case, again, recipe.dtype or "float64")
        assert measured is None or measured.fraction <= 0.5, f"{recipe.id}: {measured}"


@pytest.mark.parametrize("name", ["tokenisation/embed", "edm/sample", "memory/one-chunk"])
def test_limits_are_made_again(name: str) -> None:
    """[NUM-13] The seeds are stored; another processor may round differently, hence a tenth."""
    stored = BY_ID[name].tolerance
    again = freeze(RECIPES[name], Reference()).tolerance
    if not isinstance(stored, MonteCarlo):
        assert again == stored
        return
    assert isinstance(again, MonteCarlo) and (again.k, again.runs, again.seed) == (stored.k, stored.runs, stored.seed)
    for dtype, outputs in stored.limits.items():
        for output, limits in outputs.items():
            remade = again.limits[dtype][output]
            assert remade.rms == pytest.approx(limits.rms, rel=0.1)
            assert remade.largest == pytest.approx(limits.largest, rel=0.1)


def test_narrow_inputs_serve_every_dtype() -> None:
    """[NUM-14] [NUM-6] No rounding of inputs enters a comparison, and no tensor of weights is zero."""
    for case in CASES:
        for name, value in case.inputs.items():
            if OPERATIONS[case.op].is_narrow(name) and _real(value):
                np.testing.assert_array_equal(round_to(value, "bfloat16"), value, f"{case.id}: {name}")
    generic = BY_ID["denoiser/generic-weights"].inputs
    weights = {name: value for name, value in generic.items() if name.startswith("weights.")}
    assert len(weights) > 40 and all((value != 0).mean() > 0.99 for value in weights.values())


def test_manifest_has_the_denominators() -> None:
    """[CONF-2] [CONF-3] Public cases and laws are counted, internal ones are not."""
    document = manifest()
    for name in PROFILES:
        assert document["profiles"][name]["cases"] == sum(case.public and name in case.profiles for case in CASES)
        assert document["profiles"][name]["laws"] == count_by_profile().get(name, 0)
    assert document["cases"] == len(CASES) >= 150 and len(all_laws()) >= 40
    assert all(document["profiles"][name]["cases"] for name in PROFILES)


def test_vectors_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < VECTOR_BYTES


def test_case_comes_back_from_json() -> None:
    for case in CASES:
        counterpart = case.valid_counterpart[0] if case.valid_counterpart else {}
        arrays = {"inputs": case.inputs, "expected": case.expected, "neighbour": counterpart}
        back = case_from_json(json.loads(json.dumps(case_to_json(case))), arrays)
        assert back.tolerance == case.tolerance and back.params == case.params and back.id == case.id
        assert (back.valid_counterpart is None) == (case.valid_counterpart is None)


def _copy(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "vectors")
    return tmp_path / "vectors"


def test_load_cases_invalid_files(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    target = folder / "edm.safetensors"
    damaged = bytearray(target.read_bytes())
    damaged[-1] ^= 1
    target.write_bytes(damaged)
    with pytest.raises(VectorError, match=r"edm\.safetensors are not those of the manifest"):
        load_cases(folder)
    target.unlink()
    with pytest.raises(VectorError, match="cannot be read"):
        load_cases(folder)
    (folder / "manifest.json").write_text('{"vectors": "0.0"}')
    with pytest.raises(VectorError, match=r"version 0\.0"):
        manifest(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(VectorError, match="manifest cannot be read"):
        manifest(folder)


def test_main_damaged_vectors_are_the_suites_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("conformance.commands.judge.load_cases", lambda: load_cases(tmp_path / "nowhere"))
    assert main(["smoke"]) == 2
    assert "restore tiny_data/vectors" in capsys.readouterr().err


def test_write_vectors_leaves_nothing_half_written(tmp_path: Path) -> None:
    chosen = [BY_ID["tokenisation/order"], BY_ID["tokenisation/refuses-rows"]]
    written = write_vectors({"tokenisation": chosen}, {"core": 3}, tmp_path)
    assert written["cases"] == 2 and written["profiles"]["core"] == {"cases": 0, "laws": 3}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]
    back = load_cases(tmp_path)
    assert [case.id for case in back] == [case.id for case in chosen]
    np.testing.assert_array_equal(back[0].expected["tokens"], chosen[0].expected["tokens"])


def _recipe(**changes: object) -> Recipe:
    recipe = Recipe("tokenisation/test", "patchify", ("TOK-1",), ("core",), Exact("copies"), "a recipe of the tests")
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    return replace(replace(recipe, inputs={"x": x}, params={"patch": [2, 2]}), **changes)  # type: ignore[arg-type]


def test_freeze_takes_the_references_values_and_only_them_where_none_are_given() -> None:
    frozen: Case = freeze(_recipe(), Reference())
    assert frozen.expected["tokens"].shape == (1, 4, 4)
    given = {"tokens": np.zeros((1, 4, 4))}
    assert freeze(_recipe(expected=given), Reference()).expected is given
    chain = freeze(_recipe(judge=Chain("a copy")), Reference())
    assert isinstance(chain.tolerance, MonteCarlo) and set(chain.tolerance.limits) == {"float64", "float32", "bfloat16"}
    fixed = freeze(_recipe(judge=Chain("a copy"), dtype="float32"), Reference())
    assert isinstance(fixed.tolerance, MonteCarlo) and set(fixed.tolerance.limits) == {"float32"}
    assert freeze(_recipe(or_refused=True), Reference()).may_refuse


def test_freeze_invalid_inputs() -> None:
    with pytest.raises(VectorError, match="not representable in bfloat16"):
        freeze(_recipe(inputs={"x": np.full((1, 1, 4, 4), 0.1)}), Reference())


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "Order"},
        {"requirements": ()},
        {"requirements": ("[EDM-5]",)},
        {"op": "no-such-operation"},
        {"profiles": ()},
        {"profiles": ("everything",)},
        {"dtype": "float16"},
        {"judge": MustReject("without a valid counterpart")},
        {"valid_counterpart": ({}, {})},
        {"judge": MustReject("with values"), "valid_counterpart": ({}, {}), "expected": {}},
        {"judge": MustReject("or not"), "valid_counterpart": ({}, {}), "or_refused": True},
    ],
)
def test_recipe_invalid_parts(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"tokenisation/test|a case id"):
        _recipe(**changes)


def _stored(**changes: object) -> tuple[Recipe, Case]:
    """A recipe, and a stored case of it whose expected values are marked, so that freezing again would show."""
    recipe = _recipe(judge=Chain("a copy"), expected={"tokens": np.full((1, 4, 4), 3.0)}, **changes)
    return recipe, freeze(recipe, Reference())


def _shifted(arrays: Mapping[str, Array], by: float) -> dict[str, Array]:
    return {name: value * (1 + by) for name, value in arrays.items()}


def test_freeze_all_keeps_values_that_another_processor_rounds_otherwise() -> None:
    recipe, case = _stored()
    assert recipe.expected is not None
    elsewhere = replace(recipe, expected=_shifted(recipe.expected, 2.0**-52), meaning="in other words")
    (kept,) = freeze_all({"tokenisation": [elsewhere]}, 1, [case])["tokenisation"]
    assert kept == replace(case, meaning="in other words")
    assert kept.expected is case.expected and kept.inputs is case.inputs


def test_kept_case_changed_recipe() -> None:
    """A stored case is not kept for a recipe whose question, or whose exact answer, is another."""
    recipe, case = _stored()
    exact = _recipe(judge=Exact("copies"), expected={"tokens": np.full((1, 4, 4), 3.0)})
    assert recipe.expected is not None and exact.expected is not None
    changed = [
        (replace(recipe, expected=_shifted(recipe.expected, 1e-10)), case),
        (replace(exact, expected=_shifted(exact.expected, 2.0**-52)), freeze(exact, Reference())),
        (replace(recipe, inputs=_shifted(recipe.inputs, 2.0**-52)), case),
        (replace(recipe, params={"patch": [4, 4]}), case),
        (replace(recipe, judge=Chain("another chain")), case),
        (replace(recipe, dtype="float32"), case),
    ]
    assert kept_case(recipe, case) is not None and kept_case(exact, freeze(exact, Reference())) is not None
    for other, stored in changed:
        assert kept_case(other, stored) is None, other
    assert kept_case(recipe, None) is None


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (np.array([1.0, -4.0 - 2.0**-50]), True),
        (np.array([1.0, -4.0 - 2.0**-30]), False),
        (np.array([np.nan, -4.0]), False),
        (np.array([1.0, -4.0], np.float32), False),
        (np.array([[1.0, -4.0]]), False),
    ],
)
def test_same_but_for_rounding_values(value: Array, same: bool) -> None:
    stored = {"x": np.array([1.0, -4.0])}
    assert same_but_for_rounding({"x": value}, stored) is same
    assert not same_but_for_rounding({"y": stored["x"]}, stored)
    assert same_but_for_rounding({"x": np.array([np.nan, 2.0])}, {"x": np.array([np.nan, 2.0])})
    assert not same_but_for_rounding({"n": np.array([1, 2])}, {"n": np.array([1, 3])})
