"""The suite's frame: the command, judging, profiles, exit codes; bad manners in the same process are survived."""

import ast
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import conformance
from conformance.__main__ import main
from conformance.adapter import AdapterError, Info, PortFault, Unsupported, describe, load_adapter
from conformance.adapters.reference import OPERATIONS, Reference
from conformance.judging import law as laws_module
from conformance.judging.case import Case
from conformance.judging.law import Broken, Draw, Law, arrays, check_close, check_equal
from conformance.judging.requirements import requirements
from conformance.judging.result import read_result, result, write_result
from conformance.judging.runner import Outcome, ProfileResult, Run, exit_code, judge, judge_law, run_suite, select
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.ports.checked import Port
from conformance.protocol.operations import OPERATIONS as TABLE
from conformance.protocol.operations import PROFILES, UNIT, ancestors, round_to, to_dtype
from conformance.report import print_report

ROOT = Path(__file__).resolve().parents[1]
CASES = load_cases()
BY_ID = {case.id: case for case in CASES}
ORDER = BY_ID["tokenisation/order"]
GATE = BY_ID["attention/gate"]
REFUSED = BY_ID["edm/coefficients-refuse-zero"]

Change = Callable[[str, dict[str, Any]], Any]

pytestmark = pytest.mark.usefixtures("unchecked")  # what the reference refuses, not what its annotations do


class Altered:
    """The reference, its results passed through `change(op, result)`."""

    def __init__(self, change: Change = lambda op, result: result) -> None:
        self.change = change

    def describe(self) -> Info:
        return replace(Reference().describe(), name="port [red]under[/red] test")

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
        return self.change(op, dict(Reference().run(op, inputs, params, probes)))


class Undescribed(Altered):
    """Cannot say who it is."""

    def describe(self) -> Any:
        return {"name": "a dict"}


class Numbered(Altered):
    """Gives a number where a name belongs."""

    def describe(self) -> Info:
        return replace(Reference().describe(), version=3)  # type: ignore[arg-type]


class Refuser(Altered):
    """Refuses everything."""

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
        raise ValueError("I do not like this")


class Gateless(Altered):
    """Supports everything of chapter 3 but the gate, of which it says so only when asked."""

    def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
        return Unsupported("no gate here") if op == "gate" else super().run(op, inputs, params, probes)


class Tieless(Altered):
    """Supports all scores but the ranks."""

    def describe(self) -> Info:
        info = super().describe()
        return replace(info, ops=info.ops - {"rank_histogram"}, profiles=("scores",))


not_an_adapter = 3


def broken_factory() -> Altered:
    raise ZeroDivisionError("no licence left")


def port_of(adapter: Any, dtype: str = "float64") -> Port:
    return Port(adapter, adapter.describe(), dtype)


def verdict(adapter: Any, case: Case) -> tuple[str, str]:
    outcome = judge(port_of(adapter), case)
    return outcome.verdict, outcome.detail


def _raise(error: BaseException) -> Any:
    raise error


# The command.


@pytest.mark.slow
def test_main_reference_conforms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[CONF-1] [CONF-2] The claim names profile, dtype and versions; the denominators are the manifest's."""
    assert main(["--out", str(tmp_path), "--profile", "edm", "--profile", "tiling"]) == 0
    printed = capsys.readouterr().out
    data = read_result(tmp_path / "result.json")
    assert "CONFORMS" in printed and "DOES NOT" not in printed
    assert list(data["profiles"]) == ["edm", "tiling"] and data["dtype"] == "float64"
    assert data["spec"] == conformance.SPEC and data["vectors"] == conformance.VECTORS
    counts = json.loads((ROOT / "tiny_data/vectors/manifest.json").read_text())["profiles"]
    for name, profile in data["profiles"].items():
        assert profile["conforms"] and profile["expected"] == profile["passed"] > 10
        assert profile["expected"] == counts[name]["cases"] + counts[name]["laws"]


@pytest.mark.slow
def test_main_wrong_port_explains_its_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", "conformance.mutants:gate_reversed", "--in-process", "--profile", "core"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL attention/gate" in printed and "[ATT-4] The noise gate MUST be" in printed and "Likely:" in printed
    assert "DOES NOT CONFORM" in printed


