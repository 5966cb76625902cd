"""The command line, in process: results, the same bits twice, and refusals that name the fault and the remedy."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
import xarray as xr
from safetensors.torch import load_file

from storm_ref.workbench.cli.commands import main
from storm_ref.workbench.io.data import open_file
from storm_ref.workbench.prior import model as models

SIZES = [
    "--width",
    "8",
    "--depth",
    "1",
    "--frames",
    "2",
    "--covariance-rank",
    "10",
    "--train-steps",
    "2",
    "--batch",
    "4",
]
SMALL = ["--members", "2", "--sampler-steps", "3"]
SPLIT = "2001-03-16"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.record(tmp_path_factory.mktemp("record") / "record.nc")


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    path = data.with_name("model.safetensors")
    assert main(["train", "--data", str(data), "--split", SPLIT, *SIZES, "--out", str(path)]) == 0
    return path


def _values(path: Path) -> dict[str, np.ndarray]:
    with open_file(path) as dataset:
        return {str(name): dataset[name].values for name in dataset.variables}


def _assimilate(data: Path, weights: Path, out: Path, *more: str) -> int:
    words = ["--data", str(data), "--weights", str(weights), "--start", SPLIT, "--out", str(out), *SMALL]
    return main(["assimilate", *words, *more])


@pytest.mark.slow
def test_train_writes_a_model_and_reports_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders are made, a second run has the same bits, and where there is no terminal only plain lines are printed."""
    words = ["train", "--data", str(data), "--split", SPLIT, *SIZES, "--out"]
    checkpoint = tmp_path / "c" / "run.safetensors"
    assert main([*words, str(tmp_path / "a" / "one.safetensors"), "--checkpoint", str(checkpoint)]) == 0
    printed = capsys.readouterr()
    assert "held-back part" in printed.out and "one.safetensors" in printed.out
    assert "\x1b" not in printed.out and "\r" not in printed.out and printed.err == ""
    assert len(printed.out.splitlines()) == 2, "progress was printed"
    assert main([*words, str(tmp_path / "two.safetensors")]) == 0
    one, two = (load_file(path) for path in (tmp_path / "a" / "one.safetensors", tmp_path / "two.safetensors"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)
    assert checkpoint.exists()


@pytest.mark.slow
def test_assimilate_repeats_bit_for_bit(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed gives the same result, and another seed gives another."""
    more = ["--observed", "0,0.2", "--count", "2", "--cycle", "2"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert _assimilate(data, weights, tmp_path / name, *more, "--seed", seed) == 0
    a, b, c = (_values(tmp_path / name / "analysis.nc") for name in "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a) and set(a) == set(b)
    assert not np.array_equal(a["a"], c["a"])
    scores = [json.loads((tmp_path / name / "result.json").read_text()) for name in "abc"]
    assert all(score.pop("wall_s") > 0 for score in scores)
    assert scores[0] == scores[1] and scores[0]["fractions"] != scores[2]["fractions"]
    assert scores[0]["seed"] == 1 and scores[0]["data"] == str(data) and scores[0]["members"] == 2
    printed = capsys.readouterr()
    assert "CRPS" in printed.out and "\x1b" not in printed.out and "\r" not in printed.out and printed.err == ""
    assert f"written: {tmp_path / 'a' / 'result.json'}, {tmp_path / 'a' / 'analysis.nc'}" in printed.out
    with open_file(tmp_path / "c" / "analysis.nc") as dataset:
        assert dataset.attrs["seed"] == "2" and "--seed 2" in dataset.attrs["command"]
        assert dataset.attrs["command"].startswith("python -m storm_ref assimilate --data")
        assert "torch" in dataset.attrs["source"] and dataset["a"].dims[0] == "member"


@pytest.mark.slow
def test_assimilate_obs_std_and_guidance_reach_the_draw(data: Path, weights: Path, tmp_path: Path) -> None:
    more = ["--observed", "0.5", "--count", "1", "--cycle", "0"]
    for name, words in {"a": [], "b": ["--obs-std", "0.5,3"], "c": ["--guidance", "pigdm"]}.items():
        assert _assimilate(data, weights, tmp_path / name, *more, *words) == 0
    a, b, c = (_values(tmp_path / name / "analysis.nc")["b"] for name in "abc")
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - c).max() > 1e-3
    assert json.loads((tmp_path / "c" / "result.json").read_text())["guidance"] == "pigdm"


def test_assimilate_by_tiles(data: Path, weights: Path, tmp_path: Path) -> None:
    """Tiles of a given size are used: they change the draw, but not the Gaussian part of it."""
    more = ["--observed", "0.5", "--count", "1", "--cycle", "0"]
    model = models.load(weights)
    with torch.no_grad():  # two steps leave the network all but zero, and a zero has no tiles
        for weight in model.network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    models.save(model, tmp_path / "lively.safetensors")
    weights = tmp_path / "lively.safetensors"
    tiles = ["--tile", "6x8", "--halo", "6x4", "--blend", "0x4"]
    assert _assimilate(data, weights, tmp_path / "a", *more) == 0
    assert _assimilate(data, weights, tmp_path / "b", *more, *tiles) == 0
    a, b = (_values(tmp_path / name / "analysis.nc")["a"] for name in "ab")
    assert 0.01 < np.abs(a - b).max() < 0.5 * np.abs(a - a.mean()).max()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "stations.csv"
    path.write_text(
        "time,latitude,longitude,value,error_std,variable\n"
        "2001-03-16T00:00,55.5,3.5,290.0,0.1,a\n"
        "2001-03-16T00:00,5.0,3.5,290.0,0.1,a\n"
        "2001-03-16T06:00,52.0,8.0,277.0,0.1,b\n"
    )
    return path


def test_assimilate_stations(
    data: Path, weights: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each time of the table has an analysis, drawn towards its values, and what is left out is reported."""
    words = ["--data", str(data), "--weights", str(weights), *SMALL, "--sampler-steps", "12", "--stations", str(table)]
    assert main(["assimilate", *words, "--out", str(tmp_path / "a")]) == 0
    analysis = _values(tmp_path / "a" / "analysis.nc")
    np.testing.assert_array_equal(analysis["time"], np.array(["2001-03-16T00", "2001-03-16T06"], "datetime64[ns]"))
    printed = capsys.readouterr().out
    assert "2001-03-16T00:00: 1 of 3 observations are used" in printed and "1 outside the domain" in printed
    assert abs(analysis["b"][:, 1, 8, 8].mean() - 277) < 0.3
    assert main(["assimilate", *words, "--start", "2001-03-16T06", "--out", str(tmp_path / "b")]) == 0
    assert _values(tmp_path / "b" / "analysis.nc")["time"].tolist() == analysis["time"][1:].tolist()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["analysis.nc"]


def test_assimilate_mask(data: Path, weights: Path, tmp_path: Path) -> None:
    """The record is observed where the constant field is above 1/2, and nowhere else."""
    more = ["--mask", "network", "--count", "2", "--obs-std", "0.01", "--sampler-steps", "12"]
    assert _assimilate(data, weights, tmp_path / "a", *more) == 0
    analysis = _values(tmp_path / "a" / "analysis.nc")
    with open_file(data) as dataset:
        truth = dataset["a"].sel(time=analysis["time"]).values
        mask = dataset["network"].values > 0.5
    error = np.abs(analysis["a"].mean(0) - truth)
    assert len(analysis["time"]) == 2
    assert error[:, mask].mean() < 0.05 < 0.2 < error[:, ~mask].mean()


def test_forecast_then_verify(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each lead time has a row of scores, all of them together have one, and the file holds the same numbers."""
    out = tmp_path / "new" / "forecast.nc"
    words = ["--data", str(data), "--weights", str(weights), "--start", SPLIT, "--lead", "3", *SMALL]
    assert main(["forecast", *words, "--out", str(out)]) == 0
    assert _values(out)["a"].shape == (2, 3, 12, 16)
    scores = tmp_path / "scores.json"
    assert main(["verify", "--analysis", str(out), "--data", str(data), "--out", str(scores)]) == 0
    content = json.loads(scores.read_text())
    assert list(content["by_time"]) == ["2001-03-16T00:00", "2001-03-16T06:00", "2001-03-16T12:00"]
    with open_file(data) as dataset:
        truth = dataset["b"].sel(time=_values(out)["time"]).values
    weight = np.cos(np.deg2rad(60 - np.arange(12.0)))[:, None] * np.ones(16)
    square = (_values(out)["b"].astype(np.float64).mean(0) - truth) ** 2
    rmse = [float(np.sqrt((s * weight).sum() / weight.sum())) for s in square]
    assert [row["b"]["rmse"] for row in content["by_time"].values()] == pytest.approx(rmse)
    assert content["all"]["b"]["rmse"] == pytest.approx(float(np.sqrt(np.mean(np.square(rmse)))))
    assert "2001-03-16T12:00" in capsys.readouterr().out


def test_forecast_beyond_the_record(data: Path, weights: Path, tmp_path: Path) -> None:
    """A forecast starts behind the newest data, where there is no truth yet."""
    words = ["--data", str(data), "--weights", str(weights), "--start", "2001-03-21", "--lead", "2", *SMALL]
    assert main(["forecast", *words, "--out", str(tmp_path / "f.nc")]) == 0
    expected = np.array(["2001-03-21T00", "2001-03-21T06"], "datetime64[ns]")
    np.testing.assert_array_equal(_values(tmp_path / "f.nc")["time"], expected)


@pytest.mark.slow
def test_trial_on_a_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial runs end to end on a grid that has to be padded, and the padding is in no file."""
    data = synthetic.record(tmp_path / "odd.nc", (11, 15))
    words = [
        "--data",
        str(data),
        "--split",
        SPLIT,
        "--stop",
        "2001-03-16T12",
        "--observed",
        "0,0.3",
        "--grid-mismatch",
        "pad",
    ]
    out = ["--patch", "4x4", "--out", str(tmp_path / "out")]
    assert main(["trial", *words, *SIZES, *SMALL, *out]) == 0
    assert _values(tmp_path / "out" / "analysis.nc")["a"].shape == (2, 2, 11, 15)
    printed = capsys.readouterr().out
    assert "optimal interpolation" in printed and "Gaussian, network off" in printed
    assert "persistence: RMSE" in printed and "\x1b" not in printed
    assert json.loads((tmp_path / "out" / "result.json").read_text())["fractions"]["0.3"]["crps"] > 0


def _refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], *names: str) -> None:
    """Check for exit code 2, one line on standard error with these words in it, and an unchanged folder."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}, set(folder.rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "", "a refusal was preceded by results"
    assert printed.err.startswith(f"storm_ref {words[0]}: ") and len(printed.err.splitlines()) == 1, printed.err
    for name in names:
        assert name in printed.err, printed.err
    assert before == ({p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}, set(folder.rglob("*")))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--variables", "a,rain"], ("no field 'rain'", "there are")),
        (["--variables", "b,a"], ("the model is of ('a', 'b')", "choose")),
        (["--observed", "0.001"], ("empty observations", "choose a fraction")),
        (["--observed", "1"], ("fractions observed", "[0, 1)")),
        (["--obs-std", "1,2,3"], ("--obs-std has 3 numbers", "one for each of a, b")),
        (["--obs-std", "0"], ("error std must be positive",)),
        (["--obs-std", "0.3,-1"], ("error std must be positive",)),
        (["--start", "2002-01-01"], ("--start 2002-01-01T00:00 lies outside the record", "2001-03-01")),
        (["--start", "1999-01-01"], ("lies outside the record",)),
        (["--cycle", "90"], ("a cycle of 90 steps", "fewer")),
        (["--count", "0"], ("at least one time",)),
        (["--members", "1"], ("at least 2 members",)),
        (["--tile", "5x8"], ("5", "patch")),
        (["--halo", "4"], ("--halo and --blend", "--tile")),
        (["--mask", "nowhere"], ("mask is False everywhere",)),
        (["--mask", "roads"], ("no field 'roads'",)),
        (["--mask", "network", "--count", "0"], ("--count must be at least 1",)),
        (["--threads", "0"], ("--threads must be at least 1",)),
        (["--seed", "-1"], ("seed",)),
    ],
)
def test_assimilate_invalid_arguments(
    more: list[str],
    names: tuple[str, ...],
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["assimilate", "--data", str(data), "--weights", str(weights), "--start", SPLIT, *SMALL]
    _refused([*words, "--out", str(tmp_path / "out"), *more], tmp_path, capsys, *names)


def test_assimilate_invalid_files(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged, foreign and missing files are named, and a pickle is never run."""
    (tmp_path / "cut.nc").write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (tmp_path / "noise.nc").write_bytes(b"\x00 no NetCDF" * 50)
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "trap.safetensors").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    synthetic.record(tmp_path / "other.nc", (12, 20))
    cases: list[tuple[Path, Path, tuple[str, ...]]] = [
        (tmp_path / "cut.nc", weights, ("cut.nc", "truncated", "fetch")),
        (tmp_path / "noise.nc", weights, ("noise.nc", "corrupt")),
        (tmp_path / "none.nc", weights, ("none.nc", "no such file", "check the path")),
        (data, tmp_path / "cut.safetensors", ("cut.safetensors", "cannot be read", "again")),
        (data, tmp_path / "trap.safetensors", ("trap.safetensors", "cannot be read as safetensors")),
        (data, tmp_path / "none.safetensors", ("none.safetensors", "check the path")),
        (tmp_path / "other.nc", weights, ("longitudes", "not the model's", "interpolate")),
    ]
    for record, model, names in cases:
        words = ["--data", str(record), "--weights", str(model), "--start", SPLIT, *SMALL]
        _refused(["assimilate", *words, "--out", str(tmp_path / "out")], tmp_path, capsys, *names)
    assert not (tmp_path / "sprung").exists()


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_trial_invalid_halo_that_wraps_on_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 16 columns round the globe, a core of 8 and halos of 8, the tile would meet itself."""
    data = synthetic.record(tmp_path / "globe.nc", periodic=True)
    words = ["trial", "--data", str(data), "--split", SPLIT, *SIZES, *SMALL, "--patch", "4x4"]
    words = [*words, "--tile", "12x8", "--halo", "0x8", "--out", str(tmp_path / "out")]
    _refused(words, tmp_path, capsys, "halo", "wrap")


def test_assimilate_invalid_stations(
    data: Path, weights: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["assimilate", "--data", str(data), "--weights", str(weights), *SMALL, "--out", str(tmp_path / "out")]
    words = [*words, "--stations", str(table)]
    _refused([*words, "--start", "2001-03-18"], tmp_path, capsys, "stations.csv", "empty observations", "not within")
    table.write_text(table.read_text().splitlines()[0] + "\n")
    _refused(words, tmp_path, capsys, "stations.csv", "empty observations", "no row")
    table.write_text("time,latitude,value\n")
    _refused(words, tmp_path, capsys, "stations.csv", "no column for longitude")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--split", "2002-01-01"], ("--split 2002-01-01T00:00 lies outside the record",)),
        (["--split", "1999-01-01"], ("lies outside the record",)),
        (["--split", "2001-03-02"], ("training times are too few", "at least 16")),
        ([], ("--split DATE",)),
        (["--split", SPLIT, "--patch", "5x4"], ("patch 5 x 4 does not divide", "grid mismatch")),
        (["--split", SPLIT, "--width", "0"], ("",)),
        (["--split", SPLIT, "--frames", "0"], ("frames must be at least 1",)),
        (["--split", SPLIT, "--time-step", "90min"], ("finer than the data",)),
        (["--split", SPLIT, "--static", "sea"], ("no field 'sea'",)),
    ],
)
@pytest.mark.parametrize("command", ["train", "trial"])
def test_train_invalid_arguments(
    command: str,
    more: list[str],
    names: tuple[str, ...],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [command, "--data", str(data), *SIZES, "--out", str(tmp_path / "new" / "out"), *more]
    _refused(words, tmp_path, capsys, *names)


def test_invalid_out_is_refused_before_the_work(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where a folder has to be, or the name has no suffix that tells the format."""
    (tmp_path / "file").write_text("here")
    for words in (
        ["forecast", "--weights", str(weights), "--out", str(tmp_path / "forecast.txt")],
        ["forecast", "--weights", str(weights), "--out", str(tmp_path / "file" / "f.nc")],
        ["train", *SIZES, "--split", SPLIT, "--out", str(tmp_path / "file" / "m.safetensors")],
        ["train", *SIZES, "--split", SPLIT, "--out", str(tmp_path)],
        ["trial", *SIZES, "--split", SPLIT, "--out", str(tmp_path / "file")],
        ["assimilate", "--weights", str(weights), "--start", SPLIT, "--out", str(tmp_path / "file" / "x" / "y")],
    ):
        _refused([*words, "--data", str(data)], tmp_path, capsys, f"--out {tmp_path}")
    words = ["train", *SIZES, "--split", SPLIT, "--data", str(data), "--out", str(tmp_path / "m.safetensors")]
    state = str(tmp_path / "file" / "state")
    _refused([*words, "--checkpoint", state], tmp_path, capsys, f"--checkpoint {state}", "not a folder")


