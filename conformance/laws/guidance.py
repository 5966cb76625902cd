"""Laws of chapter 7: what any guidance does with observations, and which mean the exact one gives.

Limits come from the condition of what has to be inverted: a system of condition kappa solved in float64 is off by a
few n u kappa of its solution, and guidance multiplies the innovation by sigma^2 J^T H^T W. Conjugate gradients may stop
at RESIDUAL of the innovation.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array, Arrays
from conformance.judging.law import Draw, Law, check_close
from conformance.ports.checked import Port

__all__ = ["LAWS", "guidance_limit", "posterior", "random_problem", "settings"]

RESIDUAL = 1e-10  # where the reference's conjugate gradients stop; a port may go on
U = 2.0**-53
METHODS = ("dps", "pigdm", "sda", "mmps")


def settings(method: str) -> dict[str, Any]:
    """Params of a method; the steps are more than any system here needs."""
    chosen: dict[str, dict[str, Any]] = {"pigdm": {"sigma_data": 0.8}, "sda": {"gamma": 0.3}, "mmps": {"steps": 24}}
    return {"method": method} | chosen.get(method, {})


def random_problem(rng: np.random.Generator, size: int, observations: int, batch: int) -> dict[str, Array]:
    """Inputs of guided_mean: generic, noise levels and variances within a factor of 20 of 1."""
    root = rng.standard_normal((size, size))
    sigma = np.exp(rng.uniform(-3, 3, batch))
    mean = rng.standard_normal(size)
    return {
        "mean": mean,
        "covariance": root @ root.T / size + 0.3 * np.eye(size),
        "operator": rng.standard_normal((observations, size)),
        "value": 2 * rng.standard_normal(observations),
        "variance": np.exp(rng.uniform(-2, 2, observations)),
        "sigma": sigma,
        "x": mean + (1 + sigma)[:, None] * rng.standard_normal((batch, size)),
    }


def _drawn(draw: Draw, batch: int = 2) -> dict[str, Array]:
    size, observations = draw(st.integers(1, 4), "variables"), draw(st.integers(1, 4), "observations")
    return random_problem(np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed")), size, observations, batch)


def _norm(a: Array) -> float:
    return float(np.linalg.norm(a, 2)) if a.ndim > 1 else float(np.linalg.norm(a))


def guidance_limit(inputs: Arrays, params: dict[str, Any]) -> float:
    """Bound the distance between two correct guided means of these inputs."""
    return max(_limit_at(inputs, params, x, float(s)) for x, s in zip(inputs["x"], inputs["sigma"], strict=True))


def _limit_at(inputs: Arrays, params: dict[str, Any], x: Array, sigma: float) -> float:
    prior, operator = inputs["covariance"], inputs["operator"]
    noisy = prior + sigma**2 * np.eye(len(prior))
    spread = sigma**2 * np.linalg.solve(noisy, prior)
    data, gamma = params.get("sigma_data", 1.0) ** 2, params.get("gamma", 0.0)
    broad = {"mmps": spread, "pigdm": sigma**2 * data / (sigma**2 + data) * np.eye(len(prior))}
    system = (
        np.diag(inputs["variance"] + gamma * sigma**2) + operator @ broad.get(params["method"], 0 * prior) @ operator.T
    )
    gain = _norm(spread) * _norm(operator) * _norm(np.linalg.inv(system)) if len(operator) else 0.0
    size = _norm(x) + _norm(inputs["mean"])
    innovation = _norm(inputs["value"]) + (_norm(operator) * size if len(operator) else 0.0)
    condition = float(np.linalg.cond(noisy)) + (float(np.linalg.cond(system)) if len(operator) else 0.0)
    stop = RESIDUAL if params["method"] in ("mmps", "pigdm") else 0.0
    return 64 * len(x) * U * condition * (size + gain * innovation) + 2 * stop * gain * innovation


def posterior(inputs: Arrays, x: Array, sigma: float) -> Array:
    """E[x_0 | x, y] in the information form."""
    prior, weighted = np.linalg.inv(inputs["covariance"]), inputs["operator"].T / inputs["variance"]
    information = prior + np.eye(len(prior)) / sigma**2 + weighted @ inputs["operator"]
    mean: Array = np.linalg.solve(information, prior @ inputs["mean"] + x / sigma**2 + weighted @ inputs["value"])
    return mean


def _guided(port: Port, inputs: Arrays, params: dict[str, Any]) -> Array:
    return port.values("guided_mean", inputs, params, "guided")[0]


def _nothing(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(METHODS), "method"))
    inputs |= {"operator": inputs["operator"][:0], "value": np.zeros(0), "variance": np.zeros(0)}
    got = _guided(port, inputs, params)
    noisy = [inputs["covariance"] + s**2 * np.eye(len(inputs["mean"])) for s in inputs["sigma"]]
    apart = inputs["x"] - inputs["mean"]
    want = [inputs["mean"] + inputs["covariance"] @ np.linalg.solve(a, d) for a, d in zip(noisy, apart, strict=True)]
    check_close(got, np.stack(want), guidance_limit(inputs, params), "guided mean without observations, and D")


def _affine(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(METHODS), "method"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed of values"))
    one, two = (2 * rng.standard_normal(inputs["value"].shape) for _ in range(2))
    all_of = {"one": one, "two": two, "both": one + two, "none": 0 * one}
    got = {name: _guided(port, inputs | {"value": value}, params) for name, value in all_of.items()}
    limit = sum(guidance_limit(inputs | {"value": value}, params) for value in all_of.values())
    check_close(got["one"] + got["two"], got["both"] + got["none"], limit, "the correction of a sum of values")


def _order(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(METHODS), "method"))
    order = np.array(draw(st.permutations(range(len(inputs["value"]))), "order"))
    other = inputs | {name: inputs[name][order] for name in ("operator", "value", "variance")}
    limit = 2 * guidance_limit(inputs, params)
    check_close(_guided(port, other, params), _guided(port, inputs, params), limit, "observations in another order")


def _split(port: Port, draw: Draw) -> None:
    """1/R = 1/2R + 1/2R: H^T W (y - H xhat) is the same for every method but sda, which adds gamma sigma^2 to each."""
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(("dps", "pigdm", "mmps")), "method"))
    parts = {name: np.concatenate([inputs[name], inputs[name][-1:]]) for name in ("operator", "value", "variance")}
    parts["variance"][-2:] *= 2
    limit = guidance_limit(inputs, params) + guidance_limit(inputs | parts, params)
    check_close(
        _guided(port, inputs | parts, params),
        _guided(port, inputs, params),
        limit,
        "an observation split in two halves",
    )


def _uninformative(port: Port, draw: Draw) -> None:
    """W is at most R^-1, so the correction is at most sigma^2 |J| |H| |y - H xhat| / R."""
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(METHODS), "method"))
    large = 2.0 ** draw(st.integers(20, 60), "exponent of R")
    vague = inputs | {"variance": np.full(len(inputs["value"]), large)}
    nothing = inputs | {"operator": inputs["operator"][:0], "value": np.zeros(0), "variance": np.zeros(0)}
    size = max(_norm(x) for x in inputs["x"]) + 2 * _norm(inputs["mean"])
    bound = _norm(inputs["covariance"]) * _norm(inputs["operator"])  # sigma^2 J is smaller than the prior's covariance
    bound *= (_norm(inputs["value"]) + _norm(inputs["operator"]) * size) / large
    limit = bound + guidance_limit(vague, params) + guidance_limit(nothing, params)
    check_close(
        _guided(port, vague, params), _guided(port, nothing, params), limit, f"observations of variance {large:.3g}"
    )


def _unit(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw), settings(draw(st.sampled_from(METHODS), "method"))
    u = 2.0 ** draw(st.integers(-4, 4), "exponent of the unit")
    other = inputs | {name: u * inputs[name] for name in ("x", "sigma", "value", "mean")}
    other |= {name: u**2 * inputs[name] for name in ("variance", "covariance")}
    scaled = params | ({"sigma_data": u * params["sigma_data"]} if "sigma_data" in params else {})
    got = _guided(port, other, scaled) / u
    check_close(got, _guided(port, inputs, params), 2 * guidance_limit(inputs, params), f"the same in a unit of 1/{u}")


def _exact(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw, batch=3), settings("mmps")
    want = np.stack([posterior(inputs, x, s) for x, s in zip(inputs["x"], inputs["sigma"], strict=True)])
    smallest = min(float(inputs["variance"].min()), float(inputs["sigma"].min()) ** 2)
    information = _norm(inputs["operator"]) ** 2 / smallest + 1 / 0.3 + 1 / smallest
    size = max(_norm(x) for x in inputs["x"]) + _norm(inputs["value"]) + _norm(inputs["mean"])
    # The law's own solution: a matrix of that size, whose inverse is the posterior's covariance, below the prior's.
    own = (
        64
        * len(inputs["mean"])
        * U
        * information
        * _norm(inputs["covariance"])
        * size
        * (1 + _norm(inputs["operator"]))
    )
    check_close(_guided(port, inputs, params), want, own + guidance_limit(inputs, params), "mmps and E[x_0 | x, y]")


def _isotropic(port: Port, draw: Draw) -> None:
    inputs = _drawn(draw)
    data = draw(st.sampled_from((0.5, 0.8, 2.0)), "sigma_data")
    inputs["covariance"] = data**2 * np.eye(len(inputs["mean"]))
    one, two = settings("pigdm") | {"sigma_data": data}, settings("mmps")
    limit = guidance_limit(inputs, one) + guidance_limit(inputs, two)
    check_close(
        _guided(port, inputs, one), _guided(port, inputs, two), limit, "pigdm and mmps for a prior sigma_data^2 I"
    )
    one, two = settings("sda") | {"gamma": 0.0}, settings("dps")
    limit = guidance_limit(inputs, one) + guidance_limit(inputs, two)
    check_close(_guided(port, inputs, one), _guided(port, inputs, two), limit, "sda with gamma = 0 and dps")


def _alone(port: Port, draw: Draw) -> None:
    inputs, params = _drawn(draw, batch=3), settings(draw(st.sampled_from(METHODS), "method"))
    place = draw(st.integers(0, 2), "sample")
    one = inputs | {name: inputs[name][place : place + 1] for name in ("x", "sigma")}
    together, alone = _guided(port, inputs, params)[place], _guided(port, one, params)[0]
    check_close(
        alone, together, 2 * guidance_limit(one, params), "a sample alone, and among others of other noise levels"
    )


def _mirror(port: Port, draw: Draw) -> None:
    """Speeds know no direction: of the mirrored state the guided mean is mirrored; (j, k) and (k, j) are one speed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    params = settings(draw(st.sampled_from(METHODS), "method"))
    inputs = random_problem(rng, 4, 2, 2)
    del inputs["operator"]
    inputs |= {"pairs": np.array([[0, 1], [3, 2]]), "value": np.abs(inputs["value"])}
    got = _guided(port, inputs, params)
    turned = {"mean": -inputs["mean"], "x": -inputs["x"], "pairs": inputs["pairs"][:, ::-1]}
    # H' has rows of length 1 and a speed has the error of its two winds; H'' does not enter.
    slopes = inputs | {"operator": np.eye(4)[:2]}
    limit = 4 * guidance_limit(slopes, params)
    check_close(_guided(port, inputs | turned, params), -got, limit, "speeds of the mirrored state")


