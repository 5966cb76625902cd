"""Explanations: the requirement, the code, the first wrong intermediate, the shape of the error, the mistake's name."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.__main__ import main
from conformance.adapter import Info
from conformance.adapters.numpy import network as numpy_network
from conformance.adapters.numpy.port import adapter as numpy_adapter
from conformance.adapters.reference import Reference
from conformance.explain.code import code_places
from conformance.explain.error import axis_names, by_axis, draw_error, looks_like
from conformance.explain.stages import free_running, probe_names, stages
from conformance.judging.case import Case
from conformance.judging.requirements import requirements
from conformance.judging.runner import FAILED, judge
from conformance.judging.vectors import load_cases
from conformance.mutants import MUTANTS, adapter_of
from conformance.mutants.likely_mutants import LineUp, answer_of, distance
from conformance.ports.checked import Port

pytestmark = pytest.mark.usefixtures("unchecked")  # what the reference refuses, not what its annotations do

CASES = load_cases()
BY_ID = {case.id: case for case in CASES}
WHOLE = BY_ID["denoiser/generic-weights"]


def mutant_port(name: str, dtype: str = "float64") -> Port:
    adapter = adapter_of(MUTANTS[name])
    return Port(adapter, adapter.describe(), dtype)


def reference_port(dtype: str = "float64") -> Port:
    return Port(Reference(), Reference().describe(), dtype)


# What the error looks like.

TRUTH = np.random.default_rng(0).standard_normal((2, 3, 4, 5))


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (-TRUTH, "every value is -1 times"),
        (0.25 * TRUTH, "every value is 0.25 times"),
        (TRUTH + 3.5, "every value is 3.5 off"),
        (TRUTH[:, :, ::-1], "in the reverse order along row"),
        (np.roll(TRUTH, 1, -1), "in the wrong places"),
        (TRUTH + np.eye(5)[0], "only column 0"),
        (TRUTH + (1 - np.eye(5)[2]), "only all but column 2"),
        (TRUTH + np.arange(2)[:, None, None, None], "only sample 1"),
    ],
)
def test_looks_like_says_what_it_is(got: np.ndarray[Any, Any], says: str) -> None:
    sentences = looks_like(got, TRUTH, "denoised", 1e-9)
    assert any(says in sentence for sentence in sentences), sentences


def test_looks_like_says_nothing_it_cannot_know() -> None:
    noise = np.random.default_rng(1).standard_normal(TRUTH.shape)
    assert looks_like(TRUTH + noise, TRUTH, "denoised", 1e-9) == []
    assert looks_like(TRUTH, TRUTH, "denoised", 1e-9) == []
    assert looks_like(TRUTH * np.nan, TRUTH, "denoised", 1e-9) == []


def test_by_axis_is_the_rms_of_each_slice() -> None:
    error = np.zeros_like(TRUTH)
    error[1, :, 2, :] = 3.0
    rms = dict(by_axis(TRUTH + error, TRUTH, "denoised"))
    assert list(rms) == ["sample", "channel", "row", "column"]
    np.testing.assert_allclose(rms["sample"], [0, 3 * (1 / 4) ** 0.5])
    np.testing.assert_allclose(rms["row"], [0, 0, 3 * 0.5**0.5, 0])
    assert axis_names("denoised", (3,)) == ("axis 0",)


# Where it starts.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "first", "wrong_part"),
    [("tokens_column_major", "history", "history tokens"), ("gate_reversed", "block.0", "block 0")],
)
def test_first_difference_is_where_the_fault_is(mutant: str, first: str, wrong_part: str) -> None:
    port = mutant_port(mutant)
    compared = free_running(port, Reference(), WHOLE, "float64")
    assert [stage.name for stage in compared] == list(probe_names(WHOLE))
    assert next(stage.name for stage in compared if stage.off) == first
    parts = dict(stages(port, Reference(), WHOLE, "float64"))
    assert parts[wrong_part].verdict in FAILED
    assert parts["noise embedding"].verdict == "pass"


def test_first_difference_within_a_block() -> None:
    case = BY_ID["attention/block-near-constant"]
    compared = free_running(mutant_port("layer_norm_eps"), Reference(), case, "float64")
    assert [stage.name for stage in compared if stage.off] == ["spatial", "temporal"]
    assert [stage.name for stage in compared] == ["gamma", "spatial", "temporal"]


@pytest.mark.slow
def test_a_part_that_only_inherits_an_error_is_right_by_itself() -> None:
    """A wrong history spoils every intermediate behind it, and no other part."""
    port = mutant_port("age_in_days")
    off = [stage.name for stage in free_running(port, Reference(), WHOLE, "float64") if stage.off]
    assert {"history", "memory", "block.0", "raw"} <= set(off) and "embedding" not in off
    wrong = {name for name, outcome in stages(port, Reference(), WHOLE, "float64") if outcome.verdict in FAILED}
    assert wrong == {"history tokens", "memory"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "name", ["denoiser/generic-weights", "memory/compress", "edm/sample", "assimilation/posterior-mmps", "tiling/cone"]
)
def test_nothing_is_off_on_the_reference(name: str, dtype: str) -> None:
    case = BY_ID[name]
    port = reference_port(dtype)
    assert not [stage for stage in free_running(port, Reference(), case, dtype) if stage.off or stage.measured is None]
    assert all(outcome.verdict == "pass" for _, outcome in stages(port, Reference(), case, dtype))


def test_probes_are_optional() -> None:
    class Shy:
        def describe(self) -> Info:
            return Reference().describe()

        def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
            return Reference().run(op, inputs, params, ())

    compared = free_running(Port(Shy(), Reference().describe()), Reference(), WHOLE, "float64")
    assert {stage.note for stage in compared} == {"the port does not offer this probe"}


# Which mistake it is.


def _first_failure(port: Port) -> Case:
    return next(case for case in CASES if port.has(case.op) and judge(port, case).verdict in FAILED)


@pytest.fixture(scope="module")
def lineup() -> LineUp:
    return LineUp(CASES, "float64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["tokens_column_major", "memory_not_rescaled", "gate_reversed", "embedding_unquartered", "schedule_over_n"],
)
def test_likely_names_a_mutant_of_the_catalogue(lineup: LineUp, name: str) -> None:
    assert lineup.names_rightly(name, _first_failure(lineup.ports[name]))


def _reversed_gate(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: 1 - right(*a)


@pytest.mark.slow
def test_likely_names_a_mistake_in_another_implementation(lineup: LineUp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NumPy port shares no code with the catalogue, and its errors are recognised all the same."""
    monkeypatch.setattr(numpy_network, "gate", _reversed_gate(numpy_network.gate))
    port = Port(numpy_adapter, numpy_adapter.describe())
    for name in ("attention/gate", "denoiser/generic-weights"):
        outcome = judge(port, BY_ID[name])
        assert outcome.verdict == "fail"
        assert lineup.likely(port, outcome)[0].name == "gate_reversed"


