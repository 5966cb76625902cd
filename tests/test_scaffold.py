"""The stubs of new adapters run at once, fail for one reason, and pass when it is mended, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from conformance.__main__ import main
from conformance.adapter import describe
from conformance.authoring.new_adapter import MENDED, WRONG, new_adapter
from conformance.cases.edm import schedule
from conformance.judging.case import Case
from conformance.judging.runner import Run, run_suite
from conformance.judging.tolerance import Bound, MustReject
from conformance.ports.wire import WireAdapter, command_words, serve_words

ROOT = Path(__file__).parents[1]


def cases() -> list[Case]:
    """One of each operation of the stub, a refusal, and one that it lacks."""
    why = "sixteen roundings"
    sigma, alpha, beta = np.array([0.3, 1.05]), np.array([0.5, 4.0]), np.array([0.125, 0.0])
    gamma = 1 / (1 + np.exp(-np.log1p(np.exp(alpha)) * (np.log(sigma)[:, None] - beta)))
    gates = {"sigma": sigma, "alpha": alpha, "beta": beta}
    return [
        Case("attention/gate", "gate", ("ATT-4",), ("core",), Bound(32, why), "reversed", gates, {}, {"gamma": gamma}),
        Case("edm/levels", "schedule", ("EDM-5",), ("edm",), Bound(64, why), "rho", {}, {"steps": 5},
             {"sigmas": schedule(5)}),
        Case("edm/no-steps", "schedule", ("EDM-5",), ("edm",), MustReject("no steps"), "taken", {}, {"steps": 0}, {},
             ({}, {"steps": 1})),
        Case("verification/crps", "crps", ("VER-1",), ("edm",), Bound(1, why), "m", {}, {}, {"crps": np.zeros(1)}),
    ]  # fmt: skip


def verdicts(words: Sequence[str]) -> tuple[dict[str, str], Run]:
    adapter = WireAdapter(words, 30.0)
    try:
        run = run_suite(adapter, describe(adapter), cases(), [], ["core", "edm"])
    finally:
        adapter.close()
    return {outcome.subject.id: outcome.verdict for outcome in run.outcomes}, run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of the user's as the working directory; the suite is found as when it is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path


def words(kind: str, folder: str) -> list[str]:
    if kind == "python":
        return serve_words(f"{folder}.adapter:adapter")
    return command_words(f"{shlex.quote(sys.executable)} {folder}/port.py")


@pytest.mark.parametrize(("kind", "file"), [("python", "adapter.py"), ("wire", "port.py")])
def test_new_adapter_is_red_then_green(here: Path, kind: str, file: str) -> None:
    assert new_adapter(kind, Path("my_port")) == 0
    red = {"attention/gate": "pass", "edm/levels": "fail", "edm/no-steps": "pass", "verification/crps": "unsupported"}
    verdict_of, run = verdicts(words(kind, "my_port"))
    assert verdict_of == red
    assert "sigmas is off at [" in run.outcomes[1].detail
    stub = here / "my_port" / file
    text = stub.read_text()
    assert text.count(WRONG) == 1 and MENDED.strip() in text, "the remedy stands beside the wrong line"
    stub.write_text(text.replace(WRONG, MENDED))
    assert verdicts(words(kind, "my_port"))[0] == red | {"edm/levels": "pass"}


def test_new_adapter_wire_stands_alone(here: Path) -> None:
    new_adapter("wire", Path("my_port"))
    text = (here / "my_port" / "port.py").read_text()
    assert not re.search(r"^\s*(import|from) conformance", text, re.MULTILINE), (
        "a model for ports that cannot import it"
    )


@pytest.mark.parametrize("kind", ["python", "wire"])
@pytest.mark.parametrize("folder", ["my_port", "some where/my-port", "{absolute}"])
def test_new_adapter_prints_a_command_that_works(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str, folder: str
) -> None:
    place = Path(folder.format(absolute=here / "else"))
    assert main(["new-adapter", kind, str(place)]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if " -m conformance " in line]
    judged = subprocess.run(  # an unknown profile stops it before the run
        f"{command.strip()} --profile nonsense", shell=True, capture_output=True, text=True, cwd=here
    )
    assert "invalid choice: 'nonsense'" in judged.stderr
    parts = shlex.split(command)
    if kind == "wire":
        verdict_of, _ = verdicts(command_words(parts[parts.index("--cmd") + 1]))
    else:
        if "&&" in parts:
            os.chdir(parts[1])
        verdict_of, _ = verdicts(serve_words(parts[parts.index("--adapter") + 1]))
    assert verdict_of["attention/gate"] == "pass"


@pytest.mark.parametrize(("kind", "file"), [("python", "adapter.py"), ("wire", "port.py")])
def test_new_adapter_invalid_existing_file(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str, file: str
) -> None:
    (here / file).write_text("precious")
    assert main(["new-adapter", kind, "."]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (here / file).read_text() == "precious"