def test_main_unsupported_is_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[CONF-2] What a claimed profile lacks leaves it not conforming, though nothing fails."""
    assert main(["--adapter", f"{__name__}:Tieless", "--in-process", "--out", str(tmp_path)]) == 3
    scores = read_result(tmp_path / "result.json")["profiles"]["scores"]
    assert scores["unsupported"] > 0 and scores["failed"] == 0 and not scores["conforms"]
    assert scores["expected"] == scores["passed"] + scores["unsupported"]
    assert "INCOMPLETE" in capsys.readouterr().out


@pytest.mark.slow
def test_main_internal_operation_may_be_missing(tmp_path: Path) -> None:
    """[CONF-3] A port without a gate of its own conforms; one with a wrong gate does not."""
    words = ["--in-process", "--profile", "core", "--out", str(tmp_path)]
    assert main(["--adapter", f"{__name__}:Gateless", *words]) == 0
    assert main(["--adapter", "conformance.mutants:gate_reversed", *words]) == 1


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("nowhere", "MODULE:OBJECT"),
        ("no_such_module:adapter", "no_such_module"),
        (f"{__name__}:absent", "absent"),
        (f"{__name__}:not_an_adapter", "describe() and run(op, inputs, params, probes)"),
        (f"{__name__}:broken_factory", "no licence left"),
        (f"{__name__}:Undescribed", "must return conformance.adapter.Info"),
        (f"{__name__}:Numbered", "must be strings"),
    ],
)
def test_main_invalid_adapter(adapter: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter", adapter, "--in-process", "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--no-such-option"], ["run", "--profile", "all"], ["explain"], ["--dtype", "half"]])
def test_main_invalid_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage" in capsys.readouterr().err


def test_main_own_failure_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("conformance.commands.judge.load_cases", lambda: 1 / 0)
    assert main(["smoke"]) == 2
    assert "says nothing about the port" in capsys.readouterr().err


def test_main_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.id in printed for case in CASES)


def test_no_option_changes_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """[CONF-7] Neither an option nor an environment variable speaks of tolerance."""
    assert main(["run", "--help"]) == 0
    assert not any(word in capsys.readouterr().out.lower() for word in ("toler", "limit", "rtol", "atol"))
    for path in (ROOT / "conformance").rglob("*.py"):
        if path.name not in ("threads.py", "process.py", "trial.py", "ranks.py"):  # of threads and processes
            assert "environ" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("conformance.adapters.storm_ref:adapter", "conformance.adapters.reference:adapter"),
        ("conformance.adapters.parallel:launched", "conformance.adapters.reference_ranks:launched"),
        ("conformance.adapters.numpy_port:adapter", "conformance.adapters.numpy.port:adapter"),
    ],
)
def test_load_adapter_invalid_former_name(former: str, now: str) -> None:
    with pytest.raises(AdapterError, match=f"has moved: the adapter is now {now}$"):
        load_adapter(former)
    assert describe(load_adapter(now)).ops


def test_load_adapter_accepts_instance_class_and_factory() -> None:
    for name in ("Altered", "Refuser"):
        assert describe(load_adapter(f"{__name__}:{name}")).ops == frozenset(OPERATIONS)
    assert load_adapter("conformance.adapters.reference:adapter") is not None
    with pytest.raises(AdapterError, match="no licence"):
        load_adapter(f"{__name__}:broken_factory")


# Judging.


class Unreadable(dict[str, Any]):
    """A mapping that breaks when it is read."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("torn")


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
        (lambda op, r: _raise(PortFault("crash", "it died of signal 11")), "error", "crash: it died of signal 11"),
        (lambda op, r: _raise(ValueError("no")), "error", "refused a valid input: no"),
        (lambda op, r: _raise(Unsupported("later")), "unsupported", "later"),
        (lambda op, r: Unsupported(), "unsupported", "gate"),
        (lambda op, r: None, "fail", "NoneType instead of a dict"),
        (lambda op, r: {}, "fail", "gamma is missing; outputs there: none"),
        (lambda op, r: {"gama": r["gamma"]}, "fail", "outputs there: gama"),
        (lambda op, r: {"gamma": r["gamma"].tolist()}, "fail", "is list, not a NumPy array"),
        (lambda op, r: {"gamma": r["gamma"][:, :3]}, "fail", "shape [4, 3], expected [4, 4]"),
        (lambda op, r: {"gamma": r["gamma"].astype(np.float32)}, "fail", "dtype float32, expected float64"),
        (lambda op, r: {"gamma": r["gamma"].astype(object)}, "fail", "dtype object"),
        (lambda op, r: {"gamma": np.where(r["gamma"] > 0.9, np.nan, r["gamma"])}, "fail", "not finite"),
        (lambda op, r: {"gamma": r["gamma"] + np.inf}, "fail", "inf at [0, 0]"),
        (lambda op, r: Unreadable(r), "fail", "RuntimeError: torn"),
        (lambda op, r: {"gamma": r["gamma"] + 1e-13}, "fail", "gamma is off"),
        (lambda op, r: {"gamma": np.full((4, 4), 1.7e308)}, "fail", "gamma is off"),
        (lambda op, r: r | {"extra": np.zeros(3)}, "pass", ""),
    ],
)
def test_judge_names_what_is_wrong(change: Change, expected: str, says: str) -> None:
    """[CONF-5] [NUM-11] names, shapes, dtypes; what is not a number where one is expected fails."""
    got, detail = verdict(Altered(change), GATE)
    assert got == expected and says in detail


