"""Tests of the tests: plausible wrong versions of tiling, sampling, guidance and cycling, each of which a check must
refuse.

Every family is one function with a `fault`; without a fault it passes, so that a refusal is due to the fault alone.
Where the wrong version is the project's function on wrong inputs, it is wrapped.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from checks_sampling import (
    AXES,
    NETWORK_TILINGS,
    Problem,
    check_adjoint,
    check_bind_tiled,
    check_coefficients,
    check_draw_sigma,
    check_evaluations,
    check_exact,
    check_extents,
    check_guided,
    check_linear_cycle,
    check_loss,
    check_loss_is_one,
    check_loss_weight,
    check_member_noise,
    check_order,
    check_partition,
    check_posterior,
    check_precondition,
    check_sample,
    check_schedule,
    check_tiled,
    check_weights,
    problem,
)
from torch import Tensor

from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Churn, Denoise, draw_sigma, edm_loss, precondition, schedule
from storm_ref.guidance import Observations, mmps
from storm_ref.tiling import (
    Axis,
    LocalDenoise,
    Tile,
    Tiling,
    blend_tiles,
    cores,
    extents,
    tiled_denoiser,
    tiles,
    weights,
)

NONE = ""


def refused(fault: str, check: Callable[[], object]) -> None:
    """The check passes without a fault and fails with one."""
    if fault == NONE:
        check()
        return
    with pytest.raises(AssertionError):
        check()


def faults(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", [NONE, *names])


# Tiling


def faulty_extents(axis: Axis, fault: str) -> list[Tensor]:
    if axis.core == axis.length:
        return [torch.arange(axis.length)]
    found = []
    for start, stop in cores(axis):
        low, high = start - axis.halo, stop + axis.halo
        low += fault == "halo short on the left"
        high += fault == "halo long on the right"
        high -= fault == "stop taken for the last index"
        index = torch.arange(low, high)
        if fault == "clamped where it should clip":
            found.append(index % axis.length if axis.periodic else index.clamp(0, axis.length - 1))
        elif fault == "wraps on a closed axis" or (axis.periodic and fault != "clips on a periodic axis"):
            found.append(index % axis.length)
        else:
            found.append(index[(index >= 0) & (index < axis.length)])
    return found


@faults(
    "halo short on the left",
    "halo long on the right",
    "stop taken for the last index",
    "clamped where it should clip",
    "wraps on a closed axis",
    "clips on a periodic axis",
)
def test_extents_faults(fault: str) -> None:
    """[TILE-3]"""
    refused(fault, lambda: [check_extents(a, lambda axis: faulty_extents(axis, fault)) for a in AXES])


def faulty_weights(axis: Axis, fault: str) -> list[Tensor]:
    found = [w.clone() for w in weights(axis)]
    many, b = len(found) > 1, axis.blend
    if fault == "hard crop at all times":
        return [(w >= 0.5).double() for w in found]
    for i, (start, stop) in enumerate(cores(axis)):
        n = len(found[i])
        first = start - axis.halo if axis.periodic else max(start - axis.halo, 0)
        place = torch.arange(first, first + n).double() if many else torch.arange(n).double()
        if fault == "numpy.hanning over the extent":
            found[i] = torch.from_numpy(np.hanning(n))
        elif fault == "periodic hann over the extent":
            found[i] = torch.hann_window(n, periodic=True, dtype=torch.float64)
        elif fault == "taper at a closed edge" and not axis.periodic and i == 0 and b:
            found[i][:b] *= torch.sin(math.pi * (torch.arange(b) + 0.5 + b) / (4 * b)) ** 2
        elif fault == "not normalised" and many and b:
            found[i] = found[i] + 1e-3 * (found[i] < 1)
        elif fault == "overlap average" and many:
            inside = (place >= start - axis.halo) & (place < stop + axis.halo)
            found[i] = inside.double() / 2
        elif many and b:
            found[i] = reramped(found[i], place, start, stop, axis, fault)
    return found


def reramped(weight: Tensor, place: Tensor, start: int, stop: int, axis: Axis, fault: str) -> Tensor:
    """The seam's ramp with another shape; all of these but the last two still sum to one."""
    b = axis.blend
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "linear ramp": lambda k: (k + 0.5) / (2 * b),
        "no half in the angle": lambda k: torch.sin(math.pi * k / (4 * b)) ** 2,
        "sine, not its square": lambda k: torch.sin(math.pi * (k + 0.5) / (4 * b)),
        "angle over 2 b": lambda k: torch.sin(math.pi * (k + 0.5) / (2 * b)) ** 2,
        "cosine where sine": lambda k: torch.cos(math.pi * (k + 0.5) / (4 * b)) ** 2,
    }
    if fault not in shapes:
        return weight
    out = weight.clone()
    rise, fall = place - start + b, stop - 1 - place + b
    for k, edge in ((rise, start > 0 or axis.periodic), (fall, stop < axis.length or axis.periodic)):
        seam = (k >= 0) & (k < 2 * b)
        if edge:
            out[seam] = shapes[fault](k[seam])
    return out