def _law(
    name: str, requirements: tuple[str, ...], meaning: str, check: Any, examples: int = 8, targets: tuple[str, ...] = ()
) -> Law:
    return Law(
        f"guidance/law-{name}",
        requirements,
        profiles=("guidance",),
        ops=("guided_mean",),
        meaning=meaning,
        check=check,
        targets=targets,
        examples=examples,
    )


LAWS = (
    _law(
        "no-observation", ("GUIDE-10",), "a method without observations changes the denoised mean, or refuses", _nothing
    ),
    _law(
        "linear", ("GUIDE-1",), "the correction is not linear in the innovation: clipped, or normalised by its size",
        _affine,
        5, targets=("dps_step_normalised",),
    ),
    _law("order", ("GUIDE-1", "GUIDE-6"), "values, variances and rows of H belong to other observations", _order),
    _law("split", ("GUIDE-2", "GUIDE-3", "GUIDE-5"), "R is not a variance, or H^T does not add up", _split),
    _law("vague", ("GUIDE-6", "GUIDE-10"), "an observation that says nothing moves the mean", _uninformative),
    _law(
        "unit", ("CONV-5", "CONV-6", "GUIDE-6"),
        "a hidden unit: R as standard deviation, sigma for sigma^2, sigma_data of 1",
        _unit, targets=("variance_as_std", "guidance_sigma", "pigdm_sigma_data_one"),
    ),
    _law("bayes", ("GUIDE-5", "GUIDE-8"), "mmps is not the conditional mean of a Gaussian prior", _exact),
    _law("isotropic", ("GUIDE-3", "GUIDE-4"), "pigdm is not exact where it must be, or sda(0) not dps", _isotropic, 6),
    _law("alone", ("GUIDE-1",), "samples of a batch share a noise level, a step length or an innovation", _alone),
    _law("mirror", ("GUIDE-1", "GUIDE-5"), "a nonlinear operator's derivative has another sign or place", _mirror, 6),
)  # fmt: skip
