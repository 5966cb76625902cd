"""Exported folders: every call is in them, answers are judged as in a run, and a bad answer hurts its call alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conformance.__main__ import main
from conformance.adapter import Adapter, AdapterError, Array, Info, Unsupported, describe
from conformance.adapters.reference import adapter as reference
from conformance.authoring.freeze import case_to_json, freeze, write_vectors
from conformance.cases.tokenisation import recipes
from conformance.commands.folder import check_folder, write_export
from conformance.judging.case import Case, Chain
from conformance.judging.result import result
from conformance.judging.runner import exit_code, run_suite
from conformance.judging.tolerance import Exact, MustReject
from conformance.laws.tokenisation import LAWS
from conformance.ports.folder import Replay, answer, digest
from conformance.protocol.operations import OPERATIONS

ROOT = Path(__file__).parents[1]
PROFILES = ["core"]


def schema(name: str) -> jsonschema.Draft202012Validator:
    document = json.loads((ROOT / "conformance" / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """The cases of chapter 1 that need no Monte Carlo, and one in a dtype of its own."""
    frozen = [freeze(recipe, reference) for recipe in recipes() if not isinstance(recipe.judge, Chain)]
    x = np.arange(24.0).reshape(1, 1, 4, 6)
    tokens = x.reshape(1, 1, 4, 6, 1).transpose(0, 2, 3, 1, 4).reshape(1, 24, 1)
    single = Case(
        id="tokenisation/single",
        op="patchify",
        requirements=("TOK-2",),
        profiles=("core",),
        tolerance=Exact("moved"),
        meaning="m",
        inputs={"x": x},
        params={"patch": [1, 1]},
        expected={"tokens": tokens},
        dtype="float32",
    )
    return [*frozen, single]


@pytest.fixture(scope="module")
def exported(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "new"
    write_export(folder, cases, LAWS, PROFILES, "float32", 5, [reference])
    return folder


@pytest.fixture(scope="module")
def answered(exported: Path) -> Path:
    folder = exported.with_name("answered")
    shutil.copytree(exported, folder)
    assert answer(folder, reference) == len(json.loads((folder / "manifest.json").read_text())["calls"])
    return folder


@pytest.fixture
def folder(answered: Path, tmp_path: Path) -> Path:
    """An answered folder to spoil."""
    shutil.copytree(answered, tmp_path / "port")
    return tmp_path / "port"


def requests(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("calls/*/request.json"))}


def call_of(folder: Path, subject: str, last: bool = True) -> Path:
    """The folder of a case's call; for a rejection the bad one, which comes after its valid counterpart."""
    names = [name for name, request in requests(folder).items() if subject in request["for"]]
    return folder / "calls" / names[-1 if last else 0]


def verdicts(folder: Path, cases: list[Case]) -> dict[str, tuple[str, str]]:
    run = check_folder(Replay(folder), cases, LAWS, None)
    return {outcome.subject.id: (outcome.verdict, outcome.detail) for outcome in run.outcomes}


def test_check_judges_as_a_run(answered: Path, cases: list[Case]) -> None:
    there = check_folder(Replay(answered), cases, LAWS, None)
    here = run_suite(reference, describe(reference), cases, LAWS, PROFILES, "float32", 5)
    assert [(o.subject.id, o.verdict, o.measured, o.dtype) for o in there.outcomes] == [
        (o.subject.id, o.verdict, o.measured, o.dtype) for o in here.outcomes
    ]
    assert {outcome.verdict for outcome in there.outcomes} == {"pass"}
    assert there.info.name == "storm_ref" and there.seed == 5 and there.dtype == "float32"