@faults(
    "numpy.hanning over the extent",
    "periodic hann over the extent",
    "hard crop at all times",
    "taper at a closed edge",
    "not normalised",
    "overlap average",
    "linear ramp",
    "no half in the angle",
    "sine, not its square",
    "angle over 2 b",
    "cosine where sine",
)
def test_weights_faults(fault: str) -> None:
    """[TILE-4]"""
    refused(fault, lambda: [check_weights(a, lambda axis: faulty_weights(axis, fault)) for a in AXES])


@faults("numpy.hanning over the extent", "periodic hann over the extent", "not normalised", "sine, not its square")
def test_partition_faults(fault: str) -> None:
    """[TILE-5] the law alone, which needs no formula, sees these."""
    refused(fault, lambda: [check_partition(a, lambda axis: faulty_weights(axis, fault)) for a in AXES])


def faulty_tiled(local: LocalDenoise, tiling: Tiling, tiles_per_batch: int, fault: str) -> Denoise:
    made = tiles(tiling)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for tile in made:
            z = x[..., tile.rows[:, None], tile.cols]
            weight = tile.weight
            if fault == "weighted before, not after":
                value = local(weight * z, sigma, [tile])
            elif fault == "weighted twice":
                value = weight * weight * local(z, sigma, [tile])
            elif fault == "tile-local indices":
                moved = Tile(torch.arange(len(tile.rows)), torch.arange(len(tile.cols)), weight)
                value = weight * local(z, sigma, [moved])
            elif fault == "rows and columns of the weight exchanged" and weight.shape[0] == weight.shape[1]:
                value = weight.T * local(z, sigma, [tile])
            else:
                value = weight * local(z, sigma, [tile])
            if fault == "last tile wins":
                seen = weight > 0
                part = out[..., tile.rows[:, None], tile.cols]
                out[..., tile.rows[:, None], tile.cols] = torch.where(seen, value / weight.clamp(min=1e-9), part)
            elif fault == "a tile left out" and tile is made[-1] and len(made) > 1:
                continue
            else:
                out[..., tile.rows[:, None], tile.cols] += value
            if fault == "tiles see what others wrote":
                x = torch.where(out != 0, out, x)
        return out

    return denoise


OPERATOR_TILINGS = [
    Tiling(Axis(12, 4, 2, 1), Axis(12, 4, 4, 2, periodic=True)),
    Tiling(Axis(8, 4, 2), Axis(12, 4, 2, periodic=True)),
    Tiling(Axis(11, 4, 3, 2), Axis(11, 4, 3, 1)),
]


@faults(
    "weighted before, not after",
    "weighted twice",
    "tile-local indices",
    "rows and columns of the weight exchanged",
    "last tile wins",
    "a tile left out",
    "tiles see what others wrote",
)
def test_tiled_faults(fault: str) -> None:
    """[TILE-6]"""
    refused(fault, lambda: [check_tiled(t, lambda *a: faulty_tiled(*a, fault)) for t in OPERATOR_TILINGS])


