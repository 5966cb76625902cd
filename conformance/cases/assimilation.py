"""Cases of chapter 8, part one: ensembles drawn from prior and observations, cycles, and the linear cycle's moments.

Expected values: algorithm 2 of EDM in 50 digits around the guided means of the chapter before; the moments that the
methods are known to end at, as closed forms; the recursion of the cycle in the information form, and in fractions.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from mpmath import mp, mpf

from conformance.adapter import Array, Arrays, Params
from conformance.cases.edm import covariance, schedule
from conformance.cases.guidance import (
    DIGITS,
    METHODS,
    digits,
    floats,
    guided,
    inverse,
    network_problem,
    problem,
    refused_inputs,
)
from conformance.judging.case import Chain, Recipe
from conformance.judging.inputs import bilinear_observations
from conformance.judging.tolerance import Bound, MustReject

__all__ = ["recipes"]

LEVELS = np.array([20.0, 4.0, 0.8, 0.15, 0.004, 0.0])
FEW = np.array([10.0, 2.0, 0.5, 0.1, 0.0])
U = 2.0**-53

Denoise = Callable[[Array, Any], Array]


def _heun(denoise: Denoise, latents: Array, sigmas: Array, churn: Mapping[str, float], noises: Array | None) -> Array:
    """[EDM-6], [EDM-7] on [m, v] in 50 digits, settings of churn by name."""
    levels = [mpf(float(s)) for s in sigmas]
    steps = len(levels) - 1
    x: Array = levels[0] * digits(latents)
    for i, (now, after) in enumerate(pairwise(levels)):
        inside = churn.get("s_min", 0.0) <= now <= churn.get("s_max", math.inf)
        gamma = min(mpf(churn.get("s_churn", 0.0)) / steps, mp.sqrt(2) - 1) if inside else mpf(0)
        hat = now * (1 + gamma)
        if gamma > 0 and noises is not None:
            x = x + mp.sqrt(hat**2 - now**2) * mpf(churn.get("s_noise", 1.0)) * digits(noises[i])
        d = (x - denoise(x, hat)) / hat
        euler = x + (after - hat) * d
        x = euler if after == 0 else x + (after - hat) / 2 * (d + (euler - denoise(euler, after)) / after)
    return x


def _drawn(inputs: Arrays, params: Params) -> dict[str, Array]:
    with mp.workdps(DIGITS):
        noises = inputs.get("noises")
        samples = _heun(
            lambda x, s: guided(inputs, params, x, s), inputs["latents"], inputs["sigmas"], params["churn"], noises
        )
        return {"samples": floats(samples)}


# Ensembles.


def _inputs(seed: int, levels: Array = LEVELS, members: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return problem(seed + 1) | {"sigmas": levels, "latents": rng.standard_normal((members, 4))}


def _ensemble(
    name: str, inputs: Arrays, params: Params, meaning: str, requirements: tuple[str, ...], smoke: bool = False,
    targets: tuple[str, ...] = (),
) -> Recipe:  # fmt: skip
    settings = {"churn": {}, "together": 2} | dict(params)
    return Recipe(
        f"assimilation/{name}", "assimilate", requirements=requirements,
        profiles=("smoke", "guidance") if smoke else ("guidance",),
        judge=Chain("a few steps of the sampler around the guided mean"), meaning=meaning, inputs=inputs,
        params=settings, expected=_drawn(inputs, settings), targets=targets,
    )  # fmt: skip


def _posteriors() -> list[Recipe]:
    inputs = _inputs(800)
    stage = "guidance enters the predictor or the corrector only, or not at every step"
    named = {"dps": "GUIDE-2", "pigdm": "GUIDE-3", "sda": "GUIDE-4", "mmps": "GUIDE-8"}
    return [
        _ensemble(
            f"posterior-{method}", inputs, params=params, meaning=stage,
            requirements=("DA-1", "GUIDE-1", named[method]), smoke=method == "mmps",
            targets=("guidance_predictor_only", "guidance_corrector_only"),
        )
        for method, params in METHODS.items()
    ]  # fmt: skip


def _churned() -> list[Recipe]:
    """Every member its own latent and step noises, whichever members are drawn together."""
    rng = np.random.default_rng(801)
    noises = rng.standard_normal((5, 5, 4))
    noisy = _inputs(802) | {"noises": noises}
    window = {"s_churn": 2.0, "s_min": 0.05, "s_max": 10.0, "s_noise": 1.003}
    targets = ("members_share_step_noise", "noise_by_batch_index")
    shares = "members share noise, or take another member's, when they are drawn in batches"
    return [
        _ensemble(
            "churn", noisy, params=METHODS["pigdm"] | {"churn": {"s_churn": 2.0}}, meaning=shares,
            requirements=("DA-1", "DA-3", "EDM-6"), targets=targets,
        ),
        _ensemble(
            "churn-window", noisy, params=METHODS["mmps"] | {"churn": window, "together": 3},
            meaning=f"the guided mean is evaluated before the noise is raised, or {shares}",
            requirements=("DA-3", "EDM-6", "GUIDE-1"), targets=targets,
        ),
        _ensemble(
            "churn-forecast", noisy | NOTHING, {"method": None, "churn": window, "together": 4}, shares,
            requirements=("DA-2", "DA-3"), targets=targets,
        ),
    ]  # fmt: skip


NOTHING = {"operator": np.zeros((0, 4)), "value": np.zeros(0), "variance": np.zeros(0)}


def _forecasts() -> list[Recipe]:
    inputs = _inputs(803) | NOTHING
    return [
        _ensemble(
            "forecast", inputs, {"method": None, "together": 3}, "without observations the draw is not the prior's",
            requirements=("DA-2",),
        ),
        _ensemble(
            "forecast-guided", inputs, METHODS["dps"] | {"together": 16},
            "a method without observations is refused, or changes the draw", requirements=("DA-2", "GUIDE-10"),
        ),
    ]  # fmt: skip


# The limits of many steps, for each method.


def _end(sigmas: Array, ratio: Callable[[float], float]) -> float:
    """Return what the sampler turns a latent of 1 into when the denoised mean is ratio(sigma) x."""
    levels = sigmas.tolist()
    x = float(levels[0])
    for now, after in pairwise(levels):
        d = x * (1 - ratio(now)) / now
        euler = x + (after - now) * d
        x = euler if after == 0 else x + (after - now) * (d + euler * (1 - ratio(after)) / after) / 2
    return x


def _variance_case(
    name: str, params: Params, weight: Callable[[float], float], variance: float, meaning: str
) -> Recipe:
    """Prior N(0, 1), one observation y = 0 with R = 0.3; weight(sigma^2) is W, `variance` the closed form."""
    sigmas = schedule(32)

    def ratio(sigma: float) -> float:
        jacobian = 1 / (1 + sigma**2)
        return jacobian * (1 - sigma**2 * jacobian * weight(sigma**2))

    limit = math.sqrt(variance)
    distance = abs(_end(sigmas, ratio) - limit)
    why = f"32 steps end {distance:.2g} from the limit of many steps, by the product of their factors; twice that"
    inputs = {
        "mean": np.zeros(1),
        "covariance": np.ones((1, 1)),
        "operator": np.ones((1, 1)),
        "value": np.zeros(1),
        "variance": np.array([0.3]),
        "sigmas": sigmas,
        "latents": np.array([[1.0], [0.0]]),
    }
    return Recipe(
        f"assimilation/{name}", "assimilate",
        requirements=(
            "GUIDE-9" if params["method"] == "dps" else "GUIDE-3" if params["method"] == "pigdm" else "GUIDE-4", "DA-1",
        ),
        profiles=("guidance",), judge=Bound(2 * distance / U, why, scale=1.0), meaning=meaning, inputs=inputs,
        params=dict(params) | {"churn": {}, "together": 2}, expected={"samples": np.array([[limit], [0.0]])},
    )  # fmt: skip


def _variances() -> list[Recipe]:
    """The table of chapter 7, which tells the methods apart, with c = 1."""
    error, data = 0.3, 1.5**2
    beta = error * data / (error + data)
    broad = (data - 1) / (beta - 1) + (data - beta) * math.log(1 / beta) / (beta - 1) ** 2
    return [
        _variance_case(
            "variance-dps", {"method": "dps"}, lambda s2: 1 / error, math.exp(-1 / error),
            "this is not dps: its well-known wrong variance c exp(-c/R) does not come out",
        ),
        _variance_case(
            "variance-pigdm", {"method": "pigdm", "sigma_data": 1.5}, lambda s2: 1 / (error + s2 * data / (s2 + data)),
            math.exp(-broad / (error + data)),
            "this is not pigdm with sigma_data = 1.5: its variance does not come out",
        ),
        _variance_case(
            "variance-sda", {"method": "sda", "gamma": 1.0}, lambda s2: 1 / (error + s2),
            math.exp(-(error - 1 - math.log(error)) / (error - 1) ** 2),
            "this is not sda with gamma = 1: its variance does not come out",
        ),
    ]  # fmt: skip


def _posterior_moments() -> Recipe:
    """mmps ends at m + P^(1/2) z with Bayes' mean and covariance: latents 0 and unit vectors show both, exactly."""
    sigmas = schedule(40)
    inputs = problem(806) | {"sigmas": sigmas, "latents": np.vstack([np.zeros(4), np.eye(4)])}
    prior = np.linalg.inv(inputs["covariance"])
    weighted = inputs["operator"].T / inputs["variance"]
    values, vectors = np.linalg.eigh(np.linalg.inv(prior + weighted @ inputs["operator"]))
    mean = (vectors * values) @ vectors.T @ (prior @ inputs["mean"] + weighted @ inputs["value"])
    factors = [_end(sigmas, lambda s, c=c: c / (c + s**2)) for c in values]  # type: ignore[misc]
    root = (vectors * np.sqrt(values)) @ vectors.T
    # The prior's mean is still in the first state, which is sigma_0 z instead of m + sigma_0 z.
    shift = np.abs(np.array(factors) / sigmas[0]).max() * float(np.linalg.norm(mean))
    distance = float(np.abs(np.array(factors) - np.sqrt(values)).max()) + float(shift)
    why = f"40 steps from sigma = 80 end {distance:.2g} from Bayes, by the factors of each eigenvector; twice that"
    return Recipe(
        "assimilation/posterior-moments", "assimilate", requirements=("DA-1", "GUIDE-8"), profiles=("guidance",),
        judge=Bound(2 * distance / U, why, scale=1.0),
        meaning="mean or covariance of the ensemble are not Bayes': another method, or a wrong variance", inputs=inputs,
        params=METHODS["mmps"] | {"churn": {}, "together": 5},
        expected={"samples": mean + np.vstack([np.zeros(4), root])},
    )  # fmt: skip


