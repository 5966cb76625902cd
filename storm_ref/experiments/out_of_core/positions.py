"""Positions of patch centres, made for the part of the domain that is asked for."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.experiments.out_of_core.arrays import ArrayLike, Runs, expect, read_piece
from storm_ref.tokenisation import sphere_position

__all__ = ["Positions", "positions_of"]


@dataclass(frozen=True)
class Positions:
    """Positions on the sphere from cosines and sines of the axes, or those that were given."""

    lat: Float[Tensor, "rows 3"]  # cos, 0, sin
    lon: Float[Tensor, "cols 3"]  # cos, sin, 0
    given: ArrayLike | None

    @property
    def rows(self) -> int:
        """The number of patches along a meridian."""
        return self.lat.shape[0]

    @property
    def cols(self) -> int:
        """The number of patches along a parallel."""
        return self.lon.shape[0]

    def __call__(self, rows: Runs, cols: Runs) -> Float[Tensor, "r c p"]:
        """The positions of these patches."""
        if self.given is not None:
            return read_piece(self.given, rows, cols, grid_first=True)
        lat = torch.cat([self.lat[start:stop] for start, stop in rows])[:, None]
        lon = torch.cat([self.lon[start:stop] for start, stop in cols])[None]
        x = lat[..., 0] * lon[..., 0]
        y = lat[..., 0] * lon[..., 1]
        return torch.stack([x, y, lat[..., 2].expand_as(x)], -1)


def positions_of(
    config: StormConfig,
    latitude: Float[Tensor, " h"],
    longitude: Float[Tensor, " w"],
    given: ArrayLike | None,
) -> Positions:
    """The positions of a grid, those of `given` if there is one.

    Raises ValueError where they do not fit the network. The axes' cosines and sines are positions on the meridian of
    Greenwich and on the equator, where the other factor is 1.
    """
    greenwich = torch.zeros(config.patch[1])
    equator = torch.zeros(config.patch[0])
    lat = sphere_position(latitude, greenwich, config.patch)[:, 0]
    lon = sphere_position(equator, longitude, config.patch)[0]
    positions = Positions(lat, lon, given)
    features = config.position_features
    if given is not None:
        expect("position", given, (positions.rows, positions.cols, features))
    elif features != 3:
        raise ValueError(f"the network wants {features} coordinates of a point and a sphere has 3; give a position")
    return positions