def faulty_bind_tiled(
    network: Storm, condition: Condition, tiling: Tiling, tiles_per_batch: int, fault: str
) -> Denoise:
    """tiled_denoiser with a condition that is cropped or stacked wrongly."""
    patch, dtype = network.config.patch, network.final.weight.dtype

    def crop(tile: Tile) -> Condition:
        c = condition.crop(tile.rows, tile.cols, patch)
        rows, cols = c.position.shape[1:3]
        static, memory, position, periodic = c.static, c.memory, c.position, c.periodic
        if fault == "tile-local positions":
            position = condition.position[:, :rows, :cols]
        if fault == "memory of the first tile":
            memory = condition.memory[:, :rows, :cols]
        if fault == "static of the first tile":
            static = condition.static[..., : len(tile.rows), : len(tile.cols)]
        if fault == "positions of the core's corner":
            position = position.roll(1, 2)
        return Condition(static, memory, position, periodic)

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        members = z.shape[0] // len(batch)
        parts = [crop(t) for t in batch]
        if fault == "first member's conditioning for all":
            parts = [Condition(p.static[:1], p.memory[:1], p.position, p.periodic) for p in parts]
        stacked = Condition.stack(parts, members)
        if fault == "members and tiles exchanged":
            order = torch.arange(len(z)).reshape(len(batch), members).T.flatten()
            stacked = Condition(stacked.static[order], stacked.memory[order], stacked.position[order], stacked.periodic)
        if fault == "sigma of the first member":
            sigma = sigma[:1].expand(len(sigma))
        return precondition(lambda c, s: network(c, s, stacked), z, sigma, network.config.sigma_data, dtype)

    return blend_tiles(local, tiling, tiles_per_batch)


@faults(
    "tile-local positions",
    "memory of the first tile",
    "static of the first tile",
    "positions of the core's corner",
    "first member's conditioning for all",
    "members and tiles exchanged",
    "sigma of the first member",
)
def test_bind_tiled_faults(fault: str) -> None:
    """[TILE-6]"""
    refused(fault, lambda: [check_bind_tiled(t, lambda *a: faulty_bind_tiled(*a, fault)) for t in NETWORK_TILINGS])


def test_bind_tiled_passes_the_same_check() -> None:
    check_bind_tiled(NETWORK_TILINGS[0], tiled_denoiser)
    check_extents(AXES[1], extents)


# EDM


def faulty_coefficients(sigma: Tensor, sd: float, fault: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = sigma.double()
    t = s**2 + sd**2
    skip, out, into, noise = sd**2 / t, s * sd / t.sqrt(), 1 / t.sqrt(), s.log() / 4
    if fault == "c_noise without a quarter":
        noise = s.log()
    if fault == "c_noise to the base ten":
        noise = s.log10() / 4
    if fault == "c_skip exchanged":
        skip = s**2 / t
    if fault == "c_out not rooted":
        out = s * sd / t
    if fault == "c_in without sigma_d":
        into = 1 / (s**2 + 1).sqrt()
    if fault == "sigma_d taken for its square":
        skip, out = sd / (s**2 + sd), s * sd / (s**2 + sd).sqrt()
    if fault == "float32":
        return tuple(c.float().double() for c in (skip, out, into, noise))  # type: ignore[return-value]
    return skip, out, into, noise


@faults(
    "c_noise without a quarter",
    "c_noise to the base ten",
    "c_skip exchanged",
    "c_out not rooted",
    "c_in without sigma_d",
    "sigma_d taken for its square",
    "float32",
)
def test_coefficients_faults(fault: str) -> None:
    """[EDM-2]"""
    refused(fault, lambda: check_coefficients(lambda s, d: faulty_coefficients(s, d, fault)))


def faulty_precondition(
    network: Callable[..., Tensor], x: Tensor, sigma: Tensor, sd: float, dtype: torch.dtype, fault: str
) -> Tensor:
    skip, out, into, _ = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in faulty_coefficients(sigma, sd, NONE))
    z = x if fault == "c_in forgotten" else into * x
    given = sigma.log() / 4 if fault == "the network is given c_noise" else sigma
    given = given.float() if fault == "sigma rounded to float32" else given
    raw = network(z if fault == "the network runs in the state's dtype" else z.to(dtype), given)
    if fault == "skip of the scaled state":
        x = z
    if fault == "skip in the network's dtype":
        return ((skip * x).to(dtype) + (out * raw).to(dtype)).double()
    return skip * x + (1 if fault == "c_out forgotten" else out) * raw.double()


@faults(
    "c_in forgotten",
    "c_out forgotten",
    "skip of the scaled state",
    "the network is given c_noise",
    "sigma rounded to float32",
    "the network runs in the state's dtype",
    "skip in the network's dtype",
)
def test_precondition_faults(fault: str) -> None:
    """[EDM-1] [EDM-9]"""
    refused(fault, lambda: check_precondition(lambda *a: faulty_precondition(*a, fault)))


