"""Cases of chapter 7: the guided mean of Gaussian problems, method by method, and of a network.

Expected values: for a Gaussian prior the information form in 50 digits, which inverts a matrix of the state's size
where the requirements invert one of the observations'; for mmps with a linear operator the conditional mean
E[x_0 | x, y], which knows nothing of guidance. With a network they are the reference's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from mpmath import mp, mpf

from conformance.adapter import Array, Arrays, Params
from conformance.cases.edm import covariance
from conformance.judging.case import Chain, Judge, Recipe
from conformance.judging.inputs import bilinear_observations, config, network_inputs
from conformance.judging.tolerance import Bound, MustReject

__all__ = [
    "METHODS", "denoised", "digits", "floats", "guided", "inverse", "network_problem", "observe", "problem",
    "recipes", "seen_by",
]  # fmt: skip

DIGITS = 50
METHODS: dict[str, dict[str, Any]] = {
    "dps": {"method": "dps"},
    "pigdm": {"method": "pigdm", "sigma_data": 0.8},
    "sda": {"method": "sda", "gamma": 0.3},
    "mmps": {"method": "mmps", "steps": 8},
}
NAMED = {"dps": "GUIDE-2", "pigdm": "GUIDE-3", "sda": "GUIDE-4", "mmps": "GUIDE-5"}


# Arithmetic in 50 digits: NumPy arrays of mpmath numbers, which @ and the operators understand.


def digits(x: Any) -> Array:
    """Numbers as mpmath's, exactly; used inside mp.workdps(DIGITS)."""
    numbers = np.empty(np.shape(x), dtype=object)
    for where, value in np.ndenumerate(np.asarray(x, np.float64)):
        numbers[where] = mpf(float(value))
    return numbers


def floats(x: Array) -> Array:
    """Rounded once."""
    return np.array(x, dtype=np.float64)


def inverse(a: Array) -> Array:
    """a^-1 in 50 digits."""
    return np.array(mp.inverse(mp.matrix(a.tolist())).tolist(), dtype=object).reshape(a.shape)


def observe(inputs: Arrays, state: Array) -> tuple[Array, Array]:
    """H(state) [n] and H' [n, v] at a state [v] in 50 digits: linear, or the speeds of `pairs`."""
    if "pairs" not in inputs:
        operator = digits(inputs["operator"])
        return operator @ state, operator
    speeds = [mp.sqrt(state[j] ** 2 + state[k] ** 2) for j, k in inputs["pairs"].tolist()]
    tangent = digits(np.zeros((len(speeds), len(state))))
    for row, ((j, k), speed) in enumerate(zip(inputs["pairs"].tolist(), speeds, strict=True)):
        tangent[row, j] += state[j] / speed
        tangent[row, k] += state[k] / speed
    return np.array(speeds, dtype=object), tangent


def denoised(mean: Array, prior: Array, x: Array, sigma: Any) -> tuple[Array, Array]:
    """E[x_0 | x] [m, v] and the covariance of x_0 given x [v, v], which is sigma^2 J; mean is [v] or [m, v]."""
    precision = inverse(prior)
    spread = inverse(precision + digits(np.eye(len(prior))) / sigma**2)
    return (mean @ precision + x / sigma**2) @ spread, spread


def guided(inputs: Arrays, params: Params, x: Array, sigma: Any, mean: Array | None = None) -> Array:
    """The guided mean [m, v] at one noise level, [GUIDE-1] to [GUIDE-5], in 50 digits.

    H'^T W = (I + S B)^-1 H'^T E^-1 for W = (E + H' B H'^T)^-1 and S = H'^T E^-1 H': all methods differ in E and B.
    """
    middle = digits(inputs["mean"]) if mean is None else mean
    prior = digits(inputs["covariance"])
    best, spread = denoised(middle, prior, x, sigma)
    if not len(inputs["value"]) or params["method"] is None:
        return best
    if params["method"] == "mmps" and "pairs" not in inputs:
        return _posterior_mean(inputs, prior, middle, x, sigma)
    error, broad = digits(inputs["variance"]), 0 * spread
    if params["method"] == "sda":
        error = error + mpf(params["gamma"]) * sigma**2
    elif params["method"] == "pigdm":
        data = mpf(params["sigma_data"]) ** 2
        broad = digits(np.eye(len(prior))) * (sigma**2 * data / (sigma**2 + data))
    elif params["method"] == "mmps":
        broad = spread
    return np.stack([state + _correction(inputs, state, error, broad, spread) for state in best])