def test_check_needs_neither_torch_nor_the_same_process(answered: Path) -> None:
    """Laws draw the same calls where other modules are in memory, else none of their answers would be found."""
    script = (
        "import sys; from pathlib import Path; from conformance.commands.folder import check_folder; "
        "from conformance.ports.folder import Replay; "
        "from conformance.laws.tokenisation import LAWS; import wave; "
        f"run = check_folder(Replay(Path({str(answered)!r})), [], LAWS, None); "
        "print([o.verdict for o in run.outcomes], 'torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == f"{['pass'] * len(LAWS)} False", finished.stderr


def test_export_has_every_call_once(exported: Path, cases: list[Case]) -> None:
    calls = requests(exported)
    served = {subject for request in calls.values() for subject in request["for"]}
    assert served == {subject.id for subject in [*cases, *LAWS]}
    assert list(calls) == [f"{number + 1:05d}" for number in range(len(calls))]
    keys = set()
    for name, request in calls.items():
        inputs = load_file(exported / "calls" / name / "inputs.safetensors")
        keys.add(digest(request["op"], inputs, request["params"]))
    assert keys == set(json.loads((exported / "manifest.json").read_text())["calls"])
    assert "answer.json" in (exported / "README.txt").read_text()


def test_export_has_bad_input_and_its_valid_counterpart(exported: Path) -> None:
    bad = json.loads((call_of(exported, "tokenisation/refuses-rows") / "request.json").read_text())
    good = json.loads((call_of(exported, "tokenisation/refuses-rows", last=False) / "request.json").read_text())
    assert (bad["params"]["patch"], good["params"]["patch"]) == ([3, 3], [2, 3])


def test_export_keeps_dtypes(exported: Path) -> None:
    place = call_of(exported, "tokenisation/single")
    assert json.loads((place / "request.json").read_text())["params"]["dtype"] == "float32"
    assert load_file(place / "inputs.safetensors")["x"].dtype == np.float32
    position = load_file(call_of(exported, "tokenisation/position-sphere") / "inputs.safetensors")
    assert position["latitude"].dtype == np.float64


def test_export_invalid_folder(exported: Path, cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not empty"):
        write_export(exported, cases, [], PROFILES, "float64", 0, [reference])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write_export(tmp_path / "file", cases, [], PROFILES, "float64", 0, [reference])


def test_check_unanswered_is_unsupported(exported: Path, cases: list[Case]) -> None:
    run = check_folder(Replay(exported), cases, LAWS, None)
    assert {outcome.verdict for outcome in run.outcomes} == {"unsupported"}
    assert "has no answer" in run.outcomes[0].detail and "calls/00001" in run.outcomes[0].detail
    assert exit_code(run) == 3
    assert Replay(exported).answered() == 0
    assert run.info.name == exported.name


def test_answer_resumes(folder: Path, cases: list[Case]) -> None:
    gone = [call_of(folder, "tokenisation/order"), call_of(folder, "tokenisation/refuses-rows")]
    (gone[0] / "outputs.safetensors").unlink()
    (gone[1] / "answer.json").unlink()
    kept = call_of(folder, "tokenisation/single") / "outputs.safetensors"
    before = kept.stat().st_mtime_ns
    verdict_of = verdicts(folder, cases)
    assert (verdict_of["tokenisation/order"][0], verdict_of["tokenisation/refuses-rows"][0]) == (
        "unsupported",
        "unsupported",
    )
    assert Replay(folder).answered() == len(Replay(folder).calls) - 2
    assert answer(folder, reference) == 2
    assert {verdict for verdict, _ in verdicts(folder, cases).values()} == {"pass"}
    assert kept.stat().st_mtime_ns == before
    assert answer(folder, reference) == 0


class Wrong:
    """Patches, but the columns of tokens before the rows; a law notices too."""

    def describe(self) -> Info:
        return Info("wrong", "2", frozenset({"patchify", "unpatchify", "position"}), ("float64", "float32"))

    def run(self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Any) -> Mapping[str, Array]:
        if params.get("kind") == "sphere":
            raise Unsupported("not yet")
        outputs = dict(reference.run(op, inputs, params, probes))
        return {name: value[:, ::-1] if name == "tokens" else value for name, value in outputs.items()}


def test_check_finds_a_wrong_port(exported: Path, cases: list[Case], tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "wrong")
    answer(tmp_path / "wrong", Wrong())
    verdict_of = verdicts(tmp_path / "wrong", cases)
    assert verdict_of["tokenisation/order"][0] == "fail" and "tokens is off at" in verdict_of["tokenisation/order"][1]
    assert verdict_of["tokenisation/law-inverse"][0] == "fail"
    assert "tokens against the patches of the field" in verdict_of["tokenisation/law-inverse"][1]
    assert verdict_of["tokenisation/position-sphere"] == ("unsupported", "not yet")
    assert verdict_of["tokenisation/law-date-line"] == ("unsupported", "not yet")
    assert verdict_of["tokenisation/position-latitude"][0] == "pass"
    assert verdict_of["tokenisation/refuses-rows"][0] == "pass"


def damage(name: str) -> Callable[[Path], None]:
    """Ways to spoil the answer in a call's folder."""

    def said(text: str) -> Callable[[Path], None]:
        return lambda place: ((place / "outputs.safetensors").unlink(), (place / "answer.json").write_text(text))[0]

    def elsewhere(make: Callable[[Path, Path], None]) -> Callable[[Path], None]:
        def spoil(place: Path) -> None:
            (place / "outputs.safetensors").rename(place / "elsewhere")
            make(place / "elsewhere", place / "outputs.safetensors")

        return spoil

    def cut(place: Path) -> None:
        path = place / "outputs.safetensors"
        path.write_bytes(path.read_bytes()[:-3])

    def moved(place: Path) -> None:
        place.rename(place.parent.parent / "outside")
        place.symlink_to(place.parent.parent / "outside")

    def pipe(place: Path) -> None:
        (place / "outputs.safetensors").unlink()
        os.mkfifo(place / "outputs.safetensors")

    def resave(value: Array) -> Callable[[Path], None]:
        return lambda place: save_file({"tokens": value}, place / "outputs.safetensors")

    return {
        "cut": cut,
        "moved": moved,
        "pipe": pipe,
        "symlink": elsewhere(lambda there, here: here.symlink_to(there)),
        "hard link": elsewhere(lambda there, here: here.hardlink_to(there)),
        "sparse": lambda place: os.truncate(place / "outputs.safetensors", 2**40),
        "both": lambda place: (place / "answer.json").write_text("{}"),
        "garbage": said("{"),
        "unknown": said('{"answer": "outputs"}'),
        "error": said('{"answer": "error", "type": "KeyError", "message": "x"}'),
        "refused": said('{"answer": "refused", "message": "\\u001b[31mno"}'),
        "shape": resave(np.zeros((2, 2), np.float32)),
        "dtype": resave(np.zeros((2, 6, 18))),
    }[name]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("how", "verdict", "message"),
    [
        ("cut", "error", "protocol: the safetensors file is damaged"),
        ("moved", "error", "is a link to somewhere else"),
        ("pipe", "error", "is not a plain file of its own"),
        ("symlink", "error", "cannot be read: it is a link"),
        ("hard link", "error", "is not a plain file of its own"),
        ("sparse", "error", "more than 268435456"),
        ("both", "error", "has both outputs.safetensors and answer.json"),
        ("garbage", "error", "the answer is not JSON"),
        ("unknown", "error", "'outputs', which the protocol does not know"),
        ("error", "error", "the port raised KeyError: x"),
        ("refused", "error", "the port refused a valid input:  [31mno"),
        ("shape", "fail", "has shape [2, 2], expected [2, 6, 18]"),
        ("dtype", "fail", "has dtype float64, expected float32"),
    ],
)
def test_check_bad_answer_hurts_its_own_call(
    folder: Path, cases: list[Case], how: str, verdict: str, message: str
) -> None:
    place = call_of(folder, "tokenisation/order", last=False)
    assert json.loads((place / "request.json").read_text())["params"]["patch"] == [2, 3]
    damage(how)(place)
    verdict_of = verdicts(folder, cases)
    assert verdict_of["tokenisation/order"][0] == verdict and message in verdict_of["tokenisation/order"][1]
    sharing = json.loads((place / "request.json").read_text())["for"]
    assert {verdict_of[case.id][0] for case in cases if case.id not in sharing} == {"pass"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "damaged"),
        ({"dtype": "float16"}, "damaged"),
        ({"seed": "5"}, "damaged"),
        ({"profiles": ["all"]}, "damaged"),
        ({"calls": {"0" * 64: "../../etc"}}, "damaged"),
        ({"calls": []}, "damaged"),
        ({"spec": "0.0"}, "exported with version 0.0 of spec"),
        ({"vectors": "0.0"}, "exported with version 0.0 of vectors"),
        ({"hypothesis": "1.0"}, f"exported with version 1.0 of hypothesis, here is {hypothesis.__version__}"),
    ],
)
def test_replay_invalid_manifest(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Replay(folder)


def test_replay_invalid_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no complete export"):
        Replay(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is no complete export"):
        Replay(tmp_path)


def test_replay_invalid_port_file(folder: Path) -> None:
    (folder / "port.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        describe(Replay(folder))
    (folder / "port.json").write_text('{"name": "\\u001b[2J", "version": 3}')
    info = describe(Replay(folder))
    assert (info.name, info.version) == (" [2J", "3")


def test_digest_tells_calls_apart() -> None:
    x = np.arange(4.0)
    base = digest("gate", {"x": x}, {"a": 1, "b": 2})
    assert base == digest("gate", {"x": x.copy()}, {"b": 2, "a": 1})
    others = [
        digest("crps", {"x": x}, {"a": 1, "b": 2}),
        digest("gate", {"x": x.reshape(2, 2)}, {"a": 1, "b": 2}),
        digest("gate", {"x": x.astype(np.float32)}, {"a": 1, "b": 2}),
        digest("gate", {"y": x}, {"a": 1, "b": 2}),
        digest("gate", {"x": x}, {"a": 1, "b": 3}),
        digest("gate", {"x": np.array([-0.0, 1, 2, 3])}, {"a": 1, "b": 2}),
    ]
    assert len({base, *others}) == 7


def test_schemas_fit_the_files(answered: Path) -> None:
    schema("export_manifest").validate(json.loads((answered / "manifest.json").read_text()))
    for request in requests(answered).values():
        schema("export_request").validate(request)
    answers = [json.loads(path.read_text()) for path in answered.glob("calls/*/answer.json")]
    assert answers
    for document in answers:
        schema("export_answer").validate(document)
    assert not schema("export_answer").is_valid({"answer": "outputs"})
    assert not schema("export_answer").is_valid({"answer": "refused"})
    assert not schema("export_request").is_valid(next(iter(requests(answered).values())) | {"call": "../x"})


def test_schemas_fit_result_cases_and_manifest(answered: Path, cases: list[Case], tmp_path: Path) -> None:
    run = check_folder(Replay(answered), cases, LAWS, None)
    data = json.loads(json.dumps(result(run)))
    schema("result").validate(data)
    schema("case").validate([json.loads(json.dumps(case_to_json(case))) for case in cases])
    written = write_vectors({"tokenisation": cases[:2]}, {"core": 2}, tmp_path)
    schema("manifest").validate(written)
    schema("case").validate(json.loads((tmp_path / "tokenisation.json").read_text()))
    assert not schema("result").is_valid(data | {"exit": 2})
    assert not schema("case").is_valid([case_to_json(cases[0]) | {"id": "../x"}])
    assert not schema("manifest").is_valid(written | {"files": {"a": {"sha256": "x", "bytes": 1}}})


def test_schema_knows_every_profile_and_dtype() -> None:
    from conformance.protocol.operations import DTYPES, PROFILES

    text = json.loads((ROOT / "conformance" / "schemas" / "manifest.schema.json").read_text())
    assert set(text["properties"]["profiles"]["propertyNames"]["enum"]) == set(PROFILES)
    request = json.loads((ROOT / "conformance" / "schemas" / "export_manifest.schema.json").read_text())
    assert request["properties"]["dtype"]["enum"] == list(DTYPES)


PORT = """
from conformance.adapter import Info

class Port:
    def describe(self):
        return Info("mine", "1", frozenset({"patchify"}))

    def run(self, op, inputs, params, probes):
        import os
        if params["patch"] == [3, 2]:
            os.abort()
        raise ValueError("never")
"""


def test_command_answer_survives_a_crash(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    write_export(folder, [case for case in cases if case.op == "patchify"], [], PROFILES, "float64", 0, [reference])
    (tmp_path / "crashing_port.py").write_text(PORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["answer", str(folder), "--adapter", "crashing_port:Port"]) == 0
    assert "calls answered" in capsys.readouterr().out
    verdict_of = verdicts(folder, [case for case in cases if case.op == "patchify"])
    assert "crash: the port was killed by SIGABRT" in verdict_of["tokenisation/bits"][1]
    assert verdict_of["tokenisation/order"] == ("error", "the port refused a valid input: never")
    assert verdict_of["tokenisation/single"] == ("unsupported", "the port does not claim float32")


@pytest.mark.parametrize("words", [["--adapter", "no_such_module:x"], ["--cmd", "no-such-program"], ["--cmd", ""]])
def test_command_answer_invalid_port(exported: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answer", str(exported), *words]) == 2
    assert capsys.readouterr().err.startswith("conformance: ")


def test_export_falls_back_on_another_adapter(tmp_path: Path) -> None:
    """A law is recorded to its end when any adapter of ours has its operations."""

    class Nothing:
        def describe(self) -> Info:
            return Info("nothing", "1", frozenset(OPERATIONS))

        def run(self, op: str, inputs: Any, params: Any, probes: Any) -> Unsupported:
            return Unsupported(op)

    only: list[Adapter] = [Nothing()]
    few = write_export(tmp_path / "few", [], LAWS, PROFILES, "float64", 0, only)
    full = write_export(tmp_path / "full", [], LAWS, PROFILES, "float64", 0, [*only, reference])
    assert few == len(LAWS) and full > 10 * few


def test_command_export_and_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cases: list[Case]
) -> None:
    """The two commands from end to end, on the few vectors of this file."""
    rejected = next(case for case in cases if isinstance(case.tolerance, MustReject))
    few = [cases[0], rejected]
    counts = {"vectors": "", "profiles": {"core": {"cases": 0, "laws": 0}}}
    monkeypatch.setattr("conformance.commands.folder.load_cases", lambda: few)
    monkeypatch.setattr("conformance.commands.judge.manifest", lambda: counts)
    monkeypatch.setattr("conformance.commands.folder.all_laws", lambda: list(LAWS))
    folder, out = tmp_path / "calls", tmp_path / "out"
    assert main(["export", str(folder), "--profile", "core"]) == 0
    assert main(["export", str(folder), "--profile", "core"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["check", str(folder), "--out", str(out)]) == 3
    answer(folder, reference)
    main(["check", str(folder), "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    schema("result").validate(result)
    assert {entry["verdict"] for entry in [*result["cases"], *result["laws"]]} == {"pass"}
    assert result["adapter"]["name"] == "storm_ref"