def faulty_schedule(steps: int, low: float, high: float, rho: float, fault: str) -> Tensor:
    rho = {"rho inverted": 1 / rho, "rho 7 at all times": 7.0}.get(fault, rho)
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - (0 if fault == "ramp over n" else 1), 1)
    if fault == "geometric":
        inner = high * (low / high) ** ramp
    elif fault == "rising":
        inner = (bottom + ramp * (top - bottom)) ** rho
    else:
        inner = (top + ramp * (bottom - top)) ** rho
    last = torch.zeros(0 if fault == "no final zero" else 1, dtype=torch.float64)
    made = torch.cat([inner, last])
    return made.float().double() if fault == "float32" else made.float() if fault == "float32 dtype" else made


@faults(
    "rho inverted",
    "rho 7 at all times",
    "ramp over n",
    "geometric",
    "rising",
    "no final zero",
    "float32",
    "float32 dtype",
)
def test_schedule_faults(fault: str) -> None:
    """[EDM-5] [EDM-9]"""
    refused(fault, lambda: check_schedule(lambda *a: faulty_schedule(*a, fault)))


def faulty_loss(
    denoise: Denoise, x: Tensor, noise: Tensor, sigma: Tensor, sd: float, valid: Tensor | None, fault: str
) -> Tensor:
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    weight = {
        "weight inverted": (s * sd) ** 2 / (s**2 + sd**2),
        "weight without the square": (s**2 + sd**2) / (s * sd),
        "no weight": torch.ones_like(s),
        "weight 1 / sigma^2": 1 / s**2,
    }.get(fault, (s**2 + sd**2) / (s * sd) ** 2)
    noisy = x + (s**2 if fault == "noise by variance" else s) * noise
    error = denoise(noisy, sigma) - (noise if fault == "noise as the target" else x)
    terms = weight * (error.abs() if fault == "absolute error" else error**2)
    if valid is None:
        return terms.sum() / len(x) if fault == "summed over points" else terms.mean()
    return (terms * valid).mean() if fault == "missing points counted as zeros" else terms[valid].mean()


LOSS_FAULTS = ("weight inverted", "weight without the square", "no weight", "weight 1 / sigma^2", "noise by variance")


@faults(*LOSS_FAULTS, "noise as the target", "absolute error", "summed over points", "missing points counted as zeros")
def test_loss_faults(fault: str) -> None:
    """[EDM-3]"""
    refused(fault, lambda: check_loss(lambda d, x, n, s, sd, valid=None: faulty_loss(d, x, n, s, sd, valid, fault)))


@faults(*LOSS_FAULTS)
def test_loss_is_one_faults(fault: str) -> None:
    """[EDM-3] the law alone, which needs no formula."""
    refused(fault, lambda: check_loss_is_one(lambda d, x, n, s, sd: faulty_loss(d, x, n, s, sd, None, fault)))


@faults("square forgotten", "square of sigma alone")
def test_loss_weight_faults(fault: str) -> None:
    """[EDM-3]"""

    def weight(s: Tensor, d: float) -> Tensor:
        under = {"square forgotten": s * d, "square of sigma alone": s**2 * d}.get(fault, (s * d) ** 2)
        return (s**2 + d**2) / under

    refused(fault, lambda: check_loss_weight(weight))


@faults("variance taken for deviation", "mean of the other sign", "uniform", "base ten")
def test_draw_sigma_faults(fault: str) -> None:
    """[EDM-4]"""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        if fault == "variance taken for deviation":
            return draw_sigma(count, generator, std=1.44)
        if fault == "mean of the other sign":
            return draw_sigma(count, generator, mean=1.2)
        if fault == "uniform":
            spread = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
            return torch.exp(-1.2 + 1.2 * math.sqrt(12) * spread)
        if fault == "base ten":
            return 10.0 ** draw_sigma(count, generator).log()
        return draw_sigma(count, generator)

    refused(fault, lambda: check_draw_sigma(draw))


QUIET = Churn()


