"""Configuration of a STORM network: its sizes, and the presets whose sizes the paper quotes.

The paper names three sizes by embedding and layers: "10M" (256, 6), "200M" (1024, 8) and "10B" (3072, 40). A block of
self-attention (4 D^2), cross-attention (4 D^2), an MLP of ratio 4 (8 D^2) and adaptive layer norm with three outputs
for each of three sub-layers (9 D^2) has 25 D^2 weights, which gives 9.8 M, 210 M and 9.4 B ([NET-7]). We infer from
these numbers that this is the paper's block.
"""

import math
from dataclasses import dataclass

__all__ = ["StormConfig", "storm_10b", "storm_10m", "storm_200m", "tiny"]


@dataclass(frozen=True)
class StormConfig:
    """Sizes and fixed choices of one network.

    A checkpoint carries its configuration and loads into no other, [NET-8]. Raises ValueError when a size is out of
    range or contradicts another, [CONV-12].
    """

    channels: int  # C, state channels
    static_channels: int  # S, constant fields and known forcings
    patch: tuple[int, int]  # p_y, p_x: grid points of a token along latitude and longitude
    width: int  # D
    heads: int  # A
    depth: int  # L, number of blocks
    mlp_ratio: int = 4
    position_features: int = 3  # P: 3 on the sphere, 2 in a region, 1 for latitude only
    position_octaves: int = 6  # wave numbers 2^0 .. 2^(J-1) in the position code
    noise_features: int = 64  # Fourier features of c_noise
    window: int | None = None  # attention radius in tokens; None attends to every token of the tile
    sigma_data: float = 1.0  # sigma_d, standard deviation of the normalised state

    def __post_init__(self) -> None:
        if len(self.patch) != 2 or min(self.patch) < 1:
            raise ValueError(f"patch must be two sizes of at least 1 (latitude, longitude), got {self.patch}")
        for name in ("channels", "width", "heads", "depth", "mlp_ratio", "position_octaves"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.static_channels < 0:
            raise ValueError(f"static_channels must not be negative, got {self.static_channels}")
        if self.position_features not in (1, 2, 3):
            raise ValueError(
                f"position_features must be 1 (latitude), 2 (region) or 3 (sphere), got {self.position_features}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide width: {self.heads} does not divide {self.width}; change one of them")
        if self.noise_features < 2 or self.noise_features % 2:
            raise ValueError(f"noise_features must be even and positive, got {self.noise_features}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window is a radius in tokens and must not be negative, got {self.window}")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a positive, finite standard deviation, got {self.sigma_data}")


def tiny(
    channels: int = 3, static_channels: int = 7, patch: tuple[int, int] = (2, 2), position_features: int = 3
) -> StormConfig:
    """Return a size that trains on a laptop in minutes; the bundled world, tests and conformance vectors use it."""
    return StormConfig(
        channels, static_channels, patch, width=64, heads=4, depth=3, position_features=position_features
    )


def storm_10m(channels: int = 3, static_channels: int = 3, patch: tuple[int, int] = (2, 2)) -> StormConfig:
    """Return the paper's "10M" size: width 256, 6 blocks."""
    return StormConfig(channels, static_channels, patch, width=256, heads=8, depth=6)


def storm_200m(channels: int = 3, static_channels: int = 3, patch: tuple[int, int] = (2, 2)) -> StormConfig:
    """Return the paper's "200M" size: width 1024, 8 blocks."""
    return StormConfig(channels, static_channels, patch, width=1024, heads=16, depth=8)


def storm_10b(channels: int = 3, static_channels: int = 3, patch: tuple[int, int] = (2, 2)) -> StormConfig:
    """Return the paper's "10B" size: width 3072, 40 blocks."""
    return StormConfig(channels, static_channels, patch, width=3072, heads=24, depth=40)
