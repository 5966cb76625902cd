"""The catalogue of wrong ports and honest variants, and the command that tries the suite on them.

The whole trial is `python -m conformance mutants`; here is a sample of it, one wrong port a chapter.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from conformance.adapter import Unsupported, describe, load_adapter
from conformance.adapters.reference import Reference
from conformance.cases import CHAPTERS
from conformance.judging.case import Case
from conformance.judging.requirements import requirements
from conformance.judging.runner import Subject
from conformance.mutants import MUTANTS, Edit, Mutant, adapter_of
from conformance.mutants.honest import HONEST, honest_adapter
from conformance.mutants.mutant import MutantPort, edit, replaced_code
from conformance.mutants.trial import Finding, reach, subjects, summary, trial, try_port
from conformance.protocol.operations import DTYPES
from storm_ref import attention, tokenisation

SAMPLE = {
    "tokenisation": "tokens_column_major",
    "memory": "memory_not_rescaled",
    "attention": "gate_reversed",
    "denoiser": "sigma_data_one",
    "tiling": "hann_periodic",
    "edm": "schedule_over_n",
    "guidance": "variance_as_std",
    "assimilation": "kalman_gain",
    "verification": "crps_fair_biased",
    "parallel": "bias_before_sum",
    "numerics": "tf32_products",
    "cost": "halo_not_counted",
}


@pytest.fixture(scope="module")
def tested() -> list[Subject]:
    return subjects()


def cases_of(tested: list[Subject], chapter: str) -> list[Subject]:
    return [subject for subject in tested if isinstance(subject, Case) and subject.chapter == chapter]


def test_catalogue_covers_every_chapter() -> None:
    count = Counter(mutant.chapter for mutant in MUTANTS.values())
    assert set(count) == set(CHAPTERS)
    assert min(count.values()) >= 8
    assert len(MUTANTS) >= 110


def test_catalogue_names_and_faults() -> None:
    assert all(re.fullmatch(r"[a-z][a-z0-9_]+", name) for name in MUTANTS)
    assert not set(MUTANTS) & set(HONEST)
    faults = Counter(mutant.fault for mutant in MUTANTS.values())
    assert [fault for fault, count in faults.items() if count > 1] == []
    assert all(mutant.patches and "\n" not in mutant.fault for mutant in MUTANTS.values())


def test_catalogue_requirements_exist() -> None:
    named = {requirement for mutant in MUTANTS.values() for requirement in mutant.requirements}
    assert named - set(requirements()) == set()
    assert all(mutant.requirements for mutant in MUTANTS.values())


def test_mutants_can_be_made() -> None:
    """Their pieces of source are still there, once each, and they go by their names."""
    right = describe(Reference())
    for name, mutant in MUTANTS.items():
        info = describe(adapter_of(mutant))
        assert (info.name, info.ops, info.dtypes) == (name, right.ops, DTYPES)


def test_mutant_loads_by_name() -> None:
    assert describe(load_adapter("conformance.mutants:gate_reversed")).name == "gate_reversed"
    assert describe(load_adapter("conformance.mutants.honest:gelu_erfc")).name == "gelu_erfc"


@pytest.mark.parametrize(
    "chapter", [pytest.param(name, marks=[pytest.mark.distributed] * (name == "parallel")) for name in SAMPLE]
)
def test_mutant_is_caught_by_its_chapter(chapter: str, tested: list[Subject], unchecked: None) -> None:
    """And every patch is gone after each call: the reference passes what the mutant failed."""
    mutant = MUTANTS[SAMPLE[chapter]]
    assert mutant.chapter == chapter
    cases = sorted(cases_of(tested, chapter), key=lambda case: mutant.name not in case.targets)
    wrong = try_port(mutant.name, adapter_of(mutant), "float32", cases, enough=1)
    assert wrong.failed
    failed = [subject for subject in tested if subject.id in wrong.failed]
    assert try_port("reference", Reference(), "float32", failed).failed == ()


def test_patch_acts_wherever_the_function_is_bound() -> None:
    """denoiser imports patchify by name; the adapter calls it through its module."""
    port = MutantPort("t", MUTANTS["crop_in_silence"].patches)
    right = tokenisation.patchify
    assert {key for _, key, _, _ in port._places} == {"patchify"}
    assert len(port._places) >= 2
    with port._installed():
        assert tokenisation.patchify is not right
    assert tokenisation.patchify is right


def test_patch_is_undone_after_an_exception() -> None:
    port, right = MutantPort("t", MUTANTS["gate_reversed"].patches), attention.noise_gate
    with pytest.raises(Unsupported):
        port.run("no such operation", {}, {"dtype": "float64"}, ())
    assert attention.noise_gate is right


def test_edit_invalid_pieces() -> None:
    with pytest.raises(ValueError, match="0 times, wanted once"):
        edit("no such piece", "").apply(attention, "noise_gate")
    with pytest.raises(ValueError, match="2 times, wanted once"):
        edit("sigma.", "level.").apply(attention, "noise_gate")


def test_edit_sees_the_module_it_comes_from() -> None:
    wrong = Edit(("2.0 **", "3.0 **")).apply(tokenisation, "fourier_features")
    assert wrong.__globals__ is vars(tokenisation)


@pytest.mark.parametrize("name", ["split_sums", "online_attention", "norm_welford", "gelu_erfc", "wide_products"])
def test_honest_variant_passes_attention(name: str, tested: list[Subject], unchecked: None) -> None:
    """Other roundings, no alarm."""
    finding = try_port(name, honest_adapter(name), "float32", cases_of(tested, "attention"))
    assert finding.failed == (), finding.first


def test_honest_variants_differ_from_the_reference(tested: list[Subject], unchecked: None) -> None:
    """An honest variant that is the reference bit for bit would show nothing."""
    block = next(s for s in tested if isinstance(s, Case) and s.op == "block" and not s.rejects)
    want = Reference().run("block", dict(block.inputs), {**block.params, "dtype": "float64"}, ())
    for name in ("split_sums", "permuted_sums", "norm_two_pass", "gelu_erfc", "wide_products"):
        got = honest_adapter(name).run("block", dict(block.inputs), {**block.params, "dtype": "float64"}, ())
        assert not isinstance(got, Unsupported)
        assert (got["y"] != want["y"]).any(), name


def test_reach_leaves_out_what_cannot_tell(tested: list[Subject], unchecked: None) -> None:
    """A case that does not run the faulty code passes on the mutant as on the reference."""
    mutant = MUTANTS["gate_reversed"]
    changed = replaced_code(mutant.patches)
    assert changed is not None
    some = [*cases_of(tested, "attention"), *cases_of(tested, "verification")]
    reached = {name for name, places in reach(some, changed).items() if places}
    rest = [subject for subject in some if subject.id not in reached]
    assert {subject.chapter for subject in some if subject.id in reached} == {"attention"}
    assert try_port(mutant.name, adapter_of(mutant), "float64", rest).failed == ()


def finding(name: str, dtype: str, *failed: str) -> Finding:
    return Finding(name, dtype, failed, "", 0.0)


def test_summary_counts_only_what_dies_in_every_dtype(tested: list[Subject]) -> None:
    public = next(s.id for s in tested if s.public)
    internal = next(s.id for s in tested if not s.public)
    mutants = [Mutant(name, "a fault", "edm", ("EDM-1",), ()) for name in ("both", "one", "none")]
    findings = [
        finding("both", "float64", internal, public),
        finding("both", "float32", internal),
        finding("one", "float64", public),
        finding("one", "float32"),
        finding("none", "float64"),
        finding("none", "float32"),
        finding("gelu_erfc", "float64", internal),
        finding("gelu_erfc", "float32"),
    ]
    data = summary(mutants, findings, tested)
    assert (data["mutants"], data["killed"], data["killed_float64"], data["killed_float32"]) == (3, 1, 2, 1)
    assert data["killed_by_public"] == 0
    assert [(s["name"], s["dtype"]) for s in data["survivors"]] == [
        ("one", "float32"),
        ("none", "float64"),
        ("none", "float32"),
    ]
    assert data["honest_variants"] == 1
    (alarm,) = data["false_alarms"]
    assert (alarm["name"], alarm["dtype"], alarm["failed"]) == ("gelu_erfc", "float64", [internal])
    assert data["kills"]["both"] == {"float64": [internal, public], "float32": [internal]}


@pytest.fixture
def two_chapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials on the cases and laws of two quick chapters."""
    quick = [subject for subject in subjects() if subject.chapter in ("verification", "cost")]
    monkeypatch.setattr("conformance.mutants.trial.subjects", lambda: quick)


