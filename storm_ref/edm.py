"""EDM: preconditioning, training loss, noise schedule and the stochastic Heun sampler.

With sigma_d the standard deviation of the normalised state and F the network:

[EDM-1] D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
[EDM-2] c_skip = sigma_d^2 / (sigma^2 + sigma_d^2)      c_out = sigma sigma_d / sqrt(sigma^2 + sigma_d^2)
        c_in   = 1 / sqrt(sigma^2 + sigma_d^2)          c_noise = ln(sigma) / 4
[EDM-3] loss  E[ lambda(sigma) |D(x + sigma n; sigma) - x|^2 ],  lambda = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2
[EDM-4] training noise  ln sigma ~ N(-1.2, 1.2^2)
[EDM-5] sigma_i = (s_max^(1/rho) + i/(n-1) (s_min^(1/rho) - s_max^(1/rho)))^rho, i = 0..n-1, then sigma_n = 0
[EDM-6] churn: gamma_i = min(S_churn / n, sqrt 2 - 1) where S_min <= sigma_i <= S_max, else 0;
        sigma_hat = (1 + gamma_i) sigma_i,  x_hat = x + sqrt(sigma_hat^2 - sigma_i^2) S_noise e_i
[EDM-7] Heun: d = (x_hat - D(x_hat; sigma_hat)) / sigma_hat,  x' = x_hat + (sigma_{i+1} - sigma_hat) d,
        d' = (x' - D(x'; sigma_{i+1})) / sigma_{i+1},  x = x_hat + (sigma_{i+1} - sigma_hat) (d + d') / 2;
        the last step (sigma_n = 0) is Euler: 2 n - 1 evaluations of D in all
[EDM-8] every random number is an input: latents and per-step noises; nothing here draws any
[EDM-9] the sampler's arithmetic and the coefficients are float64 whatever the dtype of the network
[EDM-10] for x ~ N(mu, C) the exact denoiser is D(x; sigma) = mu + C (C + sigma^2 I)^-1 (x - mu)

Source: Karras, Aittala, Aila & Laine (2022), table 1, eqs. 5-8, algorithm 2, which the paper adopts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "Churn",
    "Denoise",
    "NotFiniteError",
    "draw_sigma",
    "edm_loss",
    "euler_sample",
    "gaussian_denoiser",
    "heun_step",
    "loss_weight",
    "precondition",
    "precondition_coefficients",
    "sample",
    "schedule",
    "training_sigma",
]

# D(x [b, ...], sigma [b]) -> the denoised mean, of the shape and dtype of x.
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Churn:
    """Stochasticity of the sampler, [EDM-6]. The default S_churn = 0 is the deterministic (probability-flow) sampler.

    Raises ValueError when S_churn or S_noise is negative.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.s_churn >= 0 and self.s_noise >= 0):
            raise ValueError(f"churn and its noise must not be negative, got {self.s_churn} and {self.s_noise}")

    def gamma(self, sigma: float, steps: int) -> float:
        """gamma_i: the relative increase of the noise level before the step from sigma, of `steps` steps."""
        return min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0


class NotFiniteError(ValueError):
    """The state stopped being finite: `members` (their places in the batch) at step `step` (from 1) of `steps`."""

    def __init__(self, members: list[int], step: int, steps: int, sigma: float) -> None:
        self.members, self.step, self.steps, self.sigma = members, step, steps, sigma
        super().__init__(
            f"members {members} stopped being finite at step {step} of {steps} (sigma {sigma:.3g}); guidance too stiff "
            "for the number of steps does this: take more steps or another guidance"
        )


def _positive(sigma: Tensor) -> Tensor:
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive, got {sigma.min().item()}; the sampler's final 0 is never denoised")
    return sigma.double()