def _correction(inputs: Arrays, state: Array, error: Array, broad: Array, spread: Array) -> Array:
    seen, tangent = observe(inputs, state)
    weighted = tangent.T / error
    system = digits(np.eye(len(state))) + weighted @ tangent @ broad
    innovation = digits(inputs["value"]) - seen
    correction: Array = spread @ inverse(system) @ weighted @ innovation
    return correction


def _posterior_mean(inputs: Arrays, prior: Array, mean: Array, x: Array, sigma: Any) -> Array:
    """E[x_0 | x, y], [GUIDE-8]: precisions add up, and so do means weighted by them."""
    operator, precision = digits(inputs["operator"]), inverse(prior)
    weighted = operator.T / digits(inputs["variance"])
    information = precision + digits(np.eye(len(prior))) / sigma**2 + weighted @ operator
    total = mean @ precision + x / sigma**2 + weighted @ digits(inputs["value"])
    posterior: Array = total @ inverse(information)
    return posterior


# Problems.


def seen_by(seed: int, operator: Any, variance: Any) -> dict[str, Array]:
    """A prior, and observations through that operator with those variances."""
    rng = np.random.default_rng(seed)
    size = len(operator[0])
    return {
        "mean": rng.standard_normal(size),
        "covariance": covariance(size, rng),
        "operator": np.array(operator, np.float64),
        "value": 2 * rng.standard_normal(len(operator)),
        "variance": np.array(variance, np.float64),
    }


def problem(seed: int) -> dict[str, Array]:
    """Three observations of four variables with different errors, two of which overlap: H H^T is not diagonal."""
    operator = [[1.0, 0.0, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0], [0.0, 0.0, 0.5, 1.0]]
    return seen_by(seed, operator, [0.5, 0.1, 2.0])


def _speeds(seed: int) -> dict[str, Array]:
    """Three wind speeds of overlapping pairs, around a mean that is not calm."""
    inputs = problem(seed) | {"mean": np.array([3.0, -2.0, 1.5, 4.0]), "value": np.array([2.5, 6.0, 3.0])}
    return {k: v for k, v in inputs.items() if k != "operator"} | {"pairs": np.array([[0, 1], [2, 1], [3, 2]])}


def _at(inputs: dict[str, Array], sigma: list[float], seed: int) -> dict[str, Array]:
    """With noisy states at these levels."""
    levels = np.array(sigma)
    noise = np.random.default_rng(seed).standard_normal((len(sigma), len(inputs["mean"])))
    return inputs | {"x": inputs["mean"] + (1 + levels)[:, None] * noise, "sigma": levels}


SIGMA = [0.1, 0.8, 5.0]


def _expected(inputs: Arrays, params: Params) -> dict[str, Array]:
    with mp.workdps(DIGITS):
        levels = digits(inputs["sigma"])
        rows = [guided(inputs, params, digits(x)[None], s)[0] for x, s in zip(inputs["x"], levels, strict=True)]
        return {"guided": floats(np.stack(rows))}


def _case(
    name: str, inputs: Arrays, params: Params, meaning: str, *more: str, targets: tuple[str, ...] = (),
    judge: Judge | None = None, smoke: bool = False,
) -> Recipe:  # fmt: skip
    return Recipe(
        f"guidance/{name}",
        "guided_mean",
        requirements=("GUIDE-1", NAMED[params["method"]], *more),
        profiles=("smoke", "guidance") if smoke else ("guidance",),
        judge=judge or Chain("the denoiser, its derivative, the operator and a small system, one noise level a sample"),
        meaning=meaning,
        inputs=inputs,
        params=params,
        expected=_expected(inputs, params),
        targets=targets,
    )


