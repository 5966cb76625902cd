"""Ensembles in files: read what `assimilate`, `trial` and `forecast` wrote, and pair it with the truth."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from storm_ref.workbench.io.data import Fields, open_file

__all__ = ["Ensemble", "match", "read_ensemble"]

_DIMS = ("member", "time", "latitude", "longitude")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The members of every variable, in the units of the file."""

    variables: tuple[str, ...]
    values: Float[Tensor, "m t c h w"]
    time: Shaped[np.ndarray, " t"]
    latitude: Shaped[np.ndarray, " h"]
    longitude: Shaped[np.ndarray, " w"]


def read_ensemble(path: Path) -> Ensemble:
    """Read the variables with dimensions (member, time, latitude, longitude).

    Raises ValueError, naming the file, when it has no such variable, fewer than 2 members, or values that are not
    finite.
    """
    remedy = "give a file that assimilate, trial or forecast wrote"
    with open_file(path) as dataset:
        names = tuple(str(name) for name, array in dataset.data_vars.items() if array.dims == _DIMS)
        if not names or not set(_DIMS[1:]) <= set(dataset.coords):
            raise ValueError(f"{path}: no variable has the dimensions and coordinates {_DIMS}; {remedy}")
        try:
            values = np.stack([dataset[name].values for name in names], 2).astype(np.float32)
            time = dataset["time"].values.astype("datetime64[ns]")
            latitude = dataset["latitude"].values
            longitude = dataset["longitude"].values
        except Exception as error:  # a damaged chunk is noticed only here, by whatever error its decoder raises
            raise ValueError(f"{path}: cannot be read ({error}): truncated or corrupt; {remedy}") from error
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{path}: scores need at least 2 members and finite values, got {len(values)}; {remedy}")
    return Ensemble(names, torch.from_numpy(values), time, latitude, longitude)


def match(ensemble: Ensemble, truth: Fields) -> tuple[Ensemble, Float[Tensor, "t c h w"], Bool[np.ndarray, "t c h w"]]:
    """Keep the times that ensemble and truth share: returns the ensemble, the truth, and where the truth is valid.

    Raises ValueError when grids or variables differ, or no time is shared.
    """
    if truth.variables != ensemble.variables:
        raise ValueError(f"the ensemble is of {ensemble.variables}, the truth of {truth.variables}: choose the same")
    for name in ("latitude", "longitude"):
        drawn = getattr(ensemble, name)
        true = getattr(truth, name)
        if drawn.shape != true.shape or not np.allclose(drawn, true, atol=1e-4):
            raise ValueError(f"ensemble and truth differ in {name}: interpolate one to the grid of the other")
    time, in_ensemble, in_truth = np.intersect1d(ensemble.time, truth.time, return_indices=True)
    if not len(time):
        raise ValueError("ensemble and truth have no time in common: give the record of the ensemble's times")
    part = replace(ensemble, values=ensemble.values[:, in_ensemble], time=time)
    return part, torch.from_numpy(truth.values[in_truth]), truth.valid[in_truth]
