"""Laws of chapter 8, part one: members are independent, an exact ensemble is Bayes', a cycle forgets nothing else.

With mmps and a Gaussian prior the guided mean is the denoiser of the posterior N(m, P), and a sampler without churn is
linear in its latents z: along an eigenvector of P with eigenvalue c a step multiplies by a known factor. Hence
x = m + T (z - m / sigma_0), where T has the eigenvectors of P and the products of factors: the ensemble's moments for
any number of steps, without sampling error.

Limits: every evaluation of D may be off by its own limit (laws/guidance.py), which a step takes over at most whole, and
no step amplifies errors by more than the 4 allowed for them all.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance.adapter import Array, Arrays
from conformance.judging import randomness as statistics
from conformance.judging.law import Broken, Draw, Law, check_close, check_equal
from conformance.laws.guidance import guidance_limit, random_problem, settings
from conformance.ports.checked import Port, Refused

__all__ = ["LAWS", "factor", "transfer"]

SIGMAS = np.array([10.0, 2.0, 0.4, 0.0])
SOFT = {"method": "sda", "gamma": 8.0}  # where the method does not matter: without conjugate gradients, and never stiff
U = 2.0**-53


def factor(sigmas: Array, c: float) -> float:
    """Return what the sampler turns a latent of 1 into where the denoiser is c / (c + sigma^2) x."""
    levels = sigmas.tolist()
    x: float = levels[0]
    for now, after in pairwise(levels):
        d = x * now / (c + now**2)
        euler = x + (after - now) * d
        x = euler if after == 0 else x + (after - now) * (d + euler * after / (c + after**2)) / 2
    return x


def transfer(sigmas: Array, covariance: Array) -> Array:
    """T of N(m, covariance) for these noise levels."""
    values, vectors = np.linalg.eigh(covariance)
    matrix: Array = (vectors * np.array([factor(sigmas, float(c)) for c in values])) @ vectors.T
    return matrix


def _bayes(prior: Array, inputs: Arrays) -> tuple[Array, Array]:
    """Covariance of the posterior, and the gain that multiplies y."""
    weighted = inputs["operator"].T / inputs["variance"]
    covariance = np.linalg.inv(np.linalg.inv(prior) + weighted @ inputs["operator"])
    return covariance, covariance @ weighted


def _problem(draw: Draw, members: int) -> dict[str, Array]:
    size, observations = draw(st.integers(1, 3), "variables"), draw(st.integers(1, 3), "observations")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    inputs = random_problem(rng, size, observations, 1) | {"sigmas": SIGMAS}
    del inputs["x"], inputs["sigma"]
    return inputs | {
        "latents": rng.standard_normal((members, size)),
        "noises": rng.standard_normal((len(SIGMAS) - 1, members, size)),
    }


def _limit(inputs: Arrays, params: dict[str, Any], latents: Array) -> float:
    """Bound the rounding error of a run of the sampler on these latents."""
    levels = SIGMAS[:-1]
    largest = (1 + float(np.abs(latents).max(initial=0.0))) * (1 + levels[:, None]) * np.ones(len(inputs["mean"]))
    at = {**inputs, "x": largest, "sigma": levels}
    return 4 * 2 * len(levels) * guidance_limit(at, params)


def _samples(port: Port, inputs: Arrays, params: dict[str, Any]) -> Array:
    return port.values("assimilate", inputs, {"churn": {}, "together": 16} | params, "samples")[0]


def _batching(port: Port, draw: Draw) -> None:
    inputs, params = _problem(draw, 5), SOFT | {"churn": {"s_churn": 2.0}}
    whole = _samples(port, inputs, params | {"together": 5})
    few = _samples(port, inputs, params | {"together": draw(st.integers(1, 4), "together")})
    chosen = np.array(draw(st.permutations(range(5)), "members")[: draw(st.integers(1, 4), "how many")])
    part = inputs | {"latents": inputs["latents"][chosen], "noises": inputs["noises"][:, chosen]}
    limit = 2 * _limit(inputs, params, np.array([*inputs["latents"].flat, *inputs["noises"].flat]))
    check_close(few, whole, limit, "members drawn a few at a time, and all at once")
    check_close(_samples(port, part, params), whole[chosen], limit, "some of the members in another order, and all")


def _exact(port: Port, draw: Draw) -> None:
    inputs, params = _problem(draw, 1), settings("mmps")
    del inputs["noises"]
    size = len(inputs["mean"])
    covariance, gain = _bayes(inputs["covariance"], inputs)
    mean = covariance @ np.linalg.solve(inputs["covariance"], inputs["mean"]) + gain @ inputs["value"]
    chain = transfer(SIGMAS, covariance)
    inputs["latents"] = np.vstack([np.zeros(size), np.eye(size)])
    got, limit = _samples(port, inputs, params), _limit(inputs, params, inputs["latents"])
    check_close(got[0], mean - chain @ mean / SIGMAS[0], limit, "the mean of the ensemble, and Bayes'")
    apart = got[1:] - got[0]
    close = 2 * limit * size * float(np.abs(chain).sum())
    check_close(apart.T @ apart, chain @ chain.T, close, "the covariance of the ensemble, and Bayes'")


def _forecast(port: Port, draw: Draw) -> None:
    inputs = _problem(draw, 3)
    nothing = {"operator": inputs["operator"][:0], "value": np.zeros(0), "variance": np.zeros(0)}
    churn = draw(st.sampled_from(({}, {"s_churn": 2.0}, {"s_churn": 1.0, "s_max": 3.0})), "churn")
    names = ("mean", "covariance", "sigmas", "latents", *(("noises",) if churn else ()))
    prior = {name: inputs[name] for name in names}
    (want,) = port.values("sample", prior, {"churn": churn}, "samples")
    got = _samples(port, prior | nothing, {"method": None, "churn": churn, "together": 2})
    limit = 2 * _limit(inputs | nothing, settings("dps"), np.array([*inputs["latents"].flat, *inputs["noises"].flat]))
    check_close(got, want, limit, "a forecast, and a sample of the prior")


def _again(port: Port, draw: Draw) -> None:
    inputs = _problem(draw, 3)
    params = settings("mmps") | {"churn": {"s_churn": 2.0}}
    first = _samples(port, inputs, params)
    _samples(port, inputs | {"latents": -inputs["latents"]}, params)
    check_equal(_samples(port, inputs, params), first, "the same call, before and after another")


# Cycles.


def _cycle_inputs(draw: Draw, frames: int, members: int, analyses: int) -> dict[str, Array]:
    size, observations = draw(st.integers(1, 3), "variables"), draw(st.integers(1, 2), "observations")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    base = random_problem(rng, size, observations, 1)
    return {
        "model": rng.uniform(-1, 1, (frames, size, size)) / (frames * size),
        "covariance": base["covariance"],
        "operator": base["operator"],
        "history": rng.standard_normal((frames, members, size)),
        "value": 2 * rng.standard_normal((analyses, observations)),
        "variance": np.exp(rng.uniform(-1, 2, (analyses, observations))),
        "latents": rng.standard_normal((analyses, members, size)),
        "sigmas": SIGMAS,
    }


def _states(port: Port, inputs: Arrays, params: dict[str, Any], observed: list[bool]) -> Array:
    return port.values("cycle", inputs, params | {"observed": observed}, "states")[0]


def _cycle_limit(inputs: Arrays, params: dict[str, Any]) -> float:
    """Every analysis adds its own limit; the model, whose rows sum to one at most, amplifies none."""
    largest = float(max(np.abs(inputs["history"]).max(), np.abs(inputs["latents"]).max()))
    size = len(inputs["covariance"])
    worst = [
        _limit({**inputs, "mean": np.full(size, 2 * largest), "value": y, "variance": r}, params, np.array([largest]))
        for y, r in zip(inputs["value"], inputs["variance"], strict=True)
    ]
    return sum(worst)


def _members_apart(port: Port, draw: Draw) -> None:
    frames, params = draw(st.integers(1, 3), "frames"), SOFT
    inputs = _cycle_inputs(draw, frames, 3, 3)
    observed = draw(st.lists(st.booleans(), min_size=3, max_size=3), "observed")
    order = np.array(draw(st.permutations(range(3)), "order"))
    whole, limit = _states(port, inputs, params, observed), 2 * _cycle_limit(inputs, params)
    other = inputs | {name: inputs[name][:, order] for name in ("history", "latents")}
    check_close(_states(port, other, params, observed), whole[:, order], limit, "members of a cycle in another order")
    alone = inputs | {name: inputs[name][:, :1] for name in ("history", "latents")}
    check_close(_states(port, alone, params, observed)[:, 0], whole[:, 0], limit, "one member of a cycle alone")


def _past(port: Port, draw: Draw) -> None:
    """Nothing of y_k reaches what was before; frames that no model matrix reads do not matter."""
    params, observed = SOFT, [True, True, True]
    inputs = _cycle_inputs(draw, 2, 2, 3)
    when = draw(st.integers(0, 2), "changed analysis")
    value = inputs["value"].copy()
    value[when] += 5
    first, limit = _states(port, inputs, params, observed), 2 * _cycle_limit(inputs, params)
    other = _states(port, inputs | {"value": value}, params, observed)
    check_close(other[:when], first[:when], limit, f"analyses before a change of the observations of analysis {when}")
    newest = inputs | {"model": inputs["model"] * np.array([1.0, 0.0])[:, None, None]}
    oldest = inputs["history"].copy()
    oldest[0] += 3
    want = _states(port, newest, params, observed)
    got = _states(port, newest | {"history": oldest}, params, observed)
    check_close(got, want, 2 * limit, "a model of the newest frame alone, with another oldest frame")


def _moments(port: Port, draw: Draw) -> None:
    """[DA-5] for these noise levels: m' = (I - T / sigma_0) B, P' = (I - T / sigma_0) K P K^T (...)^T + T T^T, where B
    is Bayes' mean and K = (I - G H) A. The ensemble has unit vectors in its history and latents: exact moments."""
    analyses, params = 2, settings("mmps")
    inputs = _cycle_inputs(draw, 1, 1, analyses)
    size = len(inputs["covariance"])
    members = 1 + size * (1 + analyses)
    history, latents = np.tile(inputs["history"], (1, members, 1)), np.zeros((analyses, members, size))
    for i in range(size):
        history[0, 1 + i, i] += 1
        for k in range(analyses):
            latents[k, 1 + size * (1 + k) + i, i] = 1
    inputs |= {"history": history, "latents": latents}
    got, limit = _states(port, inputs, params, [True] * analyses), _cycle_limit(inputs, params)
    mean, spread = history[0, 0], np.eye(size)
    for k in range(analyses):
        here = {"operator": inputs["operator"], "variance": inputs["variance"][k]}
        posterior, gain = _bayes(inputs["covariance"], here)
        chain = transfer(SIGMAS, posterior)
        short = np.eye(size) - chain / SIGMAS[0]
        keep = short @ (np.eye(size) - gain @ here["operator"]) @ inputs["model"][0]
        mean, spread = keep @ mean + short @ gain @ inputs["value"][k], keep @ spread @ keep.T + chain @ chain.T
        check_close(got[k, 0], mean, limit, f"the mean of analysis {k}")
        apart = got[k, 1:] - got[k, 0]
        close = 2 * limit * members * (1 + float(np.abs(apart).max()))
        check_close(apart.T @ apart, spread, close, f"the covariance of analysis {k}")


