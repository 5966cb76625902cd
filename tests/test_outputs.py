"""The files that a command writes: all of them, readable, without padding; and the old ones when the disk is full."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import xarray as xr
from matplotlib.figure import Figure

from storm_ref.workbench.cli import outputs
from storm_ref.workbench.cli.outputs import write_demonstration, write_json, write_trial
from storm_ref.workbench.io.data import Fields, open_file, targets
from storm_ref.workbench.run.analysis import DrawSettings
from storm_ref.workbench.run.demonstration import Demonstration, DemonstrationSettings, demonstrate
from storm_ref.workbench.run.training import TrainSettings, prepare, train
from storm_ref.workbench.run.trial import TrialSettings, run_trial

PADDED = (2, 3)
DRAWING = DrawSettings(members=2, seed=3, obs_std=0.5, sampler_steps=3)
TRAINING = TrainSettings(width=8, depth=1, frames=2, covariance_rank=10, steps=2, batch=4)
ABOUT = {"command": "python -m storm_ref assimilate", "source": "storm_ref 0 (torch 0)", "seed": "3"}
PICTURES = ("maps.png", "spread.png", "crps.png")


def _fields() -> Fields:
    """Fields of wind with a vortex, whose last rows and columns are padding."""
    plain = synthetic.fields()
    east, north = np.arange(16) - 7.0, 6.0 - np.arange(12)
    bump = np.exp(-(east[None] ** 2 + north[:, None] ** 2) / 18)
    wind = np.stack([-10 * north[:, None] * bump, 10 * east[None] * bump]).astype(np.float32)
    valid = np.ones_like(plain.valid)
    valid[:, :, -PADDED[0] :], valid[:, :, :, -PADDED[1] :] = False, False
    return replace(
        plain,
        values=0.3 * (plain.values - 280) + wind,
        valid=valid,
        variables=("u10", "v10"),
        units=("m s-1",) * 2,
        attributes=({"standard_name": "eastward_wind"}, {"standard_name": "northward_wind"}),
        padding=PADDED,
    )


FIELDS = _fields()


@pytest.fixture(scope="module")
def result() -> Demonstration:
    when = targets(FIELDS.time, synthetic.STEP, None, synthetic.SPLIT, TRAINING.frames)
    model = train(*prepare(FIELDS, when, synthetic.STEP, TRAINING), TRAINING)
    settings = DemonstrationSettings((0.0, 0.1, 0.2, 0.5), synthetic.SPLIT, count=2, cycle=3, drawing=DRAWING)
    return demonstrate(model, FIELDS, settings)


def _check_pictures(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name


def test_write_demonstration_leaves_every_file(result: Demonstration, tmp_path: Path) -> None:
    """The files returned are those in the folder; result.json holds the scores and the source of the data."""
    written = write_demonstration(result, FIELDS, ABOUT, tmp_path / "new" / "out", "winds.nc")
    names = {"result.json", "analysis.nc", "forecast.nc", *PICTURES, "tracks.png", "intensity.png"}
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == names == {p.name for p in written}
    _check_pictures(tmp_path / "new" / "out", (*PICTURES, "tracks.png", "intensity.png"))
    content = json.loads((tmp_path / "new" / "out" / "result.json").read_text())
    assert content == json.loads(json.dumps({**result.scores, "data": "winds.nc"}))
    promised = {"fractions", "crps_reduction", "guidance", "members", "steps", "wall_s", "data", "seed"}
    assert promised <= set(content) and set(content["fractions"]) == {"0.0", "0.1", "0.2", "0.5"}


def test_write_demonstration_fields(result: Demonstration, tmp_path: Path) -> None:
    """Both are CF NetCDF without the padding: the largest fraction is the analysis, none observed the forecast."""
    write_demonstration(result, FIELDS, ABOUT, tmp_path, "winds.nc")
    for name, fraction in (("analysis.nc", 0.5), ("forecast.nc", 0.0)):
        with open_file(tmp_path / name) as dataset:
            assert dataset["u10"].dims == ("member", "time", "latitude", "longitude")
            assert dataset["v10"].attrs == {"standard_name": "northward_wind", "units": "m s-1"}
            assert dataset["latitude"].attrs["units"] == "degrees_north"
            assert dataset.attrs == {"Conventions": "CF-1.11", **ABOUT, "fraction_observed": f"{fraction:g}"}
            expected = result.analyses[fraction][:, :, 1, : -PADDED[0], : -PADDED[1]].numpy()
            np.testing.assert_array_equal(dataset["v10"].values, expected)
            np.testing.assert_array_equal(dataset["time"].values, result.time)
            np.testing.assert_array_equal(dataset["longitude"].values, FIELDS.longitude[:-3])


def test_pictures_leave_the_padding_out(result: Demonstration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither in the maps nor among the points of spread against error."""
    drawn: dict[str, Any] = {}
    maps = outputs.figures.maps
    spread_against_error = outputs.figures.spread_against_error

    def record_maps(**arguments: Any) -> Figure:
        drawn.update({name: np.shape(value) for name, value in arguments.items() if np.ndim(value)})
        return maps(**arguments)

    def record_pairs(pairs: Any, *arguments: Any) -> Figure:
        drawn["pairs"] = {name: (len(spread), len(error)) for name, (spread, error) in pairs.items()}
        return spread_against_error(pairs, *arguments)

    monkeypatch.setattr(outputs.figures, "maps", record_maps)
    monkeypatch.setattr(outputs.figures, "spread_against_error", record_pairs)
    write_demonstration(result, FIELDS, ABOUT, tmp_path, "winds.nc")
    unobserved = {"forecast only": 130, "10% observed": 117, "20% observed": 104, "50% observed": 65}
    assert drawn == {
        "latitude": (10,),
        "longitude": (13,),
        "truth": (10, 13),
        "forecast": (10, 13),
        "analysis": (10, 13),
        "observed": (10, 13),
        "pairs": {name: (2 * 2 * points, 2 * 2 * points) for name, points in unobserved.items()},
    }