def test_forecast_and_verify_invalid(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["forecast", "--data", str(data), "--weights", str(weights), "--out", str(tmp_path / "f.nc")]
    _refused([*words, "--start", SPLIT, "--lead", "0"], tmp_path, capsys, "--lead must be at least 1")
    _refused([*words], tmp_path, capsys, "--start DATE")
    _refused(["verify", "--analysis", str(data), "--data", str(data)], tmp_path, capsys, "record.nc", "dimensions")
    missing = str(tmp_path / "f.nc")
    _refused(["verify", "--analysis", missing, "--data", str(data)], tmp_path, capsys, "f.nc", "no such file")


def test_full_disk_is_reported_and_the_old_file_kept(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.nc").write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    words = ["--data", str(data), "--weights", str(weights), "--start", SPLIT, "--lead", "1", *SMALL]
    _refused(["forecast", *words, "--out", str(tmp_path / "f.nc")], tmp_path, capsys, "No space left", "free space")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--patch", "8by8"], "'8by8' is not a size such as 8 or 8x16"),
        (["train", "--time-step", "6"], "write a whole number above 0 and min, h or d"),
        (["train", "--split", "yesterday"], "'yesterday' is not a date such as 2019-03-25"),
        (["train", "--split", "2001-02-30"], "is not a date"),
        (["assimilate", "--observed", "some"], "is not a list of numbers"),
        (["assimilate", "--guidance", "3dvar"], "invalid choice: '3dvar'"),
        (["assimilate", "--mask", "a", "--stations", "b"], "not allowed with argument"),
        (["retrain"], "invalid choice: 'retrain'"),
    ],
)
def test_main_invalid_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The parser's own refusals give the reason in the project's words, not the name of a function."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


