"""The conformance suite: the reference passes, wrong ports are caught where they are wrong, bad manners survived."""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import conformance
from conformance.__main__ import main
from conformance.adapter import AdapterError, Info, Unsupported, describe, load_adapter
from conformance.adapters.storm_ref import OPERATIONS, Reference
from conformance.case import Case
from conformance.cases import CHAPTERS, all_cases, all_recipes
from conformance.cases.denoiser import GENERIC, RECTANGLE, denoise, storm_shapes
from conformance.mutants.wrong_port import FAULTS, WrongPort
from conformance.report import print_report, requirement_text, write_result
from conformance.runner import Outcome, exit_code, judge, run_cases
from conformance.tolerance import EPS, Bound, Exact, MustReject, Ulp, chain_bound
from conformance.vectors import FOLDER, VectorError, load_vector, manifest, write_vectors
from storm_ref import attention, edm, memory
from storm_ref.config import StormConfig
from storm_ref.denoiser import Storm

ROOT = Path(__file__).resolve().parents[1]
CASES = all_cases()
BY_ID = {case.id: case for case in CASES}
ORDER = BY_ID["tokenisation/order"]
GATE = BY_ID["attention/gate"]
REFUSED = BY_ID["edm/refuses-zero-sigma"]


class Port:
    """The reference, its results passed through `change(op, result)`."""

    def __init__(self, change: Callable[[str, dict[str, Any]], Any] = lambda op, result: result) -> None:
        self.change = change

    def describe(self) -> Info:
        return replace(Reference().describe(), name="port [red]under[/red] test")

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any]) -> Any:
        return self.change(op, dict(Reference().run(op, inputs, params)))


class Gateless(Port):
    """Supports everything but the gate."""

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any]) -> Any:
        return Unsupported("no gate here") if op == "gate" else super().run(op, inputs, params)


class Undescribed(Port):
    """Cannot say who it is."""

    def describe(self) -> Any:
        return {"name": "a dict"}


class Numbered(Port):
    """Gives a number where a name belongs."""

    def describe(self) -> Info:
        return replace(Reference().describe(), version=3)  # type: ignore[arg-type]


class Refuser(Port):
    """Refuses everything."""

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any]) -> Any:
        raise ValueError("I do not like this")


not_an_adapter = 3


def broken_factory() -> Port:
    raise ZeroDivisionError("no licence left")


def verdict(port: Any, case: Case) -> tuple[str, str]:
    outcome = judge(port, port.describe(), case)
    return outcome.verdict, outcome.detail


# The reference and the command.


def test_main_reference_conforms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert "CONFORMS" in printed and "DOES NOT" not in printed
    assert all(chapter.__name__.split(".")[-1] in printed for chapter in CHAPTERS)
    assert [case["id"] for case in result["cases"]] == [case.id for case in CASES]
    assert {case["verdict"] for case in result["cases"]} == {"pass"}
    assert result["exit"] == 0 and result["adapter"]["name"] == "storm_ref" and result["spec"] == conformance.SPEC
    assert result["vectors"] == {name: entry["sha256"] for name, entry in manifest()["files"].items()}
    assert sum(sum(counts.values()) for counts in result["chapters"].values()) == len(CASES)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_main_wrong_port_explains_its_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--adapter", "conformance.mutants.wrong_port:adapter", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    sentence = requirement_text("ATT-4")
    assert sentence and f"[ATT-4] {sentence}" in printed
    assert "FAIL attention/gate (gate)" in printed and GATE.meaning in printed and "limit" in printed
    failed = next(c for c in json.loads((tmp_path / "result.json").read_text())["cases"] if c["id"] == "attention/gate")
    assert failed["verdict"] == "fail" and failed["measured"]["error"] > failed["measured"]["limit"] > 0