def _methods() -> list[Recipe]:
    """The four on three noise levels, and on one variable that can be followed by hand."""
    inputs = _at(problem(700), SIGMA, 701)
    hand = {
        "mean": np.zeros(1),
        "covariance": np.array([[4.0]]),
        "operator": np.ones((1, 1)),
        "value": np.array([6.0]),
        "variance": np.array([0.5]),
        "x": np.array([[2.0]]),
        "sigma": np.array([2.0]),
    }
    few = Bound(32, "J = 1/2, D = 1, an innovation of 5: about ten roundings of numbers below 50", scale=32.0)
    meanings = {
        "dps": ("R is taken as a standard deviation, sigma^2 or J^T is missing, or the innovation has the other sign",
                ("variance_as_std", "guidance_sigma", "guidance_sign", "jacobian_dropped")),
        "pigdm": ("r is not squared, sigma_data is taken as 1, or H H^T as diagonal",
                  ("pigdm_r_for_r2", "pigdm_sigma_data_one", "pigdm_one_step")),
        "sda": ("gamma multiplies sigma instead of sigma^2, or is ignored", ("sda_gamma_sigma", "sda_gamma_default")),
        "mmps": ("the covariance of x_0 given x is not sigma^2 J, or the conjugate gradients stop early",
                 ("mmps_one_step", "mmps_sigma")),
    }  # fmt: skip
    cases = []
    for name, (meaning, targets) in meanings.items():
        more = ("GUIDE-8",) if name == "mmps" else ("GUIDE-6", "CONV-6") if name == "dps" else ()
        cases.append(_case(name, inputs, METHODS[name], meaning, *more, targets=targets))
        text = "one variable, one observation, all numbers powers of two: the formula itself is another"
        settings = METHODS[name] | (
            {"gamma": 0.25} if name == "sda" else {"sigma_data": 2.0} if name == "pigdm" else {}
        )
        cases.append(_case(f"{name}-by-hand", hand, settings, text, judge=few, smoke=name == "dps"))
    return cases


def _geometry() -> list[Recipe]:
    """Observe one point often, more values than the state has, one value alone, with errors of all sizes."""
    point = [[0.0, 1.0, 0.0]] * 3 + [[1.0, 1.0, 0.0], [0.0, 0.5, 0.5]]
    often = _at(seen_by(710, point, [0.5, 0.25, 4.0, 1.0, 0.3]), SIGMA, 711)
    wide = _at(problem(712) | {"variance": np.array([1e-3, 1.0, 1e3])}, SIGMA, 713)
    one = _at(seen_by(714, [[0.5, -1.0, 0.0, 2.0]], [0.2]), [0.05, 1.0, 30.0], 715)
    scaled = _at(seen_by(718, [[3.0, 0, 0, 0], [0, -0.125, 0, 0], [0, 0, 0.5, 0.5]], [2.0, 0.01, 0.4]), SIGMA, 719)
    twice = "observations of one point overwrite one another, or their errors are averaged"
    loose = METHODS["mmps"] | {"steps": 60}
    sizes = "errors of very different size: the variances are applied to each other's observations, or averaged"
    return [
        _case("dps-repeated", often, METHODS["dps"], twice, "GUIDE-6"),
        _case("pigdm-repeated", often, METHODS["pigdm"], f"{twice}, or H H^T is taken as diagonal"),
        _case("mmps-repeated", often, METHODS["mmps"], f"more observations than variables; {twice}", "GUIDE-8"),
        _case("pigdm-wide", wide, METHODS["pigdm"] | {"sigma_data": 3.0}, sizes, targets=("pigdm_sigma_data_one",)),
        _case("mmps-wide", wide, loose, sizes, "GUIDE-6", "GUIDE-8"),
        _case("mmps-one", one, METHODS["mmps"] | {"steps": 1}, "one observation takes one step, exactly", "GUIDE-8"),
        _case(
            "sda-zero", scaled, METHODS["sda"] | {"gamma": 0.0},
            "gamma = 0 is refused, or is not dps", targets=("sda_gamma_default",),
        ),
        _case(
            "pigdm-scaled", scaled, METHODS["pigdm"],
            "the squared sizes of H's rows are missing in H H^T", targets=("pigdm_identity",),
        ),
    ]  # fmt: skip


def _extremes() -> list[Recipe]:
    ends = _at(problem(720), [0.002, 80.0], 721)
    meaning = "at the ends of the schedule: cancellation at small sigma, a term that should vanish at large sigma"
    return [_case(f"{name}-ends", ends, METHODS[name], meaning) for name in ("dps", "pigdm", "mmps")]


def _nonlinear() -> list[Recipe]:
    inputs = _at(_speeds(730), SIGMA, 731)
    meaning = "wind speeds: H' is not taken at the denoised state, or H' xhat stands for H(xhat)"
    return [
        _case(f"{name}-speed", inputs, params, meaning, targets=("operator_at_noisy_state",))
        for name, params in METHODS.items()
    ]


NOTHING = {"operator": np.zeros((0, 4)), "value": np.zeros(0), "variance": np.zeros(0)}


