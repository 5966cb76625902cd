"""The dependency cone: how much of the noise in each tile reaches one point, evaluation by evaluation."""

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Storm
from storm_ref.edm import Denoise
from storm_ref.experiments.fidelity.measures import Progress, Record, noise_levels, show_progress
from storm_ref.experiments.fidelity.subjects import Subject
from storm_ref.tiling import Tiling

__all__ = ["cone"]


def cone(
    subject: Subject,
    tiling: Tiling | None,
    point: tuple[int, int],
    evaluations: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> tuple[list[Record], list[list[list[float]]]]:
    """Response of a point (row, column) at the end of Euler's sampler to the state k = 1, 2, ... evaluations before.

    Returns records by k and by distance in tiles (of the subject's cores; diagonal steps count as one), with `answer`,
    the largest |s J|, and `reached`, whether any of J is not zero; and the maps of `answer` by tile, one for each k.
    Without a tiling the denoiser is untiled. The network is evaluated in float64.
    """
    one = subject.at(0)
    one = replace(one, network=_in_float64(one.network))
    denoise = one.untiled() if tiling is None else one.tiled(tiling)
    steps = list(pairwise(noise_levels(evaluations).tolist()))
    x = steps[0][0] * torch.randn(one.states.shape, generator=generator, dtype=torch.float64)
    states = []
    for sigma, sigma_next in steps:
        states.append(x)
        x = _euler(denoise, x, sigma, sigma_next)
    gradient = torch.zeros_like(x)
    gradient[0, 0, point[0], point[1]] = 1
    records: list[Record] = []
    maps = []
    for k, (state, (sigma, sigma_next)) in enumerate(zip(reversed(states), reversed(steps), strict=True), start=1):
        leaf = state.requires_grad_()
        (gradient,) = torch.autograd.grad(_euler(denoise, leaf, sigma, sigma_next), leaf, gradient)
        response = _largest_by_tile(sigma * gradient, one.core)
        maps.append(response.tolist())
        records += [{"k": k, "sigma": sigma} | record for record in _by_distance(response, one, point)]
        show_progress(progress, f"{subject.name}: cone", k, evaluations)
    return records, maps


def _in_float64(network: Storm) -> Storm:
    copy = Storm(network.config).double()
    copy.load_state_dict(network.state_dict())
    return copy.requires_grad_(False)


def _euler(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    return sigma_next / sigma * x + (1 - sigma_next / sigma) * denoise(x, level)


def _largest_by_tile(jacobian: Tensor, core: tuple[int, int]) -> Float[Tensor, "tall wide"]:
    """The largest |J| over the channels and points of each core."""
    size = jacobian.abs().amax((0, 1))
    rows = torch.stack([size[a : a + core[0]].amax(0) for a in range(0, len(size), core[0])])
    return torch.stack([rows[:, a : a + core[1]].amax(1) for a in range(0, size.shape[1], core[1])], 1)


def _by_distance(response: Tensor, subject: Subject, point: tuple[int, int]) -> list[Record]:
    dy = (torch.arange(response.shape[0]) - point[0] // subject.core[0]).abs()
    dx = (torch.arange(response.shape[1]) - point[1] // subject.core[1]).abs()
    if subject.condition.periodic:
        dx = torch.minimum(dx, response.shape[1] - dx)
    distance = torch.maximum(dy[:, None], dx)
    largest = [float(response[distance == d].max()) for d in range(int(distance.max()) + 1)]
    return [{"distance": d, "answer": size, "reached": size > 0} for d, size in enumerate(largest)]
