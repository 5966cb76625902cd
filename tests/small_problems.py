"""Small problems with known answers that several test files share: generic networks, tilings by loops, Gaussian priors.

Tolerances are a number of roundings, argued where they are used, times EPS times the magnitude of the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.guidance import Observations
from storm_ref.tiling import Axis, Tile
from storm_ref.tokenisation import latitude_position, sphere_position

EPS = 2.0**-52

# Two orders of summation in a float64 network this shallow differ by 2 eps of its largest value (seen); 32 leaves room.
NETWORK = 32 * EPS

M = TypeVar("M", bound=nn.Module)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


def assert_close(got: Tensor, want: Tensor, atol: float, what: str) -> None:
    """Absolute comparison; NaN, another shape or another dtype never passes."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    worst = (got - want).abs().max().item() if got.numel() else 0.0
    assert worst <= atol, f"{what}: off by {worst:.3g}, more than {atol:.3g}"


def refuses(call: Callable[[], object], *words: str) -> None:
    """Asserts that the call raises ValueError with all the words in its message."""
    try:
        call()
    except Exception as error:
        assert isinstance(error, ValueError), f"{type(error).__name__} where a ValueError is wanted: {error}"
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"the message does not name {missing}: {error}"
    else:
        raise AssertionError(f"accepted what must be refused; wanted an error that names {words}")


def generic(module: M, seed: int = 0) -> M:
    """The module in float64 with weights, biases and gates away from zero."""
    module = module.double()
    randomise(module, torch.Generator().manual_seed(seed))
    return module


# Tiles


def naive_cores(axis: Axis) -> list[tuple[int, int]]:
    """[TILE-2]"""
    starts = range(0, axis.length, axis.core)
    return [(start, min(start + axis.core, axis.length)) for start in starts]


def naive_extents(axis: Axis) -> list[list[int]]:
    """[TILE-3]"""
    if axis.core == axis.length:
        return [list(range(axis.length))]
    grown = [range(start - axis.halo, stop + axis.halo) for start, stop in naive_cores(axis)]
    if axis.periodic:
        return [[q % axis.length for q in points] for points in grown]
    return [[q for q in points if 0 <= q < axis.length] for points in grown]


def contributing_tiles(axis: Axis, point: int) -> set[int]:
    """[TILE-4] The tiles that weigh in at a point: that of its core, and the next one within b points of a boundary."""
    cores = naive_cores(axis)
    owner = next(i for i, (start, stop) in enumerate(cores) if start <= point < stop)
    start, stop = cores[owner]
    contributing = {owner}
    if point - start < axis.blend and (owner > 0 or axis.periodic):
        contributing.add((owner - 1) % len(cores))
    if stop - point <= axis.blend and (owner < len(cores) - 1 or axis.periodic):
        contributing.add((owner + 1) % len(cores))
    return contributing


def naive_cone(axis: Axis, evaluations: int) -> list[set[int]]:
    """[TILE-9] For each point, the points that its value depends on after so many evaluations."""
    extents = naive_extents(axis)
    count = len(extents)
    cone = []
    for point in range(axis.length):
        reached = contributing_tiles(axis, point)
        for _ in range(evaluations - 1):
            near = {i + step for i in reached for step in (-1, 0, 1)}
            reached = {i % count for i in near} if axis.periodic else {i for i in near if 0 <= i < count}
        cone.append({q for i in reached for q in extents[i]})
    return cone


def support(out: Tensor) -> list[set[int]]:
    """For each point of out[probe, point], which answers unit probes, the probes that reach it."""
    return [set(torch.nonzero(out[:, q]).flatten().tolist()) for q in range(out.shape[1])]


