"""Take every measurement of fidelity, as one record that JSON can hold."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storm_ref.experiments.fidelity.coarse_level import coarse_gain
from storm_ref.experiments.fidelity.cone import cone
from storm_ref.experiments.fidelity.evaluation import error_by_halo, skill
from storm_ref.experiments.fidelity.measures import Progress, Record, evaluation_cost
from storm_ref.experiments.fidelity.samples import Cut, difference_maps, sampled_error, scores
from storm_ref.experiments.fidelity.seams import seams
from storm_ref.experiments.fidelity.subjects import Subject, generic, legal_halos, tiling_of, trained
from storm_ref.workbench.io import bundled
from storm_ref.workbench.io.data import read, targets
from storm_ref.workbench.prior.model import load

__all__ = ["Sizes", "run"]

_Draws = Callable[[str], torch.Generator]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements. Grids are in points, of 6 x 12 tiles each; halos are those of the generic network."""

    sigmas: tuple[float, ...] = (0.1, 0.5, 2.0, 10.0, 40.0)
    large: tuple[int, int] = (48, 96)  # grid for one evaluation
    middle: tuple[int, int] = (24, 48)  # grid for seams, cone and coarse level
    small: tuple[int, int] = (12, 24)  # grid for sampled fields
    halos: tuple[int, ...] = (0, 2, 4, 8, 12)  # points of the large grid
    width: int = 64
    steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    apart: tuple[int, ...] = (20,)  # numbers of steps at which tiles are also sampled apart
    members: int = 3
    times: int = 6
    evaluations: int = 6  # of the cone
    most: float = 30.0  # halos of the trained network that cost more than this, over the untiled cost, are left out
    means: tuple[int, int] = (8, 16)  # blocks of the coarse level, at most half the tokens along each axis


def run(
    model_path: Path,
    progress: Progress | None = None,
    data: Path | None = None,
    start: str = bundled.TRAINING_END,
    sizes: Sizes = Sizes(),
    seed: int = 0,
) -> dict[str, Any]:
    """Take every measurement, on `data` or else on the bundled world, at times from `start` on.

    The model must not have been trained on those times.

    Returns, for "generic" and "trained", lists of records under "halo", "skill", "sampled", "scored", "seams" and
    "coarse" (those against the truth for the trained network alone); "cone" with "records" and "maps", each "tiled" and
    "untiled"; "pictures", maps of one sampled field; and "about", the sizes.
    """
    return {
        "generic": _measure_generic(sizes, partial(_generator, seed, "generic"), progress),
        "trained": _measure_trained(
            model_path, data or bundled.world(), start, sizes, partial(_generator, seed, "trained"), progress
        ),
    }


