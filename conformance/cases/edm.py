"""Cases of chapter 6: schedule, coefficients, the sampler, training noise, the loss and its gradients.

Expected values come from 50-digit decimal arithmetic, rounded once. A Gaussian prior with covariance V diag(l) V^T, V
a Hadamard matrix and l powers of two, is exact in binary and falls into one number a mode: on a mode d of EDM-7 is
y s / (l + s^2). A network whose output layer is zero has D = c_skip x, so its loss and the gradient of the loss by its
output bias are sums that can be written down. The loss and gradients of other networks are the reference's.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.judging.case import Chain, Judge, Recipe
from conformance.judging.inputs import config, network_inputs
from conformance.judging.tolerance import Bound, MustReject, Ulp

__all__ = ["covariance", "loss_inputs", "recipes", "schedule", "silenced", "tiny"]

DIGITS = 50
HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # its own inverse


def schedule(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7) -> Array:
    """[EDM-5] in decimal arithmetic; the bounds are the exact values of the binary numbers."""
    with localcontext() as context:
        context.prec = DIGITS
        power = Decimal(rho)
        top, bottom = Decimal(high) ** (1 / power), Decimal(low) ** (1 / power)
        levels = [float((top + (bottom - top) * i / max(steps - 1, 1)) ** power) for i in range(steps)]
    return np.array([*levels, 0.0])


def covariance(size: int, rng: np.random.Generator) -> Array:
    """A well-conditioned covariance with correlations."""
    a = rng.standard_normal((size, size))
    c: Array = a @ a.T / size + 0.3 * np.eye(size)
    return c


def _levels_ulp(low: float, high: float, rho: float) -> Ulp:
    """[NUM-2]: the condition number of the formula, in ULP."""
    amplified = (high / low) ** (1 / rho)
    bracket = f"a rounding of the bracket counts {amplified:.3g} times where it is smallest"
    why = f"{bracket}, {rho} times in the power, 2 ULP"
    return Ulp(math.ceil(2 * rho * amplified), why)


def _schedules() -> list[Recipe]:
    """Defaults, one and two steps, many, other ends and powers."""
    default = "another default than 0.002, 80, rho = 7, i/n instead of i/(n-1), single precision, or no final 0"
    rows: list[tuple[str, int, dict[str, float], str]] = [
        ("default", 18, {}, default),
        ("one-step", 1, {}, "a single step divides by n - 1 = 0, or starts at sigma_min"),
        ("two-steps", 2, {}, "two steps are not sigma_max, sigma_min and 0"),
        ("paper", 80, {}, default),
        ("settings", 5, {"sigma_min": 0.01, "sigma_max": 5.0, "rho": 3.0}, "settings are ignored, or ends are swapped"),
        ("linear", 9, {"sigma_min": 0.5, "sigma_max": 20.0, "rho": 1.0}, "rho = 1 is not a straight line"),
        ("broken-power", 7, {"sigma_min": 0.02, "sigma_max": 10.0, "rho": 2.5}, "rho is rounded to an integer"),
        ("one-end", 12, {"sigma_max": 500.0}, "a setting that is given changes one that is not"),
    ]
    cases = []
    for name, steps, settings, meaning in rows:
        low, high = settings.get("sigma_min", 0.002), settings.get("sigma_max", 80.0)
        rho, profiles = settings.get("rho", 7.0), ("edm", "smoke") if name == "default" else ("edm",)
        cases.append(Recipe(
            f"edm/schedule-{name}", "schedule", requirements=("EDM-5", "NUM-2"), profiles=profiles,
            judge=_levels_ulp(low, high, rho), meaning=meaning, inputs={}, params={"steps": steps} | settings,
            expected={"sigmas": schedule(steps, low, high, rho)},
        ))  # fmt: skip
    return cases


def _coefficients(sigma: Sequence[float], sigma_data: float) -> dict[str, Array]:
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


def _preconditions() -> list[Recipe]:
    """Coefficients at many noise levels, for three sigma_data, and where they have no rounding."""
    sigma = [1e-6, 0.002, 0.0125, 0.3, 0.5, 1.0000001, 2.0, 7.5, 80.0, 1e4]
    few = Ulp(4, "at most four roundings; the logarithm is within 1 ULP and its quarter exact")
    wrong = "a coefficient is wrong: c_noise without 1/4 or with log10, sigma_data not squared, weight inverted"
    cases = [
        Recipe(
            f"edm/coefficients-{name}", "precondition", requirements=("EDM-2", "EDM-3", "EDM-9", "NUM-2"),
            profiles=("edm",), judge=few, meaning=wrong, inputs={"sigma": np.array(sigma)}, params={"sigma_data": sd},
            expected=_coefficients(sigma, sd),
        )
        for name, sd in (("half", 0.5), ("one", 1.0), ("two", 2.0))
    ]  # fmt: skip
    exact = {"c_skip": np.array([0.5]), "c_noise": np.zeros(1), "loss_weight": np.array([2.0])}
    cases.append(Recipe(
        "edm/coefficients-unit", "precondition", requirements=("EDM-2", "EDM-3"), profiles=("edm",),
        judge=Ulp(2, "sigma = sigma_data = 1: 1/2, 0 and 2, with one rounding in a root and its square"),
        meaning="c_skip, c_noise or the loss weight is another formula's", inputs={"sigma": np.ones(1)},
        params={"sigma_data": 1.0}, expected=exact,
    ))  # fmt: skip
    for name, bad in (("zero", 0.0), ("negative", -1.0)):
        cases.append(Recipe(
            f"edm/coefficients-refuse-{name}", "precondition", requirements=("EDM-2",), profiles=("edm",),
            judge=MustReject(f"sigma = {bad:g} has no logarithm"),
            meaning="sigma <= 0 gives inf or NaN instead of an error", inputs={"sigma": np.array([1.0, bad])},
            params={"sigma_data": 1.0}, valid_counterpart=({"sigma": np.array([1.0, 2.0])}, {"sigma_data": 1.0}),
        ))  # fmt: skip
    return cases


_decimal = np.vectorize(Decimal, otypes=[object])


def _mode_step(
    y: Array, spectrum: Array, now: Decimal, after: Decimal, steps: int, churn: Mapping[str, float], noise: Array | None
) -> Array:
    """[EDM-6], [EDM-7] on modes y [m, v] about the mean, with variances `spectrum` [v]."""
    limit = Decimal(2).sqrt() - 1
    inside = Decimal(churn.get("s_min", 0)) <= now <= Decimal(churn.get("s_max", math.inf))
    gamma = min(Decimal(churn.get("s_churn", 0)) / steps, limit) if inside else Decimal(0)
    hat = (1 + gamma) * now
    if gamma > 0:
        assert noise is not None
        y = y + (hat**2 - now**2).sqrt() * Decimal(churn.get("s_noise", 1)) * noise
    d = y * (hat / (spectrum + hat**2))
    euler: Array = y + (after - hat) * d
    if after == 0:
        return euler
    trapezoid: Array = y + (after - hat) * (d + euler * (after / (spectrum + after**2))) / 2
    return trapezoid


def _exact_samples(inputs: Arrays, spectrum: Sequence[float], churn: Mapping[str, float]) -> Array:
    """`sample` in 50 digits, for the covariance HADAMARD diag(spectrum) HADAMARD."""
    with localcontext() as context:
        context.prec = DIGITS
        basis, mean = _decimal(HADAMARD), _decimal(inputs["mean"])
        levels = [Decimal(float(s)) for s in inputs["sigmas"]]
        y = (levels[0] * _decimal(inputs["latents"]) - mean) @ basis
        for i, (now, after) in enumerate(pairwise(levels)):
            noise = _decimal(inputs["noises"][i]) @ basis if "noises" in inputs else None
            y = _mode_step(
                y, _decimal(np.array(spectrum)), now=now, after=after, steps=len(levels) - 1, churn=churn, noise=noise
            )
        samples: Array = (mean + y @ basis).astype(np.float64)
        return samples


def _gauss(spectrum: Sequence[float], sigmas: Array, members: int, seed: int, churned: bool) -> dict[str, Array]:
    """Inputs of `sample` for a prior whose covariance is exact in binary."""
    rng = np.random.default_rng(seed)
    inputs = {
        "mean": rng.standard_normal(4),
        "covariance": HADAMARD @ np.diag(spectrum) @ HADAMARD,
        "sigmas": sigmas,
        "latents": rng.standard_normal((members, 4)),
    }
    return inputs | ({"noises": rng.standard_normal((len(sigmas) - 1, members, 4))} if churned else {})


UNEVEN = np.array([80.0, 20.0, 5.0, 1.0, 0.3, 0.05, 0.0])


def _samples() -> list[Recipe]:
    """Whole runs of the sampler on Gaussian priors, judged by 50 digits."""
    even, rough = (0.25, 1.0, 2.0, 0.5), (2.0**-12, 1.0, 64.0, 2.0**-4)
    solver = "another solver than Heun's: Euler, no corrector, a corrector at sigma_i, or x rounded to float32"
    rows: list[tuple[str, tuple[str, ...], Sequence[float], Array, int, dict[str, float], str]] = [
        ("sample", ("EDM-7", "EDM-10"), even, UNEVEN, 5, {}, solver),
        ("sample-default", ("EDM-7", "EDM-9"), even, schedule(18), 3, {}, solver),
        ("sample-two-levels", ("EDM-7",), even, np.array([3.0, 0.5, 0.0]), 2, {},
         "the last step is Heun's, or the one before it Euler's"),
        ("sample-rough", ("EDM-7", "EDM-9", "EDM-10"), rough, np.array([1e3, 80.0, 10.0, 1.0, 0.1, 0.01, 0.0]), 4, {},
         "small variances drown in the noise: x - D is taken in single precision"),
        ("sample-many", ("EDM-7",), even, np.array([40.0, 4.0, 0.4, 0.0]), 40, {},
         "members are mixed up, or only the first few are sampled"),
        ("sample-churn", ("EDM-6", "EDM-7", "EDM-8"), even, UNEVEN, 5,
         {"s_churn": 1.8, "s_min": 0.2, "s_max": 25.0, "s_noise": 1.25},
         "noise is added outside [S_min, S_max], without S_noise, or the trapezoid is based at x instead of x_hat"),
        ("sample-churn-edges", ("EDM-6",), even, UNEVEN, 3, {"s_churn": 1.2, "s_min": 0.3, "s_max": 20.0},
         "S_min or S_max itself is left out of the window, or the window is of sigma_hat"),
        ("sample-churn-limit", ("EDM-6",), even, UNEVEN, 3, {"s_churn": 60.0},
         "gamma is not limited to sqrt 2 - 1, or the last step is not churned"),
        ("sample-churn-share", ("EDM-6",), even, np.array([10.0, 1.0, 0.1, 0.0]), 3, {"s_churn": 0.9},
         "S_churn is divided by the number of levels, or by none"),
        ("sample-churn-quiet", ("EDM-6",), even, UNEVEN, 3, {"s_churn": 3.0, "s_noise": 0.0},
         "S_noise = 0 is taken for not given, or stops the level from being raised"),
    ]  # fmt: skip
    cases = []
    for i, (name, requirements, spectrum, sigmas, members, churn, meaning) in enumerate(rows):
        inputs = _gauss(spectrum, sigmas, members, 600 + i, bool(churn))
        profiles = ("edm", "smoke") if name == "sample" else ("edm",)
        cases.append(Recipe(
            f"edm/{name}", "sample", requirements=requirements, profiles=profiles,
            judge=Chain("the steps of the sampler"), meaning=meaning, inputs=inputs, params={"churn": churn},
            expected={"samples": _exact_samples(inputs, spectrum, churn)},
        ))  # fmt: skip
    return [*cases, _one_step()]


def _one_step() -> Recipe:
    """n = 1: one Euler step from sigma_0 to 0 ends at D(sigma_0 latent; sigma_0), here in powers of two."""
    inputs = {
        "mean": np.array([1.0, -2.0]),
        "covariance": np.diag([4.0, 12.0]),
        "sigmas": np.array([2.0, 0.0]),
        "latents": np.array([[1.0, 3.0], [-1.0, 0.5]]),
    }
    expected = 1 + 0.5 * (np.array([2.0, -2.0]) - 1), -2 + 0.75 * (np.array([6.0, 1.0]) + 2)
    return Recipe(
        "edm/sample-last-step",
        "sample",
        requirements=("EDM-7",),
        profiles=("edm",),
        judge=Bound(32, "one evaluation of D and one step on numbers below 8"),
        meaning="the last step is not Euler's: D is evaluated at sigma = 0",
        inputs=inputs,
        params={"churn": {}},
        expected={"samples": np.stack(expected, -1)},
    )


def _steps() -> list[Recipe]:
    """One step alone, where the sampler as a whole is wrong."""
    spectrum, rng = (0.25, 1.0, 2.0, 0.5), np.random.default_rng(620)
    gauss = {"mean": rng.standard_normal(4), "covariance": HADAMARD @ np.diag(spectrum) @ HADAMARD}
    gauss |= {"x": 3 * rng.standard_normal((3, 4))}
    noisy = gauss | {"noise": rng.standard_normal((3, 4))}
    window = {"s_churn": 2.0, "s_min": 0.5, "s_max": 4.0, "s_noise": 1.25}
    rows: list[tuple[str, dict[str, Array], float, float, dict[str, float], str]] = [
        ("heun", gauss, 4.0, 1.5, {}, "the corrector is missing, or its slope is divided by sigma_i"),
        ("last", gauss, 0.5, 0.0, {}, "the step to 0 is not Euler's"),
        ("churn", noisy, 2.0, 0.75, window, "x_hat is not the base of both slopes, or variances are not added"),
        ("churn-low-edge", noisy, 0.5, 0.25, window, "S_min itself is not churned"),
        ("churn-high-edge", noisy, 4.0, 1.0, window, "S_max itself is not churned"),
        ("churn-outside", noisy, 4.5, 1.0, window, "noise is added above S_max"),
        ("churn-last", noisy, 0.5, 0.0, window, "the last step is not churned, or starts from sigma_i"),
    ]
    cases = []
    for name, inputs, now, after, churn, meaning in rows:
        params = {"sigma": now, "next": after, "steps": 5, "churn": churn}
        expected = {"x": _exact_step(inputs, spectrum, now, after, churn)}
        cases.append(Recipe(
            f"edm/step-{name}", "sampler_step", requirements=("EDM-6", "EDM-7"), profiles=("edm",),
            judge=Chain("one step of the sampler"), meaning=meaning, inputs=inputs, params=params,
            expected=expected,
        ))  # fmt: skip
    return cases


def _exact_step(
    inputs: Arrays, spectrum: Sequence[float], now: float, after: float, churn: Mapping[str, float]
) -> Array:
    with localcontext() as context:
        context.prec = DIGITS
        basis, mean = _decimal(HADAMARD), _decimal(inputs["mean"])
        noise = _decimal(inputs["noise"]) @ basis if "noise" in inputs else None
        y = (_decimal(inputs["x"]) - mean) @ basis
        y = _mode_step(
            y, _decimal(np.array(spectrum)), now=Decimal(now), after=Decimal(after), steps=5, churn=churn, noise=noise
        )
        stepped: Array = (mean + y @ basis).astype(np.float64)
        return stepped


def _refused_schedules() -> list[Recipe]:
    rows: list[tuple[str, dict[str, float], dict[str, float], str, str]] = [
        ("swapped-levels", {"sigma_min": 80.0, "sigma_max": 0.002}, {"sigma_min": 0.002, "sigma_max": 80.0},
         "sigma_min 80 is above sigma_max 0.002", "a rising schedule is made"),
        ("no-steps", {"steps": 0}, {"steps": 1}, "a sampler has at least one step", "the schedule is a lone 0"),
        ("zero-sigma-min", {"sigma_min": 0.0}, {"sigma_min": 0.001}, "sigma = 0 is never denoised",
         "the last level before 0 is 0 as well"),
        ("negative-sigma-min", {"sigma_min": -0.002, "rho": 3.0}, {"sigma_min": 0.002, "rho": 3.0},
         "a noise level is positive", "a root of a negative number is NaN or complex"),
        ("zero-rho", {"rho": 0.0}, {"rho": 1.0}, "1 / rho has no value", "levels are NaN or the limit of another rho"),
    ]  # fmt: skip
    four = {"steps": 4}
    return [
        Recipe(
            f"edm/refuses-{name}", "schedule", requirements=("EDM-5", "CONV-10"), profiles=("edm",),
            judge=MustReject(why), meaning=meaning, inputs={}, params=four | bad, valid_counterpart=({}, four | good),
        )
        for name, bad, good, why, meaning in rows
    ]  # fmt: skip


def _refused_samples() -> list[Recipe]:
    gauss = {"mean": np.zeros(2), "covariance": np.eye(2), "latents": np.ones((3, 2)), "sigmas": np.array([4.0, 1, 0])}
    noises, churned = np.ones((2, 3, 2)), {"churn": {"s_churn": 1.0}}
    noisy = gauss | {"noises": noises}
    one = np.array([[1.0, 1], [1, 1], [1, 1]])
    one_bad, one_huge = one * [[1], [np.nan], [1]], one * [[1], [1e308], [1]]
    rows: list[tuple[str, str, dict[str, Array], str, str]] = [
        ("rising-levels", "EDM-12", {"sigmas": np.array([1.0, 4, 0])}, "noise levels rise from 1 to 4",
         "noise levels in the wrong order are sampled without complaint"),
        ("equal-levels", "EDM-12", {"sigmas": np.array([4.0, 4, 0])}, "two noise levels are equal",
         "noise levels that stand still are sampled without complaint"),
        ("no-final-zero", "EDM-12", {"sigmas": np.array([4.0, 1, 0.1])}, "noise levels do not end in 0",
         "noise is left in the samples"),
        ("two-final-zeros", "EDM-12", {"sigmas": np.array([4.0, 0, 0])}, "two noise levels are 0",
         "a step starts at sigma = 0"),
        ("undefined-level", "EDM-12", {"sigmas": np.array([4.0, np.nan, 0])}, "a noise level is NaN",
         "comparisons with NaN pass"),
        ("lone-level", "EDM-12", {"sigmas": np.array([0.0])}, "there is no step",
         "no step is taken, and zeros come out"),
        ("infinite-state", "EDM-12", {"latents": one_huge}, "4e308 is infinite in float64",
         "a state that stops being finite is returned"),
        ("undefined-state", "EDM-12", {"latents": one_bad}, "the second member is NaN from the start",
         "a member that is not finite is returned among the others"),
    ]  # fmt: skip
    cases = [
        Recipe(
            f"edm/refuses-{name}", "sample", requirements=(requirement, "CONV-10"), profiles=("edm",),
            judge=MustReject(why), meaning=meaning, inputs=gauss | bad, params={"churn": {}},
            valid_counterpart=(gauss, {"churn": {}}),
        )
        for name, requirement, bad, why, meaning in rows
    ]  # fmt: skip
    churn_rows: list[tuple[str, Arrays, str, str]] = [
        ("churn-without-noise", gauss, "churn without noises as an input", "the sampler draws hidden random numbers"),
        ("churn-short-noise", gauss | {"noises": noises[:1]}, "two steps, one noise", "a noise is used for two steps"),
        ("churn-shared-noise", gauss | {"noises": noises[:, :1]}, "three members, one noise",
         "all members get one noise by broadcasting"),
    ]  # fmt: skip
    cases += [
        Recipe(
            f"edm/refuses-{name}", "sample", requirements=("EDM-8", "CONV-10"), profiles=("edm",),
            judge=MustReject(why), meaning=meaning, inputs=bad, params=churned, valid_counterpart=(noisy, churned),
        )
        for name, bad, why, meaning in churn_rows
    ]  # fmt: skip
    return cases + [
        Recipe(
            f"edm/refuses-negative-{name[2:]}", "sample", requirements=("EDM-6", "CONV-10"), profiles=("edm",),
            judge=MustReject(f"{name} = -0.5"), meaning="a negative churn is taken for none", inputs=noisy,
            params={"churn": {"s_churn": 1.0} | {name: -0.5}}, valid_counterpart=(noisy, churned),
            targets=("churn_negative_accepted",),
        )
        for name in ("s_churn", "s_noise")
    ]  # fmt: skip


def _training_levels() -> list[Recipe]:
    normal = [0.0, 1.0, -1.0, 0.3, -2.75, 3.5]
    with localcontext() as context:
        context.prec = DIGITS
        mean, std = Decimal("-1.2"), Decimal("1.2")
        expected = np.array([float((mean + std * Decimal(n)).exp()) for n in normal])
    why = "the argument, below 6 in size, and its factors are rounded; exp makes absolute errors of it relative"
    return [
        Recipe(
            "edm/training-sigma", "training_sigma", requirements=("EDM-4",), profiles=("train", "smoke"),
            judge=Ulp(24, why),
            meaning="1.2 is used as a variance, the mean is +1.2 or in log10, "
            "or sigma is normal instead of its logarithm",
            inputs={"normal": np.array(normal)}, params={}, expected={"sigma": expected},
        )
    ]  # fmt: skip


TINY = {
    "channels": 1, "patch": [1, 2], "width": 4, "depth": 1, "mlp_ratio": 2, "position_features": 1,
    "position_octaves": 2, "noise_features": 4,
}  # fmt: skip


def tiny(**changes: Any) -> dict[str, Any]:
    """The configuration of a network of 638 weights."""
    return config(**TINY | changes)


def loss_inputs(c: Mapping[str, Any], grid: tuple[int, int], sigma: Sequence[float], seed: int) -> dict[str, Array]:
    """Inputs of `loss` without `valid`: generic weights, two past frames, a clean state and its noise."""
    age = [[6.0 + i, 25.0 - 2 * i] for i in range(len(sigma))]
    inputs = network_inputs(c, grid, sigma, age, seed)
    rng = np.random.default_rng(seed + 1)
    shape = inputs.pop("x").shape
    return inputs | {"clean": c["sigma_data"] * rng.standard_normal(shape), "noise": rng.standard_normal(shape)}


def silenced(inputs: Arrays) -> dict[str, Array]:
    """The same network with a zero output layer: F = 0 and D = c_skip x, exactly in every dtype."""
    return {name: value * 0 if name.startswith("weights.final.") else value for name, value in inputs.items()}


def _masked(inputs: Arrays, seed: int) -> dict[str, Array]:
    """With a mask that leaves each sample another share of its points; a fill value where it is not valid."""
    rng = np.random.default_rng(seed)
    clean = inputs["clean"]
    share = np.linspace(0.3, 0.8, len(clean))[:, None, None, None]
    valid = rng.uniform(size=clean.shape) < share
    valid[:, 0, 0, 0], valid[:, 0, 0, 1] = True, False
    return {**inputs, "clean": np.where(valid, clean, 1024.0), "valid": valid}


def _silent_loss(inputs: Arrays, sigma_data: float) -> tuple[float, float, Array]:
    """[EDM-3], [EDM-11] for F = 0 in 50 digits: the loss, the scale of its rounding, and its gradient by F.

    Rounding: D - x is a difference of numbers that may be much larger than itself, and is squared.
    """
    with localcontext() as context:
        context.prec = DIGITS
        sd, sigma = Decimal(sigma_data), _decimal(inputs["sigma"])[:, None, None, None]
        clean, noise = _decimal(inputs["clean"]), _decimal(inputs["noise"])
        total = sigma**2 + sd**2
        denoised, weight = sd**2 / total * (clean + sigma * noise), total / (sigma * sd) ** 2
        valid = inputs.get("valid", np.ones(clean.shape, bool))
        error, count = denoised - clean, int(valid.sum())
        size = np.abs(denoised) + np.abs(clean) + np.abs(sigma * noise)
        loss = (weight * error**2)[valid].sum() / count
        scale = (weight * np.abs(error) * size)[valid].sum() / count
        root = np.vectorize(lambda value: value.sqrt(), otypes=[object])(total)
        gradient = np.where(valid, 2 * weight * (sigma * sd / root) * error / count, 0)
        return float(loss), float(scale), gradient.astype(np.float64)


def _training_params(c: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": dict(c), "chunk": 2, "periodic": True}


def _silent_losses() -> list[Recipe]:
    """Closed forms, in every dtype to float64's rounding: nothing but the network is narrow."""
    rows: list[tuple[str, float, list[float], bool, str]] = [
        ("loss-fresh", 0.5, [0.02, 0.4, 9.0], False,
         "the weight is inverted, squared or of another sigma_data, or the loss is a sum, half the mean, or narrow"),
        ("loss-fresh-valid", 2.0, [0.7, 3.0, 0.05], True,
         "points that are not valid count in the numerator or the denominator, or samples are averaged one by one"),
        ("loss-fresh-levels", 1.0, [0.002, 80.0], False, "the loss of small or large noise is lost in rounding"),
    ]  # fmt: skip
    cases = []
    for i, (name, sd, sigma, masked, meaning) in enumerate(rows):
        c = tiny(sigma_data=sd)
        inputs = silenced(loss_inputs(c, (3, 4), sigma, 630 + i))
        inputs = _masked(inputs, 640) if masked else inputs
        loss, scale, _ = _silent_loss(inputs, sd)
        why = "twelve roundings of each point's D - x and its square, and the mean of at most 36 points"
        cases.append(Recipe(
            f"edm/{name}", "loss", requirements=("EDM-3", "EDM-9", "EDM-11") if masked else ("EDM-3", "EDM-9"),
            profiles=("train", "smoke") if i == 0 else ("train",), judge=Bound(24 + 36, why, scale),
            meaning=meaning, inputs=inputs, params=_training_params(c), expected={"loss": np.array(loss)},
        ))  # fmt: skip
    return cases


