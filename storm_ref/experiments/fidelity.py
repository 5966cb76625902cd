"""How near the tiled denoiser T[D] is to the untiled D, measured where [TILE-8] does not make them equal.

With r(a) = sqrt(mean a^2) over members, channels and points, x in standard deviations of the state:

    absolute      r(T[D] - D)                               in those standard deviations
    relative      r(T[D] - D) / r(D - G)                    G: D with the network off, F = 0; what the network says
    skill         r(D(x + s n; s) - x),  x the truth;  lost = (tiled - untiled) / (off - untiled), in squares
    sampled       r(S[T[D]](z) - S[D](z)), S the deterministic sampler, z the same latents; over r(S[D](z)), and over
                  the spread of members. "once" is T[S[D]]: tiles sampled apart on their part of z, then blended
    seam          r of u(q) - u(q - 1) with q at core boundaries, over the same with q at the other places of one phase
                  of the patch: 1 without seams. The boundary of an untiled field is anywhere: its ratios give the error
    cone          J_k = d x_n / d x_{n-k} at a point of the end of Euler's sampler: max |s_{n-k} J_k| over points and
                  channels of a tile is the answer, in standard deviations, to one of noise at one point there
    cost          multiply-adds of one evaluation ([COST-2]) over those of the untiled network, and points ([TILE-10])

Where a model has a covariance, its Gaussian part G is never tiled: what is measured is the tiling of F.
"""

import math
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from storm_ref import cost, verification
from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.edm import Denoise, sample, schedule
from storm_ref.experiments.coarse import coarse_denoiser, coarse_evaluation
from storm_ref.tiling import Tile, Tiling, blend_tiles, overhead, seam_bound, tile_conditions
from storm_ref.tokenisation import sphere_position
from storm_ref.workbench.io import bundled
from storm_ref.workbench.io.data import Fields, history, read, targets
from storm_ref.workbench.prior import covariance as covariances
from storm_ref.workbench.prior.covariance import Covariance, covariance_denoiser
from storm_ref.workbench.prior.model import Model, load

__all__ = [
    "Progress", "Sizes", "Subject", "coarse", "cone", "default_core", "error_by_halo", "generic", "legal_halos", "once",
    "pictures", "run", "sampled_error", "scored", "seam_profile", "seams", "skill", "tiling_of", "trained",
]  # fmt: skip

# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network on a grid, with T true states (or smooth fields) and what it is told at each, float64 states."""

    name: str
    network: Storm
    condition: Condition  # a batch of T
    covariance: Covariance
    core: tuple[int, int]  # in points
    states: Float[Tensor, "t c h w"]
    latitude: Float[Tensor, " h"]

    @property
    def grid(self) -> tuple[int, int]:
        """Latitudes and longitudes."""
        return self.states.shape[-2], self.states.shape[-1]

    def at(self, index: int) -> "Subject":
        """The same at one time; its conditions then serve any number of members."""
        one = slice(index, index + 1)
        told = replace(self.condition, static=self.condition.static[one], memory=self.condition.memory[one])
        return replace(self, condition=told, states=self.states[one])

    def whole(self) -> Denoise:
        """D, untiled."""
        grid, patch = self.grid, self.network.config.patch
        return self.by(Tiling.whole(grid, self.condition.periodic, patch))

    def by(self, tiling: Tiling) -> Denoise:
        """T[D]."""
        return _silent(covariance_denoiser(self.network, self.condition, tiling, self.covariance))

    def off(self) -> Denoise:
        """G: D with F = 0."""
        return lambda x, s: covariances.precondition(lambda z, _: torch.zeros_like(z), x, s, self.covariance)


def _silent(denoise: Denoise) -> Denoise:
    """Without a record for gradients unless the state asks for one."""

    def run(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.requires_grad):
            return denoise(x, sigma)

    return run