def _generator(seed: int, subject: str, part: str) -> torch.Generator:
    """The random numbers of one measurement, independent of what other measurements draw."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {subject} {part}".encode()))


def _measure_generic(sizes: Sizes, draws: _Draws, progress: Progress | None) -> dict[str, Any]:
    def subject_on(name: str, grid: tuple[int, int]) -> Subject:
        return generic(grid, (grid[0] // 6, grid[1] // 12), draws(name), width=sizes.width)

    large = subject_on("large", sizes.large)
    middle = subject_on("middle", sizes.middle)
    small = subject_on("small", sizes.small)
    half = middle.core[1] // 2
    quarter = small.core[1] // 2
    steps = min(sizes.apart) // 2
    cuts = [(0, 0), (quarter, quarter), (2 * quarter, quarter)]
    means = _means(middle, sizes)
    levels = sizes.sigmas[1::2]
    return {
        "about": {"halo": _about(large), "seams, cone, coarse": _about(middle), "sampled, pictures": _about(small)},
        "halo": error_by_halo(large, sizes.halos, sizes.sigmas, draws("halo"), progress),
        "sampled": sampled_error(small, cuts, sizes.steps, 2, draws("sampled"), sizes.apart, progress),
        "seams": seams(middle, [(half, 0), (half, half)], levels, draws("seams"), steps=steps, progress=progress),
        "cone": _cones(middle, (half, half), sizes.evaluations, draws("cone"), progress),
        "coarse": coarse_gain(middle, (0, half), sizes.sigmas, means, draws("coarse"), steps, 2, progress),
        "pictures": difference_maps(small, cuts[1], min(sizes.apart), draws("pictures")),
    }


def _measure_trained(
    model_path: Path, data: Path, start: str, sizes: Sizes, draws: _Draws, progress: Progress | None
) -> dict[str, Any]:
    model = load(model_path)
    fields = read(data)
    times = targets(fields.time, model.time_step, np.datetime64(start), None, model.frames)
    when = times[np.linspace(0, len(times) - 1, sizes.times).round().astype(int)]
    subject = trained(model, fields, when)
    patch = max(model.config.patch)
    steps = min(sizes.apart)
    halos = [h for h in legal_halos(subject) if _cost_over_untiled(subject, h) < sizes.most]
    cuts = [(0, 0), (patch, patch), (2 * patch, patch)]
    first = [halo for halo, _ in cuts]
    means = _means(subject, sizes)
    levels = sizes.sigmas[1::2]
    return {
        "about": _about(subject) | {"times": [str(t) for t in when]},
        "halo": error_by_halo(subject, halos, sizes.sigmas, draws("halo"), progress),
        "skill": skill(subject, halos, sizes.sigmas, draws("skill"), progress),
        "sampled": sampled_error(subject, cuts, sizes.steps, sizes.members, draws("sampled"), sizes.apart, progress),
        "scored": scores(subject, cuts, steps // 2, max(sizes.members, 2), draws("scored"), progress),
        "seams": seams(subject, [(patch, 0), (patch, patch)], levels, draws("seams"), steps=steps, progress=progress),
        "cone": _cones(subject, cuts[1], sizes.evaluations, draws("cone"), progress),
        "coarse": coarse_gain(subject, first, sizes.sigmas, means, draws("coarse"), steps, 2, progress),
        "pictures": difference_maps(subject, cuts[1], steps, draws("pictures")),
    }


def _cost_over_untiled(subject: Subject, halo: int) -> float:
    return float(evaluation_cost(subject, tiling_of(subject, halo))["cost_over_untiled"])


def _about(subject: Subject) -> Record:
    config = subject.network.config
    return {
        "grid": list(subject.grid),
        "core": list(subject.core),
        "patch": list(config.patch),
        "tokens": list(subject.tokens),
        "tiles": [-(-length // core) for length, core in zip(subject.grid, subject.core, strict=True)],
        "width": config.width,
        "heads": config.heads,
        "depth": config.depth,
        "gaussian_part_untiled": bool(subject.covariance.values.numel()),
    }


def _means(subject: Subject, sizes: Sizes) -> tuple[int, int]:
    rows, cols = subject.tokens
    return min(sizes.means[0], max(rows // 2, 1)), min(sizes.means[1], max(cols // 2, 1))


def _cones(
    subject: Subject, cut: Cut, evaluations: int, generator: torch.Generator, progress: Progress | None
) -> dict[str, Any]:
    """The cones of the middle of the middle tile, tiled and untiled, from one and the same state."""

    def middle(length: int, core: int) -> int:
        return length // core // 2 * core + core // 2

    point = (middle(subject.grid[0], subject.core[0]), middle(subject.grid[1], subject.core[1]))
    state = generator.get_state()
    tiled, tiled_maps = cone(subject, tiling_of(subject, *cut), point, evaluations, generator, progress)
    generator.set_state(state)
    untiled, untiled_maps = cone(subject, None, point, evaluations, generator, progress)
    return {
        "point": list(point),
        "halo": cut[0],
        "blend": cut[1],
        "records": {"tiled": tiled, "untiled": untiled},
        "maps": {"tiled": tiled_maps, "untiled": untiled_maps},
    }