def faulty_sample(
    denoise: Denoise,
    latents: Tensor,
    sigmas: Tensor,
    churn: Churn = QUIET,
    noises: Tensor | None = None,
    fault: str = NONE,
) -> Tensor:
    """Algorithm 2 with one thing wrong."""
    levels, steps = sigmas.tolist(), len(sigmas) - 1
    x: Tensor = latents.double() * (levels[0] ** 2 if fault == "latents by variance" else levels[0])

    def slope(z: Tensor, sigma: float) -> Tensor:
        if fault == "state in float32":
            z = z.float().double()
        return (z - denoise(z, torch.full((len(z),), sigma, dtype=torch.float64))) / sigma

    for i, (now, after) in enumerate(pairwise(levels)):
        gamma = faulty_gamma(churn, now, steps, fault)
        hat = now * (1 + gamma)
        before = x
        if gamma > 0 and noises is not None:
            added = hat**2 - now**2 if fault == "churn by variance" else math.sqrt(hat**2 - now**2)
            added = hat - now if fault == "churn by difference of levels" else added
            which = {"one noise for all steps": noises[0], "one noise for all members": noises[i][:1]}.get(
                fault, noises[i]
            )
            x = x + added * (1 if fault == "S_noise forgotten" else churn.s_noise) * which
        d = slope(x, now if fault == "evaluated at sigma, not sigma hat" else hat)
        step = after - (now if fault == "step from sigma, not sigma hat" else hat)
        predicted = x + step * d
        if after == 0:
            x = x if fault == "last step missing" else predicted
            continue
        d2 = slope(predicted, hat if fault == "corrector at the old level" else after)
        if fault == "corrector based at x instead of x hat":
            x = before + step * (d + d2) / 2
        elif fault == "corrector alone":
            x = x + step * d2
        elif fault == "corrector based at the prediction":
            x = predicted + step * (d2 - d)
        elif fault == "Euler":
            x = predicted
        else:
            x = x + step * (d + d2) / 2
    return x


def faulty_gamma(churn: Churn, sigma: float, steps: int, fault: str) -> float:
    inside = churn.s_min <= sigma <= churn.s_max
    if fault == "limits excluded":
        inside = churn.s_min < sigma < churn.s_max
    if fault == "limits ignored":
        inside = True
    share = churn.s_churn / (steps + 1 if fault == "churn over n + 1" else steps)
    return (share if fault == "gamma not capped" else min(share, math.sqrt(2) - 1)) if inside else 0.0


SAMPLE_FAULTS = (
    "latents by variance",
    "state in float32",
    "churn by variance",
    "churn by difference of levels",
    "one noise for all steps",
    "one noise for all members",
    "S_noise forgotten",
    "evaluated at sigma, not sigma hat",
    "step from sigma, not sigma hat",
    "last step missing",
    "corrector at the old level",
    "corrector based at x instead of x hat",
    "corrector alone",
    "corrector based at the prediction",
    "Euler",
    "limits excluded",
    "limits ignored",
    "churn over n + 1",
    "gamma not capped",
)


@faults(*SAMPLE_FAULTS)
def test_sample_faults(fault: str) -> None:
    """[EDM-6] [EDM-7]"""
    refused(fault, lambda: check_sample(lambda *a: faulty_sample(*a, fault=fault)))


@faults("Euler", "evaluated at sigma, not sigma hat", "gamma not capped", "churn over n + 1")
def test_evaluations_faults(fault: str) -> None:
    """[EDM-7] counting and levels; the cap binds in the runs of one and two steps."""

    def run(denoise: Denoise, *a: object) -> Tensor:
        if fault != "Euler":
            return faulty_sample(denoise, *a, fault=fault)  # type: ignore[arg-type]
        return naive_euler(denoise, *a)  # type: ignore[arg-type]

    refused(fault, lambda: check_evaluations(run))


def naive_euler(denoise: Denoise, latents: Tensor, sigmas: Tensor, *_: object) -> Tensor:
    x = sigmas[0] * latents
    for now, after in pairwise(sigmas.tolist()):
        x = x + (after - now) * (x - denoise(x, torch.full((len(x),), now, dtype=torch.float64))) / now
    return x


@faults("corrector alone", "corrector at the old level", "Euler")
def test_order_faults(fault: str) -> None:
    """[EDM-7] a lost order shows in convergence, whatever the equation was."""
    refused(fault, lambda: check_order(lambda *a: faulty_sample(*a, fault=fault), 2.0))


# Guidance