def precondition_coefficients(
    sigma: Float[Tensor, "*b"], sigma_data: float
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """c_skip, c_out, c_in, c_noise in float64, [EDM-2]. Raises ValueError for sigma <= 0."""
    s = _positive(sigma)
    total = s**2 + sigma_data**2
    return sigma_data**2 / total, s * sigma_data / total.sqrt(), 1 / total.sqrt(), s.log() / 4


def _over(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient a sample, shaped to multiply x."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def precondition(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b *s"],
    sigma: Float[Tensor, " b"],
    sigma_data: float,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *s"]:
    """D(x; sigma), [EDM-1]; `network(c_in x, sigma)` is evaluated in `dtype`, all else in float64.

    The network is given sigma itself, in float64, from which it takes c_noise and its noise gate: rounded to `dtype`
    before the logarithm, nearby noise levels would become one.
    """
    c_skip, c_out, c_in, _ = precondition_coefficients(sigma, sigma_data)
    x64 = x.double()
    raw = network((_over(c_in, x) * x64).to(dtype), sigma.double())
    return (_over(c_skip, x) * x64 + _over(c_out, x) * raw.double()).to(x.dtype)


def loss_weight(sigma: Float[Tensor, "*b"], sigma_data: float) -> Float[Tensor, "*b"]:
    """lambda(sigma), [EDM-3]: makes the loss of an untrained network one at every noise level."""
    s = _positive(sigma)
    return (s**2 + sigma_data**2) / (s * sigma_data) ** 2


def training_sigma(normal: Float[Tensor, " count"], mean: float = -1.2, std: float = 1.2) -> Float[Tensor, " count"]:
    """Noise levels for training from standard normal numbers, ln sigma ~ N(mean, std^2), float64, [EDM-4]."""
    return torch.exp(mean + std * normal.double())


def draw_sigma(count: int, generator: torch.Generator, mean: float = -1.2, std: float = 1.2) -> Float[Tensor, " count"]:
    """`training_sigma` of numbers that the generator draws."""
    return training_sigma(torch.randn(count, generator=generator, dtype=torch.float64), mean, std)


def edm_loss(
    denoise: Denoise,
    x: Float[Tensor, "b *s"],
    noise: Float[Tensor, "b *s"],
    sigma: Float[Tensor, " b"],
    sigma_data: float,
    valid: Bool[Tensor, "b *s"] | None = None,
) -> Float[Tensor, ""]:
    """[EDM-3] averaged over samples and points; `noise` is standard normal.

    Points not `valid` are left out of the average, [EDM-11]; the network sees them all the same, so x must be finite
    there too. Raises ValueError when none is valid.
    """
    if valid is not None and not bool(valid.any()):
        raise ValueError("no point is valid: a loss over nothing is not zero; leave the sample out")
    error = denoise(x + _over(sigma, x).to(x.dtype) * noise, sigma) - x
    weighted = _over(loss_weight(sigma, sigma_data), x).to(x.dtype) * error**2
    return weighted.mean() if valid is None else weighted[valid].mean()


def schedule(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " levels"]:
    """steps + 1 noise levels, decreasing, the last 0, float64, [EDM-5].

    Raises ValueError for steps < 1, rho <= 0, or unless 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"the sampler needs at least one step, got {steps}")
    if not 0 < sigma_min < sigma_max or not math.isfinite(sigma_max):
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def _slope(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    level = torch.full((x.shape[0],), sigma, dtype=torch.float64, device=x.device)
    return (x - denoise(x, level).double()) / sigma


def heun_step(
    denoise: Denoise,
    x: Float[Tensor, "b *s"],
    now: float,
    after: float,
    gamma: float = 0.0,
    noise: Float[Tensor, "b *s"] | None = None,
) -> Float[Tensor, "b *s"]:
    """One step from noise level `now` to `after`, [EDM-7]; `noise`, times S_noise, raises the level by gamma first,
    [EDM-6].
    """
    hat = (1 + gamma) * now
    if gamma > 0 and noise is not None:
        x = x + math.sqrt(hat**2 - now**2) * noise
    slope = _slope(denoise, x, hat)
    euler = x + (after - hat) * slope
    return euler if after == 0 else x + (after - hat) * (slope + _slope(denoise, euler, after)) / 2


def sample(
    denoise: Denoise,
    latents: Float[Tensor, "b *s"],
    sigmas: Float[Tensor, " levels"],
    churn: Churn = Churn(),
    noises: Float[Tensor, "steps b *s"] | None = None,
    progress: Callable[[], None] | None = None,
) -> Float[Tensor, "b *s"]:
    """Stochastic Heun sampler, algorithm 2 of EDM, [EDM-6] and [EDM-7].

    latents: standard normal. noises: standard normal, one a step, needed when churn is on. progress: called after each
    step. Returns float64. Raises ValueError on churn without noises of their shape and on levels that do not fall to 0,
    NotFiniteError on a state that stops being finite.
    """
    levels, steps = sigmas.tolist(), len(sigmas) - 1
    if steps < 1 or levels[-1] != 0 or not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"noise levels must fall strictly and end in 0, got {levels}; make them with schedule()")
    if churn.s_churn > 0 and (noises is None or noises.shape != (steps, *latents.shape)):
        got = "none" if noises is None else str(tuple(noises.shape))
        raise ValueError(f"churn needs one noise a step, of shape {(steps, *latents.shape)}, got {got}")
    x: Tensor = levels[0] * latents.double()
    for i, (now, after) in enumerate(pairwise(levels)):
        noise = None if noises is None else churn.s_noise * noises[i].double()
        x = heun_step(denoise, x, now, after, churn.gamma(now, steps), noise)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not bool(finite.all()):
            raise NotFiniteError(torch.nonzero(~finite).flatten().tolist(), i + 1, steps, now)
        if progress is not None:
            progress()
    return x


def euler_sample(
    denoise: Denoise, latents: Float[Tensor, "b *s"], sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "b *s"]:
    """First-order sampler, n evaluations: the comparison that shows Heun's second order."""
    x: Tensor = sigmas[0].item() * latents.double()
    for now, after in pairwise(sigmas.tolist()):
        x = x + (after - now) * _slope(denoise, x, now)
    return x


def gaussian_denoiser(mean: Float[Tensor, " v"], covariance: Float[Tensor, "v v"]) -> Denoise:
    """The exact denoiser of x ~ N(mean, covariance) on vectors [b, v], [EDM-10]: the oracle of linear tests."""
    spectrum: tuple[Tensor, Tensor] = torch.linalg.eigh(covariance.double())
    values, vectors = spectrum

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        gain = values / (values + sigma.double()[:, None] ** 2)
        return mean + (((x - mean) @ vectors) * gain) @ vectors.T

    return denoise