def test_main_unsupported_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter", f"{__name__}:Gateless", "--out", str(tmp_path)]) == 3
    printed = capsys.readouterr().out
    assert "INCOMPLETE" in printed and "unsupported: attention/gate: no gate here" in printed


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("nonsense", "MODULE:OBJECT"),
        (":adapter", "MODULE:OBJECT"),
        ("no_such_module:adapter", "no_such_module"),
        (f"{__name__}:no_such_object", "no_such_object"),
        (f"{__name__}:not_an_adapter", "describe() and run"),
        (f"{__name__}:broken_factory", "no licence left"),
        (f"{__name__}:Undescribed", "conformance.adapter.Info"),
        (f"{__name__}:Numbered", "must be strings"),
    ],
)
def test_main_invalid_adapter(adapter: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter", adapter, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_main_invalid_usage() -> None:
    assert main(["--no-such-option"]) == 2
    assert main(["--help"]) == 0


def test_main_own_failure_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[Case]:
        raise KeyError("a case that cannot be made")

    monkeypatch.setattr("conformance.__main__.all_cases", broken)
    assert main([]) == 2
    assert "says nothing about the port" in capsys.readouterr().err


def test_main_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.id for case in CASES]


def test_load_adapter_accepts_instance_class_and_factory() -> None:
    for name in (
        "conformance.adapters.storm_ref:adapter",
        "conformance.adapters.storm_ref:Reference",
        f"{__name__}:Port",
    ):
        assert describe(load_adapter(name)).ops == frozenset(OPERATIONS)
    with pytest.raises(AdapterError, match="describe"):
        describe(Undescribed())


# Wrong ports are caught, honest ones are not.


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_port_is_caught(name: str) -> None:
    port = FAULTS[name]
    chapter = BY_ID[port.caught_by].chapter
    outcomes = run_cases(port, port.describe(), [case for case in CASES if case.chapter == chapter])
    assert exit_code(outcomes) == 1
    assert port.caught_by in {outcome.case.id for outcome in outcomes if outcome.verdict == "fail"}


def test_wrong_ports_cover_every_chapter() -> None:
    assert {port.caught_by.split("/")[0] for port in FAULTS.values()} == {case.chapter for case in CASES}


