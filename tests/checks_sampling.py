"""Checks of tiling, sampling, guidance and cycling that take the function under test as an argument.

The tests call them with the project's functions, the tests of the tests with plausible wrong ones, which they must
refuse. Every expectation here is written from the chapter's equation alone, by loops or dense linear algebra in
float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import mpmath
import numpy as np
import torch
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.edm import Churn, gaussian_denoiser, schedule
from storm_ref.guidance import Observations
from storm_ref.tiling import Axis, Tile, Tiling
from storm_ref.tokenisation import latitude_position, region_position, sphere_position

EPS = 2.0**-52


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


def ulps(got: float, want: mpmath.mpf) -> float:
    """Distance in units in the last place of the exact value."""
    return float(abs(mpmath.mpf(got) - want) / mpmath.mpf(math.ulp(float(want))))


# Tiling

# Closed and periodic; hard and soft; a short last core; halos that clip, that reach several tiles, that fill the
# circle.
AXES = [
    Axis(12, 12),
    Axis(12, 4, 2, 1),
    Axis(12, 4, 2, 2, periodic=True),
    Axis(12, 4, 4, 2, periodic=True),
    Axis(11, 4, 3, 2),
    Axis(10, 4, 8, 2),
    Axis(16, 8, 4, 4, periodic=True),
    Axis(12, 3, 2, 0, periodic=True),
    Axis(12, 6, 2, 2, periodic=True, patch=2),
    Axis(14, 6, 4, 2, patch=2),
    Axis(12, 12, periodic=True, patch=2),
]


def naive_cores(axis: Axis) -> list[tuple[int, int]]:
    found, start = [], 0
    while start < axis.length:
        found.append((start, min(start + axis.core, axis.length)))
        start += axis.core
    return found


def naive_extents(axis: Axis) -> list[list[int]]:
    if axis.core == axis.length:
        return [list(range(axis.length))]
    found = []
    for start, stop in naive_cores(axis):
        points = []
        for q in range(start - axis.halo, stop + axis.halo):
            if axis.periodic:
                points.append(q % axis.length)
            elif 0 <= q < axis.length:
                points.append(q)
        found.append(points)
    return found


def naive_weights(axis: Axis) -> list[list[float]]:
    """[TILE-4] boundary by boundary: one row a tile, one column a point of the whole axis."""
    cut = naive_cores(axis)
    table = [[1.0 if start <= q < stop else 0.0 for q in range(axis.length)] for start, stop in cut]
    boundaries = [(i - 1, i, cut[i][0]) for i in range(1, len(cut))]
    if axis.periodic and len(cut) > 1:
        boundaries.append((len(cut) - 1, 0, 0))
    for left, right, at in boundaries:
        for k in range(2 * axis.blend):
            q = (at - axis.blend + k) % axis.length
            angle = math.pi * (k + 0.5) / (4 * axis.blend)
            table[right][q], table[left][q] = math.sin(angle) ** 2, math.cos(angle) ** 2
    return table


def check_extents(axis: Axis, extents: Callable[[Axis], list[Tensor]]) -> None:
    """[TILE-2] [TILE-3] exactly, and no point twice in a tile."""
    got = [e.tolist() for e in extents(axis)]
    assert got == naive_extents(axis), f"extents of {axis}"
    assert all(len(set(e)) == len(e) for e in got), f"a tile of {axis} sees a point twice"


def dense_weights(axis: Axis, weights: Callable[[Axis], list[Tensor]]) -> Tensor:
    """Weights of each tile scattered onto the whole axis, by the extents of the equation."""
    extents, given = naive_extents(axis), weights(axis)
    assert len(given) == len(extents), f"{len(given)} tiles of {axis}, expected {len(extents)}"
    table = torch.zeros(len(extents), axis.length, dtype=torch.float64)
    for i, (extent, weight) in enumerate(zip(extents, given, strict=True)):
        assert weight.shape == (len(extent),), f"tile {i} of {axis}: {tuple(weight.shape)} weights"
        assert weight.dtype == torch.float64
        table[i, extent] = weight
    return table


def check_weights(axis: Axis, weights: Callable[[Axis], list[Tensor]]) -> None:
    """[TILE-4] value; ones and zeros exactly, so also no taper at a closed edge."""
    got, want = dense_weights(axis, weights), torch.tensor(naive_weights(axis), dtype=torch.float64)
    plain = (want == 0) | (want == 1)
    assert torch.equal(got[plain], want[plain]), f"weights inside and beyond the seams of {axis}"
    # The angle has three roundings and the sine one; squaring doubles: below 4 eps of one.
    assert_close(got, want, 4 * EPS, f"weights of {axis}")


def check_partition(axis: Axis, weights: Callable[[Axis], list[Tensor]]) -> None:
    """[TILE-5]"""
    total = dense_weights(axis, weights).sum(0)
    assert_close(total, torch.ones_like(total), 4 * EPS, f"sum of the weights of {axis}")


def mixing(z: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    """A dense, position-dependent denoiser of one tile; integers in, integers out."""
    place = torch.tensor(rows).double()[:, None] * 3 + torch.tensor(cols).double() * 5 + 1
    return z * place + z.sum((-2, -1), keepdim=True) - z.flip(1)


def local_mixing(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
    parts = z.split(z.shape[0] // len(batch))
    return torch.cat([mixing(p, t.rows.tolist(), t.cols.tolist()) for p, t in zip(parts, batch, strict=True)])


def naive_tiled(one: Callable[[Tensor, list[int], list[int]], Tensor], tiling: Tiling, x: Tensor) -> Tensor:
    """[TILE-6], point by point."""
    out = torch.zeros_like(x)
    wy, wx = naive_weights(tiling.y), naive_weights(tiling.x)
    for i, rows in enumerate(naive_extents(tiling.y)):
        for j, cols in enumerate(naive_extents(tiling.x)):
            value = one(x[..., rows, :][..., cols], rows, cols)
            for a, row in enumerate(rows):
                for b, col in enumerate(cols):
                    out[..., row, col] += wy[i][row] * wx[j][col] * value[..., a, b]
    return out


def check_tiled(
    tiling: Tiling, blend_tiles: Callable[..., Callable[[Tensor, Tensor], Tensor]], tiles_per_batch: int = 3
) -> None:
    """[TILE-6]: bit for bit on integers where the tiling is a hard crop, else to rounding."""
    x = integers(2, 2, tiling.y.length, tiling.x.length)
    want = naive_tiled(mixing, tiling, x)
    got = blend_tiles(local_mixing, tiling, tiles_per_batch)(x, torch.ones(2, dtype=torch.float64))
    hard = tiling.y.blend == 0 and tiling.x.blend == 0
    # At most four tiles meet, each with weights good to 4 eps an axis; |D| of a tile is below the sum of all |x| terms.
    bound = 0.0 if hard else 4 * 8 * EPS * (x.abs().sum((-2, -1)).max().item() + 150 * 8)
    assert_close(got, want, bound, f"T[D] of {tiling}")


# The real network

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
        "region": lambda: region_position(lat, lon, patch, 50.0),
        "latitude": lambda: latitude_position(lat, cols, patch),
    }[position]()
    network = Storm(replace(config, position_features=places.shape[-1])).double()
    randomise(network, torch.Generator().manual_seed(5))
    memory = normal(batch, grid[0] // patch[0], cols, config.width, seed=2)
    condition = Condition(normal(batch, config.static_channels, *grid, seed=1), memory, places[None], periodic)
    sigma = torch.tensor([0.3, 2.0, 20.0, 0.01], dtype=torch.float64)[:batch]
    return World(network.requires_grad_(False), condition, normal(batch, config.channels, *grid, seed=3), sigma)


def naive_denoise(w: World, x: Tensor, condition: Condition) -> Tensor:
    """[EDM-1] and [EDM-2] written out, member by member."""
    found, sd = [], w.network.config.sigma_data
    for m, sigma in enumerate(w.sigma.tolist()):
        alone = replace(condition, static=condition.static[m : m + 1], memory=condition.memory[m : m + 1])
        s2 = sigma**2 + sd**2
        raw = w.network(x[m : m + 1] / math.sqrt(s2), w.sigma[m : m + 1], alone)
        found.append(sd**2 / s2 * x[m : m + 1] + sigma * sd / math.sqrt(s2) * raw)
    return torch.cat(found)


def naive_bind_tiled(w: World, tiling: Tiling, x: Tensor) -> Tensor:
    """[TILE-6] with the real network: every tile on its own, with its absolute positions."""
    py, px = w.network.config.patch

    def one(z: Tensor, rows: list[int], cols: list[int]) -> Tensor:
        i, j = [r // py for r in rows[::py]], [c // px for c in cols[::px]]
        condition = Condition(
            w.condition.static[:, :, rows][:, :, :, cols],
            w.condition.memory[:, i][:, :, j],
            w.condition.position[:, i][:, :, j],
            w.condition.periodic and len(cols) == tiling.x.length,
        )
        return naive_denoise(w, z, condition)

    return naive_tiled(one, tiling, x)


# Two orders of summation in a float64 network this shallow differ by 2 eps of its largest value (seen); 32 leaves room.
NETWORK = 32 * EPS


def check_bind_tiled(tiling: Tiling, tiled_denoiser: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> None:
    """[TILE-6] absolute positions, own conditioning, and members and tiles kept apart."""
    w = world((tiling.y.length, tiling.x.length), tiling.x.periodic)
    want = naive_bind_tiled(w, tiling, w.x)
    got = tiled_denoiser(w.network, w.condition, tiling, 3)(w.x, w.sigma)
    assert_close(got, want, NETWORK * want.abs().max().item(), f"tiled_denoiser on {tiling}")


NETWORK_TILINGS = [
    Tiling(Axis(8, 4, 2, 2, patch=2), Axis(12, 4, 2, 2, periodic=True, patch=2)),
    Tiling(Axis(10, 4, 2, 0, patch=2), Axis(12, 4, 4, 2, periodic=True, patch=2)),
    Tiling(Axis(8, 8, patch=2), Axis(14, 6, 4, 2, patch=2)),
]


def naive_cone(axis: Axis, evaluations: int) -> list[set[int]]:
    """[TILE-9]: for each point, the points that its value depends on after so many evaluations."""
    extents, table = naive_extents(axis), naive_weights(axis)
    tiles = len(extents)
    found = []
    for q in range(axis.length):
        reach = {i for i in range(tiles) if table[i][q] > 0}
        for _ in range(evaluations - 1):
            near = {i + d for i in reach for d in (-1, 0, 1)}
            reach = {i % tiles for i in near} if axis.periodic else {i for i in near if 0 <= i < tiles}
        found.append({p for i in reach for p in extents[i]})
    return found


def support(out: Tensor) -> list[set[int]]:
    """Of an out[probe, point] that answers unit probes: for each point, the probes that reach it."""
    return [set(torch.nonzero(out[:, q]).flatten().tolist()) for q in range(out.shape[1])]


# EDM


def check_coefficients(coefficients: Callable[[Tensor, float], Sequence[Tensor]]) -> None:
    """[EDM-2] in units in the last place: c_skip and c_out have four roundings, c_in three, c_noise a logarithm."""
    with mpmath.workdps(50):
        for sigma_data in (1.0, 0.5, 0.7):
            sigmas = torch.logspace(-4, 4, 33, dtype=torch.float64)
            got = coefficients(sigmas, sigma_data)
            for i, value in enumerate(sigmas.tolist()):
                s, d = mpmath.mpf(value), mpmath.mpf(sigma_data)
                t = s**2 + d**2
                want = {
                    "skip": d**2 / t,
                    "out": s * d / mpmath.sqrt(t),
                    "in": 1 / mpmath.sqrt(t),
                    "noise": mpmath.log(s) / 4,
                }
                for g, (name, w), limit in zip(got, want.items(), (4, 4, 3, 2), strict=True):
                    assert g.dtype == torch.float64, f"c_{name} is {g.dtype}"
                    assert ulps(g[i].item(), w) <= limit, f"c_{name} at {value}: {g[i].item()} for {w}"


def check_loss_weight(loss_weight: Callable[[Tensor, float], Tensor]) -> None:
    """[EDM-3]: six roundings."""
    with mpmath.workdps(50):
        for value in (0.01, 0.3, 1.0, 7.0, 80.0):
            s, d = mpmath.mpf(value), mpmath.mpf(0.7)
            got = loss_weight(torch.tensor([value], dtype=torch.float64), 0.7).item()
            assert ulps(got, (s**2 + d**2) / (s * d) ** 2) <= 6, f"loss weight at {value}: {got}"


def check_precondition(precondition: Callable[..., Tensor]) -> None:
    """[EDM-1]: D written out for a network that shows what it was given; [EDM-9]: a float32 network, float64 around
    it."""
    x, sigma, sd = 3 * normal(3, 2, 4), torch.tensor([0.05, 1.0, 9.0], dtype=torch.float64), 0.7
    for dtype in (torch.float64, torch.float32):
        seen = []

        def network(z: Tensor, s: Tensor, dtype: torch.dtype = dtype, seen: list[Tensor] = seen) -> Tensor:
            assert z.dtype == dtype, f"the network runs in {dtype} but was given {z.dtype}"
            seen.append(s.double())
            return torch.tanh(z) + 1

        got = precondition(network, x, sigma, sd, dtype)
        assert_close(seen[0], sigma, 0.0, "sigma as the network sees it")
        want = torch.zeros_like(x)
        for m, s in enumerate(sigma.tolist()):
            t = s**2 + sd**2
            raw = (torch.tanh((x[m] / math.sqrt(t)).to(dtype)) + 1).double()
            want[m] = sd**2 / t * x[m] + s * sd / math.sqrt(t) * raw
        # In float32 the network's argument may round either way at a tie; its output is of order one.
        atol = 16 * EPS * want.abs().max().item() if dtype == torch.float64 else 4 * 2.0**-23
        assert_close(got, want, atol, f"D with a network in {dtype}")
        identity = precondition(lambda z, s: z, x, sigma, sd, torch.float64)
        skip = (sd**2 + sigma * sd) / (sigma**2 + sd**2)
        assert_close(identity, skip[:, None, None] * x, 8 * EPS * x.abs().max().item(), "D for F = identity")
        # c_skip x is formed in float64: a network of zeros leaves it whole.
        zero = precondition(lambda z, s: torch.zeros_like(z), x, sigma, sd, torch.float32)
        want = (sd**2 / (sigma**2 + sd**2))[:, None, None] * x
        assert_close(zero, want, 8 * EPS * x.abs().max().item(), "D for F = 0 in float32")


def check_schedule(schedule: Callable[..., Tensor]) -> None:
    """[EDM-5] against fifty digits, [EDM-9].

    With u = eps / 2: a root costs (2 + |ln s| / rho) u, the four operations of the ramp 4 u of the larger root;
    dividing by the level's own root and raising to rho multiplies by rho top / root; the last power adds 2 u.
    """
    with mpmath.workdps(50):
        for steps, low, high, rho in (
            (18, 0.002, 80.0, 7.0),
            (80, 0.002, 80.0, 7.0),
            (1, 0.1, 5.0, 3.0),
            (5, 0.5, 2.0, 1.0),
        ):
            got = schedule(steps, low, high, rho)
            assert got.shape == (steps + 1,), f"{tuple(got.shape)} levels for {steps} steps"
            assert got.dtype == torch.float64, f"levels are {got.dtype}"
            assert got[-1].item() == 0, "the last level is 0"
            r = mpmath.mpf(rho)
            top, bottom = mpmath.mpf(high) ** (1 / r), mpmath.mpf(low) ** (1 / r)
            for i in range(steps):
                root = top + (mpmath.mpf(i) / max(steps - 1, 1)) * (bottom - top)
                roundings = 2 * (2 + max(abs(math.log(high)), abs(math.log(low))) / rho) + 4
                bound = (rho * roundings * float(top / root) + 2) * EPS / 2
                error = float(abs(mpmath.mpf(got[i].item()) / root**r - 1))
                assert error <= bound, (
                    f"level {i} of {steps}: {got[i].item()}, relative error {error:.3g} over {bound:.3g}"
                )


def check_draw_sigma(draw_sigma: Callable[[int, torch.Generator], Tensor]) -> None:
    """[EDM-4]: mean and deviation of ln sigma within five standard errors, and the share below one deviation."""
    count = 20_000
    logs = draw_sigma(count, torch.Generator().manual_seed(3)).log()
    assert logs.dtype == torch.float64
    assert abs(logs.mean().item() + 1.2) <= 5 * 1.2 / math.sqrt(count), f"mean {logs.mean().item()}"
    assert abs(logs.std().item() - 1.2) <= 5 * 1.2 / math.sqrt(2 * count), f"deviation {logs.std().item()}"
    below = (logs < -2.4).double().mean().item()
    assert abs(below - 0.158655) <= 5 * math.sqrt(0.1587 * 0.8413 / count), f"share below one deviation {below}"


def check_loss(edm_loss: Callable[..., Tensor]) -> None:
    """[EDM-3] by loops, with and without missing points."""
    x, noise, sigma, sd = normal(3, 5, seed=1), normal(3, 5, seed=2), torch.tensor([0.1, 1.0, 5.0]).double(), 0.7

    def denoise(z: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(z) / (1 + s[:, None])

    terms = torch.zeros_like(x)
    for m, s in enumerate(sigma.tolist()):
        for v in range(5):
            z = x[m, v].item() + s * noise[m, v].item()
            terms[m, v] = (s**2 + sd**2) / (s * sd) ** 2 * (math.tanh(z) / (1 + s) - x[m, v].item()) ** 2
    got = edm_loss(denoise, x, noise, sigma, sd)
    assert_close(got, terms.mean(), 32 * EPS * terms.max().item(), "loss")
    valid = torch.tensor([[True] * 5, [True, False, False, True, False], [False] * 5])
    want = (terms[0].sum() + terms[1, 0] + terms[1, 3]) / 7
    assert_close(
        edm_loss(denoise, x, noise, sigma, sd, valid), want, 32 * EPS * terms.max().item(), "loss of valid points"
    )


def check_loss_is_one(edm_loss: Callable[..., Tensor]) -> None:
    """[EDM-3]: an untrained network (F = 0) has loss one. The loss is quadratic, so the four signs are the
    expectation."""
    sd = 0.7
    x = torch.tensor([[sd, sd, -sd, -sd]], dtype=torch.float64)
    noise = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    for value in (0.002, 0.3, 1.0, 80.0):
        sigma = torch.tensor([value], dtype=torch.float64)
        skip = sd**2 / (value**2 + sd**2)
        got = edm_loss(lambda z, s, skip=skip: skip * z, x, noise, sigma, sd).item()
        # D - x, of the size of sigma for small sigma, is a difference of numbers of the size of sd.
        assert abs(got - 1) <= 16 * EPS * (1 + sd / value), f"loss {got} at sigma {value}"


def pointwise(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear denoiser of single points."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x) / (1 + s) + x / (2 + s**2)


def naive_heun(latent: float, levels: list[float], churn: Churn, noises: Sequence[float]) -> float:
    """[EDM-6] and [EDM-7] for one number."""

    def denoise(z: float, s: float) -> float:
        return math.tanh(z) / (1 + s) + z / (2 + s**2)

    steps = len(levels) - 1
    x = levels[0] * latent
    for i in range(steps):
        gamma = 0.0
        if churn.s_min <= levels[i] <= churn.s_max:
            gamma = min(churn.s_churn / steps, math.sqrt(2) - 1)
        hat = levels[i] + gamma * levels[i]
        x_hat = x + math.sqrt(hat**2 - levels[i] ** 2) * churn.s_noise * noises[i]
        d = (x_hat - denoise(x_hat, hat)) / hat
        predicted = x_hat + (levels[i + 1] - hat) * d
        if levels[i + 1] == 0:
            x = predicted
        else:
            d2 = (predicted - denoise(predicted, levels[i + 1])) / levels[i + 1]
            x = x_hat + (levels[i + 1] - hat) * (d / 2 + d2 / 2)
    return x


CHURNS = [
    Churn(),
    Churn(2.0),
    Churn(40.0),
    Churn(3.0, s_min=0.1, s_max=4.0, s_noise=1.1),
    Churn(3.0, s_noise=0.0),
]


def check_sample(sample: Callable[..., Tensor]) -> None:
    """[EDM-6] [EDM-7] [EDM-9] value, number by number; limits that are levels themselves count as inside."""
    for steps in (1, 2, 7):
        sigmas = schedule(steps, 0.02, 10.0)
        middle = sigmas[steps // 2].item()
        for churn in [*CHURNS, Churn(3.0, s_min=middle), Churn(3.0, s_max=middle)]:
            latents, noises = normal(2, 3, seed=7), normal(steps, 2, 3, seed=8)
            got = sample(pointwise, latents, sigmas, churn, noises)
            want = torch.tensor(
                [
                    [
                        naive_heun(latents[m, v].item(), sigmas.tolist(), churn, noises[:, m, v].tolist())
                        for v in range(3)
                    ]
                    for m in range(2)
                ],
                dtype=torch.float64,
            )
            # A step divides by sigma and multiplies by its change: errors stay of the size of the starting noise.
            assert_close(got, want, 32 * EPS * 10.0 * latents.abs().max().item(), f"{steps} steps with {churn}")


def check_evaluations(sample: Callable[..., Tensor]) -> None:
    """[EDM-7]: 2 n - 1 evaluations, at the churned level and the next in turn, never at 0; [TILE-7] one level for
    all."""
    for steps in (1, 2, 9):
        for churn in (Churn(), Churn(4.0)):
            seen: list[float] = []

            def denoise(x: Tensor, sigma: Tensor, seen: list[float] = seen) -> Tensor:
                assert x.dtype == torch.float64, f"the sampler's state is {x.dtype}"
                assert sigma.shape == x.shape[:1] and bool((sigma == sigma[0]).all())
                seen.append(sigma[0].item())
                return pointwise(x, sigma)

            sigmas = schedule(steps)
            sample(denoise, normal(2, 3), sigmas, churn, normal(steps, 2, 3, seed=1))
            want = []
            for now, after in zip(sigmas.tolist()[:-1], sigmas.tolist()[1:], strict=True):
                want += [now * (1 + min(churn.s_churn / steps, math.sqrt(2) - 1)), after]
            assert len(seen) == 2 * steps - 1, f"{len(seen)} evaluations for {steps} steps"
            assert all(abs(a - b) <= 2 * EPS * b for a, b in zip(seen, want[:-1], strict=True)), "levels of evaluation"


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


def convergence(sample: Callable[..., Tensor], steps: Sequence[int]) -> list[float]:
    """Largest error against the exact flow for each number of steps."""
    mean, covariance = gaussian(4)
    errors = []
    for n in steps:
        sigmas = schedule(n)
        offset, factor = probe(lambda z, sigmas=sigmas: sample(gaussian_denoiser(mean, covariance), z, sigmas), 4)
        want_offset, want_factor = flow(mean, covariance, sigmas)
        errors.append(max((offset - want_offset).abs().max().item(), (factor - want_factor).abs().max().item()))
    return errors


def check_order(sample: Callable[..., Tensor], order: float) -> list[float]:
    """Doubling the steps divides the error by 2^order, to a tenth in the order."""
    errors = convergence(sample, (64, 128, 256))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(o - order) <= 0.1 for o in orders), f"orders {orders}, expected {order}"
    return orders


# Guidance


@dataclass(frozen=True)
class Problem:
    """An 8-dimensional Gaussian prior on fields of shape (2, 2, 2), five observations of it, and H as a matrix."""

    mean: Tensor
    covariance: Tensor
    observations: Observations
    operator: Tensor

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[EDM-10] by one dense solve a member."""
        flat, found = x.flatten(1), []
        for m in range(len(x)):
            total = self.covariance + sigma[m] ** 2 * torch.eye(8, dtype=torch.float64)
            found.append(self.mean + self.covariance @ torch.linalg.solve(total, flat[m] - self.mean))
        return torch.stack(found).reshape(x.shape)

    def kalman(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x given y."""
        h, r = self.operator, torch.diag(self.observations.variance)
        gain = torch.linalg.solve(h @ self.covariance @ h.T + r, h @ self.covariance).T
        mean = self.mean + gain @ (self.observations.value - h @ self.mean)
        return mean, self.covariance - gain @ h @ self.covariance


def problem(covariance: Tensor | None = None) -> Problem:
    """Two observations of one point with unlike errors, one of another point, two bilinear rows that share points."""
    mean, full = gaussian(8, seed=3)
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
    return Problem(mean, full if covariance is None else covariance, observations, operator)


SIGMAS = (0.002, 0.05, 0.7, 4.0, 80.0)

# One W of [GUIDE-2] to [GUIDE-5] as a matrix: of (R, H, J, sigma).
Weight = Callable[[Tensor, Tensor, Tensor, float], Tensor]

WEIGHTS: dict[str, Weight] = {
    "dps": lambda r, h, j, s: torch.linalg.inv(r),
    "pigdm": lambda r, h, j, s: torch.linalg.inv(r + s**2 * 0.7**2 / (s**2 + 0.7**2) * h @ h.T),
    "sda": lambda r, h, j, s: torch.linalg.inv(r + 0.1 * s**2 * torch.eye(5, dtype=torch.float64)),
    "mmps": lambda r, h, j, s: torch.linalg.inv(r + s**2 * h @ j @ h.T),
}


def check_guided(name: str, method: Callable[..., Callable[[Tensor, Tensor], Tensor]]) -> None:
    """[GUIDE-1] with the W of [GUIDE-2] to [GUIDE-5] as dense matrices; pigdm with sigma_d = 0.7, sda with gamma =
    0.1."""
    p = problem()
    x = p.mean + normal(len(SIGMAS), 8, seed=4) * torch.tensor(SIGMAS).double()[:, None]
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    got = method(p.denoise, p.observations)(x.reshape(-1, 2, 2, 2), sigma).flatten(1)
    h, r = p.operator, torch.diag(p.observations.variance)
    for m, s in enumerate(SIGMAS):
        jacobian = p.covariance @ torch.linalg.inv(p.covariance + s**2 * torch.eye(8, dtype=torch.float64))
        xhat = p.mean + jacobian @ (x[m] - p.mean)
        innovation = p.observations.value - h @ xhat
        score = jacobian.T @ h.T @ WEIGHTS[name](r, h, jacobian, s) @ innovation
        # Conjugate gradients stop at a residual of 1e-10 of the innovation, whence an error of at most that over the
        # least variance in the solution, times |sigma^2 J H^T|; plain rounding is far below, except in dps, whose score
        # is large.
        size = (
            torch.linalg.matrix_norm(s**2 * jacobian @ h.T, 2).item()
            * innovation.norm().item()
            / r.diagonal().min().item()
        )
        rounding = 64 * EPS * (size + xhat.abs().max().item())
        assert_close(got[m], xhat + s**2 * score, 1e-10 * size + rounding, f"{name} at sigma {s}")


def conditional_mean(p: Problem, x: Tensor, sigma: float) -> Tensor:
    """E[x_0 | x, y]: x and y are two observations of x_0 with independent errors."""
    g = torch.cat([torch.eye(8, dtype=torch.float64), p.operator])
    r = torch.diag(torch.cat([torch.full((8,), sigma**2, dtype=torch.float64), p.observations.variance]))
    seen = torch.cat([x, p.observations.value])
    return p.mean + p.covariance @ g.T @ torch.linalg.solve(g @ p.covariance @ g.T + r, seen - g @ p.mean)


def check_exact(method: Callable[..., Callable[[Tensor, Tensor], Tensor]], p: Problem) -> float:
    """[GUIDE-8]: the guided mean is E[x_0 | x, y] at every noise level. Returns the largest error."""
    worst = 0.0
    for s in SIGMAS:
        x = p.mean + normal(3, 8, seed=6) * math.sqrt(s**2 + 1)
        got = method(p.denoise, p.observations)(x.reshape(3, 2, 2, 2), torch.full((3,), s, dtype=torch.float64))
        want = torch.stack([conditional_mean(p, each, s) for each in x])
        # As in check_guided: |sigma^2 J H^T| <= |C| |H| < 7, least variance 0.05, innovations below 10.
        assert_close(got.flatten(1), want, 1e-10 * 7 / 0.05 * 10, f"guided mean at sigma {s}")
        worst = max(worst, (got.flatten(1) - want).abs().max().item())
    return worst


def check_posterior(
    draw: Callable[[Callable[[Tensor, Tensor], Tensor], Observations, Tensor, Tensor], Tensor], tolerance: float = 5e-3
) -> tuple[float, float]:
    """[GUIDE-8] through the whole sampler: offset and factor of the draws are those of the exact flow to the posterior.

    `draw(denoise, observations, latents, sigmas)`. Returns the errors of the mean (whitened) and covariance (relative).
    """
    p, sigmas = problem(), schedule(80)
    posterior_mean, posterior = p.kalman()
    offset, factor = probe(lambda z: draw(p.denoise, p.observations, z.reshape(-1, 2, 2, 2), sigmas).flatten(1), 8)
    want_offset, want_factor = flow(posterior_mean, posterior, sigmas)
    # The rest is Heun's error with 80 steps, seen: 1e-3.
    assert_close(offset, want_offset, tolerance, "mean of the draws")
    assert_close(factor, want_factor, tolerance, "factor of the draws")
    values, vectors = torch.linalg.eigh(posterior)
    whitened = (vectors.T @ (offset - posterior_mean)) / values.sqrt()
    relative = torch.linalg.matrix_norm(factor @ factor.T - posterior) / torch.linalg.matrix_norm(posterior)
    return whitened.norm().item(), relative.item()


def check_adjoint(
    apply: Callable[[Observations, Tensor], Tensor], adjoint: Callable[[Observations, Tensor], Tensor]
) -> None:
    """H and H^T against loops, bit for bit on integers, repeated points added up."""
    index = torch.tensor([[3, 3], [0, 7], [3, 11], [11, 5]])
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0], [2.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    o = Observations(torch.zeros(4).double(), torch.ones(4).double(), index, weight, (3, 2, 2))
    x, d = integers(2, 3, 2, 2), integers(2, 4, seed=1)
    seen, back = torch.zeros(2, 4).double(), torch.zeros(2, 12).double()
    for m in range(2):
        for row in range(4):
            for k in range(2):
                seen[m, row] += weight[row, k] * x[m].flatten()[index[row, k]]
                back[m, index[row, k]] += weight[row, k] * d[m, row]
    assert_close(apply(o, x), seen, 0.0, "H x")
    assert_close(adjoint(o, d), back.reshape(2, 3, 2, 2), 0.0, "H^T d")


# Assimilation


def check_member_noise(member_noise: Callable[..., Tensor]) -> None:
    """[DA-3]: the three numbers alone decide; every one of them counts, high bits too; few draws begin many."""
    base = member_noise(1, 2, 3, (2, 3), 4)
    assert base.shape == (4, 2, 3) and base.dtype == torch.float64
    torch.manual_seed(99)
    assert torch.equal(base, member_noise(1, 2, 3, (2, 3), 4)), "the same numbers give the same noise"
    keys = [
        (1, 2, 3),
        (2, 1, 3),
        (3, 2, 1),
        (1, 3, 2),
        (0, 2, 3),
        (1 + 2**23, 2, 3),
        (1, 2 + 2**15, 3),
        (1, 2, 3 + 2**12),
    ]
    firsts = [member_noise(*key, (2, 3), 4).flatten() for key in keys]
    for i in range(len(keys)):
        for j in range(i):
            assert not bool((firsts[i] == firsts[j]).any()), f"{keys[i]} and {keys[j]} share noise"
    for draws in (1, 2, 3):
        assert torch.equal(member_noise(1, 2, 3, (2, 3), draws), base[:draws]), "the first draws depend on the number"
    many = torch.stack([member_noise(7, k, m, (5,), 4) for k in range(20) for m in range(50)]).flatten()
    count = many.numel()
    assert len(torch.unique(many)) == count, "two members of one run share noise"
    assert abs(many.mean().item()) <= 5 / math.sqrt(count)
    assert abs(many.var().item() - 1) <= 5 * math.sqrt(2 / count)
    assert abs((many**4).mean().item() - 3) <= 5 * math.sqrt(96 / count)


@dataclass(frozen=True)
class LinearCycle:
    """x_k = A x_{k-1} + q in three dimensions, two observations an analysis, four analyses."""

    model: Tensor
    model_error: Tensor
    operator: Tensor
    error: Tensor
    mean: Tensor
    covariance: Tensor
    observations: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.model, self.model_error, self.operator, self.error, self.mean, self.covariance, self.observations
        )  # fmt: skip


def linear_cycle_problem() -> LinearCycle:
    model = torch.tensor([[0.9, 0.3, 0.0], [-0.3, 0.9, 0.1], [0.0, 0.2, 0.8]], dtype=torch.float64)
    operator = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    error = torch.diag(torch.tensor([0.2, 0.4], dtype=torch.float64))
    mean, model_error = gaussian(3, seed=11, spread=0.4)
    return LinearCycle(model, model_error, operator, error, mean, gaussian(3, seed=12)[1], normal(4, 2, seed=13))


def naive_cycle(c: LinearCycle, kalman: bool = False) -> list[tuple[Tensor, Tensor]]:
    """[DA-5] by conditioning: x_k given a *known* x_{k-1} and y_k is N(M x_{k-1} + G y, (I - G H) Q), then average over
    x_{k-1}. `kalman`: the filter, which conditions the forecast N(A m, A P A^T + Q)."""
    a, q, h, r = (t.numpy() for t in (c.model, c.model_error, c.operator, c.error))
    m, p = c.mean.numpy(), c.covariance.numpy()
    found = []
    for y in c.observations.numpy():
        prior = a @ p @ a.T + q if kalman else q
        gain = prior @ h.T @ np.linalg.inv(h @ prior @ h.T + r)
        keep = np.eye(3) - gain @ h
        m = keep @ (a @ m) + gain @ y
        p = keep @ prior if kalman else (keep @ a) @ p @ (keep @ a).T + keep @ q
        found.append((torch.from_numpy(m), torch.from_numpy(p)))
    return found


def check_linear_cycle(linear_cycle: Callable[..., list[tuple[Tensor, Tensor]]]) -> None:
    """[DA-5] value, and that it is not the Kalman filter."""
    c = linear_cycle_problem()
    got, want = linear_cycle(*c.arguments()), naive_cycle(c)
    assert len(got) == len(want)
    for k, ((m, p), (wm, wp)) in enumerate(zip(got, want, strict=True)):
        assert_close(m, wm, 64 * EPS * 4, f"mean of analysis {k}")
        assert_close(p, wp, 64 * EPS * 4, f"covariance of analysis {k}")
    filtered = naive_cycle(c, kalman=True)[-1]
    assert (got[-1][0] - filtered[0]).abs().max().item() > 0.02
    assert (got[-1][1] - filtered[1]).abs().max().item() > 0.02
