"""A covariance for the denoiser: EDM's preconditioning and the weight of observations, per principal direction.

This is an extension of ours, found neither in the paper nor in the normative chapters. EDM scales by a single number
sigma_d, as if the state were white noise. Its argument holds for each principal direction of the training data on its
own. With Sigma the covariance of the normalised departures d_t, t = 1..T, from their background:

    Sigma = V diag(l) V^T + l_r (I - V V^T)             r leading directions, the rest white: applied in O(N r)
    D(x; s) = Sigma (Sigma + s^2)^-1 x + c_out F(c_in x; s)
    c_out^2 = tr Sigma s^2 (Sigma + s^2)^-1 / N,        c_in^2 = 1 / (s^2 + tr Sigma / N)
    guided mean = D + C_s H^T (R + H C_s H^T)^-1 (y - H D),   C_s = s^2 Sigma (Sigma + s^2)^-1

With F = 0 this is the exact denoiser of N(0, Sigma), [EDM-10]; C_s is the exact covariance of x_0 given x, and guided
samples are exact draws from the Gaussian posterior. With r = 0 it is EDM with sigma_d^2 = l_r, and the guidance is
`pigdm` with J replaced by its Gaussian value, so that nothing is differentiated.

T is small and N is large, so Sigma is localised and shrunk:

    Sigma = (1 - b) L * (1/T) sum_t d_t d_t^T + b diag(std) E diag(std)      * pointwise, b the shrinkage
    L = exp(-q^2 / 2),  E = exp(-|dy| / m_y - |dx| / m_x) within a channel, 0 between channels
    q^2 = (dy / m_y)^2 + (dx / m_x)^2,  m the lag in grid points at which the correlation falls to 1/e

Its leading directions come from randomised subspace iteration, so that no N x N matrix is ever formed.

References: Gaspari & Cohn (1999); Houtekamer & Mitchell (2001), localisation; Ledoit & Wolf (2004), shrinkage; Halko et
al. (2011), subspace iteration.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise
from storm_ref.guidance import Observations, ObservationsLike
from storm_ref.parallel.halo import ShardedTiles, blend_sharded, conditions, on_whole
from storm_ref.tiling import Tile, Tiling, blend_tiles, tile_conditions

__all__ = [
    "Covariance",
    "correlation_length",
    "covariance_denoiser",
    "distance",
    "fit",
    "guidance",
    "output_scale",
    "precondition",
    "sharded_covariance_denoiser",
    "white",
]


@dataclass(frozen=True)
class Covariance:
    """The covariance Sigma of normalised states of `shape` (C, H, W), with N = C H W.

    Raises ValueError unless all variances are positive and no leading variance is below that of the rest.
    """

    vectors: Float[Tensor, "v r"]  # V, orthonormal columns
    values: Float[Tensor, " r"]  # l, the variance along each
    rest: Float[Tensor, ""]  # l_r, the variance along every other direction
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.vectors.shape != (math.prod(self.shape), len(self.values)):
            raise ValueError(f"directions {tuple(self.vectors.shape)} do not fit {len(self.values)} x {self.shape}")
        if not bool(self.rest > 0) or bool((self.values < self.rest).any()):
            raise ValueError("the rest must have a positive variance, and no leading direction a smaller one")

    def to(self, dtype: torch.dtype) -> "Covariance":
        """Convert to another precision."""
        return Covariance(self.vectors.to(dtype), self.values.to(dtype), self.rest.to(dtype), self.shape)

    def apply(self, x: Float[Tensor, "b c h w"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "b c h w"]:
        """Return f(Sigma) x; `function` maps variances [b or 1, k] to factors [b or 1, k]."""
        flat = x.flatten(1)
        white = function(self.rest.reshape(1, 1))
        leading = (flat @ self.vectors) * (function(self.values[None]) - white)
        return (white * flat + leading @ self.vectors.T).reshape(x.shape)

    def mean(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, " b"]:
        """Return tr f(Sigma) / N, the mean of f over all N directions."""
        size, rank = self.vectors.shape
        return (function(self.values[None]).sum(1) + (size - rank) * function(self.rest.reshape(1, 1))[:, 0]) / size


def white(shape: tuple[int, int, int], variance: float = 1.0) -> Covariance:
    """Return Sigma = variance I, which makes `precondition` that of plain EDM with sigma_d^2 = variance."""
    vectors = torch.zeros(math.prod(shape), 0, dtype=torch.float64)
    rest = torch.tensor(variance, dtype=torch.float64)
    return Covariance(vectors, vectors[0], rest, shape)


def precondition(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    covariance: Covariance,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b c h w"]:
    """Return D(x; s) of the module's equations, in the shape and dtype of x.

    The network is evaluated in `dtype` and everything else in the precision of `covariance`.
    """
    s2 = sigma.to(covariance.rest)[:, None] ** 2
    c_in = (s2[:, 0] + covariance.mean(lambda v: v)) ** -0.5
    z = x.to(covariance.rest)
    raw = network((c_in[:, None, None, None] * z).to(dtype), sigma.double()).to(z)
    skip = covariance.apply(z, lambda v: v / (v + s2))
    return (skip + output_scale(covariance, sigma)[:, None, None, None] * raw).to(x.dtype)


def output_scale(covariance: Covariance, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return c_out, the root mean square of what F has to supply when the data are N(0, Sigma)."""
    s2 = sigma.to(covariance.rest)[:, None] ** 2
    return covariance.mean(lambda v: v * s2 / (v + s2)).sqrt()


