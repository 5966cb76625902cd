"""Judging a port with NumPy, safetensors, Hypothesis and Rich alone: no PyTorch, no reference, no Matplotlib.

Imports of everything else are refused in the processes of these tests, those of ports included.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("torch", "storm_ref", "xarray", "netCDF4", "jsonschema", "matplotlib", "mpmath", "einops", "jaxtyping")
REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def lean(tmp_path: Path) -> Path:
    """A working directory whose Python processes cannot import what a lean install lacks."""
    (tmp_path / "sitecustomize.py").write_text(REFUSE)
    return tmp_path


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", ABSENT)
def test_lean_install_refuses_imports(lean: Path, name: str) -> None:
    """The other tests of this file would pass in vain if it did not."""
    ran = run(lean, "timeit", "-n1", "-r1", f"import {name}")
    assert f"No module named '{name}'" in ran.stderr


def test_lean_install_judges_a_port_and_reports(lean: Path) -> None:
    ran = run(lean, "conformance", "run", "--adapter", "numpy", "--profile", "scores", "--out", "out")
    assert ran.returncode == 0 and "CONFORMS" in ran.stdout, ran.stdout + ran.stderr
    (lean / "out" / "report.html").unlink()
    ran = run(lean, "conformance", "report", "--result", "out/result.json", "--out", "out")
    assert ran.returncode == 0 and (lean / "out" / "report.html").exists(), ran.stderr
    ran = run(lean, "conformance", "list", "--profile", "scores")
    assert ran.returncode == 0 and "public" in ran.stdout and "internal" in ran.stdout, ran.stderr


def test_lean_install_judges_a_new_adapter_in_its_own_process(lean: Path) -> None:
    assert run(lean, "conformance", "new-adapter", "python", "my_port").returncode == 0
    ran = run(lean, "conformance", "smoke", "--adapter", "my_port.adapter:adapter", "--out", "out")
    assert ran.returncode == 1 and "FAIL edm/schedule-default" in ran.stdout, ran.stdout + ran.stderr


def test_lean_install_exports_answers_and_checks(lean: Path) -> None:
    ran = run(lean, "conformance", "export", "calls", "--profile", "scores")
    assert ran.returncode == 0, ran.stderr
    ran = run(lean, "conformance", "answer", "calls", "--adapter", "numpy")
    assert ran.returncode == 0 and "calls answered" in ran.stdout, ran.stderr
    ran = run(lean, "conformance", "check", "calls", "--out", "out")
    assert ran.returncode == 0 and "CONFORMS" in ran.stdout, ran.stdout + ran.stderr


def test_lean_install_names_what_the_reference_needs(lean: Path) -> None:
    ran = run(lean, "conformance", "--adapter", "storm_ref")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("conformance: the adapter storm_ref needs the packages of the reference, ")
    assert ran.stderr.endswith(" is not installed: pip install 'storm-ref[reference]'\n")


def test_former_entry_point_names_the_new_one(lean: Path) -> None:
    ran = run(lean, "conformance.directory", "answer", "calls", "--adapter", "numpy")
    assert ran.returncode == 2 and ran.stderr.endswith("is now python -m conformance answer\n")