def _losses() -> list[Recipe]:
    """Generic weights: what the network is given in training."""
    rows: list[tuple[str, float, list[float], bool, str]] = [
        ("loss", 0.5, [0.2, 1.5], False, "the network is trained on another x, sigma or target than it will denoise"),
        ("loss-valid", 1.0, [0.1, 0.6, 5.0], True, "points that are not valid count, or the network does not see them"),
        ("loss-levels", 2.0, [0.002, 80.0], False, "the loss at the ends of the schedule is of another noise level"),
    ]
    cases = []
    for i, (name, sd, sigma, masked, meaning) in enumerate(rows):
        c = tiny(sigma_data=sd, channels=2)
        inputs = loss_inputs(c, (2, 6), sigma, 650 + i)
        inputs = _masked(inputs, 660) if masked else inputs
        cases.append(Recipe(
            f"edm/{name}", "loss", requirements=("EDM-1", "EDM-3", "EDM-11") if masked else ("EDM-1", "EDM-3"),
            profiles=("train",), judge=Chain("a network, a difference and the mean of squares"), meaning=meaning,
            inputs=inputs, params=_training_params(c),
        ))  # fmt: skip
    return cases


def _gradients() -> list[Recipe]:
    """Gradients by every weight; for a silent network only the output layer has any, and its bias's is a sum."""
    why = Chain("a network, its loss and the way back")
    rows: list[tuple[str, dict[str, Any], list[float], bool, str]] = [
        ("gradients", {}, [0.4], False, "a part of the network is cut off from the loss, or its slope is another's"),
        ("gradients-valid", {"sigma_data": 0.5}, [0.1, 2.0], True,
         "slopes come from points that are not valid, or of a sum where the loss is a mean"),
        ("gradients-window", {"window": 1, "depth": 2, "patch": [1, 1]}, [3.0, 0.03], False,
         "masked scores have slopes, or blocks share theirs"),
    ]  # fmt: skip
    cases = []
    for i, (name, changes, sigma, masked, meaning) in enumerate(rows):
        c = tiny(**changes)
        inputs = loss_inputs(c, (2, 4), sigma, 670 + i)
        inputs = _masked(inputs, 680) if masked else inputs
        cases.append(Recipe(
            f"edm/{name}", "gradients", requirements=("EDM-3", "EDM-11", "ATT-5") if masked else ("EDM-3", "ATT-5"),
            profiles=("train", "smoke") if i == 0 else ("train",), judge=why, meaning=meaning, inputs=inputs,
            params=_training_params(c),
        ))  # fmt: skip
    return [*cases, _silent_gradients(why)]


