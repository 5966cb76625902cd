"""One evaluation: T[D] against D, and both against the truth."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from storm_ref.experiments.fidelity.measures import (
    Progress,
    Record,
    evaluation_cost,
    mean_square_error,
    noisy_states,
    rms,
    show_progress,
    standard_error,
)
from storm_ref.experiments.fidelity.subjects import Subject, blend_widths, tiling_of
from storm_ref.tiling import Tile, Tiling, blend_tiles, tile_conditions
from storm_ref.workbench.prior import covariance as covariances

__all__ = ["error_by_halo", "skill"]


def error_by_halo(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Record]:
    """The error of one evaluation at x + s n for every halo (points), every blend of `blend_widths` and every sigma.

    `maximum` is the largest |T[D] - D|; `cost_over_untiled` counts multiply-adds.
    """
    inputs = [noisy_states(subject, sigma, generator) for sigma in sigmas]
    untiled = [subject.untiled()(x, level) for x, level in inputs]
    off = [subject.network_off()(x, level) for x, level in inputs]
    records = []
    for n, halo in enumerate(halos):
        blends = blend_widths(subject, halo)
        tilings = [tiling_of(subject, halo, blend) for blend in blends]
        for k, sigma in enumerate(sigmas):
            network = rms(untiled[k] - off[k])
            for blend, tiling, tiled in zip(blends, tilings, _blend_each(subject, tilings, *inputs[k]), strict=True):
                error = tiled - untiled[k]
                record = {
                    "halo": halo,
                    "blend": blend,
                    "sigma": sigma,
                    "absolute": rms(error),
                    "maximum": float(error.abs().max()),
                    "relative": rms(error) / network,
                    "network": network,
                }
                records.append(record | evaluation_cost(subject, tiling))
        show_progress(progress, f"{subject.name}: one evaluation, by halo", n + 1, len(halos))
    return records


def _blend_each(subject: Subject, tilings: Sequence[Tiling], x: Tensor, sigma: Tensor) -> list[Tensor]:
    """T[D](x) of tilings that differ in their blend alone, for the price of one: the tiles' outputs are the same."""
    condition_of = tile_conditions(subject.condition, subject.network.config.patch)
    outputs: dict[Hashable, Tensor] = {}  # of the network, by the places of a batch's tiles

    def evaluate_once(z: Tensor, s: Tensor, batch: Sequence[Tile]) -> Tensor:
        places = tuple(tile.place for tile in batch)
        if places not in outputs:
            outputs[places] = subject.network(z, s, condition_of(batch, len(x)))
        return outputs[places]

    dtype = subject.network.final.weight.dtype
    with torch.no_grad():
        return [
            covariances.precondition(blend_tiles(evaluate_once, tiling), x, sigma, subject.covariance, dtype)
            for tiling in tilings
        ]


def skill(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Record]:
    """The denoising error against the truth: untiled, tiled with the widest blend, and with the network off.

    `lost` is the share of the network's gain in mean square that tiling loses. Its standard error `lost_error` takes
    the times for independent, so they should be days apart.
    """
    records = []
    for n, sigma in enumerate(sigmas):
        x, level = noisy_states(subject, sigma, generator)
        off = mean_square_error(subject, subject.network_off()(x, level))
        untiled = mean_square_error(subject, subject.untiled()(x, level))
        gain = float((off - untiled).mean())
        for halo in halos:
            blend = blend_widths(subject, halo)[-1]
            tiled = mean_square_error(subject, _blend_each(subject, [tiling_of(subject, halo, blend)], x, level)[0])
            excess = tiled - untiled
            records.append(
                {
                    "halo": halo,
                    "blend": blend,
                    "sigma": sigma,
                    "tiled": float(tiled.mean().sqrt()),
                    "off": float(off.mean().sqrt()),
                    "untiled": float(untiled.mean().sqrt()),
                    "lost": float(excess.mean()) / gain,
                    "lost_error": standard_error(excess) / abs(gain),
                }
            )
        show_progress(progress, f"{subject.name}: skill", n + 1, len(sigmas))
    return records
