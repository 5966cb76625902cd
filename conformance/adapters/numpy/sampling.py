"""Chapters 6 to 8 in plain NumPy: schedule and sampler, guided means, assimilation and cycles; float64 throughout.

[EDM-7]   one Heun step                    [EDM-10]  D = mu + C (C + sigma^2 I)^-1 (x - mu) for x_0 ~ N(mu, C)
[GUIDE-1] x^ + sigma^2 J^T H'^T W (y - H(x^))        [DA-5]  the moments of a linear cycle
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.adapter import Array, Arrays
from conformance.adapters.numpy import checks as check

__all__ = [
    "Churn",
    "Gaussian",
    "LinearOperator",
    "Operator",
    "PairNorms",
    "churn_of",
    "cycle",
    "guide",
    "linear_cycle",
    "member_noise",
    "sample",
    "schedule",
    "step",
]

Denoiser = Callable[[Array, float], Array]  # D(x; sigma) of members x [m, v]


def schedule(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """Noise levels [steps + 1], [EDM-5]."""
    n = check.integer("steps", steps)
    low, high = (float(check.positive(k, v)) for k, v in (("sigma_min", sigma_min), ("sigma_max", sigma_max)))
    r = float(check.positive("rho", rho))
    if low >= high:
        raise ValueError(f"sigma_min {low} is not below sigma_max {high}; noise levels have to fall")
    if n == 1:
        return np.array([high, 0.0])
    a, b = high ** (1 / r), low ** (1 / r)
    return np.array([(a + i / (n - 1) * (b - a)) ** r for i in range(n)] + [0.0])


@dataclass(frozen=True)
class Churn:
    """[EDM-6]; the defaults add no noise."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_min", "s_max", "s_noise"):
            value = getattr(self, name)
            if not value >= 0 or (math.isinf(value) and name != "s_max"):
                raise ValueError(f"{name} is {value}; give a number of at least 0")

    def factor(self, sigma: float, steps: int) -> float:
        """gamma_i."""
        return min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0


def churn_of(given: Mapping[str, float] | None) -> Churn:
    """Churn of the params of a case."""
    strange = sorted(set(given or {}) - {"s_churn", "s_min", "s_max", "s_noise"})
    if strange:
        raise ValueError(f"churn has no {', '.join(strange)}; give s_churn, s_min, s_max or s_noise")
    return Churn(**dict(given or {}))


def step(
    denoiser: Denoiser, x: Array, sigma: float, following: float, steps: int, churn: Churn, noise: Array | None
) -> Array:
    """One step of the sampler from sigma to the following level, [EDM-6] and [EDM-7]."""
    if not sigma > following >= 0:
        raise ValueError(f"a step from noise level {sigma} to {following}; levels fall and are not negative")
    if churn.s_churn > 0 and noise is None:
        raise ValueError(f"s_churn is {churn.s_churn} but there is no noise; give it, every random number is an input")
    hat, gamma = x, churn.factor(sigma, steps)
    raised = (1 + gamma) * sigma
    if gamma > 0 and noise is not None:
        hat = x + math.sqrt(raised**2 - sigma**2) * churn.s_noise * check.shape("noise", noise, *x.shape)
    d = (hat - denoiser(hat, raised)) / raised
    euler = hat + (following - raised) * d
    if following == 0:
        return euler
    d_prime = (euler - denoiser(euler, following)) / following
    return hat + (following - raised) * (d + d_prime) / 2


def sample(denoiser: Denoiser, latents: Array, sigmas: Array, churn: Churn, noises: Array | None) -> Array:
    """Members [m, v] of latents [m, v], and noises [n, m, v] with churn, [EDM-7]."""
    levels = [float(s) for s in check.falling(sigmas)]
    n = len(levels) - 1
    check.finite("latents", check.shape("latents", latents, None, None))
    if noises is not None:
        check.finite("noises", check.shape("noises", noises, n, *latents.shape))
    with np.errstate(over="ignore"):
        x = levels[0] * latents
    for i in range(n):
        with np.errstate(over="ignore", invalid="ignore"):
            x = step(denoiser, x, levels[i], levels[i + 1], n, churn, None if noises is None else noises[i])
        lost = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(lost):  # [DA-6]
            raise ValueError(f"the state is no longer finite in step {i}, member {lost[0]}; use more steps or check D")
    return x


