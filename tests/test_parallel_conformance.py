"""The conformance profile `parallel`: the reference passes, ranks that disagree do not, wrong ports are caught."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from conformance.__main__ import main
from conformance.adapter import Array, Info, describe
from conformance.adapters import reference_ranks as parallel
from conformance.adapters.reference import Reference, Serial
from conformance.cases.parallel import recipes
from conformance.commands.folder import check_folder, write_export
from conformance.judging.runner import judge, judge_law, measure
from conformance.judging.vectors import FOLDER, load_cases, manifest
from conformance.laws.parallel import LAWS
from conformance.mutants import MUTANTS, adapter_of
from conformance.mutants.honest import honest_adapter
from conformance.mutants.likely_mutants import LineUp
from conformance.mutants.mutant import in_ranks
from conformance.ports.checked import Port, Wrong
from conformance.ports.folder import Replay, answer, answer_as_rank
from conformance.protocol.operations import OPERATIONS
from conformance.protocol.ranks import RanksError, launched, merge, missing_ranks, rank_of
from storm_ref.parallel.pool import RankError

ROOT = Path(__file__).parents[1]
CASES = {case.id.split("/")[1]: case for case in load_cases() if case.chapter == "parallel"}
PAIR = {"mesh": {"ddp": 1, "fsdp": 1, "tile": 2, "tp": 1}}


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left() -> Iterator[None]:
    yield
    parallel.closed()


def reference(dtype: str = "float64") -> Port:
    return Port(Reference(), describe(Reference()), dtype)


@pytest.fixture(scope="module", autouse=True)
def _ranks_end() -> Iterator[None]:
    """With this module: ranks that wait take time from those that work."""
    yield
    parallel.closed()


# The profile


@pytest.mark.slow
@pytest.mark.distributed
def test_reference_conforms_to_parallel(tmp_path: Path, unchecked: None) -> None:
    """In float32: `make conformance` has all profiles in float64."""
    assert main(["--profile", "parallel", "--dtype", "float32", "--out", str(tmp_path)]) == 0


def test_parallel_cases_share_one_golden_answer() -> None:
    """Every mesh of a problem has the same inputs, expected values and limits, to the bit; one rank is among them."""
    for name in ("denoise-corners", "step", "batch", "ensemble"):
        some = [case for key, case in CASES.items() if key.startswith(f"{name}-")]
        first = CASES[f"{name}-one"]
        assert len(some) >= 4
        assert len({json.dumps(case.params["mesh"]) for case in some}) == len(some)
        for case in some:
            assert {**case.params, "mesh": None} == {**first.params, "mesh": None}
            assert case.tolerance == first.tolerance
            for mine, others in ((case.inputs, first.inputs), (case.expected, first.expected)):
                assert all(np.array_equal(mine[key], others[key]) for key in others)


def test_parallel_cases_use_every_axis_alone_and_together() -> None:
    for op in ("parallel_denoise", "parallel_gradients", "parallel_ensemble"):
        shapes = [tuple(c.params["mesh"].values()) for c in CASES.values() if c.op == op and not c.rejects]
        alone = {tuple(size > 1 for size in shape) for shape in shapes if sum(size > 1 for size in shape) == 1}
        assert len(alone) >= 3, op
        assert any(sum(size > 1 for size in shape) > 1 for shape in shapes), op
        assert max(int(np.prod(shape)) for shape in shapes) == 8


def test_parallel_expected_values_are_serial() -> None:
    """[PAR-9] to [PAR-18] No rank has a part in them: the chapters before give them again."""
    for recipe in recipes():
        if recipe.valid_counterpart is None and recipe.expected is None:
            case = CASES[recipe.id.split("/")[1]]
            got = Serial().run(case.op, dict(case.inputs), {**case.params, "dtype": "float64"}, ())
            measured, _ = measure(case, dict(got), "float64")
            assert measured is not None and measured.fraction < 0.5, case.id


def test_shared_parts_are_stored_once() -> None:
    lines = json.loads((FOLDER / "parallel.json").read_text())
    jsonschema.validate(lines, json.loads((ROOT / "conformance/schemas/case.schema.json").read_text()))
    shared = {line["id"].split("/")[1]: line.get("shared", {}) for line in lines}
    assert shared["step-tp2"] == {
        "inputs": "step-one/inputs", "expected": "step-one/expected", "tolerance": "step-one",
    }  # fmt: skip
    assert "tolerance" not in next(line for line in lines if line["id"] == "parallel/step-tp2")
    files = manifest()["files"]
    assert files["parallel.safetensors"]["bytes"] + files["parallel.json"]["bytes"] < 380_000


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["gather-mixed", "denoise-shapes-tile2", "batch-one", "refuses-members"])
def test_reference_passes_with_checked_shapes(name: str) -> None:
    outcome = judge(reference(), CASES[name])
    assert outcome.verdict == "pass", outcome.detail


@pytest.mark.distributed
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.id.split("/")[1])
def test_reference_keeps_laws(law: Any, unchecked: None) -> None:
    outcome = judge_law(reference(), law, 1, shrink=False)
    assert outcome.verdict == "pass", outcome.detail


def test_parallel_is_outside_other_profiles() -> None:
    """A port without ranks conforms to what it claims: no other profile has a case that needs them."""
    for case in load_cases():
        assert (OPERATIONS[case.op].chapter == "parallel") == ("parallel" in case.profiles), case.id
    from conformance.adapters.numpy.port import adapter as numpy

    info = describe(numpy)
    assert "parallel" not in info.profiles
    assert not [op for op in info.ops if OPERATIONS[op].chapter == "parallel"]
    assert judge(Port(numpy, info), CASES["denoise-corners-one"]).verdict == "unsupported"


# Ranks


def by_rank(*values: Array, name: str = "denoised") -> dict[str, Array]:
    return {f"rank.{rank}.{name}": value for rank, value in enumerate(values)}


def test_merge_agreeing_ranks() -> None:
    x = np.arange(4.0)
    assert list(merge(by_rank(x, x.copy()), PAIR)) == ["denoised"]
    assert merge({"denoised": x}, PAIR)["denoised"] is x
    apart = by_rank(x, x[:2], name="extents")
    assert merge(apart, PAIR) == apart
    assert merge({"rank.0.y": x}, {}) == {"rank.0.y": x}  # a call without a mesh


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (by_rank(np.zeros(3), np.array([0.0, 1e-16, 0])),
         r"ranks disagree: denoised differs between rank 0 and rank 1, by up to 1e-16, first at \[1\]: 0.0 and 1e-16"),
        (by_rank(np.zeros(3), -np.zeros(3)), "ranks disagree: denoised .* by the sign of a zero"),
        (by_rank(np.zeros(3), np.zeros(2)), r"ranks disagree: denoised is float64 \[3\] and float64 \[2\]"),
        (by_rank(np.zeros(3), np.zeros(3, np.float32)), "float32"),
        (by_rank(np.zeros(3)), "denoised of rank 1 of 2 is missing"),
        ({"rank.1.denoised": np.zeros(3)}, "denoised of rank 0 of 2 is missing"),
        (by_rank(*[np.zeros(3)] * 3), "there is a rank 2, and the mesh has ranks 0 to 1"),
        (by_rank(np.zeros(3), np.zeros(3)) | {"denoised": np.zeros(3)}, "assembled and by rank"),
    ],
)  # fmt: skip
def test_merge_invalid_ranks(result: dict[str, Array], message: str) -> None:
    with pytest.raises(RanksError, match=message):
        merge(result, PAIR)


def test_without_names_missing_ranks() -> None:
    assert missing_ranks([0, 3], 5) == "ranks 1, 2, 4 of 5"
    assert missing_ranks([1, 0], 2) == ""
    assert (rank_of("outputs.rank12.safetensors"), rank_of("outputs.rank01.safetensors")) == (12, None)


class Changed:
    """The reference in one process, with its answer changed."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def describe(self) -> Info:
        return describe(Reference())

    def run(self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Any) -> Mapping[str, Array]:
        outputs: Mapping[str, Array] = self.change(dict(Serial().run(op, inputs, params, probes)), params)
        return outputs


