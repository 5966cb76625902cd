"""Cases of chapter 7: the guided mean of a linear-Gaussian problem, method by method.

Expected values: dense linear algebra with J = C (C + sigma^2 I)^-1; for mmps the conditional mean E[x_0 | x, y] from
the information form, which knows nothing of guidance.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.cases.edm import covariance, gaussian_mean
from conformance.tolerance import Bound, MustReject

__all__ = ["cases", "guided_mean", "jacobian"]


def jacobian(sigma: float, cov: Array) -> Array:
    """J of the Gaussian denoiser."""
    return np.linalg.solve(cov + sigma**2 * np.eye(len(cov), dtype=cov.dtype), cov).T


def _system(sigma: float, cov: Array, operator: Array, variance: Array, params: Mapping[str, Any]) -> Array:
    """The matrix whose inverse is W, [GUIDE-2] to [GUIDE-5]."""
    error: Array = np.diag(variance)
    if params["method"] == "dps":
        return error
    if params["method"] == "pigdm":
        r2 = sigma**2 * params["sigma_data"] ** 2 / (sigma**2 + params["sigma_data"] ** 2)
        error = error + r2 * operator @ operator.T
        return error
    if params["method"] == "sda":
        error = error + params["gamma"] * sigma**2 * np.eye(len(variance), dtype=cov.dtype)
        return error
    return error + sigma**2 * operator @ jacobian(sigma, cov) @ operator.T


def guided_mean(x: Array, sigma: float, inputs: Mapping[str, Array], params: Mapping[str, Any]) -> Array:
    """[GUIDE-1] for one noise level: [m, v]."""
    mean, cov, operator = inputs["mean"], inputs["covariance"], inputs["operator"]
    denoised = gaussian_mean(x, sigma, mean, cov)
    system = _system(sigma, cov, operator, inputs["variance"], params)
    weighted = np.linalg.solve(system, (inputs["value"] - denoised @ operator.T).T)
    score = jacobian(sigma, cov).T @ operator.T @ weighted
    result: Array = denoised + np.asarray(sigma**2, cov.dtype) * score.T
    return result


def _posterior_mean(x: Array, sigma: float, inputs: Mapping[str, Array]) -> Array:
    """E[x_0 | x, y] in the information form: C^-1 + I / sigma^2 + H^T R^-1 H."""
    prior, operator, precision = (
        np.linalg.inv(inputs["covariance"]),
        inputs["operator"],
        np.diag(1 / inputs["variance"]),
    )
    information = prior + np.eye(len(prior)) / sigma**2 + operator.T @ precision @ operator
    seen = prior @ inputs["mean"] + operator.T @ precision @ inputs["value"] + x / sigma**2
    return np.linalg.solve(information, seen.T).T


def problem(seed: int, size: int = 4) -> dict[str, Array]:
    """Prior, and three observations of different variance, two of which overlap (H H^T is not diagonal)."""
    rng = np.random.default_rng(seed)
    operator = np.zeros((3, size))
    operator[0, 0], operator[1, [0, 2]], operator[2, 3] = 1.0, [0.25, 0.75], 1.0
    return {
        "mean": rng.standard_normal(size),
        "covariance": covariance(size, rng),
        "operator": operator,
        "value": 2 * rng.standard_normal(3),
        "variance": np.array([0.5, 0.1, 2.0]),
    }


SIGMA = [0.1, 0.8, 5.0]


def _inputs(seed: int) -> dict[str, Array]:
    levels = np.array(SIGMA)
    return problem(seed) | {
        "x": (1 + levels)[:, None] * np.random.default_rng(seed + 1).standard_normal((3, 4)),
        "sigma": levels,
    }


def _bound(inputs: Mapping[str, Array], params: Mapping[str, Any], expected: Array) -> Bound:
    worst = 0.0
    for sigma in SIGMA:
        system = _system(sigma, inputs["covariance"], inputs["operator"], inputs["variance"], params)
        prior = inputs["covariance"] + sigma**2 * np.eye(len(inputs["covariance"]))
        worst = max(worst, float(np.linalg.cond(system)), float(np.linalg.cond(prior)))
    gain = max(SIGMA) ** 2 / float(inputs["variance"].min()) if params["method"] == "dps" else 1.0
    why = f"systems of condition {worst:.3g}, products of 4 terms, a correction of {gain:.3g} times the innovation"
    return Bound(math.ceil(32 * worst * gain), why, scale=float(np.abs(expected).max()))


def _case(name: str, requirements: tuple[str, ...], params: dict[str, Any], meaning: str) -> Case:
    inputs = _inputs(700)
    rows = [guided_mean(inputs["x"][i : i + 1], s, inputs, params) for i, s in enumerate(SIGMA)]
    if params["method"] == "mmps":
        rows = [_posterior_mean(inputs["x"][i : i + 1], s, inputs) for i, s in enumerate(SIGMA)]
    expected = np.concatenate(rows)
    return Case(
        f"guidance/{name}",
        "guided_mean",
        requirements,
        _bound(inputs, params, expected),
        meaning,
        inputs,
        params,
        {"guided": expected},
    )


def _nothing_observed() -> Case:
    inputs = _inputs(702) | {"operator": np.zeros((0, 4)), "value": np.zeros(0), "variance": np.zeros(0)}
    expected = np.concatenate(
        [gaussian_mean(inputs["x"][i : i + 1], s, inputs["mean"], inputs["covariance"]) for i, s in enumerate(SIGMA)]
    )
    bound = Bound(256, "the denoiser alone: a system of condition below 10 and products of 4 terms")
    return Case(
        "guidance/no-observation",
        "guided_mean",
        ("GUIDE-10",),
        bound,
        "no observation is treated as an observation of something",
        inputs,
        {"method": "dps"},
        {"guided": expected},
    )


def _refusals() -> list[Case]:
    valid = _inputs(703)
    params = {"method": "dps"}

    def case(name: str, requirements: tuple[str, ...], why: str, meaning: str, **change: Array) -> Case:
        return Case(
            f"guidance/{name}",
            "guided_mean",
            requirements,
            MustReject(why),
            meaning,
            valid | change,
            params,
            neighbour=(valid, params),
        )

    return [
        case(
            "refuses-zero-variance",
            ("GUIDE-6",),
            "a variance of 0",
            "an error variance of 0 gives inf or NaN",
            variance=np.array([0.5, 0.0, 2.0]),
        ),
        case(
            "refuses-missing-value",
            ("GUIDE-7", "CONV-7"),
            "an observation is NaN",
            "missing observations are masked by multiplication, and NaN spreads",
            value=np.array([0.5, np.nan, 2.0]),
        ),
        case(
            "refuses-broken-operator",
            ("GUIDE-11",),
            "a weight of H is inf",
            "an observation through an infinite weight is used",
            operator=np.where(valid["operator"] == 0.25, np.inf, valid["operator"]),
        ),
        Case(
            "guidance/refuses-negative-gamma",
            "guided_mean",
            ("GUIDE-4",),
            MustReject("gamma = -0.1"),
            "a negative gamma makes W indefinite without complaint",
            valid,
            {"method": "sda", "gamma": -0.1},
            neighbour=(valid, {"method": "sda", "gamma": 0.1}),
        ),
    ]


def cases() -> list[Case]:
    """The four methods, no observation, and observations that must be refused."""
    return [
        _case(
            "dps",
            ("GUIDE-1", "GUIDE-2", "GUIDE-6", "CONV-6"),
            {"method": "dps"},
            "R is taken as a standard deviation, sigma^2 or J^T is missing, or the innovation has the other sign",
        ),
        _case(
            "pigdm",
            ("GUIDE-1", "GUIDE-3"),
            {"method": "pigdm", "sigma_data": 0.8},
            "r is not squared, sigma_data is taken as 1, or H H^T as diagonal",
        ),
        _case(
            "sda",
            ("GUIDE-1", "GUIDE-4"),
            {"method": "sda", "gamma": 0.3},
            "gamma multiplies sigma instead of sigma^2, or is ignored",
        ),
        _case(
            "mmps",
            ("GUIDE-1", "GUIDE-5", "GUIDE-8"),
            {"method": "mmps", "steps": 6},
            "the covariance of x_0 given x is not sigma^2 J, or the conjugate gradients stop early",
        ),
        _nothing_observed(),
        *_refusals(),
    ]
