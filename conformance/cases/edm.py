"""Cases of chapter 6: schedule, coefficients and the sampler.

Expected values: scalars from 50-digit decimal arithmetic, rounded once; samples from algorithm 2 written out in NumPy,
with the exact denoiser of a Gaussian solved as a linear system.
"""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.tolerance import Bound, Exact, MustReject, Ulp, chain_bound

__all__ = ["cases", "covariance", "gaussian_mean", "heun", "schedule"]

DIGITS = 50


def schedule(steps: int, low: float = 0.002, high: float = 80.0, rho: int = 7) -> Array:
    """[EDM-5] in decimal arithmetic; the bounds are the exact values of the binary numbers."""
    with localcontext() as context:
        context.prec = DIGITS
        top, bottom = Decimal(high) ** (1 / Decimal(rho)), Decimal(low) ** (1 / Decimal(rho))
        levels = [float((top + (bottom - top) * i / max(steps - 1, 1)) ** rho) for i in range(steps)]
    return np.array([*levels, 0.0])


def _coefficients(sigma: list[float], sigma_data: float) -> dict[str, Array]:
    with localcontext() as context:
        context.prec = DIGITS
        sd, levels = Decimal(sigma_data), [Decimal(s) for s in sigma]
        rows = {
            "c_skip": [sd**2 / (s**2 + sd**2) for s in levels],
            "c_out": [s * sd / (s**2 + sd**2).sqrt() for s in levels],
            "c_in": [1 / (s**2 + sd**2).sqrt() for s in levels],
            "c_noise": [s.ln() / 4 for s in levels],
            "loss_weight": [(s**2 + sd**2) / (s * sd) ** 2 for s in levels],
        }
        return {name: np.array([float(v) for v in row]) for name, row in rows.items()}


def covariance(size: int, rng: np.random.Generator) -> Array:
    """A well-conditioned covariance with correlations."""
    a = rng.standard_normal((size, size))
    c: Array = a @ a.T / size + 0.3 * np.eye(size)
    return c


def gaussian_mean(x: Array, sigma: float, mean: Array, cov: Array) -> Array:
    """[EDM-10]: E[x_0 | x] for x_0 ~ N(mean, cov), [m, v]."""
    noise = np.eye(len(mean), dtype=cov.dtype) * np.asarray(sigma, cov.dtype) ** 2
    denoised: Array = mean + (cov @ np.linalg.solve(cov + noise, (x - mean).T)).T
    return denoised


def heun(
    denoise: Callable[[Array, float], Array],
    latents: Array,
    sigmas: Array,
    churn: Mapping[str, float],
    noises: Array | None,
) -> Array:
    """[EDM-6], [EDM-7]: algorithm 2 with S_churn and so on given by name; keeps the dtype of the latents."""
    levels = [float(s) for s in sigmas]
    steps = len(levels) - 1
    x: Array = levels[0] * latents
    for i in range(steps):
        now, after = levels[i], levels[i + 1]
        inside = churn.get("s_min", 0.0) <= now <= churn.get("s_max", math.inf)
        gamma = min(churn.get("s_churn", 0.0) / steps, math.sqrt(2) - 1) if inside else 0.0
        hat = now * (1 + gamma)
        if gamma > 0 and noises is not None:
            x = x + math.sqrt(hat**2 - now**2) * churn.get("s_noise", 1.0) * noises[i]
        d = (x - denoise(x, hat)) / hat
        euler = x + (after - hat) * d
        x = euler if after == 0 else x + (after - hat) * 0.5 * (d + (euler - denoise(euler, after)) / after)
    return x


def _sample_case(name: str, requirements: tuple[str, ...], churn: dict[str, float], meaning: str) -> Case:
    rng = np.random.default_rng(600)
    sigmas = np.array([80.0, 20.0, 5.0, 1.0, 0.3, 0.05, 0.0])
    inputs = {
        "mean": rng.standard_normal(4),
        "covariance": covariance(4, rng),
        "sigmas": sigmas,
        "latents": rng.standard_normal((5, 4)),
        "noises": rng.standard_normal((6, 5, 4)),
    }

    def formula(a: dict[str, Array]) -> Array:
        return heun(
            lambda x, s: gaussian_mean(x, s, a["mean"], a["covariance"]), a["latents"], sigmas, churn, a["noises"]
        )

    bound = chain_bound(formula, inputs, "six steps of the sampler")
    if not churn:
        del inputs["noises"]
    expected = {"samples": formula(inputs | {"noises": np.empty(0)})} if not churn else {"samples": formula(inputs)}
    return Case(f"edm/{name}", "sample", requirements, bound, meaning, inputs, {"churn": churn}, expected)


def _one_step() -> Case:
    """n = 1: one Euler step from sigma_0 to 0 ends at D(sigma_0 latent; sigma_0), here in powers of two."""
    inputs = {
        "mean": np.array([1.0, -2.0]),
        "covariance": np.diag([4.0, 12.0]),
        "sigmas": np.array([2.0, 0.0]),
        "latents": np.array([[1.0, 3.0], [-1.0, 0.5]]),
    }
    expected = 1 + 0.5 * (np.array([2.0, -2.0]) - 1), -2 + 0.75 * (np.array([6.0, 1.0]) + 2)
    return Case(
        "edm/sample-last-step",
        "sample",
        ("EDM-7",),
        Bound(16, "one evaluation of D and one step on numbers below 8"),
        "the last step is not Euler's: D is evaluated at sigma = 0",
        inputs,
        {"churn": {}},
        {"samples": np.stack(expected, -1)},
    )