def _linear(port: Port, draw: Draw) -> None:
    """From a known past one analysis has Bayes' covariance for the prior N(A m, Q); no covariance depends on y or m."""
    size, observations = draw(st.integers(1, 4), "variables"), draw(st.integers(1, 4), "observations")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    base = random_problem(rng, size, observations, 1)
    inputs = {
        "model": rng.standard_normal((size, size)),
        "model_error": base["covariance"],
        "operator": base["operator"],
    }
    inputs |= {"error": np.diag(base["variance"]), "mean": base["mean"], "covariance": np.zeros((size, size))}
    inputs |= {"observations": rng.standard_normal((2, observations))}
    posterior, gain = _bayes(base["covariance"], base)
    system = base["operator"] @ base["covariance"] @ base["operator"].T + inputs["error"]
    condition = float(np.linalg.cond(system) + np.linalg.cond(base["covariance"]))
    scale = 1 + float(np.abs(base["covariance"]).sum() + np.abs(inputs["model"] @ base["mean"]).sum())
    scale += float(np.abs(gain).sum() * np.abs(inputs["observations"]).max())
    scale *= 1 + float(np.abs(gain @ base["operator"]).sum())
    limit = 64 * size * U * condition * scale
    means, covariances = port.values("linear_cycle", inputs, {}, "means", "covariances")
    forecast = inputs["model"] @ base["mean"]
    want = forecast + gain @ (inputs["observations"][0] - base["operator"] @ forecast)
    check_close(covariances[0], posterior, limit, "the covariance from a known past, and Bayes'")
    check_close(means[0], want, limit, "the mean from a known past, and Bayes'")
    other = inputs | {"mean": inputs["mean"] + 3, "observations": -2 * inputs["observations"]}
    (again,) = port.values("linear_cycle", other, {}, "covariances")
    check_close(
        again, covariances, 4 * limit * (1 + float(np.abs(covariances).max())), "covariances of other observations"
    )