def _nothing_observed() -> Recipe:
    inputs = _at(problem(702) | NOTHING, SIGMA, 703)
    return Recipe(
        "guidance/no-observation",
        "guided_mean",
        requirements=("GUIDE-10",),
        profiles=("guidance",),
        judge=Chain("the denoiser alone"),
        meaning="no observation is treated as an observation of something",
        inputs=inputs,
        params=METHODS["dps"],
        expected=_expected(inputs, METHODS["dps"]),
    )


Change = tuple[str, str, str, str, dict[str, Array]]  # name, requirement, why, meaning, changed inputs


def refused_inputs(valid: Arrays) -> list[Change]:
    """Offences against three observations of four variables, for every operation that takes them."""

    def third(name: str, value: float) -> dict[str, Array]:
        return {name: np.array([*valid[name][:2].tolist(), value])}

    broken = np.where(valid["operator"] == 0.25, np.inf, valid["operator"])
    return [
        ("zero-variance", "GUIDE-6", "a variance of 0", "a variance of 0 gives inf or NaN", third("variance", 0.0)),
        ("negative-variance", "GUIDE-6", "a variance of -2", "a negative variance repels", third("variance", -2.0)),
        ("nan-variance", "GUIDE-6", "a variance is NaN", "a NaN among variances spreads", third("variance", np.nan)),
        (
            "infinite-variance", "GUIDE-6", "a variance is inf",
            "an infinite variance stands for a missing observation, which should be absent", third("variance", np.inf),
        ),
        (
            "missing-value", "GUIDE-7", "an observation is NaN",
            "missing observations are masked by multiplication, and NaN spreads", third("value", np.nan),
        ),
        ("infinite-value", "GUIDE-7", "an observation is -inf", "an infinite value is used", third("value", -np.inf)),
        ("broken-operator", "GUIDE-11", "a weight of H is inf", "an infinite weight is used", {"operator": broken}),
        (
            "other-state", "GUIDE-11", "an operator on 5 variables, a state of 4",
            "an operator of another state's size is cropped or padded", {"operator": np.ones((3, 5))},
        ),
        (
            "fewer-variances", "GUIDE-6", "2 variances for 3 observations",
            "variances are broadcast over observations", {"variance": valid["variance"][:1]},
        ),
    ]  # fmt: skip


def _refusals() -> list[Recipe]:
    valid, params = _at(problem(740), SIGMA, 741), METHODS["dps"]
    cases = [
        Recipe(
            f"guidance/refuses-{name}", "guided_mean", requirements=(requirement, "CONV-10"), profiles=("guidance",),
            judge=MustReject(why), meaning=meaning, inputs=valid | change, params=params,
            valid_counterpart=(valid, params),
        )
        for name, requirement, why, meaning, change in refused_inputs(valid)
    ]  # fmt: skip
    negative = Recipe(
        "guidance/refuses-negative-gamma",
        "guided_mean",
        requirements=("GUIDE-4", "CONV-10"),
        profiles=("guidance",),
        judge=MustReject("gamma = -0.1"),
        meaning="a negative gamma makes W indefinite without complaint",
        inputs=valid,
        params=METHODS["sda"] | {"gamma": -0.1},
        valid_counterpart=(valid, METHODS["sda"] | {"gamma": 0.1}),
    )
    return [*cases, negative]


# Networks: their derivative is not symmetric, so that J and J^T differ.


def _axis(length: int, tiled: bool = False) -> dict[str, Any]:
    cut = {"core": 4, "halo": 2, "blend": 2} if tiled else {"core": length, "halo": 0, "blend": 0}
    return {"length": length, **cut, "periodic": False, "patch": 2}