class Gaussian:
    """The prior N(mu, C): its denoiser and its Jacobian, [EDM-10], by the eigenvectors of C.

    mean [v], or [m, v] where every member has its own.
    """

    def __init__(self, mean: Array, covariance: Array) -> None:
        self.mean = check.finite("mean", mean)
        square = check.rounding_symmetric("covariance", check.shape("covariance", covariance, *(mean.shape[-1:] * 2)))
        self.values, self.vectors = np.linalg.eigh(square)
        if self.values.min(initial=0) < -1e-8 * np.abs(self.values).max(initial=0):
            raise ValueError(f"covariance has the eigenvalue {self.values.min()}; give one without negative variance")

    def jacobian(self, sigma: float) -> Array:
        """J = C (C + sigma^2 I)^-1 [v, v]."""
        shrink = self.values / (self.values + sigma**2)
        return (self.vectors * shrink) @ self.vectors.T  # type: ignore[no-any-return]

    def denoise(self, x: Array, sigma: float) -> Array:
        """D(x; sigma) of members x [m, v]."""
        shrink = self.values / (self.values + sigma**2)
        return self.mean + ((x - self.mean) @ self.vectors * shrink) @ self.vectors.T  # type: ignore[no-any-return]


# Observation operators: H(x) [n] and H'(x) [n, v] of one state [v].
Operator = Callable[[Array], tuple[Array, Array]]


class LinearOperator:
    """H(x) = H x; the rows of H have finite weights, [GUIDE-11]."""

    def __init__(self, matrix: Array, n: int, v: int) -> None:
        self.matrix = check.finite("operator", check.shape("operator", matrix, n, v))

    @classmethod
    def of_points(cls, index: Array, weight: Array, n: int, v: int) -> "LinearOperator":
        """H_i(x) = sum_j weight_ij x[index_ij]: weights of one point add up, [CONV-1] and [GUIDE-11]."""
        index = check.shape("index", index, n, None)
        weight = check.finite("weight", check.shape("weight", weight, *index.shape))
        if not np.issubdtype(index.dtype, np.integer):
            raise ValueError(f"index is of dtype {index.dtype}; give whole numbers")
        if index.size and (index.min() < 0 or index.max() >= v):
            raise ValueError(f"index reaches {index.min()} to {index.max()}; give 0 to {v - 1}, points of the state")
        matrix = np.zeros((n, v))
        for i, j in np.ndindex(index.shape):
            matrix[i, index[i, j]] += weight[i, j]
        return cls(matrix, n, v)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        return self.matrix @ x, self.matrix


class PairNorms:
    """H_i(x) = sqrt(x_j^2 + x_k^2), (j, k) = pairs[i]."""

    def __init__(self, pairs: Array, n: int, v: int) -> None:
        self.pairs = check.shape("pairs", pairs, n, 2)
        if self.pairs.size and (self.pairs.min() < 0 or self.pairs.max() >= v):
            raise ValueError(f"pairs reach {self.pairs.min()} to {self.pairs.max()}; give 0 to {v - 1}")

    def __call__(self, x: Array) -> tuple[Array, Array]:
        norms = np.sqrt((x[self.pairs] ** 2).sum(1))
        if (norms == 0).any():
            raise ValueError(f"the state is 0 at {self.pairs[norms == 0][0].tolist()}; a norm has no derivative there")
        tangent = np.zeros((len(norms), len(x)))
        for i, pair in enumerate(self.pairs):
            for j in pair:
                tangent[i, j] += x[j] / norms[i]
        return norms, tangent


Weighting = Callable[[Array, float, Array, Array, Array], Array]  # W d of R, sigma, H', J and the innovation d


def setting(settings: Mapping[str, Any], method: str, name: str) -> Any:
    """A setting that a method has to state."""
    if name not in settings:
        raise ValueError(f"{method} lacks its {name}; state it")
    return settings[name]


def weighting(method: str, settings: Mapping[str, Any]) -> Weighting:
    """W of a method, applied to an innovation, [GUIDE-2] to [GUIDE-5]."""
    if method == "dps":
        return lambda r, sigma, tangent, j, d: d / r
    if method == "sda":
        gamma = setting(settings, method, "gamma")
        if not (gamma >= 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma is {gamma}; give a finite number of at least 0")
        return lambda r, sigma, tangent, j, d: d / (r + gamma * sigma**2)
    if method == "pigdm":
        sigma_data = float(check.positive("sigma_data", setting(settings, method, "sigma_data")))

        def pigdm(r: Array, sigma: float, tangent: Array, j: Array, d: Array) -> Array:
            spread = sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)
            return np.linalg.solve(np.diag(r) + spread * tangent @ tangent.T, d)

        return pigdm
    if method == "mmps":
        steps = check.integer("steps of mmps", setting(settings, method, "steps"))
        residual = settings.get("residual", 0.0)
        return lambda r, sigma, tangent, j, d: conjugate_gradients(
            lambda p: r * p + sigma**2 * tangent @ (j.T @ (tangent.T @ p)), d, steps, residual
        )
    raise ValueError(f"the method of guidance is {method!r}; give dps, pigdm, sda or mmps")


def conjugate_gradients(product: Callable[[Array], Array], d: Array, steps: int, residual: float) -> Array:
    """A^-1 d by at most `steps` steps from zero; stops at a residual of `residual` |d|, or where A is not positive."""
    w, r = np.zeros_like(d), d.copy()
    p, size = r.copy(), float(r @ r)
    for _ in range(steps):
        if math.sqrt(size) <= max(residual, 1e-15) * float(np.linalg.norm(d)):
            break
        q = product(p)
        curvature = float(p @ q)
        if not curvature > 0:
            break
        w, r = w + size / curvature * p, r - size / curvature * q
        size, before = float(r @ r), size
        p = r + size / before * p
    return w