# Noise.


def _noise(port: Port, key: tuple[int, int, int], shape: list[int], draws: int = 1) -> Array:
    seed, analysis, member = key
    params = {"seed": seed, "analysis": analysis, "member": member, "shape": shape, "draws": draws}
    (noise,) = port.values("noise", {}, params, "noise")
    if noise.shape != (draws, *shape):
        raise Broken(f"noise has shape {list(noise.shape)}, expected {[draws, *shape]}")
    return noise


def _far(port: Port, key: tuple[int, int, int], shape: list[int]) -> Array:
    """Noise of a key that a port may find too large; nothing where it says so."""
    try:
        return _noise(port, key, shape).ravel()
    except Refused:
        return np.empty(0)


def _keys(port: Port, draw: Draw) -> None:
    seed, analysis, member = (draw(st.integers(1, 2**12), name) for name in ("seed", "analysis", "member"))
    shape = [draw(st.integers(1, 3), "rows"), draw(st.integers(6, 9), "columns")]
    noise = _noise(port, (seed, analysis, member), shape, 3)
    check_equal(_noise(port, (seed, analysis, member), shape), noise[:1], "the first of one draw and of three")
    check_equal(_noise(port, (seed, analysis, member), shape, 3), noise, "the same noise again")
    others = [
        (seed, analysis + 1, member), (seed + 1, analysis, member), (seed, analysis, member + 1),
        (seed - 1, analysis, member + 1),
        (seed + 1, analysis - 1, member), (seed, 0, member), (seed, analysis, 0),
    ]  # fmt: skip
    # One number for two: those of a member that is a whole ensemble further on are not those of the next analysis.
    sizes = (10, 16, 20, 32, 50, 64, 100, 128, 256, 1000, 1024, 10_000, 2**16)
    others += [(seed, analysis, member + size) for size in sizes]
    others = [other for other in dict.fromkeys(others) if other != (seed, analysis, member)]
    far = [(seed + 2**32, analysis, member), (seed, analysis, member + 2**32)]
    numbers = [((seed, analysis, member), noise.ravel())]
    numbers += [(key, _noise(port, key, shape).ravel()) for key in others]
    numbers += [(key, _far(port, key, shape)) for key in far]
    known: Array = np.empty(0)
    for key, values in numbers:
        known = np.concatenate([known, values])
        if len(np.unique(known)) != known.size:
            raise Broken(f"(seed, analysis, member) = {key} has numbers of its own again, or those of an earlier key")