def _refusals() -> list[Recipe]:
    valid, params = _inputs(804, FEW, 2), {"churn": {}, "together": 16}
    dps = params | {"method": "dps"}

    def case(
        name: str, requirement: str, why: str, meaning: str, inputs: Arrays, settings: Params, good: Params
    ) -> Recipe:
        return Recipe(
            f"assimilation/refuses-{name}", "assimilate", requirements=tuple({requirement: 0, "CONV-10": 0}),
            profiles=("guidance",), judge=MustReject(why), meaning=meaning, inputs=inputs, params=settings,
            valid_counterpart=(valid, good),
        )  # fmt: skip

    # dps with R = 1e-60: an evaluation multiplies the state by about 1e60, beyond the largest number in four steps.
    stiff = valid | {"variance": np.full(3, 1e-60)}
    wanted = ("zero-variance", "missing-value", "broken-operator", "other-state")
    return [
        *(case(*row[:4], valid | row[4], dps, dps) for row in refused_inputs(valid) if row[0] in wanted),
        case(
            "divergence", "DA-6", why="the state overflows",
            meaning="an analysis of inf or NaN is returned as if it were one", inputs=stiff, settings=dps, good=dps,
        ),
        case(
            "unused-observations", "DA-7", why="observations and no guidance method",
            meaning="observations without a method are ignored, and a forecast is taken for an analysis", inputs=valid,
            settings=params | {"method": None}, good=params | {"method": "sda", "gamma": 1.0},
        ),
        case(
            "no-member", "CONV-10", why="an ensemble of no member", meaning="an ensemble of nothing is returned",
            inputs=valid | {"latents": np.zeros((0, 4))}, settings=dps, good=dps,
        ),
        case(
            "none-together", "CONV-12", why="0 members at a time", meaning="members at a time are not checked",
            inputs=valid, settings=dps | {"together": 0}, good=dps,
        ),
        case(
            "negative-gamma", "GUIDE-4", why="gamma = -0.5",
            meaning="a negative gamma makes W indefinite without complaint", inputs=valid,
            settings=params | {"method": "sda", "gamma": -0.5}, good=params | {"method": "sda", "gamma": 0.5},
        ),
    ]  # fmt: skip