def test_likely_is_silent_on_an_error_nobody_knows(lineup: LineUp) -> None:
    class Odd:
        def describe(self) -> Info:
            return Reference().describe()

        def run(self, op: str, inputs: dict[str, Any], params: dict[str, Any], probes: Sequence[str]) -> Any:
            result = dict(Reference().run(op, inputs, params, probes))
            return {name: value + np.sin(np.arange(value.size)).reshape(value.shape) for name, value in result.items()}

    port = Port(Odd(), Reference().describe())
    assert lineup.likely(port, judge(port, WHOLE)) == []
    assert lineup.likely(reference_port(), judge(reference_port(), WHOLE)) == []


def test_distance_is_one_where_the_mutant_is_right() -> None:
    mine = answer_of(mutant_port("gate_reversed"), WHOLE)
    right = answer_of(reference_port(), WHOLE)
    assert distance(mine, mine, WHOLE) == 0.0 and distance(mine, right, WHOLE) == pytest.approx(1.0)
    assert distance(mine, replace(mine, kind="refused"), WHOLE) == np.inf


# The command.


@pytest.mark.slow
def test_main_explains_from_requirement_to_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "denoiser/generic-weights", "--adapter", "conformance.mutants:gate_reversed", "--in-process"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for part in (
        "FAIL  denoiser/generic-weights",
        "[NET-3] It MUST apply blocks",
        "storm_ref/denoiser.py:",
        "The first that is off is block.0",
        "Wrong by itself: block 0, block 1",
        "rms error by sample",
        "gate_reversed: ",
        "exactly this result",
        "python -m conformance explain denoiser/generic-weights --adapter conformance.mutants:gate_reversed",
    ):
        assert part in said, part
    picture = tmp_path / "explain-denoiser-generic-weights.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_main_explains_a_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = "attention/law-gate-rises"
    words = ["explain", law, "--adapter", "conformance.mutants:gate_reversed", "--in-process", "--out", str(tmp_path)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert f"FAIL  {law}" in said and "with " in said and "gate_reversed" in said and "--seed 0" in said


def test_main_explains_that_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "edm/schedule-default", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "PASS  edm/schedule-default" in said and "[EDM-5]" in said and "Likeliest" not in said


def test_main_explains_what_it_can_without_torch_and_matplotlib(tmp_path: Path) -> None:
    """A lean install judges and explains; it says what it leaves out."""
    port = "def gate(i):\n    t = np.logaddexp(0, i['alpha']) * (np.log(i['sigma'])[:, None] - i['beta'])\n"
    port += "    return {'gamma': np.exp(-np.logaddexp(0, t))}\n\n\nclass Port:\n    def describe(self):\n"
    port += "        return Info('lean', '1', frozenset({'gate'}))\n\n    def run(self, op, inputs, params, probes):\n"
    port += "        return gate(inputs)\n"
    (tmp_path / "lean_port.py").write_text(f"import numpy as np\nfrom conformance.adapter import Info\n\n\n{port}")
    program = "import sys; sys.modules.update(torch=None, matplotlib=None); from conformance.__main__ import main; "
    program += "sys.exit(main(['explain', 'attention/gate', '--adapter', 'lean_port:Port', '--in-process']))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert told.returncode == 1, told.stderr
    for part in ("[ATT-4]", "storm_ref/attention.py:", "rms error by", "matplotlib is not installed", "needs PyTorch"):
        assert part in told.stdout, part


def test_main_explain_invalid_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "edm/no-such-case"]) == 2
    assert "python -m conformance list" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 4, 5)])
def test_draw_error_takes_any_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    truth = np.random.default_rng(0).standard_normal(shape)
    draw_error(truth + 1, truth, "y", "chapter/case", tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").stat().st_size > 1000


# From requirement to code.


def test_code_places_finds_functions_methods_and_classes() -> None:
    (gate,) = code_places("ATT-4")
    assert gate.path == "storm_ref/attention.py" and gate.source.startswith("def noise_gate(")
    assert any(place.source.startswith("class Axis") for place in code_places("TILE-1"))
    assert any("def crop(" in place.source for place in code_places("TILE-6"))
    assert code_places("NUM-5") == []


def test_requirements_are_whole_sentences_with_a_keyword() -> None:
    known = requirements()
    assert len(known) > 100 and known["EDM-5"].chapter == "06_edm.md"
    assert all(requirement.keyword and requirement.text.endswith(".") for requirement in known.values())
    assert sum(requirement.binding for requirement in known.values()) > 90