def spread(outputs: dict[str, Array], params: dict[str, Any]) -> dict[str, Array]:
    ranks = int(np.prod(list(params["mesh"].values())))
    return {f"rank.{r}.{name}": value.copy() for name, value in outputs.items() for r in range(ranks)}


def test_ranks_that_disagree_fail_by_one_bit() -> None:
    """[NUM-13] has room for such an error; ranks have none."""

    def off(outputs: dict[str, Array], params: dict[str, Any]) -> dict[str, Array]:
        ranks = spread(outputs, params)
        ranks["rank.3.denoised"].flat[5] = np.nextafter(ranks["rank.3.denoised"].flat[5], np.inf)
        return ranks

    case = CASES["denoise-corners-tile4"]
    assert judge(Port(Changed(spread), describe(Reference())), case).verdict == "pass"
    outcome = judge(Port(Changed(off), describe(Reference())), case)
    assert outcome.verdict == "fail"
    assert outcome.detail.startswith("ranks disagree: denoised differs between rank 0 and rank 3, by up to")


def test_missing_rank_is_named() -> None:
    def lost(outputs: dict[str, Array], params: dict[str, Any]) -> dict[str, Array]:
        return {name: value for name, value in spread(outputs, params).items() if not name.startswith("rank.2.")}

    with pytest.raises(Wrong, match="denoised of rank 2 of 4 is missing"):
        port = Port(Changed(lost), describe(Reference()))
        port.call("parallel_denoise", CASES["denoise-corners-tile4"].inputs, CASES["denoise-corners-tile4"].params)