# Cycles: each member from its own past.


def _states(inputs: Arrays, params: Params) -> dict[str, Array]:
    """[DA-4] in 50 digits: frames oldest first, the newest of them met by the first model matrix."""
    with mp.workdps(DIGITS):
        frames = [digits(frame) for frame in inputs["history"]]
        states = []
        for k, there in enumerate(params["observed"]):
            mean = sum(frame @ digits(a).T for frame, a in zip(frames[::-1], inputs["model"], strict=True))
            seen = {name: inputs[name][k] for name in ("value", "variance")} if there else NOTHING
            here = {**inputs, **seen}

            def denoise(x: Array, s: Any, here: Arrays = here, mean: Any = mean) -> Array:
                return guided(here, params, x, s, mean)

            frames = [*frames[1:], _heun(denoise, inputs["latents"][k], inputs["sigmas"], {}, None)]
            states.append(floats(frames[-1]))
        return {"states": np.stack(states)}


def _cycle(name: str, method: str, frames: int, observed: list[bool], meaning: str, smoke: bool = False) -> Recipe:
    rng = np.random.default_rng(820 + frames + len(observed))
    size, members, operator = 3, 3, np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]])
    inputs = {
        "model": rng.standard_normal((frames, size, size)) / (1 + frames),
        "covariance": covariance(size, rng),
        "history": 2 * rng.standard_normal((frames, members, size)),
        "operator": operator,
        "value": 2 * rng.standard_normal((len(observed), 2)),
        "variance": rng.uniform(0.2, 2.0, (len(observed), 2)),
        "latents": rng.standard_normal((len(observed), members, size)),
        "sigmas": FEW,
    }
    params = METHODS[method] | {"observed": observed}
    return Recipe(
        f"assimilation/{name}", "cycle", requirements=("DA-4", "DA-1", "DA-2"),
        profiles=("smoke", "guidance") if smoke else ("guidance",),
        judge=Chain("analyses of a few steps, each fed the ones before it"), meaning=meaning, inputs=inputs,
        params=params, expected=_states(inputs, params),
        targets=("history_ensemble_mean", "history_not_moved", "history_newest_first", "history_of_first_member"),
    )  # fmt: skip