def arguments(out: Path, *only: str) -> argparse.Namespace:
    return argparse.Namespace(only=list(only), dtype=["float64"], jobs=1, out=out)


@pytest.mark.slow
def test_trial_writes_json(
    two_chapters: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None
) -> None:
    assert trial(arguments(tmp_path, "crps_fair_biased", "halo_not_counted", "crps_by_pairs")) == 0
    data = json.loads((tmp_path / "mutants.json").read_text(encoding="utf-8"))
    assert (data["mutants"], data["killed"], data["survivors"]) == (2, 2, [])
    assert (data["honest_variants"], data["false_alarms"]) == (1, [])
    assert set(data["kills"]) == {"crps_fair_biased", "halo_not_counted"}
    assert "crps_fair_biased" in data["requirements"]["VER-2"]
    assert all(1 <= len(ids) <= 10 for by_dtype in data["kills"].values() for ids in by_dtype.values())
    printed = capsys.readouterr().out
    assert "killed 2 of 2" in printed
    assert "VER-2: 1" in printed


def test_trial_survivor_fails(
    two_chapters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """A wrong port that is right survives, and the trial says so."""
    unchanged = (tokenisation, "math", tokenisation.math)
    right = Mutant("right", "nothing is wrong", "verification", ("VER-5",), (unchanged,))
    monkeypatch.setitem(MUTANTS, "right", right)
    assert trial(arguments(tmp_path, "right")) == 1
    data = json.loads((tmp_path / "mutants.json").read_text(encoding="utf-8"))
    assert [(s["name"], s["fault"]) for s in data["survivors"]] == [("right", "nothing is wrong")]


def test_trial_invalid_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mutant or honest variant nobody"):
        trial(arguments(tmp_path, "nobody"))
