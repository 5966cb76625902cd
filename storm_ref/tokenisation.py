"""Tokenisation: fields become tokens of p_y x p_x grid points, and each token knows where on Earth it is.

[TOK-1] N = (H/p_y)(W/p_x); the patch divides the grid, or an error names both
[TOK-2] token n = i (W/p_x) + j holds patch (i, j): row-major over patches, and inside a token channel, row, column
[TOK-3] unpatchify(patchify(x)) = x bit for bit, and the other way round
[TOK-4] state token   t_n = W_x [c_in x ; static]_n + b_x + P(r_n)
[TOK-5] history token h_kn = W_h [x_k ; static_k]_n + b_h + P(r_n) + A(age_k)
[TOK-6] position r_n is a function of absolute coordinates of the patch centre: on the sphere
        (cos lat cos lon, cos lat sin lon, sin lat); in a region projected (x, y); sin lat alone is zonally equivariant
[TOK-7] P(r) = W_p [sin(2^j pi r / 2), cos(2^j pi r / 2)], j = 0..J-1, no bias: all sines, then all cosines,
        each coordinate by coordinate with j fastest. The longest wave is 4, so that no two points of [-1, 1]^P share a
        code; with a longest wave of 2, r = 1 and r = -1 would, and so would the two poles
[TOK-8] A(age) = W_a [sin(2^j pi s / 2), cos(2^j pi s / 2)], s = log2(1 + age / 1 h) / 8, age in hours > 0: real time,
        so that any number of frames and any gaps between them mean the same thing; one-to-one up to 2^32 hours
[TOK-9] positions, ages and the sines and cosines of their codes are computed in float64 and rounded to the network's
        dtype once, before W_p and W_a

The paper tokenises with a linear patch embedding; position and age codes are our interpretation (B_provenance).
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "age_features",
    "fourier_features",
    "latitude_position",
    "patchify",
    "region_position",
    "sphere_position",
    "unpatchify",
]


def patchify(x: Float[Tensor, "*b c h w"], patch: tuple[int, int]) -> Float[Tensor, "*b n v"]:
    """Cut fields into N = (h/p_y)(w/p_x) tokens of v = c p_y p_x values, [TOK-1] and [TOK-2].

    Raises ValueError when the patch does not divide the grid.
    """
    height, width = x.shape[-2:]
    if min(patch) < 1 or height % patch[0] or width % patch[1]:
        raise ValueError(
            f"patch {patch[0]} x {patch[1]} does not divide the grid {height} x {width}; choose a patch that does, or "
            "pad or crop the grid"
        )
    return rearrange(x, "... c (i p) (j q) -> ... (i j) (c p q)", p=patch[0], q=patch[1])


def unpatchify(tokens: Float[Tensor, "*b n v"], patch: tuple[int, int], rows: int) -> Float[Tensor, "*b c h w"]:
    """Put tokens together into fields: the inverse of `patchify` on a grid of `rows` rows of patches, [TOK-3].

    Raises ValueError when the tokens do not fill whole rows or whole channels.
    """
    count, values = tokens.shape[-2:]
    if rows < 1 or count % rows:
        raise ValueError(f"{count} tokens do not fill {rows} rows of patches")
    if values % (patch[0] * patch[1]):
        raise ValueError(f"tokens of {values} values do not hold whole channels of {patch[0]} x {patch[1]} points")
    return rearrange(tokens, "... (i j) (c p q) -> ... c (i p) (j q)", i=rows, p=patch[0], q=patch[1])


def _centres(coordinate: Float[Tensor, " n"], patch: int) -> Float[Tensor, " m"]:
    """Return the mean coordinate of each patch along one axis, in degrees and float64, [TOK-6]."""
    if coordinate.shape[0] % patch:
        raise ValueError(f"patch {patch} does not divide an axis of {coordinate.shape[0]} coordinates")
    if bool((coordinate.diff().abs() > 180).any()):
        raise ValueError("neighbouring longitudes are more than 180 degrees apart; unwrap them (add or subtract 360)")
    return coordinate.double().reshape(-1, patch).mean(1)


def sphere_position(
    latitude: Float[Tensor, " h"], longitude: Float[Tensor, " w"], patch: tuple[int, int]
) -> Float[Tensor, "rows cols 3"]:
    """Return x, y, z of the patch centres on the unit sphere, [TOK-6], in float64, [TOK-9].

    latitude and longitude are in degrees, longitudes without a jump. The position is periodic in longitude by
    construction: 0 and 360 degrees are one point. Raises ValueError when the patch does not divide an axis and when
    longitudes jump.
    """
    lat = torch.deg2rad(_centres(latitude, patch[0]))[:, None]
    lon = torch.deg2rad(_centres(longitude, patch[1]))[None, :]
    x = torch.cos(lat) * torch.cos(lon)
    y = torch.cos(lat) * torch.sin(lon)
    z = torch.sin(lat).expand_as(x)
    return torch.stack([x, y, z], -1)


def region_position(
    latitude: Float[Tensor, " h"], longitude: Float[Tensor, " w"], patch: tuple[int, int], length: float
) -> Float[Tensor, "rows cols 2"]:
    """Return equirectangular x, y of the patch centres, [TOK-6], in float64, [TOK-9].

    x = (lon - lon_0) cos(lat_0) / length and y = (lat - lat_0) / length, where (lat_0, lon_0) is the middle of the
    region's grid points; all are in degrees, longitudes without a jump. Raises ValueError for length <= 0, when the
    patch does not divide an axis and when longitudes jump.
    """
    if not length > 0:
        raise ValueError(f"length must be positive (the degrees that make one unit), got {length}")
    lat = _centres(latitude, patch[0])
    lon = _centres(longitude, patch[1])
    lat_0 = (latitude.double().max() + latitude.double().min()) / 2
    lon_0 = (longitude.double().max() + longitude.double().min()) / 2
    y = (lat - lat_0) / length
    x = (lon - lon_0) * torch.cos(torch.deg2rad(lat_0)) / length
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1)


def latitude_position(latitude: Float[Tensor, " h"], cols: int, patch: tuple[int, int]) -> Float[Tensor, "rows cols 1"]:
    """Return sin(lat) of the patch centres in float64, the same in each of `cols` columns of patches, [TOK-6].

    latitude is in degrees. Without longitude in its positions the network is equivariant to shifts in longitude. Raises
    ValueError when the patch does not divide the axis.
    """
    return torch.sin(torch.deg2rad(_centres(latitude, patch[0])))[:, None, None].expand(-1, cols, 1)


def fourier_features(r: Float[Tensor, "*b p"], octaves: int) -> Float[Tensor, "*b f"]:
    """Return [sin(2^j pi r / 2), cos(2^j pi r / 2)] for j < octaves, [TOK-7], in the dtype of r.

    The f = 2 p octaves values are all sines, then all cosines, each coordinate by coordinate with j fastest.
    """
    waves = math.pi / 2 * 2.0 ** torch.arange(octaves, dtype=r.dtype, device=r.device)
    phase = (r[..., None] * waves).flatten(-2)
    return torch.cat([phase.sin(), phase.cos()], -1)


def age_features(age: Float[Tensor, "*b"], octaves: int) -> Float[Tensor, "*b f"]:
    """Return the f = 2 octaves Fourier features of s = log2(1 + age / 1 h) / 8, ages in hours, [TOK-8].

    Raises ValueError when an age is not positive (the frame is not in the past) or not finite.
    """
    wrong = age[~(torch.isfinite(age) & (age > 0))]
    if wrong.numel():
        raise ValueError(
            f"ages are hours before the analysis time and must be positive and finite, got {wrong[0].item()}; is a "
            "frame of the present or the future among the past frames?"
        )
    return fourier_features((torch.log2(1 + age) / 8)[..., None], octaves)
