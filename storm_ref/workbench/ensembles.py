"""Ensembles on disk: read what `assimilate` and `forecast` wrote, and match it with the truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from storm_ref.workbench.data import Fields, open_file

__all__ = ["Ensemble", "match", "read_ensemble"]

_DIMS = ("member", "time", "latitude", "longitude")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members of every variable, in the file's units."""

    variables: tuple[str, ...]
    values: Float[Tensor, "m t c h w"]
    time: Shaped[np.ndarray, " t"]
    latitude: Shaped[np.ndarray, " h"]
    longitude: Shaped[np.ndarray, " w"]


def read_ensemble(path: Path) -> Ensemble:
    """Read a file with dimensions (member, time, latitude, longitude). Raises ValueError naming the file otherwise."""
    with open_file(path) as dataset:
        names = tuple(str(name) for name, array in dataset.data_vars.items() if array.dims == _DIMS)
        if not names:
            raise ValueError(f"{path}: no variable has the dimensions {_DIMS}; give a file that assimilate or forecast wrote")
        values = np.stack([dataset[name].values for name in names], 2)
        axes = (dataset["time"].values.astype("datetime64[ns]"), dataset["latitude"].values, dataset["longitude"].values)
    return Ensemble(names, torch.from_numpy(np.array(values, np.float32)), *axes)


def match(ensemble: Ensemble, truth: Fields) -> tuple[Ensemble, Float[Tensor, "t c h w"], Shaped[np.ndarray, "t c h w"]]:
    """The times that both have: the ensemble there, the truth, and where the truth is valid.

    Raises ValueError when grids or variables differ, or no time is common.
    """
    if truth.variables != ensemble.variables:
        raise ValueError(f"the ensemble is of {ensemble.variables}, the truth of {truth.variables}: choose these variables")
    for name in ("latitude", "longitude"):
        mine, theirs = getattr(ensemble, name), getattr(truth, name)
        if mine.shape != theirs.shape or not np.allclose(mine, theirs, atol=1e-4):
            raise ValueError(f"ensemble and truth differ in {name}: interpolate one to the grid of the other")
    time, ours, theirs = np.intersect1d(ensemble.time, truth.time, return_indices=True)
    if not len(time):
        raise ValueError("ensemble and truth have no time in common")
    part = Ensemble(ensemble.variables, ensemble.values[:, ours], time, ensemble.latitude, ensemble.longitude)
    return part, torch.from_numpy(truth.values[theirs]), truth.valid[theirs]
