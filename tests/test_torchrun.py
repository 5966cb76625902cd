"""Under torchrun: the serial run's results, one output, and an end in good order when a rank goes wrong."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
import xarray as xr

from storm_ref.denoiser import randomise
from storm_ref.workbench.cli.commands import main
from storm_ref.workbench.prior import model as models

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HERE = Path(__file__).parent
SPLIT = "2001-03-16"
TRAIN = ["--split", SPLIT, "--train-steps", "10", "--batch", "4", "--frames", "2", "--width", "8", "--depth", "1"]
TRAIN += ["--covariance-rank", "8", "--patch", "3x4", "--tile", "6x8", "--halo", "3x4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four tiles, so that starting processes is what takes the time."""
    return ["--data", str(synthetic.record(tmp_path_factory.mktemp("record") / "record.nc"))]


def torchrun(ranks: int, words: list[str], restarts: int = 0, mark: str = "") -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    launch += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "STORM_REF_TEST": mark}
    return subprocess.run(launch + words, capture_output=True, text=True, timeout=1800, env=environment)


def left_behind(mark: str) -> list[str]:
    """Processes that carry this mark in their environment; on Linux alone."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"STORM_REF_TEST={mark}\0".encode() in path.read_bytes():
                commands.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return commands


@pytest.fixture(scope="module")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on two ranks without a fault."""
    out = tmp_path_factory.mktemp("undisturbed") / "model.safetensors"
    ran = torchrun(2, ["-m", "storm_ref", "--", "train", *data, *TRAIN, "--mesh", "fsdp=1,tile=2", "--out", str(out)])
    assert ran.returncode == 0, ran.stderr
    return out


def test_train_is_the_serial_training(data: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Losses as in one process, to a few units of float32's rounding."""
    assert main(["train", *data, *TRAIN, "--out", str(tmp_path / "model.safetensors")]) == 0
    one, two = (models.load(path).training["losses"] for path in (tmp_path / "model.safetensors", undisturbed))
    assert np.allclose(one, two, rtol=1e-6)


def test_assimilate_is_the_serial_ensemble(data: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """analysis.nc and forecast.nc on 2 x 2 ranks and in one process: equal to float32's rounding; one set of files."""
    model = models.load(undisturbed)
    randomise(model.network, torch.Generator().manual_seed(1))  # ten steps leave it all but zero
    models.save(model, tmp_path / "model.safetensors")
    words = ["assimilate", *data, "--weights", str(tmp_path / "model.safetensors"), "--start", SPLIT, "--seed", "5"]
    words += ["--members", "3", "--sampler-steps", "6", "--count", "2", "--cycle", "2", "--observed", "0,0.2"]
    words += ["--tile", "6x8", "--halo", "3x4"]
    assert main([*words, "--out", str(tmp_path / "serial")]) == 0
    mesh = ["--mesh", "ddp=1,fsdp=1,tile=2,tp=2", "--out", str(tmp_path / "ranks")]
    ran = torchrun(4, ["-m", "storm_ref", "--", *words, *mesh])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("written:") == 1
    assert sorted(os.listdir(tmp_path / "ranks")) == sorted(os.listdir(tmp_path / "serial"))
    for name in ("analysis.nc", "forecast.nc"):
        one, two = (xr.load_dataset(tmp_path / folder / name) for folder in ("serial", "ranks"))
        for variable in one.data_vars:
            scale = float(np.abs(one[variable]).max())
            # Sampling multiplies float32's rounding, 6e-8, by a few.
            assert float(np.abs(one[variable] - two[variable]).max()) <= 2e-6 * scale, variable
    assert not list(tmp_path.glob("**/.*"))


def test_train_restarted_ends_as_undisturbed(data: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """Twice torchrun starts all ranks again; they resume from the last checkpoint and end with the same bits."""
    out, mark = tmp_path / "model.safetensors", f"restarted-{time.time_ns()}"
    words = ["train", *data, *TRAIN, "--mesh", "tile=2", "--out", str(out), "--checkpoint", str(tmp_path / "state")]
    ran = torchrun(2, [str(HERE / "faulty.py"), "--", "raise,die", "1", "3,7", *words], restarts=2, mark=mark)
    assert ran.returncode == 0, ran.stderr
    assert "this rank has had enough" in ran.stderr and "exitcode: -9" in ran.stderr
    one, two = (models.load(path) for path in (undisturbed, out))
    assert one.training["losses"] == two.training["losses"]
    for name, weight in one.network.state_dict().items():
        assert torch.equal(weight, two.network.state_dict()[name]), name
    assert left_behind(mark) == []
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "state"]


@pytest.mark.parametrize("kind", ["raise", "die", "hang", "shapes"])
def test_train_ends_when_a_rank_goes_wrong(kind: str, data: list[str], tmp_path: Path) -> None:
    """Without restarts: not zero, the rank is named, nothing half-written, nobody left."""
    out, mark = tmp_path / "model.safetensors", f"{kind}-{time.time_ns()}"
    timeout = "30" if kind in ("hang", "shapes") else "600"  # the others end without waiting for it
    words = ["train", *data, *TRAIN, "--mesh", "tile=2", "--timeout", timeout, "--out", str(out)]
    ran = torchrun(2, [str(HERE / "faulty.py"), "--", kind, "1", "3", *words], mark=mark)
    assert ran.returncode != 0
    # Of shapes that differ gloo aborts whichever rank sees it first, and torchrun says which.
    said = {"raise": "train (rank 1): this rank has had enough", "die": "SIGKILL", "hang": "no word from rank 1"}
    assert said.get(kind, "Root Cause") in ran.stderr, ran.stderr
    cause = ran.stderr[ran.stderr.rindex("Root Cause") :]
    assert re.search(r"rank +: 1" if kind in ("raise", "die") else r"rank +: [01]", cause), ran.stderr
    assert left_behind(mark) == []
    assert os.listdir(tmp_path) == []


def test_refused_on_every_rank_is_said_once(data: list[str], tmp_path: Path) -> None:
    """Arguments that do not fit the mesh are refused in one line, before any work and output. Ranks start only once."""
    refusals = {
        "--mesh tp=2 --width 15": "heads must divide width",
        "--mesh ddp=2 --batch 1": "2 data ranks for 1 samples or members",
        "--mesh tile=4": "the mesh ddp=1,fsdp=1,tile=4,tp=1 has 4 ranks, but 2 were started",
        "": "2 processes were started, and no --mesh",
    }
    words = ["train", *data, *TRAIN, "--out", str(tmp_path / "model.safetensors")]
    ran = torchrun(2, [str(HERE / "refused.py"), "--", ";".join(refusals), *words])
    assert ran.returncode != 0
    for text in refusals.values():
        assert ran.stderr.count(text) == 1, ran.stderr
    assert os.listdir(tmp_path) == []


def test_mesh_without_torchrun_is_refused(data: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["train", *data, *TRAIN, "--out", str(tmp_path / "model.safetensors"), "--mesh", "tile=2"]
    assert main(words) == 2
    assert "start it with torchrun --nproc-per-node 2" in capsys.readouterr().err
