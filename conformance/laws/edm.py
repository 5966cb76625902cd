"""Laws of chapter 6: identities of the coefficients, what the sampler may depend on, and the loss as a mean.

With a Gaussian prior a sample is affine in latents and noises and an error of one step is not amplified by the next
ones, so that honest samplers differ by a few roundings a step: `SAMPLE` u of the largest value has room for 64 steps.
A loss is a mean of squares, each of a difference that keeps its digits where sigma is not small: `LOSS` u.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array
from conformance.cases.edm import covariance, loss_inputs, schedule, silenced, tiny
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.laws.tiling import shaped
from conformance.ports.checked import Port

__all__ = ["LAWS"]

U = 2.0**-53
SAMPLE = 2.0**12
LOSS = 2.0**12

Inputs = dict[str, Array]


def _seeded(draw: Draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))


def _coefficients(port: Port, draw: Draw) -> None:
    rng, sd = _seeded(draw), draw(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), "sigma_data")
    sigma = np.exp(rng.uniform(-6, 5, 8))
    names = ("c_skip", "c_out", "c_in", "c_noise", "loss_weight")

    def values(unit: float) -> list[Array]:
        coefficients = port.values("precondition", {"sigma": unit * sigma}, {"sigma_data": unit * sd}, *names)
        return [shaped(value, (8,), name) for name, value in zip(names, coefficients, strict=True)]

    (skip, out, inner, noise, weight), double = values(1.0), values(2.0)
    # Each coefficient is within 4 ULP, 8 u; a product of three is within 24 u and its own roundings.
    check_close(skip / (sd * inner) ** 2, np.ones(8), 32 * U, "c_skip over (sigma_data c_in)^2")
    check_close(out / (sigma * sd * inner), np.ones(8), 32 * U, "c_out over sigma sigma_data c_in")
    check_close(weight * out**2, np.ones(8), 32 * U, "loss weight times c_out^2")
    check_close(skip + (sigma * inner) ** 2, np.ones(8), 32 * U, "c_skip plus (sigma c_in)^2")
    check_close(double[3] - noise, np.full(8, np.log(2) / 4), 64 * U, "what c_noise gains at twice the noise level")
    want = (skip, 2 * out, inner / 2, double[3], weight / 4)
    for name, got, scaled in zip(names, double, want, strict=True):
        check_close(got / scaled, np.ones(8), 32 * U, f"{name} in half the unit")


def _schedule(port: Port, draw: Draw) -> None:
    steps, rho = draw(st.integers(1, 40), "steps"), draw(st.sampled_from([1.0, 2.0, 3.5, 7.0]), "rho")
    low, ratio = draw(st.floats(0.001, 1), "sigma_min"), draw(st.floats(2, 500), "sigma_max / sigma_min")
    high = low * ratio
    params = {"steps": steps, "sigma_min": low, "sigma_max": high, "rho": rho}
    (sigmas,) = port.values("schedule", {}, params, "sigmas")
    if sigmas.shape != (steps + 1,) or sigmas[-1] != 0 or not (np.diff(sigmas) < 0).all():
        raise Broken(f"levels do not fall strictly to 0 in {steps} steps: {sigmas.tolist()}")
    relative = 4 * rho * ratio ** (1 / rho) * U  # NUM-2
    check_close(sigmas[:1] / high, np.ones(1), relative, "the first level over sigma_max")
    if steps > 1:
        check_close(sigmas[-2:-1] / low, np.ones(1), relative, "the last level before 0 over sigma_min")
        root = sigmas[:-1] ** (1 / rho)
        even = np.linspace(high ** (1 / rho), low ** (1 / rho), steps)
        check_close(root / root[0], even / even[0], relative, "levels to the power 1/rho against even steps")


WINDOW = {"s_churn": 2.0, "s_min": 0.1, "s_max": 30.0, "s_noise": 1.125}


def _prior(draw: Draw, churned: bool, members: int = 3) -> Inputs:
    """Inputs of `sample` for a Gaussian prior of three variables."""
    rng, steps = _seeded(draw), draw(st.integers(1, 8), "steps")
    inputs = {
        "mean": rng.standard_normal(3),
        "covariance": covariance(3, rng),
        "latents": rng.standard_normal((members, 3)),
        "sigmas": schedule(steps, 0.05, 40.0),
    }
    return inputs | ({"noises": rng.standard_normal((steps, members, 3))} if churned else {})


def _churn(draw: Draw) -> dict[str, float]:
    return WINDOW if draw(st.booleans(), "churn") else {}


def _samples(port: Port, inputs: Inputs, churn: Mapping[str, float]) -> Array:
    (samples,) = port.values("sample", inputs, {"churn": dict(churn)}, "samples")
    return shaped(samples, inputs["latents"].shape, "samples")


def _close(got: Array, want: Array, what: str) -> None:
    check_close(got, want, SAMPLE * U * max(1.0, float(np.abs(want).max())), what)


def _affine(port: Port, draw: Draw) -> None:
    churn = _churn(draw)
    one, a = _prior(draw, bool(churn)), draw(st.integers(-4, 4), "a") / 2
    rng = _seeded(draw)
    random = ("latents", "noises") if churn else ("latents",)
    two = one | {name: rng.standard_normal(one[name].shape) for name in random}
    mixed = one | {name: a * one[name] + (1 - a) * two[name] for name in random}
    want = a * _samples(port, one, churn) + (1 - a) * _samples(port, two, churn)
    check_close(_samples(port, mixed, churn), want, 64 * SAMPLE * U, "samples of mixed noise against the mixed samples")


def _units(port: Port, draw: Draw) -> None:
    churn, u = _churn(draw), 2.0 ** draw(st.integers(-6, 6).filter(bool), "log2 of the unit")
    inputs = _prior(draw, bool(churn))
    scaled = inputs | {"mean": u * inputs["mean"], "covariance": u**2 * inputs["covariance"]}
    scaled["sigmas"] = u * inputs["sigmas"]
    there = churn | {name: u * churn[name] for name in ("s_min", "s_max") if churn}
    _close(_samples(port, scaled, there) / u, _samples(port, inputs, churn), f"samples in a unit of {1 / u:g}")


def _origin(port: Port, draw: Draw) -> None:
    churn = _churn(draw)
    inputs = _prior(draw, bool(churn))
    start = inputs["mean"] / inputs["sigmas"][0]
    centred = inputs | {"mean": np.zeros(3), "latents": inputs["latents"] - start}
    want = inputs["mean"] + _samples(port, centred, churn)
    _close(_samples(port, inputs, churn), want, "samples about the mean against samples about zero")


def _members(port: Port, draw: Draw) -> None:
    churn = _churn(draw)
    inputs, other = _prior(draw, bool(churn)), draw(st.integers(0, 2), "member that changes")
    changed = inputs | {"latents": inputs["latents"].copy()}
    changed["latents"][other] *= -3
    if churn:
        changed["noises"] = inputs["noises"].copy()
        changed["noises"][:, other] += 1
    rest, together = np.arange(3) != other, _samples(port, inputs, churn)
    check_equal(_samples(port, changed, churn)[rest], together[rest], f"the other members when member {other} changes")
    for m in range(3):
        alone = inputs | {"latents": inputs["latents"][m : m + 1]}
        alone |= {"noises": inputs["noises"][:, m : m + 1]} if churn else {}
        _close(_samples(port, alone, churn), together[m : m + 1], f"member {m} alone against among others")


def _turn(port: Port, draw: Draw) -> None:
    """Variables in another order, or with another sign, are the same variables."""
    churn = _churn(draw)
    inputs, order = _prior(draw, bool(churn)), np.array(draw(st.permutations(range(3)), "order"))
    sign = np.array([1.0, -1.0, 1.0])

    def turned(value: Array) -> Array:
        signed: Array = (value * sign)[..., order]
        return signed

    there = {n: turned(v) for n, v in inputs.items() if n in ("mean", "latents", "noises")}
    there["covariance"] = turned(turned(inputs["covariance"]).T).T
    want = turned(_samples(port, inputs, churn))
    _close(_samples(port, inputs | there, churn), want, "variables in another order and sign")


def _no_churn(port: Port, draw: Draw) -> None:
    inputs = _prior(draw, True)
    plain = _samples(port, {name: value for name, value in inputs.items() if name != "noises"}, {})
    settings: list[dict[str, float]] = [
        {}, {"s_churn": 0.0, "s_noise": 2.0}, {"s_churn": 5.0, "s_min": 41.0}, {"s_churn": 5.0, "s_max": 0.04},
    ]  # fmt: skip
    for churn in settings:
        check_equal(_samples(port, inputs, churn), plain, f"samples with churn {churn} against none")


def _repeat(port: Port, draw: Draw) -> None:
    churn = _churn(draw)
    inputs = _prior(draw, bool(churn))
    first = _samples(port, inputs, churn)
    check_equal(_samples(port, inputs, churn), first, "the same samples asked for again")


def _order(port: Port, draw: Draw) -> None:
    """On dx/ds = (x - D)/s a Gaussian prior has the solution x_0 = m + C^(1/2) (C + s^2)^(-1/2) (x - m)."""
    rng, steps, top = _seeded(draw), draw(st.integers(16, 32), "steps"), 20.0
    inputs = {"mean": rng.standard_normal(3), "covariance": covariance(3, rng), "latents": rng.standard_normal((2, 3))}
    values, basis = np.linalg.eigh(inputs["covariance"])
    start = (top * inputs["latents"] - inputs["mean"]) @ basis
    exact = inputs["mean"] + start * np.sqrt(values / (values + top**2)) @ basis.T
    error = [
        float(np.linalg.norm(_samples(port, inputs | {"sigmas": schedule(n, 1e-4, top)}, {}) - exact))
        for n in (steps, 2 * steps)
    ]
    # The ratio tends to 4 from above, 4.55 at 16 steps and 4.25 at 32; a method of first order has 2, of third 8.
    if not 3.7 * error[1] < error[0] < 5 * error[1]:
        raise Broken(f"errors {error[0]:.3g} and {error[1]:.3g} in {steps} and {2 * steps} steps: the order is not 2")


def _levels(port: Port, draw: Draw) -> None:
    rng = _seeded(draw)
    normal = rng.standard_normal(9)
    sigma, mirrored, shifted = (
        shaped(port.values("training_sigma", {"normal": drawn}, {}, "sigma")[0], (9,), "sigma")
        for drawn in (normal, -normal, normal + 1)
    )
    # Arguments of exp are below 10 in size and each known to 40 u.
    check_close(sigma * mirrored / np.exp(-2.4), np.ones(9), 128 * U, "levels of opposite normal numbers, multiplied")
    check_close(shifted / sigma / np.exp(1.2), np.ones(9), 128 * U, "a level one standard deviation further up")


def _params(c: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": dict(c), "chunk": 1, "periodic": False}


def _training(draw: Draw, members: int, silent: bool, **changes: Any) -> tuple[Inputs, dict[str, Any]]:
    """Inputs and params of `loss`; silent: a fresh network, whose F is zero in every dtype."""
    c = tiny(**changes)
    sigma = [draw(st.floats(0.05, 10), f"sigma of sample {m}") for m in range(members)]
    inputs = loss_inputs(c, (2, 4), sigma, draw(st.integers(0, 2**31), "seed"))
    return silenced(inputs) if silent else inputs, _params(c)


def _loss(port: Port, inputs: Inputs, params: dict[str, Any]) -> float:
    return float(shaped(port.values("loss", inputs, params, "loss")[0], (), "loss"))


def _gradients(port: Port, inputs: Inputs, params: dict[str, Any]) -> tuple[float, Inputs]:
    """The loss and its gradients, under the names of the weights."""
    names = [name for name in inputs if name.startswith("weights.")]
    asked = ("loss", *(name.replace("weights.", "gradients.") for name in names))
    loss, *gradients = port.values("gradients", inputs, params, *asked)
    pairs = zip(names, gradients, strict=True)
    return float(shaped(loss, (), "loss")), {name: shaped(value, inputs[name].shape, name) for name, value in pairs}


def _near(got: float, want: float, what: str) -> None:
    check_close(np.array(got), np.array(want), LOSS * U * max(1.0, abs(want)), what)


def _take(inputs: Inputs, members: Array) -> Inputs:
    """The samples `members`; weights and positions serve all."""
    return {n: v if n == "position" or n.startswith("weights.") else v[members] for n, v in inputs.items()}


def _masked(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    valid = rng.uniform(size=inputs["clean"].shape) < 0.6
    valid[..., 0, :2] = [True, False]
    return inputs | {"valid": valid}


def _invalid(port: Port, draw: Draw) -> None:
    inputs, params = _training(draw, 2, silent=True)
    rng = _seeded(draw)
    inputs = _masked(inputs, rng)
    want = _loss(port, inputs, params)
    other = dict(inputs)
    for name in ("clean", "noise"):
        other[name] = np.where(inputs["valid"], inputs[name], 64 * rng.standard_normal(inputs[name].shape))
    loss = _loss(port, other, params)
    check_equal(np.array(loss), np.array(want), "the loss of a fresh network when points that are not valid change")
    whole = inputs | {"valid": np.ones_like(inputs["valid"])}
    bare = {name: value for name, value in inputs.items() if name != "valid"}
    _near(_loss(port, whole, params), _loss(port, bare, params), "all points valid against no mask")


def _mean(port: Port, draw: Draw) -> None:
    inputs, params = _training(draw, 3, silent=False)
    loss = _loss(port, inputs, params)
    alone = [_loss(port, _take(inputs, np.array([m])), params) for m in range(3)]
    _near(loss, float(np.mean(alone)), "the loss of three samples against the mean of theirs")
    order = np.array(draw(st.permutations(range(3)), "order"))
    _near(_loss(port, _take(inputs, order), params), loss, "samples in another order")
    masked = _masked(inputs, _seeded(draw))
    parts = [_loss(port, _take(masked, np.array([m])), params) for m in range(3)]
    counts = masked["valid"].sum((1, 2, 3))
    want = float(np.dot(parts, counts) / counts.sum())
    _near(_loss(port, masked, params), want, "with a mask, against the mean weighted by valid points")


def _fresh(port: Port, draw: Draw) -> None:
    """With F = 0 and D = c_skip x: lambda (c_skip sigma)^2 for noise of size 1 on a state of zeros, and
    lambda (1 - c_skip)^2 sigma_data^2 for a state of size sigma_data without noise, which add up to 1."""
    sd = draw(st.sampled_from([0.5, 1.0, 2.0]), "sigma_data")
    inputs, params = _training(draw, 1, silent=True, sigma_data=sd)
    ones = np.ones_like(inputs["clean"])
    of_noise = _loss(port, inputs | {"clean": 0 * ones, "noise": ones}, params)
    of_data = _loss(port, inputs | {"clean": sd * ones, "noise": 0 * ones}, params)
    _near(of_noise + of_data, 1.0, "a fresh network's loss from noise and from data of size sigma_data, together")
    sigma = float(inputs["sigma"][0])
    want = sd**2 / (sigma**2 + sd**2)
    _near(of_noise, want, "the share of noise in a fresh network's loss")


def _slope(port: Port, draw: Draw) -> None:
    """By central differences with steps h and 2 h: their difference is three times the error of the finer one."""
    inputs, params = _training(draw, 2, silent=False)
    inputs, rng = _masked(inputs, _seeded(draw)), _seeded(draw)
    names = [name for name in inputs if name.startswith("weights.")]
    way = {name: rng.standard_normal(inputs[name].shape) for name in names}
    loss, gradients = _gradients(port, inputs, params)
    derivative = sum(float((gradients[name] * way[name]).sum()) for name in names)
    _near(loss, _loss(port, inputs, params), "the loss beside the gradients")

    def difference(h: float) -> float:
        up, down = (_loss(port, inputs | {n: inputs[n] + s * way[n] for n in names}, params) for s in (h, -h))
        return (up - down) / (2 * h)

    h = 2.0**-14
    fine, coarse = difference(h), difference(2 * h)
    limit = abs(coarse - fine) / 2 + LOSS * U * abs(loss) / h
    check_close(
        np.array(derivative), np.array(fine), limit, "the gradient along a direction against the loss on both sides"
    )


def _gradient_mean(port: Port, draw: Draw) -> None:
    inputs, params = _training(draw, 2, silent=False)
    _, mean = _gradients(port, inputs, params)
    one, two = (_gradients(port, _take(inputs, np.array([m])), params)[1] for m in range(2))
    limit = 2.0**14 * U * max(float(np.abs(value).max()) for part in (one, two) for value in part.values())
    for name, value in mean.items():
        check_close(value, (one[name] + two[name]) / 2, limit, f"gradients by {name} of two samples against their mean")


Check = Callable[[Port, Draw], None]


def _law(name: str, requirements: tuple[str, ...], op: str, check: Check, meaning: str, **settings: Any) -> Law:
    profile = "train" if op in ("training_sigma", "loss", "gradients") else "edm"
    ops = (op, *settings.pop("also", ()))
    return Law(f"edm/law-{name}", requirements, (profile,), ops, meaning, check, **settings)


# Losses of narrow networks differ by the network's rounding: compared in float64, where a fault cannot hide in it.
WIDE: dict[str, Any] = {"examples": 3, "dtype": "float64"}

LAWS = (
    _law("coefficients", ("EDM-2", "EDM-3"), "precondition", _coefficients,
         "coefficients do not belong together: one of them is of another formula or another sigma_data"),
    _law("schedule", ("EDM-5", "EDM-12", "NUM-2"), "schedule", _schedule,
         "levels do not fall from sigma_max to sigma_min in even steps of their rho-th root, and then to 0"),
    _law("affine", ("EDM-6", "EDM-7", "EDM-8"), "sample", _affine,
         "samples of a Gaussian are not affine in their noise: something else is drawn, clipped or rounded"),
    _law("units", ("CONV-5", "EDM-6", "EDM-7"), "sample", _units, "a constant with a unit hides in the sampler"),
    _law("origin", ("EDM-7", "EDM-10"), "sample", _origin, "samples depend on where the state's zero is"),
    _law("members", ("EDM-8", "NUM-12"), "sample", _members, "a member depends on its neighbours in the batch"),
    _law("variables", ("EDM-7", "EDM-10"), "sample", _turn, "variables are not treated alike"),
    _law("no-churn", ("EDM-6", "EDM-8"), "sample", _no_churn,
         "noise is added, or the level raised, where churn is off or outside its window"),
    _law("repeat", ("NUM-12", "EDM-8"), "sample", _repeat, "the sampler draws random numbers or keeps a state"),
    _law("order", ("EDM-7",), "sample", _order,
         "the sampler is not of second order: no corrector, or one with another slope", examples=6),
    _law("training-levels", ("EDM-4",), "training_sigma", _levels, "ln sigma is not -1.2 + 1.2 times a normal number"),
    _law("loss-fresh", ("EDM-2", "EDM-3", "EDM-9"), "loss", _fresh,
         "a fresh network's loss is not 1 at every noise level: the weight, sigma_data or the mean is wrong",
         examples=4),
    _law("loss-invalid", ("EDM-11",), "loss", _invalid, "values at points that are not valid change the loss",
         examples=3),
    _law("loss-mean", ("EDM-3", "EDM-11"), "loss", _mean,
         "the loss is not the mean over samples and points", **WIDE),
    _law("gradient", ("EDM-3", "EDM-11"), "gradients", _slope,
         "the gradient is not the slope of the loss", also=("loss",), **WIDE),
    _law("gradient-mean", ("EDM-3",), "gradients", _gradient_mean,
         "slopes of two samples are not averaged", **WIDE),
)  # fmt: skip
