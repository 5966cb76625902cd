"""Small things that several measurements share: sizes of fields, noisy states, costs and progress."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref import cost
from storm_ref.edm import schedule
from storm_ref.experiments.fidelity.subjects import Subject
from storm_ref.tiling import Tiling, overhead

__all__ = [
    "Progress",
    "Record",
    "evaluation_cost",
    "mean_square_error",
    "noise_levels",
    "noisy_states",
    "rms",
    "show_progress",
    "standard_error",
]

# (what is being done, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


def show_progress(progress: Progress | None, label: str, done: int, total: int) -> None:
    """Report progress if anyone listens."""
    if progress is not None:
        progress(label, done, total)


def rms(x: Tensor) -> float:
    """The root of the mean square over all elements."""
    return float(x.square().mean().sqrt())


def mean_square_error(subject: Subject, denoised: Tensor) -> Float[Tensor, " t"]:
    """The mean squared error against the truth at each of the subject's times."""
    return (denoised - subject.states).square().mean((1, 2, 3))


def standard_error(samples: Tensor) -> float:
    """The standard error of the mean of independent samples, NaN for a single one."""
    return float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan


def noisy_states(subject: Subject, sigma: float, generator: torch.Generator) -> tuple[Tensor, Float[Tensor, " t"]]:
    """The subject's states with noise of this level added, and the level of each."""
    noise = torch.randn(subject.states.shape, generator=generator, dtype=torch.float64)
    return subject.states + sigma * noise, torch.full((len(noise),), sigma, dtype=torch.float64)


def noise_levels(steps: int) -> Float[Tensor, " levels"]:
    """The sampler's schedule of so many steps between the noise levels that all measurements use."""
    return schedule(steps, sigma_min=0.02, sigma_max=80.0)


def evaluation_cost(subject: Subject, tiling: Tiling) -> Record:
    """The cost of one tiled evaluation: points and multiply-adds, both over those of the untiled network."""
    config = subject.network.config
    tiled = cost.tiled_evaluation(config, tiling).multiply_adds
    untiled = cost.evaluation(config, math.prod(subject.tokens)).multiply_adds
    return {"overhead": overhead(tiling), "multiply_adds": tiled, "cost_over_untiled": tiled / untiled}