def _attention_in_one_piece(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    return attention.attention_reference(q, k, v, mask)


def _solved_gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Any:
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        system = covariance + sigma[:, None, None] ** 2 * torch.eye(len(mean), dtype=torch.float64)
        return mean + torch.linalg.solve(system, (x - mean)[..., None])[..., 0] @ covariance

    return denoise


def _frames_one_by_one(state: Any, score: torch.Tensor, value: torch.Tensor) -> Any:
    for k in reversed(range(score.shape[1])):
        state = _memory_update(state, score[:, k : k + 1], value[:, k : k + 1])
    return state


_memory_update = memory.memory_update


def _layer_norm_by_hand(x: torch.Tensor) -> torch.Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) * (((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** -0.5


@pytest.mark.parametrize(
    "port",
    [
        WrongPort("attention with stored scores", "", ((attention, "attention", _attention_in_one_piece),)),
        WrongPort("Gaussian by a solve", "", ((edm, "gaussian_denoiser", _solved_gaussian),)),
        WrongPort("frames one by one, backwards", "", ((memory, "memory_update", _frames_one_by_one),)),
        WrongPort("layer norm by hand", "", ((attention, "layer_norm", _layer_norm_by_hand),)),
    ],
    ids=lambda port: port.fault,
)
def test_honest_variant_conforms(port: WrongPort) -> None:
    outcomes = run_cases(port, port.describe(), CASES)
    assert [(o.case.id, o.detail) for o in outcomes if o.verdict != "pass"] == []


# Ports that misbehave.


class Unreadable(dict[str, Any]):
    """A mapping that breaks when it is read."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("torn")


def _raise(error: BaseException) -> Any:
    raise error


class Mute(Exception):
    """Cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("change", "expected", "says"),
    [
        (lambda op, r: _raise(RuntimeError("boom \x1b[31m")), "error", "RuntimeError: boom  [31m"),
        (lambda op, r: _raise(SystemExit(5)), "error", "SystemExit: 5"),
        (lambda op, r: _raise(Mute()), "error", "cannot be printed"),
        (lambda op, r: _raise(MemoryError()), "error", "MemoryError"),
        (lambda op, r: _raise(ValueError("no")), "error", "ValueError: no"),
        (lambda op, r: _raise(Unsupported("later")), "unsupported", "later"),
        (lambda op, r: Unsupported(), "unsupported", "gate"),
        (lambda op, r: None, "fail", "NoneType instead of a dict"),
        (lambda op, r: {}, "fail", "gamma is missing; outputs there: none"),
        (lambda op, r: {"gama": r["gamma"]}, "fail", "outputs there: gama"),
        (lambda op, r: {"gamma": r["gamma"].tolist()}, "fail", "is list, not a NumPy array"),
        (lambda op, r: {"gamma": r["gamma"].T[:, :3]}, "fail", "shape [4, 3], expected [4, 4]"),
        (lambda op, r: {"gamma": r["gamma"].astype(np.float32)}, "fail", "dtype float32, expected float64"),
        (lambda op, r: {"gamma": r["gamma"].astype(object)}, "fail", "dtype object"),
        (lambda op, r: {"gamma": np.where(r["gamma"] > 0.9, np.nan, r["gamma"])}, "fail", "not finite"),
        (lambda op, r: {"gamma": r["gamma"] + np.inf}, "fail", "inf at [0, 0]"),
        (lambda op, r: Unreadable(r), "error", "RuntimeError: torn"),
        (lambda op, r: {"gamma": r["gamma"] + 1e-13}, "fail", "gamma is off"),
        (lambda op, r: {"gamma": np.full((4, 4), 1.7e308)}, "fail", "gamma is off"),
        (lambda op, r: r | {"extra": None}, "pass", ""),
    ],
)
def test_judge_names_what_is_wrong(change: Callable[[str, dict[str, Any]], Any], expected: str, says: str) -> None:
    got, detail = verdict(Port(change), GATE)
    assert got == expected and says in detail


def test_judge_exact_counts_and_places_differences() -> None:
    def swap(op: str, result: dict[str, Any]) -> dict[str, Any]:
        tokens = result["tokens"].copy()
        tokens[1, [2, 3]] = tokens[1, [3, 2]]
        return {"tokens": tokens}

    outcome = judge(Port(swap), Port().describe(), ORDER)
    assert outcome.verdict == "fail" and outcome.measured is not None
    assert outcome.measured.error == 2 * 18 and outcome.measured.where == (1, 2, 0)


def test_judge_sees_every_output() -> None:
    case = BY_ID["edm/coefficients"]
    for name in case.expected:
        port = Port(lambda op, result, name=name: result | {name: result[name] * (1 + 1e-14)})
        outcome = judge(port, port.describe(), case)
        assert outcome.verdict == "fail" and outcome.detail.startswith(f"{name} is off")


def test_result_is_json_whatever_the_error(tmp_path: Path) -> None:
    """An expected zero has the smallest spacing there is: the error in ULP overflows, and JSON knows no infinity."""
    port = Port(lambda op, result: {"sigmas": result["sigmas"] + 1.0})
    outcomes = run_cases(port, port.describe(), [BY_ID["edm/schedule-default"]])
    write_result(tmp_path / "deep" / "result.json", port.describe(), outcomes)
    measured = json.loads((tmp_path / "deep" / "result.json").read_text())["cases"][0]["measured"]
    assert measured == {"error": None, "limit": 64, "unit": "ULP", "where": [18]}


def test_exit_code_fails_before_it_is_incomplete() -> None:
    def outcome(verdict: str) -> Outcome:
        return Outcome(GATE, verdict, "")

    assert [exit_code([outcome("pass"), outcome(v)]) for v in ("pass", "fail", "error", "unsupported")] == [0, 1, 1, 3]
    assert exit_code([outcome("unsupported"), outcome("error")]) == 1


def test_judge_rejection_wants_a_value_error_with_a_reason() -> None:
    def refuse(error: Exception) -> Any:
        class Own(Port):
            def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any]) -> Any:
                return _raise(error) if not (inputs["sigma"] > 0).all() else super().run(op, inputs, params)

        return Own()

    assert verdict(refuse(ValueError("sigma is 0")), REFUSED) == ("pass", "refused: sigma is 0")
    assert verdict(refuse(ValueError()), REFUSED)[0] == "fail"
    assert verdict(refuse(RuntimeError("sigma is 0")), REFUSED)[0] == "error"
    assert verdict(refuse(Unsupported("zero")), REFUSED)[0] == "unsupported"
    accepting = FAULTS["crop_in_silence"]
    assert judge(accepting, accepting.describe(), BY_ID["tokenisation/refuses-rows"]).verdict == "fail"


def test_judge_refusing_everything_passes_nothing() -> None:
    outcomes = run_cases(Refuser(), Refuser().describe(), CASES)
    assert {outcome.verdict for outcome in outcomes} == {"error"}