def _levels_ulp(low: float, high: float, rho: int) -> Ulp:
    """[NUM-2]: the condition number of the formula, in ULP."""
    amplified = (high / low) ** (1 / rho)
    why = (
        f"a rounding of the bracket counts {amplified:.3g} times where it is smallest, {rho} times in the power, 2 ULP"
    )
    return Ulp(math.ceil(2 * rho * amplified), why)


def _scalars() -> list[Case]:
    sigma = [0.002, 0.3, 1.0, 1.0000001, 7.5, 80.0]
    few = Ulp(4, "at most four roundings; the logarithm is within 1 ULP and its quarter exact")
    return [
        Case(
            "edm/schedule-default",
            "schedule",
            ("EDM-5", "NUM-2"),
            _levels_ulp(0.002, 80.0, 7),
            "another default than 0.002, 80, rho = 7, i/n instead of i/(n-1), or no final 0",
            {},
            {"steps": 18},
            {"sigmas": schedule(18)},
        ),
        Case(
            "edm/schedule-settings",
            "schedule",
            ("EDM-5", "NUM-2"),
            _levels_ulp(0.01, 5.0, 3),
            "settings are ignored, or sigma_min and sigma_max are swapped",
            {},
            {"steps": 5, "sigma_min": 0.01, "sigma_max": 5.0, "rho": 3.0},
            {"sigmas": schedule(5, 0.01, 5.0, 3)},
        ),
        Case(
            "edm/schedule-one-step",
            "schedule",
            ("EDM-5",),
            _levels_ulp(0.002, 80.0, 7),
            "a single step divides by n - 1 = 0",
            {},
            {"steps": 1},
            {"sigmas": schedule(1)},
        ),
        Case(
            "edm/coefficients",
            "precondition",
            ("EDM-2", "EDM-3", "NUM-2"),
            few,
            "a coefficient is wrong: c_noise without 1/4 or with log10, sigma_data not squared, weight inverted",
            {"sigma": np.array(sigma)},
            {"sigma_data": 0.5},
            _coefficients(sigma, 0.5),
        ),
        Case(
            "edm/coefficients-unit",
            "precondition",
            ("EDM-2",),
            Exact("sigma = sigma_data = 1: 1/2 and 0 have no rounding"),
            "c_skip or c_noise is another formula's",
            {"sigma": np.ones(1)},
            {"sigma_data": 1.0},
            {"c_skip": np.array([0.5]), "c_noise": np.zeros(1)},
        ),
    ]


def _refusals() -> list[Case]:
    levels = {"sigma": np.array([1.0])}
    gauss = {
        "mean": np.zeros(2),
        "covariance": np.eye(2),
        "latents": np.ones((1, 2)),
        "sigmas": np.array([4.0, 1.0, 0.0]),
    }
    noisy = gauss | {"noises": np.ones((2, 1, 2))}
    churn = {"churn": {"s_churn": 1.0}}
    return [
        Case(
            "edm/refuses-zero-sigma",
            "precondition",
            ("EDM-2",),
            MustReject("sigma = 0 has no logarithm"),
            "sigma <= 0 gives inf or NaN instead of an error",
            {"sigma": np.array([1.0, 0.0])},
            {"sigma_data": 1.0},
            neighbour=(levels, {"sigma_data": 1.0}),
        ),
        Case(
            "edm/refuses-swapped-levels",
            "schedule",
            ("EDM-5",),
            MustReject("sigma_min 80 is above sigma_max 0.002"),
            "a rising schedule is made",
            {},
            {"steps": 4, "sigma_min": 80.0, "sigma_max": 0.002},
            neighbour=({}, {"steps": 4, "sigma_min": 0.002, "sigma_max": 80.0}),
        ),
        Case(
            "edm/refuses-churn-without-noise",
            "sample",
            ("EDM-8",),
            MustReject("churn without noises as an input"),
            "the sampler draws hidden random numbers",
            gauss,
            churn,
            neighbour=(noisy, churn),
        ),
        Case(
            "edm/refuses-rising-levels",
            "sample",
            ("EDM-12",),
            MustReject("noise levels rise from 1 to 4"),
            "noise levels in the wrong order are sampled without complaint",
            gauss | {"sigmas": np.array([1.0, 4.0, 0.0])},
            {"churn": {}},
            neighbour=(gauss, {"churn": {}}),
        ),
    ]


def cases() -> list[Case]:
    """Scalars, deterministic and stochastic samples, and what is refused."""
    window = {"s_churn": 1.8, "s_min": 0.2, "s_max": 25.0, "s_noise": 1.003}
    return [
        *_scalars(),
        _one_step(),
        _sample_case(
            "sample", ("EDM-7", "EDM-9", "EDM-10"), {}, "another solver than Heun's, or arithmetic in single precision"
        ),
        _sample_case(
            "sample-churn",
            ("EDM-6", "EDM-7", "EDM-8"),
            window,
            "noise is added outside [S_min, S_max], without S_noise, or the trapezoid is based at x instead of x_hat",
        ),
        _sample_case(
            "sample-churn-limit",
            ("EDM-6",),
            {"s_churn": 60.0},
            "gamma is not limited to sqrt 2 - 1, or S_churn is not divided by the number of steps",
        ),
        *_refusals(),
    ]