def generic(
    grid: tuple[int, int],
    core: tuple[int, int],
    generator: torch.Generator,
    count: int = 1,
    width: int = 64,
    heads: int = 4,
    depth: int = 3,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """Random weights (`denoiser.randomise`), one point a token, on a globe; smooth random states of 2 channels and a
    memory of 3 smooth random past frames, all of variance 1.
    """
    config = StormConfig(2, 1, (1, 1), width, heads, depth, window=window)
    network = Storm(config)
    randomise(network, generator)
    network = network.to(dtype).requires_grad_(False)
    latitude = 90 - (torch.arange(grid[0], dtype=torch.float64) + 0.5) * 180 / grid[0]
    longitude = torch.arange(grid[1], dtype=torch.float64) * 360 / grid[1]
    position = sphere_position(latitude, longitude, (1, 1))
    fields = _smooth((count, 1 + 3 + 3, 2, *grid), generator)
    static, past, known = fields[:, 0, :1], fields[:, 1:4], fields[:, 4:, :1]
    age = torch.tensor([6.0, 12.0, 18.0], dtype=torch.float64).expand(count, -1)
    memory = network.compress(past.to(dtype), known.to(dtype), age, position)
    told = Condition(static.to(dtype), memory, position[None], periodic=True)
    states = _smooth((count, 2, *grid), generator)
    return Subject("generic", network, told, covariances.white((2, *grid)), core, states, latitude)


def _smooth(shape: Sequence[int], generator: torch.Generator, power: float = 3.0) -> Float[Tensor, "..."]:
    """Random fields of variance 1, amplitude falling as wave number^-power/2, periodic along the last axis only."""
    height, width = shape[-2:]
    noise = torch.fft.fft2(torch.randn(*shape[:-2], 2 * height, width, generator=generator, dtype=torch.float64))
    ky, kx = torch.fft.fftfreq(2 * height, 0.5 / height), torch.fft.fftfreq(width, 1 / width)
    amplitude = (1 + (ky[:, None] / 2) ** 2 + kx**2).double() ** (-power / 4)
    field: Tensor = torch.fft.ifft2(noise * amplitude).real[..., :height, :]
    return field / field.std((-2, -1), keepdim=True)


def trained(
    model: Model, fields: Fields, when: Shaped[np.ndarray, " t"], core: tuple[int, int] | None = None
) -> Subject:
    """A trained model at true states of the times `when`. Raises ValueError when the fields are not of its kind."""
    model.check(fields)
    found = [history(fields.time, t, model.frames, model.time_step) for t in when]
    values = torch.from_numpy(fields.values)
    index = np.stack([i for i, _ in found])
    past = torch.stack([model.background.anomalies(values[i], fields.time[i]) for i in index])
    shown = (past / model.background.anomaly_std[:, None, None]).float()
    static = torch.stack([model.forcing(fields.time[i]) for i in index])
    age = torch.from_numpy(np.stack([a for _, a in found]))
    with torch.no_grad():
        memory = model.network.compress(shown, static, age, model.position)
    told = Condition(model.forcing(when), memory, model.position[None], model.periodic)
    now = values[np.searchsorted(fields.time, when)].double()
    states = (now - model.background.predict(past, when)) / model.background.departure_std[:, None, None]
    core = core or default_core(model)
    return Subject("trained", model.network, told, model.covariance, core, states, model.latitude)


def default_core(model: Model, least: int = 6) -> tuple[int, int]:
    """The largest cores, in points, that cut each axis into at least `least` equal tiles; a patch where none does."""

    def size(length: int, patch: int) -> int:
        tokens = length // patch
        return patch * max([c for c in range(1, tokens + 1) if not tokens % c and tokens // c >= least], default=1)

    patch = model.config.patch
    return size(len(model.latitude), patch[0]), size(len(model.longitude), patch[1])


def tiling_of(subject: Subject, halo: int, blend: int = 0) -> Tiling:
    """Tiles of the subject's cores with this halo on both axes; the blend as wide as each core allows, at most `blend`.

    Raises ValueError for a halo or a blend that is no multiple of the patch or not legal, as `tiling.Axis` does.
    """
    patch, core = subject.network.config.patch, subject.core
    most = [c // p // 2 * p for c, p in zip(core, patch, strict=True)]
    blends = (min(blend, most[0]), min(blend, most[1]))
    return Tiling.of(subject.grid, core, (halo, halo), blends, subject.condition.periodic, patch)


def legal_halos(subject: Subject) -> list[int]:
    """0, then doubling from one patch up, and the largest: with it every extent covers the circle."""
    patch = max(subject.network.config.patch)
    space = subject.grid[1] - subject.core[1]
    largest = (space // 2 if subject.condition.periodic else space) // patch * patch
    doubling = [patch * 2**i for i in range(12)]
    return [0, *(h for h in doubling if h < largest), largest]


def _blends(subject: Subject, halo: int) -> list[int]:
    """None, half of the halo and the widest that is legal, in points."""
    patch = max(subject.network.config.patch)
    most = min(halo, max(subject.core) // 2 // patch * patch)
    return sorted({0, min(halo // 2 // patch * patch, most), most})


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _noisy(subject: Subject, sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(subject.states.shape, generator=generator, dtype=torch.float64)
    level = torch.full((len(noise),), sigma, dtype=torch.float64)
    return subject.states + sigma * noise, level


def _price(subject: Subject, tiling: Tiling) -> Record:
    c, (rows, cols) = subject.network.config, subject.condition.position.shape[-3:-1]
    adds, dense = cost.tiled_evaluation(c, tiling).multiply_adds, cost.evaluation(c, rows * cols).multiply_adds
    return {"overhead": overhead(tiling), "multiply_adds": adds, "cost_over_untiled": adds / dense}


def _tell(progress: Progress | None, label: str, done: int, total: int) -> None:
    if progress is not None:
        progress(label, done, total)


# One evaluation


def error_by_halo(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Record]:
    """One evaluation at x + s n, for every halo (points), every blend of none, half the halo and all, and every sigma.

    `maximum` is the largest |T[D] - D|; `cost_over_untiled` the multiply-adds.
    """
    inputs = [_noisy(subject, s, generator) for s in sigmas]
    exact = [(subject.whole()(*pair), subject.off()(*pair)) for pair in inputs]
    records = []
    for n, halo in enumerate(halos):
        cut = [tiling_of(subject, halo, b) for b in _blends(subject, halo)]
        for sigma, pair, (want, off) in zip(sigmas, inputs, exact, strict=True):
            for blend, tiling, got in zip(_blends(subject, halo), cut, _several(subject, cut, *pair), strict=True):
                error = got - want
                records.append(
                    {"halo": halo, "blend": blend, "sigma": sigma, "absolute": _rms(error)}
                    | {"maximum": float(error.abs().max()), "relative": _rms(error) / _rms(want - off)}
                    | {"network": _rms(want - off)} | _price(subject, tiling)
                )  # fmt: skip
        _tell(progress, f"{subject.name}: one evaluation, by halo", n + 1, len(halos))
    return records


def _several(subject: Subject, cut: Sequence[Tiling], x: Tensor, sigma: Tensor) -> list[Tensor]:
    """T[D](x) of tilings that differ in their blend alone, for the price of one: the tiles' outputs are the same."""
    condition_of = tile_conditions(subject.condition, subject.network.config.patch)
    outputs: dict[Hashable, Tensor] = {}  # of the network, by the places of a batch's tiles

    def evaluate_batch(z: Tensor, s: Tensor, batch: Sequence[Tile]) -> Tensor:
        places = tuple(tile.place for tile in batch)
        if places not in outputs:
            outputs[places] = subject.network(z, s, condition_of(batch, len(x)))
        return outputs[places]

    dtype = subject.network.final.weight.dtype
    with torch.no_grad():
        return [
            covariances.precondition(blend_tiles(evaluate_batch, t), x, sigma, subject.covariance, dtype) for t in cut
        ]


def skill(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[Record]:
    """Denoising error against the truth, untiled, tiled (blend: the widest) and with the network off.

    lost: the share of what the network gains in mean square that tiling loses, with its standard error over the times
    (which takes times for independent: let them be days apart).
    """
    records = []
    for n, sigma in enumerate(sigmas):
        x, level = _noisy(subject, sigma, generator)
        square = {"off": _square(subject, subject.off()(x, level))}
        square["untiled"] = _square(subject, subject.whole()(x, level))
        gain = float((square["off"] - square["untiled"]).mean())
        for halo in halos:
            blend = _blends(subject, halo)[-1]
            got = _square(subject, _several(subject, [tiling_of(subject, halo, blend)], x, level)[0])
            more = got - square["untiled"]
            spread = float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else math.nan
            records.append(
                {"halo": halo, "blend": blend, "sigma": sigma, "tiled": float(got.mean().sqrt())}
                | {name: float(values.mean().sqrt()) for name, values in square.items()}
                | {"lost": float(more.mean()) / gain, "lost_error": spread / abs(gain)}
            )  # fmt: skip
        _tell(progress, f"{subject.name}: skill", n + 1, len(sigmas))
    return records


def _square(subject: Subject, found: Tensor) -> Float[Tensor, " t"]:
    """Mean squared error of each time."""
    return (found - subject.states).square().mean((1, 2, 3))


# Sampled fields


def once(
    subject: Subject, tiling: Tiling, latents: Float[Tensor, "m c h w"], sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "m c h w"]:
    """T[S[D]]: every tile sampled by itself on its part of the latents, and only the results blended.

    Where the model has a covariance each tile has that of its own points; c_in and c_out stay those of the domain.
    """
    dtype, network = subject.network.final.weight.dtype, subject.network
    condition_of = tile_conditions(subject.condition, network.config.patch)

    def sample_batch(z: Tensor, _: Tensor, batch: Sequence[Tile]) -> Tensor:
        cropped = condition_of(batch, len(latents))
        parts = [_restrict(subject.covariance, t) for t in batch]

        def denoise(x: Tensor, s: Tensor) -> Tensor:
            scale, s2 = covariances.output_scale(subject.covariance, s)[:, None, None, None], float(s[0]) ** 2
            c_in = (s2 + subject.covariance.mean(lambda v: v)) ** -0.5
            pairs = zip(parts, torch.split(x, len(latents)), strict=True)
            skip = torch.cat([part.apply(y, lambda v: v / (v + s2)) for part, y in pairs])
            raw: Tensor = network((c_in * x).to(dtype), s, cropped)
            return skip + scale * raw.double()

        return sample(denoise, z, sigmas)

    with torch.no_grad():
        return blend_tiles(sample_batch, tiling)(latents.double(), torch.ones(len(latents), dtype=torch.float64))


def _restrict(whole: Covariance, tile: Tile) -> Covariance:
    """P Sigma P^T of the tile's points, exactly."""
    shape = (whole.shape[0], len(tile.rows), len(tile.cols))
    fields = whole.vectors.T.reshape(-1, *whole.shape)[..., tile.rows[:, None], tile.cols]
    roots = (fields.flatten(1).T * (whole.values - whole.rest).clamp_min(0).sqrt()).double()
    vectors, sizes, _ = torch.linalg.svd(roots, full_matrices=False)
    return Covariance(vectors, whole.rest + sizes**2, whole.rest, shape)


def sampled_error(
    subject: Subject,
    cuts: Sequence[tuple[int, int]],
    steps: Sequence[int],
    members: int,
    generator: torch.Generator,
    apart: Sequence[int] = (),
    sigma_min: float = 0.02,
    sigma_max: float = 80.0,
    progress: Progress | None = None,
) -> list[Record]:
    """Members from the same latents, untiled and by tiles of every (halo, blend) in `cuts`, for every number of steps.

    method: "every evaluation" ([TILE-7]), for the numbers of steps in `apart` also "once"; "untiled" is the change of
    the untiled field from these steps to the most, the error of the sampler itself. relative: to the fields' r;
    over_spread: to sqrt 2 times the members' spread, the distance of two independent members.
    """
    subject = subject.at(0)
    latents = torch.randn(members, *subject.states.shape[1:], generator=generator, dtype=torch.float64)
    records, fields = [], {n: sample(subject.whole(), latents, schedule(n, sigma_min, sigma_max)) for n in steps}
    for k, n in enumerate(steps):
        sigmas, want = schedule(n, sigma_min, sigma_max), fields[n]
        found = [("untiled", 0, 0, fields[max(steps)])]
        for halo, blend in cuts:
            tiling = tiling_of(subject, halo, blend)
            found.append(("every evaluation", halo, blend, sample(subject.by(tiling), latents, sigmas)))
            if n in apart:
                found.append(("once", halo, blend, once(subject, tiling, latents, sigmas)))
        for method, halo, blend, got in found:
            record = {"method": method, "steps": n, "halo": halo, "blend": blend}
            records.append(record | _distance(got, want))
        _tell(progress, f"{subject.name}: sampled fields", k + 1, len(steps))
    return records


def _distance(got: Tensor, want: Tensor) -> Record:
    spread = math.sqrt(2) * float(want.var(0).mean().sqrt()) if len(want) > 1 else math.nan
    error = got - want
    return {
        "difference": _rms(error), "maximum": float(error.abs().max()),
        "relative": _rms(error) / _rms(want), "over_spread": _rms(error) / spread,
    }  # fmt: skip


def scored(
    subject: Subject,
    cuts: Sequence[tuple[int, int]],
    steps: int,
    members: int,
    generator: torch.Generator,
    sigma_min: float = 0.02,
    sigma_max: float = 80.0,
    progress: Progress | None = None,
) -> list[Record]:
    """Fair CRPS and RMSE of the mean against the truth, over the subject's times, area-weighted, in the state's unit.

    more, more_error: CRPS less that of the untiled members of the same latents, and its standard error over the times.
    """
    sigmas, weights = schedule(steps, sigma_min, sigma_max), verification.area_weights(subject.latitude)
    names = [("untiled", 0, 0), *(("every evaluation", *cut) for cut in cuts), ("network off", 0, 0)]
    table = torch.zeros(len(names), len(subject.states), 2, dtype=torch.float64)
    for t in range(len(subject.states)):
        one = subject.at(t)
        latents = torch.randn(members, *one.states.shape[1:], generator=generator, dtype=torch.float64)
        denoisers = [one.whole(), *(one.by(tiling_of(one, *cut)) for cut in cuts), one.off()]
        for i, denoise in enumerate(denoisers):
            got, truth = sample(denoise, latents, sigmas), one.states[0]
            table[i, t, 0] = verification.average(verification.crps_fair(got, truth), weights=weights)
            table[i, t, 1] = verification.average((got.mean(0) - truth) ** 2, weights=weights)
        _tell(progress, f"{subject.name}: scores", t + 1, len(subject.states))
    more = table[:, :, 0] - table[:1, :, 0]
    error = more.std(1) / math.sqrt(more.shape[1])
    return [
        {"method": name, "halo": halo, "blend": blend, "steps": steps, "crps": float(table[i, :, 0].mean())}
        | {"rmse": float(table[i, :, 1].mean().sqrt()), "more": float(more[i].mean()), "more_error": float(error[i])}
        for i, (name, halo, blend) in enumerate(names)
    ]


# Seams


def seam_profile(
    field: Float[Tensor, "m c h w"], tiling: Tiling, along: str
) -> tuple[Float[Tensor, "m core"], Float[Tensor, "m offsets"]]:
    """r(u(q) - u(q - 1)) of each member by the place of q in its core (0: the step across the boundary); and for every
    place of a patch boundary in the core, the ratio of r there to r at the other such places.

    With cores of one patch there are no others, and the ratio is NaN. `along` is "y" or "x".
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
    steps: int | None = 20,
    progress: Progress | None = None,
) -> list[Record]:
    """Seams in one evaluation at every sigma, and in sampled fields (`sigma` None) of so many steps, by (halo, blend).

    ratio, ratio_error: at core boundaries, mean over members with its standard error; others: the ratios of all other
    places; profile: r of the step by its place in the core; over_untiled: the same over that of the untiled field of
    the same noise, member by member, which takes out what the field itself has there. For one evaluation with a blend
    along x: `step`, the largest in F blended along x alone, and `bound`, `tiling.seam_bound` of its tiles. At least 2
    members.
    """
    one, records = subject.at(0), []
    shape, levels = (members, *one.states.shape[1:]), [*sigmas, *([] if steps is None else [None])]
    for n, sigma in enumerate(levels):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = noise if sigma is None else one.states + sigma * noise
        level = torch.full((members,), sigma or 1.0, dtype=torch.float64)

        def field(denoise: Denoise, x: Tensor = x, level: Tensor = level, sampled: bool = sigma is None) -> Tensor:
            return sample(denoise, x, schedule(steps or 1, 0.02, 80.0)) if sampled else denoise(x, level)

        untiled = field(one.whole())
        for halo, blend in [(0, None), *cuts]:
            tiling = tiling_of(one, halo, blend or 0)
            found = untiled if blend is None else field(one.by(tiling))
            name = "untiled" if blend is None else "tiled"
            base = {"method": name, "halo": halo, "blend": blend or 0, "sigma": sigma}
            records += [base | {"along": a} | _seam(found, untiled, tiling, a) for a in ("y", "x")]
            if sigma is not None and tiling.x.blend > 0:
                records[-1] |= _bound(one, tiling, x, level)
        _tell(progress, f"{subject.name}: seams", n + 1, len(levels))
    return records


def _seam(field: Tensor, untiled: Tensor, tiling: Tiling, along: str) -> Record:
    profile, ratio = seam_profile(field, tiling, along)
    paired = profile / seam_profile(untiled, tiling, along)[0]
    mean, root = ratio.mean(0).tolist(), math.sqrt(len(ratio))
    alone = math.isnan(mean[0])
    return {
        "ratio": None if alone else mean[0], "ratio_error": None if alone else float(ratio[:, 0].std()) / root,
        "others": mean[1:], "profile": profile.square().mean(0).sqrt().tolist(),
        "over_untiled": paired.mean(0).tolist(), "over_untiled_error": (paired.std(0) / root).tolist(),
    }  # fmt: skip


def _bound(subject: Subject, tiling: Tiling, x: Tensor, sigma: Tensor) -> Record:
    """Along x, of F: the largest step of the blend, and the bound from the tiles' own steps and disagreement."""
    hard = replace(tiling, y=replace(tiling.y, blend=0))
    outputs: list[tuple[Tile, Tensor]] = []
    condition_of = tile_conditions(subject.condition, subject.network.config.patch)

    def evaluate_batch(z: Tensor, s: Tensor, batch: Sequence[Tile]) -> Tensor:
        result: Tensor = subject.network(z, s, condition_of(batch, len(x)))
        outputs.extend(zip(batch, torch.split(result, len(x)), strict=True))
        return result

    c_in = (float(sigma[0]) ** 2 + subject.covariance.mean(lambda v: v)) ** -0.5
    with torch.no_grad():
        whole = blend_tiles(evaluate_batch, hard)((c_in * x).to(subject.network.final.weight.dtype), sigma)
    low, high = torch.full_like(whole, math.inf), torch.full_like(whole, -math.inf)
    slope, jump = 0.0, 0.0
    for row in {int(t.rows[0]) for t, _ in outputs}:  # rows of tiles meet along x alone
        low.fill_(math.inf), high.fill_(-math.inf)
        for t, u in (pair for pair in outputs if int(pair[0].rows[0]) == row):
            at = (..., t.rows[:, None], t.cols)
            low[at], high[at] = torch.minimum(low[at], u), torch.maximum(high[at], u)
            slope = max(slope, float(u.diff(dim=-1).abs().max()))
        jump = max(jump, float((high - low)[torch.isfinite(low)].max()))
    step = whole - whole.roll(1, -1)
    return {"step": float(step.abs().max()), "bound": seam_bound(slope, jump, tiling.x.blend)}


# The cone


def cone(
    subject: Subject,
    tiling: Tiling | None,
    point: tuple[int, int],
    evaluations: int,
    generator: torch.Generator,
    sigma_min: float = 0.02,
    sigma_max: float = 80.0,
    progress: Progress | None = None,
) -> tuple[list[Record], list[list[list[float]]]]:
    """What one point (row, column) of the end of Euler's sampler hears of the state k evaluations before, k = 1 ...

    Records by k and by distance in tiles (of the subject's cores; diagonal steps count as one): `answer`, the largest
    |s J|, and `reached`, whether any of J is not zero. And the maps of `answer` by tile, one for each k. `tiling` None:
    untiled. The network is evaluated in float64.
    """
    one = subject.at(0)
    one = replace(one, network=_double(one.network))
    denoise = one.whole() if tiling is None else one.by(tiling)
    levels = schedule(evaluations, sigma_min, sigma_max).tolist()
    x = levels[0] * torch.randn(one.states.shape, generator=generator, dtype=torch.float64)
    states = []
    for now, after in pairwise(levels):
        states.append(x)
        x = _euler(denoise, x, now, after)
    back = torch.zeros_like(x)
    back[0, 0, point[0], point[1]] = 1
    records, maps = [], []
    for k, (state, now, after) in enumerate(zip(states[::-1], levels[-2::-1], levels[:0:-1], strict=True), start=1):
        leaf = state.requires_grad_()
        (back,) = torch.autograd.grad(_euler(denoise, leaf, now, after), leaf, back)
        answer = _by_tile(now * back, one.core)
        maps.append(answer.tolist())
        records += [{"k": k, "sigma": now} | r for r in _by_distance(answer, one, point)]
        _tell(progress, f"{subject.name}: cone", k, evaluations)
    return records, maps


def _double(network: Storm) -> Storm:
    copy = Storm(network.config).double()
    copy.load_state_dict(network.state_dict())
    return copy.requires_grad_(False)


def _euler(denoise: Denoise, x: Tensor, now: float, after: float) -> Tensor:
    level = torch.full((len(x),), now, dtype=torch.float64)
    return after / now * x + (1 - after / now) * denoise(x, level)


def _by_tile(jacobian: Tensor, core: tuple[int, int]) -> Float[Tensor, "tall wide"]:
    """The largest |J| over the channels and points of each core."""
    size = jacobian.abs().amax((0, 1))
    rows = [size[a : a + core[0]].amax(0) for a in range(0, len(size), core[0])]
    return torch.stack([torch.stack(rows)[:, a : a + core[1]].amax(1) for a in range(0, size.shape[1], core[1])], 1)


def _by_distance(answer: Tensor, subject: Subject, point: tuple[int, int]) -> list[Record]:
    dy = (torch.arange(answer.shape[0]) - point[0] // subject.core[0]).abs()
    dx = (torch.arange(answer.shape[1]) - point[1] // subject.core[1]).abs()
    if subject.condition.periodic:
        dx = torch.minimum(dx, answer.shape[1] - dx)
    away = torch.maximum(dy[:, None], dx)
    largest = [float(answer[away == d].max()) for d in range(int(away.max()) + 1)]
    return [{"distance": d, "answer": a, "reached": a > 0} for d, a in enumerate(largest)]


# The coarse level


def coarse(
    subject: Subject,
    halos: Sequence[int],
    sigmas: Sequence[float],
    shape: tuple[int, int],
    generator: torch.Generator,
    steps: int | None = None,
    members: int = 4,
    progress: Progress | None = None,
) -> list[Record]:
    """Tiles (blend: the widest) without and with a coarse level of `shape` blocks, both against the untiled network.

    One evaluation at every sigma, and with `steps` sampled fields (`sigma` None): r of the difference for `tiled` and
    `coarse`, gain = 1 - coarse / tiled (negative: it harms), and multiply-adds of both over the untiled ones. For one
    evaluation also the shares of the network's gain that both lose (`skill`), which mean nothing for generic weights.
    """
    tests = [_noisy(subject, s, generator) for s in sigmas]
    want = [(subject.whole()(*test), subject.off()(*test)) for test in tests]
    one, records = subject.at(0), []
    latents = torch.randn(members, *one.states.shape[1:], generator=generator, dtype=torch.float64)
    levels = None if steps is None else schedule(steps, 0.02, 80.0)
    fields = None if levels is None else sample(one.whole(), latents, levels)
    for n, halo in enumerate(halos):
        tiling = tiling_of(one, halo, _blends(one, halo)[-1])
        price = _prices(one, tiling, shape) | {"halo": halo, "blend": tiling.x.blend, "means": math.prod(shape)}
        for sigma, test, (exact, off) in zip(sigmas, tests, want, strict=True):
            got = [denoise(*test) for denoise in _both(subject, tiling, shape)]
            errors = [_rms(g - exact) for g in got]
            records.append(price | {"sigma": sigma} | _gain(*errors) | _lost(subject, exact, off, *got))
        if fields is not None and levels is not None:
            errors = [_rms(sample(d, latents, levels) - fields) / _rms(fields) for d in _both(one, tiling, shape)]
            records.append(price | {"sigma": None, "steps": steps} | _gain(*errors))
        _tell(progress, f"{subject.name}: coarse level", n + 1, len(halos))
    return records


def _both(subject: Subject, tiling: Tiling, shape: tuple[int, int]) -> tuple[Denoise, Denoise]:
    helped = coarse_denoiser(subject.network, subject.condition, tiling, subject.covariance, shape)
    return subject.by(tiling), _silent(helped)


def _lost(subject: Subject, untiled: Tensor, off: Tensor, plain: Tensor, helped: Tensor) -> Record:
    """The shares of the network's gain that are lost, as `skill` has them."""
    base, none, *rest = (float(_square(subject, x).mean()) for x in (untiled, off, plain, helped))
    return {f"lost_{name}": (r - base) / (none - base) for name, r in zip(("tiled", "coarse"), rest, strict=True)}


def _gain(plain: float, helped: float) -> Record:
    return {"tiled": plain, "coarse": helped, "gain": 1 - helped / plain if plain else 0.0}


def _prices(subject: Subject, tiling: Tiling, shape: tuple[int, int]) -> Record:
    plain, c = _price(subject, tiling), subject.network.config
    dense = plain["multiply_adds"] / plain["cost_over_untiled"]
    helped = coarse_evaluation(c, tiling, shape).multiply_adds
    return {"tiled_cost": plain["cost_over_untiled"], "coarse_cost": helped / dense}


# All of it


@dataclass(frozen=True)
class Sizes:
    """How much `run` measures. Grids in points, of 6 x 12 tiles each; halos of the generic network in points."""

    sigmas: tuple[float, ...] = (0.1, 0.5, 2.0, 10.0, 40.0)
    large: tuple[int, int] = (48, 96)  # one evaluation
    middle: tuple[int, int] = (24, 48)  # seams, cone, coarse level
    small: tuple[int, int] = (12, 24)  # sampled fields
    halos: tuple[int, ...] = (0, 2, 4, 8, 12)  # on the large grid
    width: int = 64
    steps: tuple[int, ...] = (5, 10, 20, 40, 80)
    apart: tuple[int, ...] = (20,)  # numbers of steps at which tiles are sampled apart, too
    members: int = 3
    times: int = 6
    evaluations: int = 6  # of the cone
    most: float = 30.0  # times the untiled cost, beyond which a halo of the trained network is left out
    means: tuple[int, int] = (8, 16)  # the coarse level, or half the tokens along each axis if these are fewer


def run(
    model_path: Path,
    progress: Progress | None = None,
    data: Path | None = None,
    start: str = bundled.TRAINING_END,
    sizes: Sizes = Sizes(),
    seed: int = 0,
) -> dict[str, Any]:
    """All measurements as JSON can hold them; the data's times from `start` on are to be unknown to the model.

    data: a record for the model; None for the bundled world.

    For "generic" and "trained": lists of records under "halo", "skill", "sampled", "scored", "seams" and "coarse"
    (those against the truth for the trained one alone); "cone" with "records" and "maps", each "tiled" and "untiled";
    "pictures", one sampled field; "about", the sizes.
    """
    return {
        "generic": _run_generic(sizes, partial(_draws, seed, "generic"), progress),
        "trained": _run_trained(
            model_path, data or bundled.world(), start, sizes, partial(_draws, seed, "trained"), progress
        ),
    }


def _draws(seed: int, subject: str, part: str) -> torch.Generator:
    """Random numbers of one measurement: what another one draws does not move them."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {subject} {part}".encode()))


def _run_generic(sizes: Sizes, draws: Callable[[str], torch.Generator], progress: Progress | None) -> dict[str, Any]:
    large, middle, small = (
        generic(grid, (grid[0] // 6, grid[1] // 12), draws(name), width=sizes.width)
        for name, grid in (("large", sizes.large), ("middle", sizes.middle), ("small", sizes.small))
    )
    half, quarter, half_way = middle.core[1] // 2, small.core[1] // 2, min(sizes.apart) // 2
    cuts, means = [(0, 0), (quarter, quarter), (2 * quarter, quarter)], _means(middle, sizes)
    return {
        "about": {"halo": _about(large), "seams, cone, coarse": _about(middle), "sampled, pictures": _about(small)},
        "halo": error_by_halo(large, sizes.halos, sizes.sigmas, draws("halo"), progress),
        "sampled": sampled_error(small, cuts, sizes.steps, 2, draws("sampled"), sizes.apart, progress=progress),
        "seams": seams(middle, [(half, 0), (half, half)], sizes.sigmas[1::2], draws("seams"), 4, half_way, progress),
        "cone": _cones(middle, (half, half), sizes.evaluations, draws("cone"), progress),
        "coarse": coarse(middle, (0, half), sizes.sigmas, means, draws("coarse"), half_way, 2, progress),
        "pictures": pictures(small, cuts[1], min(sizes.apart), draws("pictures")),
    }


def _run_trained(
    model_path: Path,
    data: Path,
    start: str,
    sizes: Sizes,
    draws: Callable[[str], torch.Generator],
    progress: Progress | None,
) -> dict[str, Any]:
    model, fields = load(model_path), read(data)
    found = targets(fields.time, model.time_step, np.datetime64(start), None, model.frames)
    when = found[np.linspace(0, len(found) - 1, sizes.times).round().astype(int)]
    subject, patch, steps = trained(model, fields, when), max(model.config.patch), min(sizes.apart)
    halos = [
        h for h in legal_halos(subject) if _price(subject, tiling_of(subject, h))["cost_over_untiled"] < sizes.most
    ]
    cuts, members, means = [(0, 0), (patch, patch), (2 * patch, patch)], sizes.members, _means(subject, sizes)
    first = [h for h, _ in cuts]
    return {
        "about": _about(subject) | {"times": [str(t) for t in when]},
        "halo": error_by_halo(subject, halos, sizes.sigmas, draws("halo"), progress),
        "skill": skill(subject, halos, sizes.sigmas, draws("skill"), progress),
        "sampled": sampled_error(subject, cuts, sizes.steps, members, draws("sampled"), sizes.apart, progress=progress),
        "scored": scored(subject, cuts, steps // 2, max(members, 2), draws("scored"), progress=progress),
        "seams": seams(subject, [(patch, 0), (patch, patch)], sizes.sigmas[1::2], draws("seams"), 4, steps, progress),
        "cone": _cones(subject, cuts[1], sizes.evaluations, draws("cone"), progress),
        "coarse": coarse(subject, first, sizes.sigmas, means, draws("coarse"), steps, 2, progress),
        "pictures": pictures(subject, cuts[1], steps, draws("pictures")),
    }


def _about(subject: Subject) -> Record:
    c, (rows, cols) = subject.network.config, subject.condition.position.shape[-3:-1]
    return {
        "grid": list(subject.grid), "core": list(subject.core), "patch": list(c.patch), "tokens": [rows, cols],
        "tiles": [-(-n // s) for n, s in zip(subject.grid, subject.core, strict=True)],
        "width": c.width, "heads": c.heads, "depth": c.depth,
        "gaussian_part_untiled": bool(subject.covariance.values.numel()),
    }  # fmt: skip


def _means(subject: Subject, sizes: Sizes) -> tuple[int, int]:
    rows, cols = subject.condition.position.shape[-3:-1]
    return min(sizes.means[0], max(rows // 2, 1)), min(sizes.means[1], max(cols // 2, 1))


def _cones(
    subject: Subject, cut: tuple[int, int], evaluations: int, generator: torch.Generator, progress: Progress | None
) -> dict[str, Any]:
    """Of the middle of the tile in the middle, tiled and untiled from one state."""
    point = tuple(n // c // 2 * c + c // 2 for n, c in zip(subject.grid, subject.core, strict=True))
    state, found = generator.get_state(), {}
    for name, tiling in (("tiled", tiling_of(subject, *cut)), ("untiled", None)):
        generator.set_state(state)
        found[name] = cone(subject, tiling, (point[0], point[1]), evaluations, generator, progress=progress)
    return {
        "point": list(point), "halo": cut[0], "blend": cut[1],
        "records": {name: records for name, (records, _) in found.items()},
        "maps": {name: maps for name, (_, maps) in found.items()},
    }  # fmt: skip


def pictures(
    subject: Subject, cut: tuple[int, int], steps: int, generator: torch.Generator, channel: int = -1
) -> dict[str, Any]:
    """One member from the same latents: "untiled", "tiled", "once", and "difference", tiled less untiled; rows as on
    the grid, in standard deviations.
    """
    one, sigmas = subject.at(0), schedule(steps, 0.02, 80.0)
    latents = torch.randn(one.states.shape, generator=generator, dtype=torch.float64)
    tiling = tiling_of(one, *cut)
    fields = {
        "untiled": sample(one.whole(), latents, sigmas), "tiled": sample(one.by(tiling), latents, sigmas),
        "once": once(one, tiling, latents, sigmas),
    }  # fmt: skip
    fields["difference"] = fields["tiled"] - fields["untiled"]
    maps = {name: field[0, channel].tolist() for name, field in fields.items()}
    return {"halo": cut[0], "blend": cut[1], "steps": steps} | maps