def faulty_guided(denoise: Denoise, o: Observations, name: str, fault: str) -> Denoise:
    """[GUIDE-1] to [GUIDE-5] with dense matrices and one thing wrong."""
    size = torch.Size(o.shape).numel()

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        found = []
        for m in range(len(x)):
            found.append(one(x[m : m + 1], sigma[m : m + 1]))
        return torch.cat(found)

    def one(x: Tensor, sigma: Tensor) -> Tensor:
        s, state = sigma.item(), x.detach()
        jacobian = torch.autograd.functional.jacobian(lambda z: denoise(z, sigma), state).reshape(size, size)
        xhat = denoise(state, sigma)
        h = torch.stack([o.apply(e.reshape(o.shape)) for e in torch.eye(size, dtype=torch.float64)], 1)
        variance = {"R as a deviation": o.variance**2, "R's root": o.variance.sqrt()}.get(fault, o.variance)
        r, eye = torch.diag(variance), torch.eye(len(variance), dtype=torch.float64)
        r2 = s**2 * 0.49 / (s**2 + 0.49)
        r2 = {"r^2 = sigma^2": s**2, "r^2 rooted": math.sqrt(r2), "r^2 of unit variance": s**2 / (s**2 + 1)}.get(
            fault, r2
        )
        w = {
            "dps": r,
            "pigdm": r + r2 * (eye if fault == "H H^T taken for I" else h @ h.T),
            "sda": r + 0.1 * (s if fault == "gamma sigma" else s**2) * eye,
            "mmps": r
            + (s if fault == "sigma in W" else s**2) * h @ (eye8(size) if fault == "no J in W" else jacobian) @ h.T,
        }[name]
        at = o.apply(state)[0] if fault == "innovation at x, not at xhat" else o.apply(xhat)[0]
        innovation = (at - o.value) if fault == "sign" else (o.value - at)
        back = h.T
        if fault == "repeated points overwrite one another":
            back = h.T.clone()
            back[1, 0] = 0
        score = back @ torch.linalg.solve(w, innovation)
        score = score if fault == "dropped J" else jacobian.T @ score
        score = score * (2 if fault == "observations added twice" else 1)
        scale = {"sigma instead of sigma^2": s, "no sigma": 1.0}.get(fault, s**2)
        return xhat + scale * score.reshape(x.shape)

    return guided


