"""The suite as pytest items in a port's own test run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.authoring.new_adapter import MENDED, WRONG, new_adapter

ROOT = Path(__file__).parents[1]

# A plug-in that puts a few cases in the place of the stored ones.
FEW = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import conformance.laws, conformance.judging.vectors
from tests.test_scaffold import cases
conformance.judging.vectors.load_cases = cases
conformance.laws.all_laws = lambda: []
"""


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "pytest", "-p", "few", "-p", "conformance.pytest_plugin", "-rfs", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def port(tmp_path: Path) -> Path:
    new_adapter("python", tmp_path / "my_port")
    (tmp_path / "few.py").write_text(FEW)
    return tmp_path


def test_plugin_one_item_each(port: Path) -> None:
    red = run(port, "--conformance-adapter", "my_port.adapter:adapter")
    assert "2 passed, 1 skipped" in red.stdout and "1 failed" in red.stdout, red.stdout + red.stderr
    assert red.returncode == 1
    assert "fail: sigmas is off at [" in red.stdout and "likely: rho" in red.stdout and "EDM-5" in red.stdout
    assert "conformance::edm/levels" in red.stdout and "runner.py" not in red.stdout
    stub = port / "my_port" / "adapter.py"
    stub.write_text(stub.read_text().replace(WRONG, MENDED))
    green = run(port, "--conformance-adapter", "my_port.adapter:adapter")
    assert green.returncode == 0 and "3 passed, 1 skipped" in green.stdout, green.stdout


def test_plugin_unsupported_fails_in_a_profile_asked_for(port: Path) -> None:
    finished = run(
        port, "--conformance-adapter", "my_port.adapter:adapter", "--conformance-profile", "edm", "-k", "crps"
    )
    assert "unsupported: the port does not claim the operation crps" in finished.stdout
    assert "1 failed, 2 deselected" in finished.stdout, finished.stdout


def test_plugin_invalid_port(port: Path) -> None:
    finished = run(port, "--conformance-cmd", "no-such-program")
    assert finished.returncode == 4
    assert "conformance: there is no program 'no-such-program'" in finished.stderr


def test_plugin_without_a_port_adds_nothing(port: Path) -> None:
    (port / "test_own.py").write_text("def test_own():\n    assert True\n")
    finished = run(port)
    assert finished.returncode == 0 and "1 passed" in finished.stdout