def mixing(z: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    """A dense, position-dependent denoiser of one tile; integers in, integers out."""
    place = torch.tensor(rows).double()[:, None] * 3 + torch.tensor(cols).double() * 5 + 1
    return z * place + z.sum((-2, -1), keepdim=True) - z.flip(1)


def local_mixing(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
    """`mixing` of each tile of a batch."""
    parts = z.split(z.shape[0] // len(batch))
    return torch.cat([mixing(p, t.rows.tolist(), t.cols.tolist()) for p, t in zip(parts, batch, strict=True)])


# Networks

CONFIG = StormConfig(2, 2, (2, 2), width=8, heads=2, depth=2, position_octaves=2, noise_features=8)


@dataclass(frozen=True)
class World:
    """A network with generic weights, what it is conditioned on, and a state."""

    network: Storm
    condition: Condition
    x: Tensor
    sigma: Tensor


def world(
    grid: tuple[int, int], periodic: bool, position: str = "sphere", batch: int = 2, config: StormConfig = CONFIG
) -> World:
    lat = torch.linspace(80, -70, grid[0], dtype=torch.float64)
    lon = torch.arange(grid[1], dtype=torch.float64) * ((360 if periodic else 90) / grid[1])
    patch, cols = config.patch, grid[1] // config.patch[1]
    places = {
        "sphere": lambda: sphere_position(lat, lon, patch),
        "latitude": lambda: latitude_position(lat, cols, patch),
    }[position]()
    network = Storm(replace(config, position_features=places.shape[-1])).double()
    randomise(network, torch.Generator().manual_seed(5))
    memory = normal(batch, grid[0] // patch[0], cols, config.width, seed=2)
    condition = Condition(normal(batch, config.static_channels, *grid, seed=1), memory, places[None], periodic)
    sigma = torch.tensor([0.3, 2.0, 20.0, 0.01], dtype=torch.float64)[:batch]
    return World(network.requires_grad_(False), condition, normal(batch, config.channels, *grid, seed=3), sigma)


# Gaussian priors


def pointwise(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear denoiser of single points."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x) / (1 + s) + x / (2 + s**2)


def gaussian(size: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """A mean and a full covariance with condition number about 20."""
    vectors = torch.linalg.qr(normal(size, size, seed=seed + 100))[0]
    values = spread * torch.logspace(-0.9, 0.4, size, dtype=torch.float64)
    return normal(size, seed=seed + 101), vectors @ torch.diag(values) @ vectors.T


def flow(mean: Tensor, covariance: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and factor of the exact flow latents -> sample: the probability flow down to the last level, then D.

    In a mode of variance c the flow keeps (x - mean) / sqrt(c + sigma^2).
    """
    values, vectors = torch.linalg.eigh(covariance)
    high, low = sigmas[0].item(), sigmas[-2].item()
    keep = ((values + low**2) / (values + high**2)).sqrt() * values / (values + low**2)
    factor = vectors @ torch.diag(keep) @ vectors.T
    return mean - factor @ mean, high * factor


def probe(run: Callable[[Tensor], Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Offset [v] and factor [v, size] of an affine map of batches [m, size]: unit vectors show it whole."""
    out = run(torch.cat([torch.zeros(1, size), torch.eye(size)]).double())
    return out[0], (out[1:] - out[0]).T


@dataclass(frozen=True)
class Problem:
    """An 8-dimensional Gaussian prior on fields of shape (2, 2, 2), five observations of it, and H as a matrix."""

    mean: Tensor
    covariance: Tensor
    observations: Observations
    operator: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[EDM-10] by one dense solve a member."""
        denoised = []
        for state, level in zip(x.flatten(1), sigma, strict=True):
            total = self.covariance + level**2 * torch.eye(8, dtype=torch.float64)
            denoised.append(self.mean + self.covariance @ torch.linalg.solve(total, state - self.mean))
        return torch.stack(denoised).reshape(x.shape)

    def kalman(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x given y."""
        h, r = self.operator, torch.diag(self.observations.variance)
        gain = torch.linalg.solve(h @ self.covariance @ h.T + r, h @ self.covariance).T
        mean = self.mean + gain @ (self.observations.value - h @ self.mean)
        return mean, self.covariance - gain @ h @ self.covariance


def problem() -> Problem:
    """Two observations of one point with unlike errors, one of another point, two bilinear rows that share points."""
    mean, covariance = gaussian(8, seed=3)
    index = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [6, 0, 0, 0], [0, 1, 2, 3], [4, 5, 2, 7]])
    weight = torch.tensor(
        [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [0.42, 0.18, 0.28, 0.12]], dtype=torch.float64
    )
    variance = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.6], dtype=torch.float64)
    operator = torch.zeros(5, 8, dtype=torch.float64)
    for row in range(5):
        for k in range(4):
            operator[row, index[row, k]] += weight[row, k]
    observations = Observations(normal(5, seed=9), variance, index, weight, (2, 2, 2))
    return Problem(mean, covariance, observations, operator)