def test_judge_unclaimed_operation_is_not_called() -> None:
    info = replace(Refuser().describe(), ops=frozenset({"crps"}))
    assert judge(Refuser(), info, GATE).verdict == "unsupported"
    assert exit_code([judge(Refuser(), info, GATE)]) == 3


def test_judge_port_cannot_spoil_the_cases() -> None:
    class Vandal(Port):
        def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any]) -> Any:
            result = {name: np.array(value) for name, value in Reference().run(op, inputs, params).items()}
            for value in inputs.values():
                value[...] = 0
            params.clear()
            return result

    port = Vandal()
    assert exit_code(run_cases(port, port.describe(), CASES)) == 0
    assert exit_code(run_cases(port, port.describe(), CASES)) == 0


def test_print_report_shows_the_ports_strings_as_text(tmp_path: Path) -> None:
    out = StringIO()
    port = Port(lambda op, result: _raise(RuntimeError("[bold]loud[/bold]")))
    outcomes = run_cases(port, port.describe(), [GATE])
    print_report(Console(file=out, force_terminal=True, width=200), port.describe(), outcomes, tmp_path)
    assert "[bold]loud[/bold]" in out.getvalue() and "port [red]under[/red] test" in out.getvalue()


# Tolerances and cases.


def test_exact_ignores_only_the_sign_of_zero() -> None:
    assert Exact("").measure(np.array([-0.0, 1.0]), np.array([0.0, 1.0])).passed
    assert not Exact("").measure(np.array([0.0, np.nextafter(1.0, 2)]), np.array([0.0, 1.0])).passed


def test_ulp_counts_spacings_of_the_expected_value() -> None:
    expected = np.array([1.0, 1e300, 3e-300])
    for steps in (0, 1, 3, 4):
        got = expected + steps * np.spacing(expected)
        assert Ulp(3, "").measure(got, expected).error == steps
        assert Ulp(3, "").measure(got, expected).passed == (steps <= 3)
    assert not Ulp(3, "").measure(np.array([1e-300]), np.array([0.0])).passed


def test_bound_is_k_eps_scale() -> None:
    expected = np.array([4.0, 0.0])
    measured = Bound(10, "").measure(np.array([4.0, 30 * EPS]), expected)
    assert measured.passed and measured.limit == 40 * EPS and measured.where == (1,)
    assert not Bound(10, "").measure(np.array([4.0, 50 * EPS]), expected).passed
    assert Bound(10, "", scale=8.0).measure(np.array([4.0, 50 * EPS]), expected).passed


def test_bound_rejects_every_nonzero_where_nothing_is_expected() -> None:
    assert not Bound(10, "").measure(np.array([1e-300]), np.array([0.0])).passed


def test_chain_bound_measures_the_amplification() -> None:
    """[NUM-3] x + a - a loses what a pushes out: k grows with a, and a float32 error of zero still leaves k = 16."""
    rng = np.random.default_rng(0)
    x = {"x": rng.standard_normal(1000)}
    ks = [
        chain_bound(lambda i, a=a: (i["x"] + i["x"].dtype.type(a)) - i["x"].dtype.type(a), x, "").k for a in (10, 1000)
    ]
    assert 50 < ks[1] / ks[0] < 200
    assert chain_bound(lambda i: i["x"], x, "").k == 16
    with pytest.raises(TypeError, match="dtype"):
        chain_bound(lambda i: i["x"].astype(np.float64), x, "")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "Order"},
        {"requirements": ()},
        {"requirements": ("[EDM-5]",)},
        {"expected": {}},
        {"tolerance": MustReject("both expected and to be rejected")},
        {"neighbour": ({}, {})},
    ],
)
def test_case_invalid_parts(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"case|requirements"):
        replace(ORDER, **change)


def test_cases_are_complete() -> None:
    """Distinct ids, at least two a chapter, refusals, JSON params, documented operations, requirements with a text."""
    readme = (ROOT / "conformance" / "README.md").read_text()
    assert len(BY_ID) == len(CASES)
    for chapter in CHAPTERS:
        own = [case for case in CASES if case.chapter == chapter.__name__.split(".")[-1]]
        assert len(own) >= 2 and any(isinstance(case.tolerance, MustReject) for case in own)
    for case in CASES:
        assert json.loads(json.dumps(dict(case.params))) == dict(case.params), case.id
        assert f"| `{case.op}` |" in readme and case.op in OPERATIONS
        assert all(requirement_text(requirement) for requirement in case.requirements), case.id
        assert case.meaning and case.tolerance.why
        assert all(np.isfinite(value).all() for value in case.expected.values())
    assert {case.op for case in CASES} == set(OPERATIONS)