def network_problem(
    seed: int, cols: int = 4, sigma: tuple[float, ...] = (0.4, 3.0)
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Inputs and params of a network of width 4 on a grid of 4 rows, in two tiles where it has 8 columns."""
    c = config(
        width=4, depth=1, mlp_ratio=2, position_features=2, position_octaves=1, noise_features=4, sigma_data=0.75
    )
    inputs = network_inputs(c, (4, cols), sigma, [[6.0]] * len(sigma), seed)
    axes = {"y": _axis(4), "x": _axis(cols, tiled=cols == 8)}
    return inputs, {"config": c, "chunk": 1, "periodic": False, "together": 2} | axes


def _network_case(
    name: str, inputs: Arrays, params: Params, meaning: str, requirements: tuple[str, ...],
    profiles: tuple[str, ...] = ("guidance",), dtype: str | None = None, targets: tuple[str, ...] = (),
) -> Recipe:  # fmt: skip
    return Recipe(
        f"guidance/network-{name}",
        "guided_denoise",
        requirements=requirements,
        profiles=profiles,
        judge=Chain("a network, its derivative by reverse mode, and the algebra of guidance around it"),
        meaning=meaning,
        inputs=inputs,
        params=params,
        targets=targets,
        dtype=dtype,
    )


def _networks() -> list[Recipe]:
    inputs, params = network_problem(750)
    three = bilinear_observations(4, (0, 0, 0), (1, 2, 1), (0, 0, 0))
    three["index"][2] = three["index"][2][::-1]  # reads one point, which the first reads too
    wide, tiles = network_problem(751, cols=8)
    seam = bilinear_observations(8, (0, 1, 2), (1, 0, 3), (1, 2, 5))
    fine, narrow = network_problem(752, sigma=(0.004, 0.03))
    nothing = {name: value[:0] for name, value in three.items()}
    transposed = "J stands for J^T: a network's derivative is not symmetric"
    return [
        _network_case(
            "dps", inputs | three, params=params | METHODS["dps"],
            meaning=f"{transposed}, or points read twice overwrite", requirements=("GUIDE-1", "GUIDE-2", "CONV-1"),
            profiles=("smoke", "guidance"), targets=("jacobian_dropped", "adjoint_overwrites"),
        ),
        _network_case(
            "pigdm", inputs | three, params | METHODS["pigdm"] | {"sigma_data": 0.75},
            f"{transposed}, or H H^T misses points that two observations read", requirements=("GUIDE-1", "GUIDE-3"),
        ),
        _network_case("sda", inputs | three, params | METHODS["sda"], transposed, requirements=("GUIDE-1", "GUIDE-4")),
        _network_case(
            "mmps-one", inputs | bilinear_observations(4, (1, 1, 2)), params | METHODS["mmps"] | {"steps": 1},
            "one observation is one number to divide by, R + sigma^2 h J h^T", requirements=("GUIDE-1", "GUIDE-5"),
        ),
        _network_case(
            "tiled-dps", wide | seam, tiles | METHODS["dps"],
            "guidance inside each tile instead of on the blend: observations in overlaps count twice",
            requirements=("GUIDE-1", "TILE-6"), targets=("guidance_in_tiles",),
        ),
        _network_case(
            "tiled-pigdm", wide | seam, params=tiles | METHODS["pigdm"],
            meaning="D is the blend and J that of one tile", requirements=("GUIDE-1", "GUIDE-3", "TILE-6"),
        ),
        _network_case(
            "no-observation", inputs | nothing, params | METHODS["dps"],
            "without observations the guided mean is not the denoiser", requirements=("GUIDE-10",),
        ),
        _network_case(
            "narrow", fine | bilinear_observations(4, (0, 1, 0), (1, 2, 2), error=1e-3), narrow | METHODS["pigdm"],
            "guidance's algebra is in the network's dtype", requirements=("NUM-9", "GUIDE-1"), profiles=("lowprec",),
            dtype="float32",
        ),
    ]  # fmt: skip


def _network_refusals() -> list[Recipe]:
    inputs, params = network_problem(760, sigma=(1.0,))
    valid, settings = inputs | bilinear_observations(4, (0, 0, 0), (1, 2, 2)), params | METHODS["dps"]

    def changed(name: str, value: float) -> dict[str, Array]:
        values = valid[name].copy()
        values[1, 3] = value
        return {name: values}

    offences = {
        "index-above": (changed("index", 32), "index 32 of a state of 32 points", "an index past the end is clamped"),
        "index-below": (changed("index", -1), "index -1", "an index of -1 reads the last point"),
        "weight": (changed("weight", np.nan), "a weight is NaN", "a NaN among weights spreads"),
    }
    return [
        Recipe(
            f"guidance/network-refuses-{name}", "guided_denoise", requirements=("GUIDE-11", "CONV-10"),
            profiles=("guidance",), judge=MustReject(why), meaning=meaning, inputs=valid | change, params=settings,
            valid_counterpart=(valid, settings),
        )
        for name, (change, why, meaning) in offences.items()
    ]  # fmt: skip


def recipes() -> list[Recipe]:
    """The four methods on Gaussian problems and on a network, no observation, and what must be refused."""
    parts: tuple[Callable[[], list[Recipe]], ...] = (
        _methods, _geometry, _extremes, _nonlinear, lambda: [_nothing_observed()], _refusals, _networks,
        _network_refusals,
    )  # fmt: skip
    return [recipe for part in parts for recipe in part()]