def _no_history() -> Recipe:
    valid = _cycle("cycle-no-history", "sda", 1, [True], "")
    empty = {"history": np.zeros((0, 3, 3)), "model": np.zeros((0, 3, 3))}
    return Recipe(
        "assimilation/refuses-no-history", "cycle", requirements=("DA-4", "CONV-10"), profiles=("guidance",),
        judge=MustReject("a cycle without a past frame"), meaning="a cycle from nothing is returned",
        inputs={**valid.inputs, **empty}, params=valid.params, valid_counterpart=(valid.inputs, valid.params),
    )  # fmt: skip


def _cycles() -> list[Recipe]:
    return [
        _cycle("cycle", "mmps", 1, [True, True, True], "members share a history, or the first one is kept", smoke=True),
        _cycle("cycle-two-frames", "dps", 2, [True, True, True], "frames are in another order, or the newest leaves"),
        _cycle(
            "cycle-three-frames", "pigdm", 3, [True, False, True, True, False],
            "the oldest frame stays, or an analysis without observations takes the last ones",
        ),
        _no_history(),
        _cycle("cycle-forecast", "sda", 2, [False, False, True], "forecasts are not fed back as history"),
    ]  # fmt: skip


# The linear cycle's moments.


def _moments(inputs: Arrays) -> dict[str, Array]:
    """[DA-5] in the information form: B = (Q^-1 + H^T R^-1 H)^-1 is (I - G H) Q, and G = B H^T R^-1."""
    with mp.workdps(DIGITS):
        a, q, h = (digits(inputs[name]) for name in ("model", "model_error", "operator"))
        precision, weighted = inverse(q), h.T @ inverse(digits(inputs["error"]))
        rest = inverse(precision + weighted @ h)
        keep = rest @ precision @ a
        mean, cov = digits(inputs["mean"]), digits(inputs["covariance"])
        means, covariances = [], []
        for y in inputs["observations"]:
            mean = keep @ mean + rest @ weighted @ digits(y)
            cov = keep @ cov @ keep.T + rest
            means.append(floats(mean))
            covariances.append(floats(cov))
        return {"means": np.stack(means), "covariances": np.stack(covariances)}