def guide(
    mean: Array, jacobian: Array, sigma: float, observe: Operator, value: Array, variance: Array, weigh: Weighting
) -> Array:
    """The guided mean [v] of one member: its denoised mean [v] and J [v, v], [GUIDE-1]; [GUIDE-10] without value."""
    if len(value) == 0:
        return mean
    seen, tangent = observe(mean)
    weighted = weigh(variance, sigma, tangent, jacobian, value - seen)
    return mean + sigma**2 * jacobian.T @ (tangent.T @ weighted)  # type: ignore[no-any-return]


def guided_gaussian(
    prior: Gaussian, observe: Operator, value: Array, variance: Array, method: str | None, settings: Mapping[str, Any]
) -> Denoiser:
    """The denoiser of a Gaussian prior under observations; without any that of the prior, [DA-2] and [DA-7]."""
    value, variance = check.variances(value, variance)
    if method is None:
        if len(value):
            raise ValueError(f"there are {len(value)} observations and no method of guidance; name one or give none")
        return prior.denoise
    weigh = weighting(method, settings)

    def denoise(x: Array, sigma: float) -> Array:
        jacobian, means = prior.jacobian(sigma), prior.denoise(x, sigma)
        return np.stack([guide(m, jacobian, sigma, observe, value, variance, weigh) for m in means])

    return denoise


def linear_cycle(parts: Arrays) -> tuple[Array, Array]:
    """Means [k, v] and covariances [k, v, v] of the analyses of a linear cycle, [DA-5]."""
    n, v = check.finite("operator", check.shape("operator", parts["operator"], None, None)).shape
    model = check.finite("model", check.shape("model", parts["model"], v, v))
    mean = check.finite("mean", check.shape("mean", parts["mean"], v))
    observations = check.finite("observations", check.shape("observations", parts["observations"], None, n))
    sizes = {"model_error": v, "error": n, "covariance": v}
    q, r, p = (check.rounding_symmetric(name, check.shape(name, parts[name], k, k)) for name, k in sizes.items())
    h = parts["operator"]
    gain = np.linalg.solve(h @ q @ h.T + r, h @ q).T  # G, as both matrices are symmetric
    rest = np.eye(v) - gain @ h
    means, covariances = [], []
    for y in observations:
        mean = rest @ model @ mean + gain @ y
        p = rest @ model @ p @ model.T @ rest.T + rest @ q
        means.append(mean)
        covariances.append(p)
    return np.array(means).reshape(-1, v), np.array(covariances).reshape(-1, v, v)


def cycle(parts: Arrays, observed: Sequence[bool], method: str | None, settings: Mapping[str, Any]) -> Array:
    """Analyses [k, m, v] of x_k = sum_j A_j x_(k-j) + q, each member from its own history, [DA-1] and [DA-4]."""
    model = check.finite("model", check.shape("model", parts["model"], None, None, None))
    frames, v = model.shape[0], model.shape[2]
    k, m, _ = check.shape("latents", parts["latents"], None, None, v).shape
    past = list(check.finite("history", check.shape("history", parts["history"], frames, m, v)))
    values = check.shape("value", parts["value"], k, None)
    variances = check.shape("variance", parts["variance"], *values.shape)
    if len(observed) != k:
        raise ValueError(f"observed tells of {len(observed)} analyses, latents of {k}; give as many")
    observe, states = LinearOperator(parts["operator"], values.shape[1], v), []
    for i in range(k):
        forecast = np.sum([past[-j] @ model[j - 1].T for j in range(1, frames + 1)], axis=0)  # A_1 meets the newest
        y, r = (values[i], variances[i]) if observed[i] else (np.empty(0), np.empty(0))
        denoiser = guided_gaussian(Gaussian(forecast, parts["covariance"]), observe, y, r, method, settings)
        states.append(sample(denoiser, parts["latents"][i], parts["sigmas"], Churn(), None))
        past = [*past[1:], states[-1]]
    return np.array(states)


def member_noise(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int) -> Array:
    """Standard normal [draws, *shape] of (seed, analysis, member) alone, [DA-3].

    Each of the three numbers is two words of 32 bits, so that no two triples are one key.
    """
    words: list[int] = []
    for name, number in (("seed", seed), ("analysis", analysis), ("member", member)):
        if check.integer(name, number, 0) >= 2**64:
            raise ValueError(f"{name} is {number}; give less than 2^64")
        words += [number % 2**32, number // 2**32]
    sizes = [check.integer("a side of the shape", size) for size in shape]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    return generator.standard_normal((check.integer("draws", draws, 0), *sizes))