def test_assembled_answer_passes() -> None:
    port = Port(Changed(lambda outputs, params: outputs), describe(Reference()))
    assert judge(port, CASES["step-fsdp2-tile2-tp2"]).verdict == "pass"


# Folders

FEW = ("shares-mesh", "gather-tile2", "blend-corners", "denoise-corners-tp2", "step-tile2", "ensemble-ddp2",
       "refuses-no-valid-point")  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    few = [CASES[name] for name in FEW]
    write_export(tmp_path / "calls", few, [], ["parallel"], "float64", 0, [Serial()])
    return tmp_path / "calls"


def verdicts(folder: Path) -> dict[str, tuple[str, str]]:
    run = check_folder(Replay(folder), [CASES[name] for name in FEW], [], None)
    return {outcome.subject.id.split("/")[1]: (outcome.verdict, outcome.detail) for outcome in run.outcomes}


def place_of(folder: Path, name: str) -> Path:
    for path in sorted(folder.glob("calls/*/request.json")):
        if f"parallel/{name}" in json.loads(path.read_text())["for"]:
            return path.parent
    raise AssertionError(name)


class Lone:
    """A port that answers as one rank of several, without the others: with the serial answer, which all ranks have."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def describe(self) -> Info:
        return Info("lone", "1", frozenset(parallel.SERIAL), ("float64",))

    def run(self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Any) -> Mapping[str, Array]:
        outputs = Serial().run(op, inputs, params, probes)
        own = f"rank.{self.rank}."
        return {n.removeprefix(own): v for n, v in outputs.items() if n.startswith(own) or not n.startswith("rank.")}


def test_folder_of_ranks_is_merged(exported: Path) -> None:
    assert [answer_as_rank(exported, Lone(rank), rank, 2) for rank in (1, 0)] == [7, 7]  # a refusal has a neighbour
    verdict_of = verdicts(exported)
    assert verdict_of.pop("shares-mesh")[0] == "unsupported"  # of 24 ranks
    assert {verdict for verdict, _ in verdict_of.values()} == {"pass"}, verdict_of
    assert sorted(path.name for path in place_of(exported, "step-tile2").glob("out*")) == [
        "outputs.rank0.safetensors",
        "outputs.rank1.safetensors",
    ]
    assert not list(place_of(exported, "step-tile2").glob("answer.json"))
    assert answer_as_rank(exported, Lone(0), 0, 2) == 0  # nothing is left to do
    assert answer(exported, Serial()) == 1  # by the other calls, as ever


def test_folder_names_the_missing_rank(exported: Path) -> None:
    for rank in (0, 1):
        answer_as_rank(exported, Lone(rank), rank, 2)
    place = place_of(exported, "step-tile2")
    (place / "outputs.rank1.safetensors").unlink()
    verdict, detail = verdicts(exported)["step-tile2"]
    assert verdict == "error"
    assert f"calls/{place.name} has no outputs.rank1.safetensors: rank 1 of 2 did not answer" in detail
    assert answer_as_rank(exported, Lone(0), 0, 2) == 1  # both run it again
    (place / "outputs.rank1.safetensors").write_bytes((place / "outputs.rank0.safetensors").read_bytes())
    assert verdicts(exported)["step-tile2"][0] == "pass"
    (place / "outputs.rank2.safetensors").write_bytes((place / "outputs.rank0.safetensors").read_bytes())
    assert "there is a rank 2, and the mesh has ranks 0 to 1" in verdicts(exported)["step-tile2"][1]


def test_folder_of_ranks_that_disagree(exported: Path) -> None:
    for rank in (0, 1):
        answer_as_rank(exported, Lone(rank), rank, 2)
    one, other = (place_of(exported, "gather-tile2") / f"outputs.rank{r}.safetensors" for r in (0, 1))
    one.write_bytes(other.read_bytes())
    assert verdicts(exported)["gather-tile2"][0] == "fail"
    place = place_of(exported, "refuses-no-valid-point")
    (place / "outputs.rank0.safetensors").write_bytes(other.read_bytes())
    (place / "answer.json").write_text('{"answer": "refused", "message": "no"}')
    assert "has both" in verdicts(exported)["refuses-no-valid-point"][1]


def test_launched_invalid_environment(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="use torchrun, mpirun or srun"):
        launched()
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert launched() == (3, 4)
    assert main(["answer", str(exported), "--launched", "--cmd", "true"]) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_reference_answers_a_folder_under_torchrun(exported: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    port = ["--launched", "--adapter", "conformance.adapters.reference_ranks:launched"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "conformance", "answer", str(exported), *port],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1800,
    )  # fmt: skip
    assert "rank 1 of 2: 7 calls answered" in done.stdout, done.stderr[-2000:]
    verdict_of = verdicts(exported)
    assert verdict_of.pop("shares-mesh")[0] == "unsupported"
    assert {verdict for verdict, _ in verdict_of.values()} == {"pass"}, verdict_of


# Wrong ports and honest ones


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mutant", "name", "said"),
    [
        ("f_without_sum", "step-tp2", "ranks disagree"),
        ("bias_before_sum", "denoise-corners-tp2", "denoised is off"),
        ("halo_of_other_neighbour", "gather-ring", "extents is off"),
        ("loss_mean_of_ranks", "step-ddp2", "is off"),
        ("norm_of_fsdp_part", "batch-fsdp4", "ranks disagree: norm"),
        ("member_of_rank", "ensemble-ddp2", "samples is off"),
    ],
)
def test_parallel_mutant_is_caught(mutant: str, name: str, said: str, unchecked: None) -> None:
    """And its patches are gone: the reference passes the same case."""
    assert in_ranks(MUTANTS[mutant].patches)
    adapter = adapter_of(MUTANTS[mutant])
    outcome = judge(Port(adapter, describe(adapter)), CASES[name])
    assert outcome.verdict == "fail" and said in outcome.detail, outcome.detail
    assert judge(reference(), CASES[name]).verdict == "pass"


@pytest.mark.slow
@pytest.mark.distributed
def test_parallel_mutant_that_hangs_ends(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """[PAR-19] A rank waits for one that has given up: an error in time, and ranks that are new for the next call."""
    adapter = adapter_of(MUTANTS["ranks_fail_alone"])
    port = Port(adapter, describe(adapter))
    case = CASES["refuses-divergence"]
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "SHORT", 30.0)
        outcome = judge(port, case)
    assert outcome.verdict == "error" and "RankError: rank 1 hung" in outcome.detail
    assert case.valid_counterpart is not None
    assert port.call(case.op, *case.valid_counterpart)["samples"].shape == (2, 1, 4, 12)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one_rank_for_any_mesh", "ranks_from_the_last"])
def test_parallel_honest_variant_passes(name: str, unchecked: None) -> None:
    adapter = honest_adapter(name)
    for case in ("denoise-corners-tile2-tp2", "step-tp2", "batch-ddp4", "solve-tp2", "refuses-heads"):
        outcome = judge(Port(adapter, describe(adapter), "float32"), CASES[case])
        assert outcome.verdict == "pass", outcome.detail


@pytest.mark.slow
@pytest.mark.distributed
def test_parallel_mutant_is_named(unchecked: None) -> None:
    case = CASES["step-tile2"]
    adapter = adapter_of(MUTANTS["tile_gradients_averaged"])
    some = LineUp([c for c in CASES.values() if c.id in (case.id, "parallel/step-tile4")], "float64")
    port = Port(adapter, describe(adapter))
    assert some.likely(port, judge(port, case))[0].name == "tile_gradients_averaged"


@pytest.mark.distributed
def test_rank_that_fails_is_an_error(unchecked: None) -> None:
    """It is said which rank met what, and the next call is answered."""
    case = CASES["denoise-shapes-tile2"]
    with pytest.raises(RankError, match="rank 0 raised: KeyError: 'nothing'"):
        parallel.over_ranks("nothing", {}, case.params)
    assert judge(reference(), case).verdict == "pass"