def _linear(name: str, inputs: Arrays, meaning: str) -> Recipe:
    return Recipe(
        f"assimilation/{name}", "linear_cycle", requirements=("DA-1", "DA-5"), profiles=("guidance",),
        judge=Chain("the gain, and a few products of small matrices a cycle"), meaning=meaning, inputs=inputs,
        params={}, expected=_moments(inputs),
        targets=("kalman_gain", "q_and_r_swapped", "posterior_covariance_without_history"),
    )  # fmt: skip


def _linear_cycles() -> list[Recipe]:
    rng = np.random.default_rng(803)
    inputs = {
        "model": 0.5 * rng.standard_normal((3, 3)),
        "model_error": covariance(3, rng),
        "operator": rng.standard_normal((2, 3)),
        "error": np.array([[0.4, 0.1], [0.1, 0.3]]),
        "mean": rng.standard_normal(3),
        "covariance": np.diag([2.0, 1.0, 0.5]),
        "observations": rng.standard_normal((4, 2)),
    }
    more = inputs | {
        "operator": rng.standard_normal((4, 3)),
        "error": covariance(4, rng),
        "observations": 3 * rng.standard_normal((6, 4)),
    }
    wrong = "the gain is the Kalman filter's (from A P A^T + Q), or the error of the history does not reach P"
    return [
        _linear("linear-cycle", inputs, wrong),
        _linear("linear-cycle-many", more, "more observations than variables, with correlated errors"),
        _scalar_cycle(),
    ]


def _scalar_cycle() -> Recipe:
    """A = 1/2, Q = 1, H = 1, R = 3: the gain is 1/4; in fractions."""
    mean, cov, gain = Fraction(2), Fraction(8), Fraction(1, 4)
    means, covs = [], []
    for y in (Fraction(4), Fraction(-2), Fraction(1)):
        mean = (1 - gain) * mean / 2 + gain * y
        cov = (1 - gain) ** 2 * cov / 4 + (1 - gain)
        means.append([float(mean)])
        covs.append([[float(cov)]])
    numbers = {"model": 0.5, "model_error": 1.0, "operator": 1.0, "error": 3.0, "covariance": 8.0}
    inputs = {name: np.array([[value]]) for name, value in numbers.items()}
    inputs |= {"mean": np.array([2.0]), "observations": np.array([[4.0], [-2.0], [1.0]])}
    return Recipe(
        "assimilation/scalar-cycle", "linear_cycle", requirements=("DA-5",), profiles=("smoke", "guidance"),
        judge=Bound(32, "three cycles of four roundings on numbers below 8", scale=8.0),
        meaning="R and Q are swapped in the gain, or taken as standard deviations", inputs=inputs, params={},
        expected={"means": np.array(means), "covariances": np.array(covs)}, targets=("kalman_gain", "q_and_r_swapped"),
    )  # fmt: skip


