"""Measure how much of the difference between tiled and untiled the coarse level of `experiments.coarse` removes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from storm_ref.edm import Denoise, sample
from storm_ref.experiments.coarse import coarse_denoiser, coarse_evaluation
from storm_ref.experiments.fidelity.measures import (
    Progress,
    Record,
    evaluation_cost,
    mean_square_error,
    noise_levels,
    noisy_states,
    rms,
    show_progress,
)
from storm_ref.experiments.fidelity.subjects import Subject, blend_widths, tiling_of, without_gradient
from storm_ref.tiling import Tiling

__all__ = ["coarse_gain"]


def coarse_gain(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    shape: tuple[int, int],
    generator: torch.Generator,
    steps: int,
    members: int = 4,
    progress: Progress | None = None,
) -> list[Record]:
    """Tiles of the widest blend without and with a coarse level of `shape` blocks, both against the untiled network.

    There is a record for one evaluation at every sigma and one for fields sampled in `steps` steps (`sigma` None). It
    has r of the difference for `tiled` and `coarse`, gain = 1 - coarse / tiled (negative where the coarse level harms),
    and the multiply-adds of both over those of the untiled network. For one evaluation it also has the shares of the
    network's gain that both lose (as in `skill`), which mean nothing for generic weights.
    """
    inputs = [noisy_states(subject, sigma, generator) for sigma in sigmas]
    untiled = [subject.untiled()(x, level) for x, level in inputs]
    off = [subject.network_off()(x, level) for x, level in inputs]
    one = subject.at(0)
    latents = torch.randn(members, *one.states.shape[1:], generator=generator, dtype=torch.float64)
    levels = noise_levels(steps)
    untiled_sample = sample(one.untiled(), latents, levels)
    records: list[Record] = []
    for n, halo in enumerate(halos):
        tiling = tiling_of(one, halo, blend_widths(one, halo)[-1])
        about = {"halo": halo, "blend": tiling.x.blend, "means": math.prod(shape)} | _costs(one, tiling, shape)
        for k, sigma in enumerate(sigmas):
            tiled, coarse = (denoise(*inputs[k]) for denoise in _denoisers(subject, tiling, shape))
            gain = _gain(rms(tiled - untiled[k]), rms(coarse - untiled[k]))
            records.append(about | {"sigma": sigma} | gain | _lost(subject, untiled[k], off[k], tiled, coarse))
        samples = (sample(denoise, latents, levels) for denoise in _denoisers(one, tiling, shape))
        errors = [rms(field - untiled_sample) / rms(untiled_sample) for field in samples]
        records.append(about | {"sigma": None, "steps": steps} | _gain(*errors))
        show_progress(progress, f"{subject.name}: coarse level", n + 1, len(halos))
    return records


def _denoisers(subject: Subject, tiling: Tiling, shape: tuple[int, int]) -> tuple[Denoise, Denoise]:
    """By tiles alone, and by tiles with the coarse level."""
    coarse = coarse_denoiser(subject.network, subject.condition, tiling, subject.covariance, shape)
    return subject.tiled(tiling), without_gradient(coarse)


def _lost(subject: Subject, untiled: Tensor, off: Tensor, tiled: Tensor, coarse: Tensor) -> Record:
    """The shares of the network's gain that tiles lose without and with the coarse level."""
    least = float(mean_square_error(subject, untiled).mean())
    gain = float(mean_square_error(subject, off).mean()) - least
    return {
        "lost_tiled": (float(mean_square_error(subject, tiled).mean()) - least) / gain,
        "lost_coarse": (float(mean_square_error(subject, coarse).mean()) - least) / gain,
    }


def _gain(tiled: float, coarse: float) -> Record:
    return {"tiled": tiled, "coarse": coarse, "gain": 1 - coarse / tiled if tiled else 0.0}


def _costs(subject: Subject, tiling: Tiling, shape: tuple[int, int]) -> Record:
    tiled = evaluation_cost(subject, tiling)
    untiled = tiled["multiply_adds"] / tiled["cost_over_untiled"]
    coarse = coarse_evaluation(subject.network.config, tiling, shape).multiply_adds
    return {"tiled_cost": tiled["cost_over_untiled"], "coarse_cost": coarse / untiled}
