"""Cases of chapter 8: an ensemble drawn from prior and observations, and the linear cycle.

Expected values: algorithm 2 in NumPy around the guided mean of the chapter before; the recursion of the cycle with
explicit inverses, and once in fractions; the variance that dps is known to end at.
"""

from fractions import Fraction
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.case import Case
from conformance.cases.edm import gaussian_mean, heun, schedule
from conformance.cases.guidance import guided_mean, problem
from conformance.tolerance import EPS, Bound, MustReject, chain_bound

__all__ = ["cases"]

LEVELS = np.array([20.0, 8.0, 3.0, 1.0, 0.4, 0.1, 0.02, 0.0])


def _inputs(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return problem(seed + 1) | {"sigmas": LEVELS, "latents": rng.standard_normal((5, 4))}


def _ensemble_case(
    name: str, requirements: tuple[str, ...], params: dict[str, Any], meaning: str, churn: dict[str, float]
) -> Case:
    inputs = _inputs(800)
    if churn:
        inputs["noises"] = np.random.default_rng(801).standard_normal((7, 5, 4))

    def formula(a: dict[str, Array]) -> Array:
        if params["method"] is None:
            return heun(
                lambda x, s: gaussian_mean(x, s, a["mean"], a["covariance"]),
                a["latents"],
                LEVELS,
                churn,
                a.get("noises"),
            )
        return heun(lambda x, s: guided_mean(x, s, a, params), a["latents"], LEVELS, churn, a.get("noises"))

    bound = chain_bound(formula, inputs, "seven guided steps")
    expected = {"samples": formula(inputs)}
    if params["method"] is None:
        inputs |= {"operator": np.zeros((0, 4)), "value": np.zeros(0), "variance": np.zeros(0)}
    return Case(
        f"assimilation/{name}",
        "assimilate",
        requirements,
        bound,
        meaning,
        inputs,
        params | {"churn": churn, "together": 2},
        expected,
    )


def _dps_variance() -> Case:
    """Prior N(0, 2), one observation y = 0 with R = 1: in the limit of many steps dps ends at sqrt(2 e^-2) latent."""
    sigmas = schedule(64)
    inputs = {
        "mean": np.zeros(1),
        "covariance": np.array([[2.0]]),
        "operator": np.ones((1, 1)),
        "value": np.zeros(1),
        "variance": np.ones(1),
        "sigmas": sigmas,
        "latents": np.array([[1.0], [0.0]]),
    }
    params = {"method": "dps", "churn": {}, "together": 2}
    limit = np.array([[np.sqrt(2 * np.exp(-2.0))], [0.0]])
    distance = float(
        np.abs(heun(lambda x, s: guided_mean(x, s, inputs, params), inputs["latents"], sigmas, {}, None) - limit).max()
    )
    bound = Bound(
        2 * distance / EPS, f"64 steps of Heun end {distance:.2g} from the limit of many steps; twice that", scale=1.0
    )
    return Case(
        "assimilation/dps-variance",
        "assimilate",
        ("GUIDE-9",),
        bound,
        "this is not dps: its well-known wrong variance c exp(-c/R) does not come out",
        inputs,
        params,
        {"samples": limit},
    )


def _unused_observations() -> Case:
    valid, params = _inputs(804), {"churn": {}, "together": 16}
    return Case(
        "assimilation/refuses-unused-observations",
        "assimilate",
        ("DA-7",),
        MustReject("observations and no guidance method"),
        "observations without a method are ignored, and a forecast is taken for an analysis",
        valid,
        params | {"method": None},
        neighbour=(valid, params | {"method": "sda", "gamma": 1.0}),
    )


def _diverging() -> Case:
    """dps with R = 1e-40: every step multiplies the state by about 1e40, beyond the largest number within eight."""
    valid = _inputs(802)
    stiff = valid | {"variance": np.full(3, 1e-40)}
    params = {"method": "dps", "churn": {}, "together": 16}
    return Case(
        "assimilation/refuses-divergence",
        "assimilate",
        ("DA-6",),
        MustReject("the state overflows"),
        "an analysis of inf or NaN is returned as if it were one",
        stiff,
        params,
        neighbour=(valid, params),
    )


def _cycle(inputs: dict[str, Array]) -> dict[str, Array]:
    """[DA-5] with explicit inverses."""
    a, q, h = inputs["model"], inputs["model_error"], inputs["operator"]
    gain = q @ h.T @ np.linalg.inv(h @ q @ h.T + inputs["error"])
    rest = np.eye(len(a)) - gain @ h
    mean, cov, means, covs = inputs["mean"], inputs["covariance"], [], []
    for y in inputs["observations"]:
        mean = rest @ a @ mean + gain @ y
        cov = rest @ (a @ cov @ a.T) @ rest.T + rest @ q
        means.append(mean)
        covs.append(cov)
    return {"means": np.stack(means), "covariances": np.stack(covs)}


def _cycle_case() -> Case:
    rng = np.random.default_rng(803)
    q = rng.standard_normal((3, 3))
    inputs = {
        "model": 0.5 * rng.standard_normal((3, 3)),
        "model_error": q @ q.T / 3 + 0.2 * np.eye(3),
        "operator": rng.standard_normal((2, 3)),
        "error": np.array([[0.4, 0.1], [0.1, 0.3]]),
        "mean": rng.standard_normal(3),
        "covariance": np.diag([2.0, 1.0, 0.5]),
        "observations": rng.standard_normal((4, 2)),
    }
    system = inputs["operator"] @ inputs["model_error"] @ inputs["operator"].T + inputs["error"]
    condition = float(np.linalg.cond(system))
    bound = Bound(32 * 4 * condition, f"four cycles of 3 x 3 products after one system of condition {condition:.3g}")
    return Case(
        "assimilation/linear-cycle",
        "linear_cycle",
        ("DA-1", "DA-5"),
        bound,
        "the gain is the Kalman filter's (from A P A^T + Q), or the error of the history does not reach P",
        inputs,
        {},
        _cycle(inputs),
    )


def _scalar_cycle() -> Case:
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
    return Case(
        "assimilation/scalar-cycle",
        "linear_cycle",
        ("DA-5",),
        Bound(16, "three cycles of four roundings on numbers below 8"),
        "R and Q are swapped in the gain, or taken as standard deviations",
        inputs,
        {},
        {"means": np.array(means), "covariances": np.array(covs)},
    )


def cases() -> list[Case]:
    """Ensembles with and without observations, divergence, and the cycle."""
    return [
        _ensemble_case(
            "posterior",
            ("DA-1", "GUIDE-1", "GUIDE-8"),
            {"method": "mmps", "steps": 6},
            "guidance enters the predictor or the corrector only, or not at every step",
            {},
        ),
        _ensemble_case(
            "posterior-churn",
            ("DA-1", "DA-3", "EDM-6"),
            {"method": "pigdm", "sigma_data": 1.0},
            "members share noise, or take another member's, when they are drawn in batches",
            {"s_churn": 2.0},
        ),
        _ensemble_case("forecast", ("DA-2",), {"method": None}, "without observations the draw is not the prior's", {}),
        _dps_variance(),
        _diverging(),
        _unused_observations(),
        _cycle_case(),
        _scalar_cycle(),
    ]