# The whole of STORM: a network by tiles, sampled, with and without observations.


def _analysis(seed: int, cols: int = 8, noises: bool = False) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inputs and params of two members, each with its own history, on a grid of 4 rows, in two tiles of 8 columns."""
    inputs, params = network_problem(seed, cols)
    rng, levels = np.random.default_rng(seed), np.array([4.0, 1.0, 0.2, 0.0])
    known = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
    known |= {"sigmas": levels, "latents": rng.standard_normal((2, 2, 4, cols))}
    if noises:
        known["noises"] = rng.standard_normal((3, 2, 2, 4, cols))
    return known, params | {"method": None, "churn": {}}


def _analysis_case(
    name: str,
    inputs: Arrays,
    params: Params,
    meaning: str,
    requirements: tuple[str, ...],
    profiles: tuple[str, ...] = ("guidance",),
) -> Recipe:
    why = Chain("three steps of the sampler around a tiled network, and guidance in them")
    return Recipe(
        f"assimilation/analysis-{name}", "analysis", requirements=requirements, profiles=profiles, judge=why,
        meaning=meaning, inputs=inputs, params=params,
    )  # fmt: skip


def _analyses() -> list[Recipe]:
    free, tiles = _analysis(860)
    noisy, churned = _analysis(861, noises=True)
    small, whole = _analysis(862, 4)
    seam = bilinear_observations(8, (0, 1, 2), (1, 0, 3), (1, 2, 5))
    return [
        _analysis_case(
            "forecast", free, params=tiles,
            meaning="tiles are sampled one by one, and blended at the end or once a step",
            requirements=("DA-2", "TILE-6", "TILE-7", "NET-5"), profiles=("smoke", "guidance", "tiling"),
        ),
        _analysis_case(
            "dps", free | seam, tiles | METHODS["dps"], "observations guide some evaluations, or tiles one by one",
            ("DA-1", "GUIDE-1", "GUIDE-2", "TILE-7"), profiles=("guidance",),
        ),
        _analysis_case(
            "churn", noisy | seam, params=churned | METHODS["sda"] | {"churn": {"s_churn": 1.0}},
            meaning="noise is drawn for each tile, shared by members, or not taken from the input",
            requirements=("DA-1", "DA-3", "EDM-6", "EDM-8", "TILE-7"), profiles=("guidance", "rng"),
        ),
        _analysis_case(
            "whole", small | bilinear_observations(4, (0, 0, 1)), whole | METHODS["pigdm"] | {"sigma_data": 0.75},
            "one tile is not the untiled denoiser, or the history of another member is used",
            ("DA-1", "DA-4", "GUIDE-3", "TILE-8"), profiles=("guidance",),
        ),
        Recipe(
            "assimilation/analysis-refuses-unused-observations", "analysis", requirements=("DA-7",),
            profiles=("guidance",), judge=MustReject("observations and no guidance method"),
            meaning="observations are ignored without a word", inputs=free | seam, params=tiles,
            valid_counterpart=(free | seam, tiles | METHODS["dps"]),
        ),
        Recipe(
            "assimilation/analysis-refuses-churn-without-noise", "analysis", requirements=("EDM-8",),
            profiles=("guidance", "rng"), judge=MustReject("S_churn = 1 and no noises"),
            meaning="the port draws noise of its own, which nobody can repeat", inputs=free,
            params=tiles | {"churn": {"s_churn": 1.0}},
            valid_counterpart=(noisy, churned | {"churn": {"s_churn": 1.0}}),
        ),
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """Whole analyses, ensembles with and without observations, what they end at, refusals, cycles, moments."""
    ends = [*_variances(), _posterior_moments()]
    drawn = [*_analyses(), *_posteriors(), *_churned(), *_forecasts()]
    return [*drawn, *ends, *_refusals(), *_cycles(), *_linear_cycles()]