def test_judge_exact_counts_and_places_differences() -> None:
    def swap(op: str, result: dict[str, Any]) -> dict[str, Any]:
        tokens = result["tokens"].copy()
        tokens[1, [2, 3]] = tokens[1, [3, 2]]
        return {"tokens": tokens}

    outcome = judge(port_of(Altered(swap)), ORDER)
    assert outcome.verdict == "fail" and outcome.measured is not None and outcome.output == "tokens"
    assert outcome.measured.error == 2 * 18 and outcome.measured.where == (1, 2, 0)


def test_judge_sees_every_output() -> None:
    case = BY_ID["edm/coefficients-half"]
    for name in case.expected:
        port = Altered(lambda op, result, name=name: result | {name: result[name] * (1 + 1e-14)})
        got, detail = verdict(port, case)
        assert got == "fail" and detail.startswith(f"{name} is off")


def test_judge_expected_nan_must_come_and_stay_where_it_is() -> None:
    tokens = ORDER.expected["tokens"]
    case = replace(ORDER, expected={"tokens": np.where(tokens == 5, np.nan, tokens)})
    assert verdict(Altered(), case)[0] == "fail"

    def spoil(op: str, result: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": np.where(result["tokens"] == 5, np.nan, result["tokens"])}

    assert verdict(Altered(spoil), case)[0] == "pass"
    assert verdict(Altered(spoil), ORDER)[0] == "fail"


def test_judge_rejection_wants_a_value_error_with_a_reason() -> None:
    """[CONF-4] a refusal is not a crash, and says why."""

    def refuse(error: Exception) -> Any:
        class Own(Altered):
            def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
                return _raise(error) if not (inputs["sigma"] > 0).all() else super().run(op, inputs, params, probes)

        return Own()

    assert verdict(refuse(ValueError("sigma is 0")), REFUSED) == ("pass", "refused: sigma is 0")
    assert verdict(refuse(ValueError()), REFUSED)[0] == "fail"
    assert verdict(refuse(RuntimeError("sigma is 0")), REFUSED)[0] == "error"
    assert verdict(refuse(Unsupported("zero")), REFUSED)[0] == "unsupported"
    accepting = Altered()
    accepting.run = lambda op, inputs, params, probes: {"c_skip": np.ones(1)}  # type: ignore[method-assign]
    assert verdict(accepting, REFUSED)[0] == "fail"


def test_judge_refusing_everything_passes_nothing() -> None:
    run = run_suite(Refuser(), Refuser().describe(), CASES, [], list(PROFILES))
    passing = [o.subject.id for o in run.outcomes if o.verdict == "pass"]
    assert all(BY_ID[name].may_refuse for name in passing)
    assert not any(profile.conforms for profile in run.profiles.values())


def test_judge_unclaimed_operation_or_dtype_is_not_called() -> None:
    info = replace(Refuser().describe(), ops=frozenset({"crps"}))
    assert judge(Port(Refuser(), info), GATE).verdict == "unsupported"
    only_double = replace(Refuser().describe(), dtypes=("float64",))
    assert judge(Port(Refuser(), only_double, "float32"), GATE).verdict == "unsupported"


def test_judge_port_cannot_spoil_the_cases() -> None:
    class Vandal(Altered):
        def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
            result = {name: np.array(v) for name, v in Reference().run(op, inputs, params, probes).items()}
            for value in inputs.values():
                value[...] = 0
            params.clear()
            return result

    before = copy.deepcopy([(dict(case.inputs), dict(case.params)) for case in CASES[:40]])
    for case in CASES[:40]:
        assert verdict(Vandal(), case)[0] == "pass"
    for case, (inputs, params) in zip(CASES[:40], before, strict=True):
        assert params == case.params
        for name, value in inputs.items():
            np.testing.assert_array_equal(value, case.inputs[name])


# Laws.


def _law(check: Callable[[Port, Draw], None], *ops: str, examples: int = 5) -> Law:
    used = ops or ("schedule",)
    return Law("edm/law-test", ("EDM-5",), ("edm",), used, "a law of the tests", check, examples=examples)


def test_judge_law_passes_fails_and_shrinks_to_the_smallest_example() -> None:
    from hypothesis import strategies as st

    def below(limit: int) -> Callable[[Port, Draw], None]:
        def check(port: Port, draw: Draw) -> None:
            steps = draw(st.integers(1, 30), "steps")
            (sigmas,) = port.values("schedule", {}, {"steps": steps}, "sigmas")
            if len(sigmas) > limit:
                raise Broken(f"{len(sigmas)} levels")

        return check

    port = port_of(Altered())
    assert judge_law(port, _law(below(40)), 0).verdict == "pass"
    broken = judge_law(port, _law(below(7), examples=50), 0)
    assert broken.verdict == "fail" and broken.detail == "8 levels; with steps = 7"
    assert judge_law(port, _law(below(7), examples=50), 0).detail == broken.detail


def test_judge_law_names_faults_of_the_port() -> None:
    def check(port: Port, draw: Draw) -> None:
        port.values("schedule", {}, {"steps": 3}, "sigmas")

    def outcome(change: Change) -> str:
        return judge_law(port_of(Altered(change)), _law(check), 0).verdict

    assert outcome(lambda op, r: r) == "pass"
    assert outcome(lambda op, r: _raise(ValueError("no"))) == "error"
    assert outcome(lambda op, r: _raise(KeyError("no"))) == "error"
    assert outcome(lambda op, r: Unsupported()) == "unsupported"
    assert outcome(lambda op, r: {"sigmas": r["sigmas"] * np.nan}) == "fail"
    assert outcome(lambda op, r: {"sigmas": r["sigmas"].astype(np.float32)}) == "fail"
    assert outcome(lambda op, r: {}) == "fail"
    lacking = replace(Reference().describe(), ops=frozenset({"crps"}))
    assert judge_law(Port(Altered(), lacking), _law(check), 0).verdict == "unsupported"


def test_judge_law_that_cannot_be_computed_is_a_failure_of_the_port() -> None:
    """A result of a shape that the law's arithmetic cannot take says nothing against the suite."""

    def check(port: Port, draw: Draw) -> None:
        (sigmas,) = port.values("schedule", {}, {"steps": 3}, "sigmas")
        check_equal(sigmas[3], np.float64(0.0), "the last level")

    empty = Altered(lambda op, r: {"sigmas": r["sigmas"][:0]})
    outcome = judge_law(port_of(empty), _law(check), 0)
    assert outcome.verdict == "fail" and "cannot be computed" in outcome.detail and "IndexError" in outcome.detail


def test_law_draws_are_the_same_for_a_seed() -> None:
    drawn: list[Any] = []

    def check(port: Port, draw: Draw) -> None:
        drawn.append(draw(arrays(2, 3), "x").tobytes())

    for _ in range(2):
        judge_law(port_of(Altered()), _law(check, examples=10), 3)
    judge_law(port_of(Altered()), _law(check, examples=10), 4)
    first, second, third = drawn[:10], drawn[10:20], drawn[20:]
    assert first == second != third and len(set(first)) > 5


def test_law_checks_raise_broken_with_place_and_size() -> None:
    with pytest.raises(Broken, match=r"x: differ by 2 at \[1\], limit 1"):
        check_close(np.array([0.0, 2.0]), np.zeros(2), 1.0, "x")
    with pytest.raises(Broken, match="differ by nan"):
        check_close(np.array([np.nan]), np.zeros(1), 1.0, "x")
    with pytest.raises(Broken, match="shapes"):
        check_close(np.zeros(2), np.zeros(3), 1.0, "x")
    with pytest.raises(Broken, match=r"1 of 2 values differ, first at \[0\]: 1.0 and 0.0"):
        check_equal(np.array([1.0, 2.0]), np.array([0.0, 2.0]), "x")
    check_equal(np.array([-0.0]), np.array([0.0]), "x")
    check_close(np.zeros((0, 2)), np.zeros((0, 2)), 0.0, "x")


@pytest.mark.parametrize(
    "change",
    [{"id": "edm/no-law"}, {"ops": ("nothing",)}, {"ops": ()}, {"profiles": ("all",)}, {"requirements": ()}],
)
def test_law_invalid_parts(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="law"):
        replace(_law(lambda port, draw: None), **change)


# Profiles, results, exit codes.


def _outcome(verdict: str, name: str = "edm/schedule-default", **changes: Any) -> Outcome:
    return Outcome(replace(BY_ID[name], **changes), verdict, "", "float64")


def _run(*outcomes: Outcome, expected: int | None = None) -> Run:
    counts = {v: sum(o.verdict in v for o in outcomes) for v in (("pass",), ("fail", "error"), ("unsupported",))}
    profile = ProfileResult(len(outcomes) if expected is None else expected, *counts.values())
    return Run(Reference().describe(), "float64", 0, {"edm": profile}, list(outcomes))


def test_exit_code_fails_before_it_is_incomplete() -> None:
    codes = [exit_code(_run(_outcome("pass"), _outcome(v))) for v in ("pass", "fail", "error", "unsupported")]
    assert codes == [0, 1, 1, 3]
    assert exit_code(_run(_outcome("unsupported"), _outcome("error"))) == 1
    assert exit_code(_run(_outcome("pass"), expected=2)) == 3  # one was not reached
    assert exit_code(_run()) == 3  # nothing was judged


def test_run_suite_counts_public_cases_and_any_failure() -> None:
    wrong_gate = Altered(lambda op, r: {"gamma": 1 - r["gamma"]} if op == "gate" else r)
    core = [case for case in CASES if "core" in case.profiles]
    profile = run_suite(wrong_gate, wrong_gate.describe(), core, [], ["core"]).profiles["core"]
    assert profile.expected == profile.passed == sum(case.public for case in core)
    assert profile.failed >= 1 and not profile.conforms


def test_run_suite_blocks_what_follows_from_an_earlier_failure() -> None:
    def spoil(op: str, result: dict[str, Any]) -> dict[str, Any]:
        return {name: v + 1 for name, v in result.items()} if op in ("attention", "block", "denoise") else result

    port = Altered(spoil)
    core = [case for case in CASES if "core" in case.profiles]
    run = run_suite(port, port.describe(), core, [], ["core"])
    blocked = {o.subject.op: o.blocked_by for o in run.outcomes if o.verdict == "fail"}
    assert blocked["attention"] is None
    assert blocked["block"] == blocked["denoise"] and str(blocked["block"]).startswith("attention/")


def test_ancestors_are_transitive_and_acyclic() -> None:
    assert {"patchify", "gate", "attention", "memory"} <= ancestors("guided_denoise")
    assert all(op not in ancestors(op) for op in TABLE)
    order = list(TABLE)
    assert all(order.index(part) < order.index(op) for op in TABLE for part in ancestors(op))


def test_select_takes_what_is_asked_claimed_or_touched() -> None:
    info = Reference().describe()
    assert select(info, CASES, [], ["edm"])[0] == ["edm"]
    assert select(replace(info, profiles=("tiling", "core")), CASES, [], [])[0] == ["tiling", "core"]
    assert set(select(replace(info, ops=frozenset({"crps"})), CASES, [], [])[0]) == {"scores", "smoke"}
    profiles, cases, laws = select(info, CASES, all_laws(), [])
    assert profiles == list(PROFILES) and cases == CASES and laws == all_laws()


def test_result_is_json_whatever_the_error(tmp_path: Path) -> None:
    """An expected zero has the smallest spacing there is: the error in ULP overflows, and JSON knows no infinity."""
    port = Altered(lambda op, r: {"sigmas": r["sigmas"] + 1.0})
    run = run_suite(port, port.describe(), [BY_ID["edm/schedule-default"]], [], ["edm"])
    write_result(tmp_path / "deep" / "result.json", result(run))
    measured = read_result(tmp_path / "deep" / "result.json")["cases"][0]["measured"]
    assert measured["error"] is None and measured["unit"] == "ULP" and measured["output"] == "sigmas"


def test_read_result_invalid_files(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"spec": 1}'):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match="run makes one"):
            read_result(tmp_path / "result.json")
    with pytest.raises(ValueError, match="run makes one"):
        read_result(tmp_path / "absent.json")


def test_print_report_shows_the_ports_strings_as_text(tmp_path: Path) -> None:
    out = StringIO()
    port = Altered(lambda op, r: _raise(RuntimeError("[bold]loud[/bold]")))
    run = run_suite(port, port.describe(), [GATE], [], ["core"])
    print_report(Console(file=out, force_terminal=True, width=200), result(run), tmp_path)
    assert "[bold]loud[/bold]" in out.getvalue() and "port [red]under[/red] test" in out.getvalue()


# dtypes.


def test_round_to_is_nearest_even_and_idempotent() -> None:
    import torch

    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(2000) * 10.0 ** rng.integers(-30, 30, 2000), [0.0, -0.0, np.inf, np.nan]])
    for dtype in ("float32", "bfloat16"):
        want = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)).double().numpy()
        np.testing.assert_array_equal(round_to(x, dtype), want)
        np.testing.assert_array_equal(round_to(round_to(x, dtype), dtype), want)
    assert round_to(x, "float64") is x
    halfway = 1 + 2.0**-8
    assert round_to(np.array([halfway, 1 + 3 * 2.0**-8]), "bfloat16").tolist() == [1.0, 1 + 2 * 2.0**-7]