def _statistics(port: Port, draw: Draw) -> None:
    """Eight streams of 8192 numbers, by member, analysis, seed and draw; the sizes are those of statistics.py."""
    length = [8192]
    by = {
        "members": [_noise(port, (20260417, 3, member), length)[0] for member in range(8)],
        "analyses": [_noise(port, (20260417, analysis, 5), length)[0] for analysis in range(10, 18)],
        "seeds": [_noise(port, (seed, 3, 5), length)[0] for seed in range(8)],
        "draws": list(_noise(port, (1, 2, 3), length, 8)),
    }
    streams = {name: np.stack(rows) for name, rows in by.items()}
    first = streams["members"]
    levels = {f"independence of {name}": statistics.correlation(rows) for name, rows in streams.items()}
    levels |= {
        "mean": statistics.mean(first),
        "variance": statistics.variance(first),
        "distribution": statistics.distribution(first[:2]),
        "independence of neighbours": statistics.neighbours(first),
        "resolution": statistics.repeats(first),
    }
    for name, p in levels.items():
        if p <= statistics.LEVEL:
            raise Broken(f"{name} of the noise: p = {p:.3g}, below {statistics.LEVEL:.3g}")


def _law(
    name: str, op: str, requirements: tuple[str, ...], meaning: str, check: Any, examples: int = 5,
    targets: tuple[str, ...] = (), profiles: tuple[str, ...] = ("guidance",),
) -> Law:  # fmt: skip
    ops = tuple(op.split())
    return Law(
        f"assimilation/law-{name}", requirements, profiles, ops, meaning, check, targets=targets, examples=examples
    )


