"""Seams: whether steps between neighbours are larger across the boundaries of cores than elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.edm import Denoise, sample
from storm_ref.experiments.fidelity.measures import Progress, Record, noise_levels, show_progress
from storm_ref.experiments.fidelity.subjects import Subject, tiling_of
from storm_ref.tiling import Tile, Tiling, blend_tiles, seam_bound, tile_conditions

__all__ = ["seam_profile", "seams"]


def seam_profile(
    field: Float[Tensor, "m c h w"], tiling: Tiling, along: str
) -> tuple[Float[Tensor, "m core"], Float[Tensor, "m offsets"]]:
    """Steps between neighbours along one axis, "y" or "x", by their place in the core.

    Returns r(u(q) - u(q - 1)) of each member by the place of q in its core, 0 being the step across the boundary; and,
    for every place of a patch boundary in the core, the ratio of r there to r at the other such places. With cores of
    one patch there are no others, and the ratio is NaN.
    """
    axis = tiling.y if along == "y" else tiling.x
    u = field if along == "x" else field.transpose(-1, -2)
    step = u - u.roll(1, -1)
    places = torch.arange(0 if axis.periodic else axis.core, axis.length)
    square = step[..., places].square().mean((1, 2))
    phase = places % axis.core
    mean = torch.stack([square[:, phase == p].mean(1) for p in range(axis.core)], 1)
    same = mean[:, :: axis.patch]
    others = (same.sum(1, keepdim=True) - same) / (same.shape[1] - 1 or math.nan)
    return mean.sqrt(), (same / others).sqrt()


def seams(
    subject: Subject,
    cuts: Sequence[tuple[int, int]],
    sigmas: Sequence[float],
    generator: torch.Generator,
    members: int = 4,
    steps: int = 20,
    progress: Progress | None = None,
) -> list[Record]:
    """Seams in one evaluation at every sigma, and in fields sampled in `steps` steps (`sigma` None), by (halo, blend).

    The records hold, with at least 2 members,

        ratio, ratio_error     the ratio of `seam_profile` at core boundaries: mean over members, standard error
        others                 the ratios of all other places
        profile                r of the step by its place in the core
        over_untiled           the same over that of the untiled field of the same noise, member by member, which
                               removes what the field itself has there; and over_untiled_error
        step, bound            for one evaluation with a blend along x: the largest step in F blended along x alone, and
                               `tiling.seam_bound` of its tiles
    """
    one = subject.at(0)
    tilings = [tiling_of(one, *cut) for cut in cuts]
    levels: list[float | None] = [*sigmas, None]
    records: list[Record] = []
    for n, sigma in enumerate(levels):
        noise = torch.randn(members, *one.states.shape[1:], generator=generator, dtype=torch.float64)
        untiled = _field(one, one.untiled(), noise, sigma, steps)
        records += _records(untiled, untiled, tiling_of(one, 0), {"method": "untiled", "sigma": sigma})
        for tiling, (halo, blend) in zip(tilings, cuts, strict=True):
            tiled = _field(one, one.tiled(tiling), noise, sigma, steps)
            about = {"method": "tiled", "halo": halo, "blend": blend, "sigma": sigma}
            records += _records(tiled, untiled, tiling, about)
            if sigma is not None and tiling.x.blend > 0:
                records[-1] |= _largest_step(one, tiling, one.states + sigma * noise, sigma)
        show_progress(progress, f"{subject.name}: seams", n + 1, len(levels))
    return records


def _field(subject: Subject, denoise: Denoise, noise: Tensor, sigma: float | None, steps: int) -> Tensor:
    """The denoised state at this noise level, or for None the field that is sampled from the noise."""
    if sigma is None:
        return sample(denoise, noise, noise_levels(steps))
    return denoise(subject.states + sigma * noise, torch.full((len(noise),), sigma, dtype=torch.float64))


def _records(field: Tensor, untiled: Tensor, tiling: Tiling, about: Record) -> list[Record]:
    """One record along y, one along x."""
    return [{"halo": 0, "blend": 0} | about | {"along": a} | _seam(field, untiled, tiling, a) for a in ("y", "x")]


def _seam(field: Tensor, untiled: Tensor, tiling: Tiling, along: str) -> Record:
    profile, ratio = seam_profile(field, tiling, along)
    paired = profile / seam_profile(untiled, tiling, along)[0]
    mean = ratio.mean(0).tolist()
    one_patch = math.isnan(mean[0])
    root = math.sqrt(len(ratio))
    return {
        "ratio": None if one_patch else mean[0],
        "ratio_error": None if one_patch else float(ratio[:, 0].std()) / root,
        "others": mean[1:],
        "profile": profile.square().mean(0).sqrt().tolist(),
        "over_untiled": paired.mean(0).tolist(),
        "over_untiled_error": (paired.std(0) / root).tolist(),
    }


def _largest_step(subject: Subject, tiling: Tiling, x: Tensor, sigma: float) -> Record:
    """The largest step of F blended along x alone, and its bound from the tiles' own steps and their disagreement."""
    hard = replace(tiling, y=replace(tiling.y, blend=0))
    outputs: list[tuple[Tile, Tensor]] = []
    condition_of = tile_conditions(subject.condition, subject.network.config.patch)

    def evaluate_and_keep(z: Tensor, s: Tensor, batch: Sequence[Tile]) -> Tensor:
        result: Tensor = subject.network(z, s, condition_of(batch, len(x)))
        outputs.extend(zip(batch, torch.split(result, len(x)), strict=True))
        return result

    c_in = (sigma**2 + subject.covariance.mean(lambda v: v)) ** -0.5
    state = (c_in * x).to(subject.network.final.weight.dtype)
    with torch.no_grad():
        whole = blend_tiles(evaluate_and_keep, hard)(state, torch.full((len(x),), sigma, dtype=torch.float64))
    step_in_tile = max(float(u.diff(dim=-1).abs().max()) for _, u in outputs)
    rows = {int(tile.rows[0]) for tile, _ in outputs}  # tiles of one row meet along x alone
    disagreement = max(_disagreement(whole, [(t, u) for t, u in outputs if int(t.rows[0]) == row]) for row in rows)
    step = whole - whole.roll(1, -1)
    return {"step": float(step.abs().max()), "bound": seam_bound(step_in_tile, disagreement, tiling.x.blend)}


def _disagreement(like: Tensor, outputs: Sequence[tuple[Tile, Tensor]]) -> float:
    """The largest difference of two tiles at a point of both."""
    low = torch.full_like(like, math.inf)
    high = torch.full_like(like, -math.inf)
    for tile, u in outputs:
        at = (..., tile.rows[:, None], tile.cols)
        low[at] = torch.minimum(low[at], u)
        high[at] = torch.maximum(high[at], u)
    return float((high - low)[torch.isfinite(low)].max())