def test_to_dtype_narrows_what_the_table_says_and_copies() -> None:
    arrays_in = {"x": np.ones(2), "sigma": np.ones(2), "weights.final.bias": np.ones(2), "index": np.ones(2, np.int64)}
    for dtype, narrow in (("float64", np.float64), ("float32", np.float32), ("bfloat16", np.float32)):
        out = to_dtype("denoise", arrays_in, dtype)
        assert out["x"].dtype == out["sigma"].dtype == np.float64 and out["weights.final.bias"].dtype == narrow
        assert out["index"].dtype == np.int64
        assert not any(np.shares_memory(out[name], arrays_in[name]) for name in arrays_in)
    assert to_dtype("embed", {"x": np.ones(2)}, "float32")["x"].dtype == np.float32


def test_unit_is_half_an_epsilon() -> None:
    import torch

    for dtype, unit in UNIT.items():
        assert unit == torch.finfo(getattr(torch, dtype)).eps / 2


# Vectors, layout and the suite itself.


def test_readme_example_is_a_port() -> None:
    text = (ROOT / "conformance" / "README.md").read_text(encoding="utf-8")
    block = text.split("```python\n", 1)[1].split("```", 1)[0]
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert verdict(scope["adapter"], GATE)[0] == "pass"
    assert verdict(scope["adapter"], ORDER)[0] == "unsupported"