def _preconditioned(evaluate: Denoise, covariance: Covariance, dtype: torch.dtype) -> Denoise:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return precondition(evaluate, x, sigma, covariance, dtype)

    return denoise


def covariance_denoiser(
    network: Storm, condition: Condition, tiling: Tiling | None, covariance: Covariance, tiles_per_batch: int = 16
) -> Denoise:
    """Return D(x; s) of one analysis; without a tiling the network sees the whole domain.

    [TILE-6] applies to F alone: the Gaussian part of D is evaluated on the whole domain.
    """
    dtype = network.final.weight.dtype
    condition_of = tile_conditions(condition, network.config.patch)

    def network_on_domain(z: Tensor, sigma: Tensor) -> Tensor:
        return network(z, sigma, condition)  # type: ignore[no-any-return]

    def network_on_tiles(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        return network(z, sigma, condition_of(batch, z.shape[0] // len(batch)))  # type: ignore[no-any-return]

    evaluate = network_on_domain if tiling is None else blend_tiles(network_on_tiles, tiling, tiles_per_batch)
    return _preconditioned(evaluate, covariance, dtype)


def sharded_covariance_denoiser(
    network: Storm,
    condition: Condition,
    parts: ShardedTiles,
    covariance: Covariance,
    memory: Float[Tensor, "b d p"] | None = None,
) -> Denoise:
    """Return D(x; s) of one analysis on full states, which are replicated over the tile ranks.

    The tiles of F are partitioned over the ranks; the Gaussian part is evaluated by each of them. memory: this rank's
    shard of the memory tokens, as `parallel.halo.conditions` takes it.
    """
    dtype = network.final.weight.dtype
    condition_of = conditions(condition, parts, network.config.patch, memory)

    def network_on_tiles(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        return network(z, sigma, condition_of(batch, z.shape[0] // len(batch)))  # type: ignore[no-any-return]

    return _preconditioned(on_whole(blend_sharded(network_on_tiles, parts), parts), covariance, dtype)


def guidance(denoise: Denoise, observations: ObservationsLike, covariance: Covariance) -> Denoise:
    """Return the guided mean of the module's equations.

    It costs O(n r^2) per noise level and O((n + N) r) per member. It is exact for a Gaussian prior when no two
    observations read the same point: the white part l_r of two that do is taken as independent. Raises ValueError for
    an H that is not linear and, when evaluated, for a batch with several noise levels.
    """
    if not isinstance(observations, Observations):
        raise ValueError("guidance by a covariance needs linear observations; use mmps for this operator")
    if observations.value.numel() == 0:
        return denoise
    fields = covariance.vectors.T.reshape(-1, *covariance.shape)
    observed_vectors = observations.apply(fields).T  # H V
    overlap = (observations.weight.to(observed_vectors) ** 2).sum(1)  # diagonal of H H^T
    factors: dict[float, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def factorise(sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leading, rest = (v * sigma**2 / (v + sigma**2) for v in (covariance.values, covariance.rest))
        excess = (leading - rest).clamp_min(0)
        diagonal = observations.variance.to(observed_vectors) + rest * overlap
        root = observed_vectors * excess.sqrt()
        inner = torch.eye(len(excess)).to(root) + root.T @ (root / diagonal[:, None])
        return diagonal, root / diagonal[:, None], torch.linalg.cholesky(inner), excess

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        if not bool((sigma == level).all()):
            raise ValueError("guidance by a covariance takes one noise level at a time, as the sampler has it")
        if level not in factors:
            factors[level] = factorise(level)
        diagonal, root, cholesky, excess = factors[level]
        mean = denoise(x, sigma)
        innovation = observations.value.to(root) - observations.apply(mean.to(root))
        # Woodbury: (diagonal + B B^T)^-1 with an r x r factor, r the number of directions.
        weight = innovation / diagonal - torch.cholesky_solve((innovation @ root).T, cholesky).T @ root.T
        correction = ((weight @ observed_vectors) * excess) @ covariance.vectors.T
        rest = covariance.rest * level**2 / (covariance.rest + level**2)
        return mean + (correction.reshape(mean.shape) + rest * observations.adjoint(weight)).to(mean)

    return guided


def correlation_length(departure: Float[Tensor, "t c h w"], periodic: bool) -> tuple[float, float]:
    """Return the lags along latitude and longitude, in grid points, at which the mean correlation falls to 1/e.

    An axis along which it never does has its own size for a length.
    """
    std = departure.square().mean(0).sqrt()
    z = departure / torch.where(std > 0, std, 1)
    return _decay_length(z, -2, False), _decay_length(z, -1, periodic)


def _decay_length(z: Tensor, dim: int, periodic: bool) -> float:
    previous = 1.0
    for lag in range(1, z.shape[dim]):
        if periodic:
            correlation = float((z * z.roll(lag, dim)).mean())
        else:
            count = z.shape[dim] - lag
            correlation = float((z.narrow(dim, 0, count) * z.narrow(dim, lag, count)).mean())
        if correlation < math.exp(-1):
            return lag - 1 + (previous - math.exp(-1)) / (previous - correlation)
        previous = correlation
    return float(z.shape[dim])


def distance(size: int, length: float, periodic: bool) -> Float[Tensor, "n n"]:
    """Return the distances between the points of an axis in units of `length` grid points.

    On a periodic axis they are chords of the circle: a Gaussian of the arc would not be a covariance.
    """
    lag = (torch.arange(size)[:, None] - torch.arange(size)).abs().double()
    return (torch.sin(math.pi * lag / size) * size / math.pi if periodic else lag) / length


def fit(
    departure: Float[Tensor, "t c h w"],
    periodic: bool,
    rank: int,
    generator: torch.Generator,
    shrinkage: float = 0.1,
    most: int = 256,
) -> Covariance:
    """Estimate Sigma from T normalised departures, which are zero at invalid points.

    Of a long record every n-th is used, which leaves fewer than 2 `most`. The generator draws the first basis of the
    subspace iteration. Raises ValueError for a rank that is negative or leaves no rest, and for a shrinkage outside
    (0, 1].
    """
    d = departure[:: max(1, len(departure) // most)].float()
    shape: tuple[int, int, int] = (d.shape[1], d.shape[2], d.shape[3])
    size = math.prod(shape)
    if not 0 <= rank < size:
        raise ValueError(f"the rank must be between 0 and {size - 1}, one less than the values of a state, got {rank}")
    if not 0 < shrinkage <= 1:
        raise ValueError(f"the shrinkage must be above 0 and at most 1, got {shrinkage}")
    variance = d.square().mean(0)
    if rank == 0:
        return white(shape, float(variance.double().mean()))
    multiply = _estimate(d, variance.sqrt(), periodic, shrinkage)
    basis = torch.randn(size, min(rank + 16, size), generator=generator)
    for _ in range(3):
        basis = torch.linalg.qr(multiply(basis))[0]
    values, inside = torch.linalg.eigh((basis.T @ multiply(basis)).double())
    values = values.flip(0)[:rank]
    vectors = (basis.double() @ inside).flip(1)[:, :rank]
    rest = ((variance.double().sum() - values.sum()) / (size - rank)).clamp_min(1e-6 * float(values[0]))
    return Covariance(vectors, values.clamp_min(float(rest)), rest, shape)


def _estimate(d: Tensor, std: Tensor, periodic: bool, shrinkage: float) -> Callable[[Tensor], Tensor]:
    """Return the map from columns [v, k] to Sigma times them, computed without the matrix."""
    length_y, length_x = correlation_length(d, periodic)
    distance_y = distance(d.shape[-2], length_y, False)
    distance_x = distance(d.shape[-1], length_x, periodic)
    gauss_y, gauss_x = ((-(q**2) / 2).exp().to(d) for q in (distance_y, distance_x))
    exp_y, exp_x = ((-q).exp().to(d) for q in (distance_y, distance_x))

    def multiply(columns: Tensor) -> Tensor:
        v = columns.T.reshape(-1, *d.shape[1:])
        out = shrinkage * std * (exp_y @ (std * v) @ exp_x)
        for part in torch.split(d, 4):
            localised = gauss_y @ torch.einsum("tchw,rchw->trhw", part, v) @ gauss_x
            out += (1 - shrinkage) / len(d) * torch.einsum("tchw,trhw->rchw", part, localised)
        return out.flatten(1).T

    return multiply