def test_readme_example_is_a_port() -> None:
    code = (ROOT / "conformance" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    port = names["adapter"]
    outcomes = run_cases(port, describe(port), [GATE, BY_ID["edm/schedule-default"], BY_ID["verification/crps"]])
    assert [outcome.verdict for outcome in outcomes] == ["pass", "unsupported", "unsupported"]


def test_cases_repeat() -> None:
    """Made twice, every array is the same: nothing is drawn from a hidden generator."""
    for first, second in zip(CASES, all_cases(), strict=True):
        for name in ("inputs", "expected"):
            one, other = getattr(first, name), getattr(second, name)
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)


def test_suite_imports_the_reference_only_where_it_may() -> None:
    allowed = {"adapters/storm_ref.py", "mutants/wrong_port.py"}
    folder = ROOT / "conformance"
    importing = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("storm_ref", "torch") for name in names):
                importing.add(path.relative_to(folder).as_posix())
    assert importing == allowed


@pytest.mark.parametrize("config", [GENERIC["config"], RECTANGLE["config"]])
def test_storm_shapes_are_the_state_dict(config: Mapping[str, Any]) -> None:
    network = Storm(StormConfig(**(dict(config) | {"patch": tuple(config["patch"])})))
    assert storm_shapes(config) == {name: tuple(value.shape) for name, value in network.state_dict().items()}


# Frozen vectors.


def test_vectors_are_what_the_reference_gives_now(tmp_path: Path) -> None:
    """[NUM-8] Made again they have the same inputs, and expected values within the case's own bound."""
    made = write_vectors(all_recipes(), Reference(), tmp_path)
    stored = manifest()
    assert made["files"].keys() == stored["files"].keys()
    assert {p.name for p in FOLDER.iterdir()} == {*stored["files"], "manifest.json"}
    assert sum(entry["bytes"] for entry in stored["files"].values()) < 1_000_000
    for recipe in all_recipes():
        (old_inputs, old), (inputs, expected) = load_vector(recipe.id), load_vector(recipe.id, tmp_path)
        assert old_inputs.keys() == inputs.keys() and old.keys() == expected.keys()
        assert all(np.array_equal(old_inputs[name], inputs[name]) for name in inputs)
        assert all(recipe.tolerance(inputs).measure(old[name], expected[name]).passed for name in expected)


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.id)
def test_vectors_agree_with_the_equations(recipe: Any) -> None:
    """[NET-1] to [NET-5]: the frozen values against NumPy, which shares no code with the reference."""
    inputs, expected = load_vector(recipe.id)
    own = denoise(inputs, recipe.params["config"], recipe.params["periodic"])
    assert recipe.tolerance(inputs).measure(own, expected["denoised"]).passed


def test_load_vector_invalid_files(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="generate"):
        load_vector("denoiser/windowed", tmp_path)
    write_vectors(all_recipes()[1:], Reference(), tmp_path)
    load_vector("denoiser/windowed", tmp_path)
    path = tmp_path / "denoiser-windowed.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VectorError, match="not the one in the manifest"):
        load_vector("denoiser/windowed", tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(VectorError, match="manifest"):
        load_vector("denoiser/windowed", tmp_path)


def test_main_generate_writes_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--out", str(tmp_path)]) == 0
    assert "denoiser-windowed.safetensors" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / "manifest.json").exists()


# Requirement texts.


def test_requirement_text_joins_its_lines_and_stops(tmp_path: Path) -> None:
    (tmp_path / "01.md").write_text(
        "# T\n**[AB-1]** first\nline\n\nno\n- **[AB-2]** item\n  more\n- other\n**[AB-3]** x\n**[AB-4]** y\n"
    )
    texts = {i: requirement_text(f"AB-{i}", tmp_path) for i in range(1, 6)}
    assert texts == {1: "first line", 2: "item more", 3: "x", 4: "y", 5: None}


def test_requirement_text_without_a_specification(tmp_path: Path) -> None:
    assert requirement_text("EDM-5", tmp_path / "absent") is None