def test_readme_table_has_every_operation_and_its_level() -> None:
    text = (ROOT / "conformance" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5]
    listed = {row.strip("*"): not row.startswith("*") for row in rows if row.strip("*") in TABLE}
    assert listed == {name: op.public for name, op in TABLE.items()}


def _imports(path: Path) -> set[str]:
    """The packages that a file imports anywhere."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


def test_suite_imports_the_reference_only_where_it_may() -> None:
    """Judging imports neither the reference nor PyTorch: only the reference's adapter, mutants and authoring do."""
    may = {"reference.py", "reference_operations.py", "reference_ranks.py", "probes.py", "montecarlo.py"}
    for path in (ROOT / "conformance").rglob("*.py"):
        inside = path.relative_to(ROOT / "conformance")
        if inside.parts[0] != "mutants":
            strange = _imports(path) & {"torch", "storm_ref"}
            assert not strange or inside.name in may, f"{inside} imports {strange}"


def test_suite_floors_import_downwards_alone() -> None:
    """The rooms that judging stands on, from the bottom: each knows those below it and none above."""
    floors = ("protocol", "ports", "judging", "cases", "laws")
    for floor, room in enumerate(floors):
        for path in (ROOT / "conformance" / room).glob("*.py"):
            names = {
                node.module
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom) and node.module is not None
            }
            rooms = {name.split(".")[1] for name in names if name.startswith("conformance.")}
            assert rooms <= {"adapter", *floors[: floor + 1]}, f"{path.name} of {room} imports {rooms}"


def test_law_module_is_the_one_place_of_hypothesis() -> None:
    assert laws_module.hypothesis is not None
    for path in (ROOT / "storm_ref").rglob("*.py"):
        assert not _imports(path) & {"conformance", "hypothesis"}, path


def test_cases_have_distinct_ids_and_known_requirements() -> None:
    assert len(BY_ID) == len(CASES) >= 150
    for case in CASES:
        for requirement in case.requirements:
            assert requirement in requirements(), f"{case.id} cites {requirement}"