def eye8(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


COMMON = (
    "R as a deviation",
    "R's root",
    "innovation at x, not at xhat",
    "sign",
    "repeated points overwrite one another",
    "dropped J",
    "observations added twice",
    "sigma instead of sigma^2",
    "no sigma",
)
GUIDANCE_FAULTS = [
    *[("dps", f) for f in (NONE, *COMMON)],
    *[
        ("pigdm", f)
        for f in (NONE, *COMMON, "r^2 = sigma^2", "r^2 rooted", "r^2 of unit variance", "H H^T taken for I")
    ],
    *[("sda", f) for f in (NONE, *COMMON, "gamma sigma")],
    *[("mmps", f) for f in (NONE, *COMMON, "sigma in W", "no J in W")],
]


@pytest.mark.parametrize(("name", "fault"), GUIDANCE_FAULTS)
def test_guided_faults(name: str, fault: str) -> None:
    """[GUIDE-1] to [GUIDE-6]"""
    refused(fault, lambda: check_guided(name, lambda d, o: faulty_guided(d, o, name, fault)))


@pytest.mark.parametrize("fault", [NONE, *COMMON, "sigma in W", "no J in W"])
def test_exact_faults(fault: str) -> None:
    """[GUIDE-8] against the conditional mean, which knows nothing of scores."""
    p: Problem = problem()
    refused(fault, lambda: check_exact(lambda d, o: faulty_guided(d, o, "mmps", fault), p))


@pytest.mark.parametrize("name", ["dps", "pigdm", "sda"])
def test_other_methods_are_not_exact(name: str) -> None:
    """[GUIDE-8] an approximation that passes for mmps."""
    with pytest.raises(AssertionError):
        check_exact(lambda d, o: faulty_guided(d, o, name, NONE), problem())


@faults(
    "guidance only in the predictor", "guidance only in the corrector", "no guidance", "one conjugate-gradient step"
)
def test_posterior_faults(fault: str) -> None:
    """[GUIDE-1] [GUIDE-8] through the sampler."""

    def draw(denoise: Denoise, o: Observations, latents: Tensor, sigmas: Tensor) -> Tensor:
        guided = mmps(denoise, o, 1 if fault == "one conjugate-gradient step" else 20)
        count = [0]

        def alternating(x: Tensor, sigma: Tensor) -> Tensor:
            corrector = count[0] % 2 == 1
            count[0] += 1
            plain = {
                "guidance only in the predictor": corrector,
                "guidance only in the corrector": not corrector,
                "no guidance": True,
            }.get(fault, False)
            return (denoise if plain else guided)(x, sigma)

        return faulty_sample(alternating, latents, sigmas)

    refused(fault, lambda: check_posterior(draw))


@faults("overwrites repeated points", "first read alone", "weights forgotten", "channel last")
def test_adjoint_faults(fault: str) -> None:
    """[GUIDE-1]"""

    def apply(o: Observations, x: Tensor) -> Tensor:
        flat = x.movedim(-3, -1).flatten(-3) if fault == "channel last" else x.flatten(-3)
        read = flat[..., o.index] * (1 if fault == "weights forgotten" else o.weight)
        return read[..., 0] if fault == "first read alone" else read.sum(-1)

    def adjoint(o: Observations, d: Tensor) -> Tensor:
        flat = d.new_zeros(*d.shape[:-1], 12)
        for row in range(o.index.shape[0]):
            for k in range(o.index.shape[1]):
                put = o.weight[row, k] * d[..., row]
                old = 0 if fault == "overwrites repeated points" else flat[..., o.index[row, k]]
                flat[..., o.index[row, k]] = old + put
        return flat.reshape(*d.shape[:-1], *o.shape)

    refused(fault, lambda: check_adjoint(apply, adjoint))


# Assimilation


def faulty_noise(
    seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1, fault: str = NONE
) -> Tensor:
    numbers = {
        "same noise for all members": (seed, analysis, 0),
        "same noise for all analyses": (seed, 0, member),
        "seed without effect": (0, analysis, member),
        "numbers added": (seed + analysis + member, 0, 0),
        "numbers multiplied": (seed * 1000 + analysis * 10 + member, 0, 0),
    }.get(fault, (seed, analysis, member))
    if fault == "packed into torch's seed":
        packed = torch.Generator().manual_seed((seed << 40) | (analysis << 16) | member)
        return torch.randn(draws, *shape, generator=packed, dtype=torch.float64)
    if fault == "global generator":
        return torch.randn(draws, *shape, dtype=torch.float64)
    generator = np.random.default_rng([*numbers, *([draws] if fault == "depends on the number of draws" else [])])
    if fault == "float32":
        return torch.from_numpy(generator.standard_normal((draws, *shape), dtype=np.float32))
    if fault == "uniform":
        return torch.from_numpy(math.sqrt(12) * (generator.random((draws, *shape)) - 0.5))
    if fault == "draws last":
        return torch.from_numpy(generator.standard_normal((*shape, draws))).movedim(-1, 0)
    return torch.from_numpy(generator.standard_normal((draws, *shape)))


@faults(
    "same noise for all members",
    "same noise for all analyses",
    "seed without effect",
    "numbers added",
    "numbers multiplied",
    "packed into torch's seed",
    "global generator",
    "depends on the number of draws",
    "float32",
    "uniform",
    "draws last",
)
def test_member_noise_faults(fault: str) -> None:
    """[DA-3] without a fault: another good generator, so that the check asks for the law and not for one stream."""
    refused(fault, lambda: check_member_noise(lambda *a: faulty_noise(*a, fault=fault)))


@faults(
    "Kalman filter", "history's spread forgotten", "gain on the forecast covariance", "(I - G H) once", "Q left out"
)
def test_linear_cycle_faults(fault: str) -> None:
    """[DA-5]"""

    def run(
        a: Tensor, q: Tensor, h: Tensor, r: Tensor, m: Tensor, p: Tensor, ys: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        found, eye = [], torch.eye(len(m), dtype=torch.float64)
        for y in ys:
            forecast = a @ p @ a.T + q
            prior = forecast if fault in ("Kalman filter", "gain on the forecast covariance") else q
            gain = prior @ h.T @ torch.linalg.inv(h @ prior @ h.T + r)
            keep = eye - gain @ h
            m = keep @ a @ m + gain @ y
            carried = keep @ a @ p @ a.T @ (eye if fault == "(I - G H) once" else keep.T)
            p = {
                "Kalman filter": keep @ forecast,
                "history's spread forgotten": keep @ q,
                "Q left out": carried,
            }.get(fault, carried + keep @ q)
            found.append((m, p))
        return found

    refused(fault, lambda: check_linear_cycle(run))


def test_the_checks_pass_on_the_projects_functions() -> None:
    """A spot check that the shared checks are called as the tests call them."""
    check_schedule(schedule)
    check_loss(edm_loss)