LAWS = (
    _law(
        "batching", "assimilate", ("DA-3",),
        "a member depends on which others are drawn, in what order or how many at once", _batching, 3,
        targets=("members_share_step_noise", "noise_by_batch_index"),
    ),
    _law(
        "bayes", "assimilate", requirements=("DA-1", "GUIDE-8"),
        meaning="the exact method's ensemble has not Bayes' mean and covariance", check=_exact, examples=3,
        targets=("guidance_predictor_only", "guidance_corrector_only"),
    ),
    _law("forecast", "assimilate sample", ("DA-2", "GUIDE-10"), "a forecast is not a draw from the prior", _forecast),
    _law(
        "same-bits", "assimilate", ("NUM-12",), "the same inputs give other bits: a hidden or global source of numbers",
        _again, 2, profiles=("guidance", "rng"),
    ),
    _law(
        "cycle-members", "cycle", requirements=("DA-3", "DA-4"),
        meaning="members of a cycle share a history or are mixed up", check=_members_apart, examples=3,
        targets=("history_ensemble_mean", "history_of_first_member"),
    ),
    _law(
        "cycle-past", "cycle", requirements=("DA-1", "DA-4"),
        meaning="an analysis takes observations of another time, or frames out of order", check=_past, examples=2,
        targets=("history_newest_first", "history_not_moved", "observations_a_step_late"),
    ),
    _law(
        "cycle-moments", "cycle", requirements=("DA-1", "DA-4", "DA-5"), meaning="a cycle has not the moments of one",
        check=_moments, examples=3, targets=("history_ensemble_mean", "history_not_moved"),
    ),
    _law(
        "linear-cycle", "linear_cycle", requirements=("DA-1", "DA-5"),
        meaning="one analysis from a known past is not Bayes'", check=_linear, examples=8,
        targets=("kalman_gain", "q_and_r_swapped"),
    ),
    _law(
        "noise-keys", "noise", requirements=("DA-3", "NUM-12"),
        meaning="noise does not depend on (seed, analysis, member) alone, or repeats", check=_keys, examples=4,
        targets=("noise_same_for_all_members", "noise_numbers_added", "noise_global_generator"), profiles=("rng",),
    ),
    _law(
        "noise-statistics", "noise", requirements=("DA-3", "NUM-5"),
        meaning="noise is not standard normal, not independent, or coarse", check=_statistics, examples=1,
        targets=("noise_uniform", "noise_in_float32", "noise_same_for_all_members"), profiles=("rng",),
    ),
)  # fmt: skip