def _silent_gradients(why: Judge) -> Recipe:
    c = tiny(sigma_data=0.5)
    inputs = _masked(silenced(loss_inputs(c, (3, 4), [0.3, 4.0], 690)), 691)
    loss, _, gradient = _silent_loss(inputs, 0.5)
    cells = gradient.reshape(2, 3, 2, 2)  # sample, row, column of patches, column in the patch of 1 x 2
    silent = ("embed_state.weight", "memory.query", "blocks.0.gate_beta", "blocks.0.spatial.key.weight")
    expected = {"loss": np.array(loss), "gradients.final.bias": cells.sum((0, 1, 2))}
    expected |= {f"gradients.{name}": np.zeros_like(inputs[f"weights.{name}"]) for name in silent}
    return Recipe(
        "edm/gradients-fresh",
        "gradients",
        requirements=("EDM-3", "EDM-11"),
        profiles=("train",),
        judge=why,
        meaning="the slope of a fresh network's loss by its output bias is not the mean of 2 lambda c_out (D - x)",
        inputs=inputs,
        params=_training_params(c),
        expected=expected,
    )


def _refused_training() -> list[Recipe]:
    """sigma <= 0 in training: the loss weight would be infinite."""
    c, cases = tiny(), []
    inputs = loss_inputs(c, (1, 4), [0.5, 1.0], 695)
    for op, bad in (("loss", 0.0), ("loss", -0.5), ("gradients", 0.0)):
        name = f"edm/refuses-{op}-{'zero' if bad == 0 else 'negative'}-sigma"
        cases.append(Recipe(
            name, op, requirements=("EDM-2", "EDM-3", "CONV-10"), profiles=("train",),
            judge=MustReject(f"sigma = {bad:g} has no logarithm"),
            meaning="a loss of sigma <= 0 is infinite or NaN", inputs=inputs | {"sigma": np.array([0.5, bad])},
            params=_training_params(c), valid_counterpart=(inputs, _training_params(c)),
        ))  # fmt: skip
    return cases


def recipes() -> list[Recipe]:
    """Scalars, deterministic and stochastic samples, training, and what is refused."""
    return [
        *_schedules(), *_preconditions(), *_steps(), *_samples(), *_refused_schedules(), *_refused_samples(),
        *_training_levels(), *_silent_losses(), *_losses(), *_gradients(), *_refused_training(),
    ]  # fmt: skip
