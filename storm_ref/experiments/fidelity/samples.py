"""Sampled fields: tiled and untiled from the same latents, against each other and against the truth."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref import verification
from storm_ref.edm import sample
from storm_ref.experiments.fidelity.measures import Progress, Record, noise_levels, rms, show_progress
from storm_ref.experiments.fidelity.subjects import Subject, tiling_of
from storm_ref.tiling import Tile, Tiling, blend_tiles, tile_conditions
from storm_ref.workbench.prior import covariance as covariances
from storm_ref.workbench.prior.covariance import Covariance

__all__ = ["difference_maps", "sample_tiles_apart", "sampled_error", "scores"]

Cut = tuple[int, int]  # halo and blend, in points


def sample_tiles_apart(
    subject: Subject, tiling: Tiling, latents: Float[Tensor, "m c h w"], sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "m c h w"]:
    """T[S[D]]: every tile is sampled alone on its part of the latents, and only the results are blended.

    Where the model has a covariance, each tile has that of its own points; c_in and c_out stay those of the domain.
    """
    network = subject.network
    members = len(latents)
    condition_of = tile_conditions(subject.condition, network.config.patch)

    def sample_batch(z: Tensor, _: Tensor, batch: Sequence[Tile]) -> Tensor:
        condition = condition_of(batch, members)
        parts = [_restricted(subject.covariance, tile) for tile in batch]

        def denoise_apart(x: Tensor, s: Tensor) -> Tensor:
            variance = float(s[0]) ** 2
            c_in = (variance + subject.covariance.mean(lambda v: v)) ** -0.5
            c_out = covariances.output_scale(subject.covariance, s)[:, None, None, None]
            pairs = zip(parts, torch.split(x, members), strict=True)
            skip = torch.cat([part.apply(y, lambda v: v / (v + variance)) for part, y in pairs])
            raw: Tensor = network((c_in * x).to(network.final.weight.dtype), s, condition)
            return skip + c_out * raw.double()

        return sample(denoise_apart, z, sigmas)

    with torch.no_grad():
        return blend_tiles(sample_batch, tiling)(latents.double(), torch.ones(members, dtype=torch.float64))


def _restricted(whole: Covariance, tile: Tile) -> Covariance:
    """P Sigma P^T of the tile's points, exactly."""
    shape = (whole.shape[0], len(tile.rows), len(tile.cols))
    fields = whole.vectors.T.reshape(-1, *whole.shape)[..., tile.rows[:, None], tile.cols]
    roots = (fields.flatten(1).T * (whole.values - whole.rest).clamp_min(0).sqrt()).double()
    vectors, singular_values, _ = torch.linalg.svd(roots, full_matrices=False)
    return Covariance(vectors, whole.rest + singular_values**2, whole.rest, shape)


def sampled_error(
    subject: Subject,
    cuts: Sequence[Cut],
    steps: Sequence[int],
    members: int,
    generator: torch.Generator,
    apart: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Record]:
    """The difference of members from the same latents, tiled less untiled, for every cut and every number of steps.

    `method` is "every evaluation" ([TILE-7]); "once" (`sample_tiles_apart`) for the numbers of steps in `apart`; or
    "untiled" for the change of the untiled field from these steps to the most, which is the sampler's own error.
    `relative` is relative to r of the fields; `over_spread` to sqrt 2 times the members' spread, the distance of two
    independent members.
    """
    subject = subject.at(0)
    latents = torch.randn(members, *subject.states.shape[1:], generator=generator, dtype=torch.float64)
    untiled = {n: sample(subject.untiled(), latents, noise_levels(n)) for n in steps}
    records = []
    for k, n in enumerate(steps):
        sigmas = noise_levels(n)
        samples = [("untiled", 0, 0, untiled[max(steps)])]
        for halo, blend in cuts:
            tiling = tiling_of(subject, halo, blend)
            samples.append(("every evaluation", halo, blend, sample(subject.tiled(tiling), latents, sigmas)))
            if n in apart:
                samples.append(("once", halo, blend, sample_tiles_apart(subject, tiling, latents, sigmas)))
        for method, halo, blend, field in samples:
            record = {"method": method, "steps": n, "halo": halo, "blend": blend}
            records.append(record | _difference(field, untiled[n]))
        show_progress(progress, f"{subject.name}: sampled fields", k + 1, len(steps))
    return records


def _difference(field: Tensor, untiled: Tensor) -> Record:
    error = field - untiled
    spread = math.sqrt(2) * float(untiled.var(0).mean().sqrt()) if len(untiled) > 1 else math.nan
    return {
        "difference": rms(error),
        "maximum": float(error.abs().max()),
        "relative": rms(error) / rms(untiled),
        "over_spread": rms(error) / spread,
    }


def scores(
    subject: Subject,
    cuts: Sequence[Cut],
    steps: int,
    members: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Record]:
    """Fair CRPS and RMSE of the mean against the truth, area-weighted over the subject's times, in the state's unit.

    `more` is the CRPS less that of the untiled members from the same latents, `more_error` its standard error over the
    times.
    """
    methods = [("untiled", 0, 0), *(("every evaluation", *cut) for cut in cuts), ("network off", 0, 0)]
    weights = verification.area_weights(subject.latitude)
    crps = torch.zeros(len(methods), len(subject.states), dtype=torch.float64)
    square = torch.zeros_like(crps)
    for t in range(len(subject.states)):
        one = subject.at(t)
        truth = one.states[0]
        latents = torch.randn(members, *one.states.shape[1:], generator=generator, dtype=torch.float64)
        denoisers = [one.untiled(), *(one.tiled(tiling_of(one, *cut)) for cut in cuts), one.network_off()]
        for i, denoise in enumerate(denoisers):
            ensemble = sample(denoise, latents, noise_levels(steps))
            crps[i, t] = verification.average(verification.crps_fair(ensemble, truth), weights=weights)
            square[i, t] = verification.average((ensemble.mean(0) - truth) ** 2, weights=weights)
        show_progress(progress, f"{subject.name}: scores", t + 1, len(subject.states))
    more = crps - crps[:1]
    more_error = more.std(1) / math.sqrt(more.shape[1])
    return [
        {
            "method": method,
            "halo": halo,
            "blend": blend,
            "steps": steps,
            "crps": float(crps[i].mean()),
            "rmse": float(square[i].mean().sqrt()),
            "more": float(more[i].mean()),
            "more_error": float(more_error[i]),
        }
        for i, (method, halo, blend) in enumerate(methods)
    ]


def difference_maps(
    subject: Subject, cut: Cut, steps: int, generator: torch.Generator, channel: int = -1
) -> dict[str, Any]:
    """Maps of one member from the same latents: "untiled", "tiled", "once" and "difference", tiled less untiled.

    Rows are as on the grid, values in standard deviations.
    """
    one = subject.at(0)
    sigmas = noise_levels(steps)
    latents = torch.randn(one.states.shape, generator=generator, dtype=torch.float64)
    tiling = tiling_of(one, *cut)
    untiled = sample(one.untiled(), latents, sigmas)
    tiled = sample(one.tiled(tiling), latents, sigmas)
    fields = {
        "untiled": untiled,
        "tiled": tiled,
        "once": sample_tiles_apart(one, tiling, latents, sigmas),
        "difference": tiled - untiled,
    }
    maps = {name: field[0, channel].tolist() for name, field in fields.items()}
    return {"halo": cut[0], "blend": cut[1], "steps": steps} | maps
