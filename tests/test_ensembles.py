"""Ensembles in files: they are read as written, paired with the truth by time, and anything else is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
import xarray as xr

from storm_ref.workbench.io.data import to_dataset, write
from storm_ref.workbench.io.ensembles import match, read_ensemble

FIELDS = synthetic.fields(days=4)
MEMBERS = np.random.default_rng(0).normal(280, 1, (3, 4, 2, 12, 16)).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(to_dataset(MEMBERS, FIELDS, FIELDS.time[2:6]), tmp_path / "ensemble.nc")
    return tmp_path / "ensemble.nc"


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_read_ensemble_round_trip(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ensemble{suffix}"
    write(to_dataset(MEMBERS, FIELDS, FIELDS.time[2:6]), path)
    back = read_ensemble(path)
    assert set(back.variables) == {"a", "b"}  # in the order of the file, which a folder does not keep
    for c, name in enumerate("ab"):
        np.testing.assert_array_equal(back.values[:, :, back.variables.index(name)].numpy(), MEMBERS[:, :, c])
    np.testing.assert_array_equal(back.time, FIELDS.time[2:6])
    np.testing.assert_array_equal(back.latitude, FIELDS.latitude)
    np.testing.assert_array_equal(back.longitude, FIELDS.longitude)


def test_match_takes_the_common_times(file: Path) -> None:
    """The truth starts later and has times that the ensemble lacks: frames are paired by time, not by index."""
    gaps = synthetic.fields(days=4, gaps=True)
    truth = replace(gaps, time=gaps.time[4:], values=gaps.values[4:], valid=gaps.valid[4:])
    part, target, valid = match(read_ensemble(file), truth)
    np.testing.assert_array_equal(part.time, FIELDS.time[4:6])
    np.testing.assert_array_equal(part.values.numpy(), MEMBERS[:, 2:])
    np.testing.assert_array_equal(target.numpy(), FIELDS.values[4:6])
    np.testing.assert_array_equal(valid, gaps.valid[4:6])


def test_match_invalid_truth(file: Path) -> None:
    ensemble = read_ensemble(file)
    cases = {
        "differ in latitude": replace(FIELDS, latitude=FIELDS.latitude + 1),
        "differ in longitude": replace(FIELDS, longitude=FIELDS.longitude + 1),
        r"ensemble is of \('a', 'b'\), the truth of \('a', 'c'\)": replace(FIELDS, variables=("a", "c")),
        "no time in common": replace(FIELDS, time=FIELDS.time + np.timedelta64(1, "h")),
    }
    for message, truth in cases.items():
        with pytest.raises(ValueError, match=message):
            match(ensemble, truth)


def test_read_ensemble_invalid_file(file: Path, tmp_path: Path) -> None:
    whole = xr.open_dataset(file, engine="h5netcdf").load()
    whole.close()
    holed = whole.copy(deep=True)
    holed["a"][1, 0, 0, 0] = np.nan
    wrong = {
        "no variable has the dimensions": whole.isel(member=0),
        "coordinates": whole.drop_vars("latitude"),
        "at least 2 members and finite values, got 1": whole.isel(member=[0]),
        "finite values, got 3": holed,
    }
    for message, dataset in wrong.items():
        dataset.to_netcdf(tmp_path / "wrong.nc", engine="h5netcdf")
        with pytest.raises(ValueError, match=f"wrong.nc.*{message}.*give a file that assimilate"):
            read_ensemble(tmp_path / "wrong.nc")
    (tmp_path / "wrong.nc").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"wrong\.nc: cannot be read"):
        read_ensemble(tmp_path / "wrong.nc")
    with pytest.raises(ValueError, match=r"none\.nc: there is no such file"):
        read_ensemble(tmp_path / "none.nc")