OLD_NAMES = [
    ("train", "--rank", "--covariance-rank"),
    ("trial", "--rate", "--learning-rate"),
    ("train", "--step", "--time-step"),
    ("trial", "--steps", "--sampler-steps"),
    ("assimilate", "--steps", "--sampler-steps"),
    ("train", "--mix", "--mixed-transitions"),
    ("forecast", "--fit", "--grid-mismatch"),
    ("train", "--recompute", "--activation-checkpointing"),
]


@pytest.mark.parametrize(("command", "old", "new"), OLD_NAMES)
def test_main_invalid_old_option_names_the_new_one(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the value as a word of its own, behind an equals sign, and without any."""
    for words in ([old, "4"], [f"{old}=4"], [old]):
        with pytest.raises(SystemExit) as stopped:
            main([command, *words])
        assert stopped.value.code == 2
        assert f"{old} is now called {new}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--covariance-ran", "4"], ["--recomp"], ["--ste=6h"], ["--learning", "1e-3"]])
def test_main_invalid_shortened_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *words])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, "train", "assimilate", "forecast", "verify", "trial"])
def test_help_reads_well(
    command: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option is explained within 80 columns; a default stands once, and never as None or an installed path."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    assert max(len(line) for line in page.splitlines()) <= 80
    text = " ".join(page.split())
    assert "None" not in text and "tiny_data" not in text
    assert "default: all) (default" not in text
    assert not any(f" {old} " in text for _, old, _ in OLD_NAMES)
    if command is None:
        assert all(name in text for name in ("train", "assimilate", "forecast", "verify", "trial"))
    else:
        assert "--threads N number of CPU threads; results are bitwise reproducible for a given number" in text


def test_double_dash_before_the_command_is_nothing(data: Path, weights: Path, tmp_path: Path) -> None:
    """It keeps torchrun from reading the options of the command; whether torchrun passes it on depends on Python."""
    words = ["forecast", "--data", str(data), "--weights", str(weights), "--start", SPLIT, "--lead", "1", *SMALL]
    for name, dash in (("one", []), ("two", ["--"])):
        assert main([*dash, *words, "--out", str(tmp_path / f"{name}.nc")]) == 0
    one, two = (_values(tmp_path / f"{name}.nc") for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