def test_write_trial_leaves_every_file(tmp_path: Path) -> None:
    settings = TrialSettings(
        split=synthetic.SPLIT,
        time_step=synthetic.STEP,
        fractions=(0.0, 0.2),
        stop=np.datetime64("2001-03-17"),
        drawing=DRAWING,
        training=TRAINING,
    )
    written = write_trial(run_trial(FIELDS, settings), FIELDS, ABOUT, tmp_path, "winds.nc")
    names = {"result.json", "analysis.nc", "forecast.nc", "training.png", *PICTURES}
    assert {p.name for p in tmp_path.iterdir()} == names == {p.name for p in written}
    _check_pictures(tmp_path, (*PICTURES, "training.png"))
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["data"] == "winds.nc" and set(content["crps_reduction"]) == {"0.2"}
    assert set(content["optimal_interpolation"]["fractions"]) == set(content["fractions"]) == {"0.0", "0.2"}


@pytest.mark.parametrize("method", ["json", "netcdf", "png"])
def test_write_demonstration_invalid_full_disk(
    result: Demonstration, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file of each kind stays, half of a new one is not left beside it, and the reason is given."""
    write_demonstration(result, FIELDS, ABOUT, tmp_path, "old.nc")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(owner: object, *arguments: object, **_: object) -> None:
        path = owner if isinstance(owner, Path) else arguments[0]
        assert isinstance(path, Path)
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    writers = {"json": (Path, "write_text"), "netcdf": (xr.Dataset, "to_netcdf"), "png": (Figure, "savefig")}
    monkeypatch.setattr(*writers[method], full)
    with pytest.raises(OSError, match=r"could not be written.*No space left.*free space"):
        write_demonstration(result, FIELDS, ABOUT, tmp_path, "new.nc")
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) == set(before), "something temporary was left"
    kept = {"json": ["result.json"], "netcdf": list(before), "png": ["maps.png", "result.json"]}[method]
    assert all(after[name] == before[name] for name in kept)
    assert json.loads((tmp_path / "result.json").read_text())["data"] == "old.nc"


def test_write_json_invalid_number(tmp_path: Path) -> None:
    """NaN is not JSON: nothing is written, not even the folder."""
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "new" / "x.json", {"crps": float("nan")})
    assert not (tmp_path / "new").exists()
