"""EDM: preconditioning, training loss, noise schedule and the stochastic Heun sampler.

With sigma_d the standard deviation of the normalised state and F the network:

[EDM-1] D(x; sigma) = c_skip x + c_out F(c_in x; sigma); F forms c_noise and the noise gate from sigma itself ([NET-1],
        [ATT-4])
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
[EDM-8] every random number is an input: latents, step noises, training noise, or a generator that is an argument
[EDM-9] the sampler's arithmetic and the coefficients are float64 whatever the dtype of the network
[EDM-10] for x ~ N(mu, C) the exact denoiser is D(x; sigma) = mu + C (C + sigma^2 I)^-1 (x - mu)
[EDM-11] points marked as not valid are selected out of the loss, which is one mean over the valid points of all samples
        together; no valid point is an error
[EDM-12] noise levels that do not decrease strictly to 0 are refused, and so is a state that stops being finite ([DA-6])

Source: Karras, Aittala, Aila & Laine (2022), table 1, eqs. 5-8 and algorithm 2, which the paper adopts. In EDM's own
notation F is given c_noise, a one-to-one function of sigma.
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
    "per_sample",
    "precondition",
    "precondition_coefficients",
    "sample",
    "schedule",
    "training_sigma",
]

# D(x; sigma): takes x [b, ...] and sigma [b], returns the denoised mean in the shape and dtype of x.
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Churn:
    """Parameters of the sampler's stochasticity, [EDM-6]: S_churn, S_min, S_max and S_noise.

    The default S_churn = 0 gives the deterministic (probability-flow) sampler. Raises ValueError when S_churn or
    S_noise is negative.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.s_churn >= 0 and self.s_noise >= 0):
            raise ValueError(f"s_churn and s_noise must not be negative, got {self.s_churn} and {self.s_noise}")

    def gamma(self, sigma: float, steps: int) -> float:
        """Return gamma_i of [EDM-6], the relative increase of noise level `sigma` in a schedule of `steps` steps."""
        return min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0


class NotFiniteError(ValueError):
    """The sampler's state stopped being finite, [EDM-12].

    `members` are indices into the batch; `step` counts from 1 to `steps`; `sigma` is the noise level the step started
    from.
    """

    def __init__(self, members: list[int], step: int, steps: int, sigma: float) -> None:
        self.members = members
        self.step = step
        self.steps = steps
        self.sigma = sigma
        super().__init__(
            f"members {members} stopped being finite at step {step} of {steps} (sigma {sigma:.3g}); guidance that is "
            "too stiff for the number of steps causes this: take more steps or another guidance method"
        )


def per_sample(coefficient: Float[Tensor, " b"], x: Float[Tensor, "b *s"]) -> Float[Tensor, "b *ones"]:
    """Reshape one coefficient per sample so that it multiplies x, in the dtype and on the device of x."""
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _positive(sigma: Tensor) -> Tensor:
    if not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive, got {sigma.min().item()}; the sampler's final 0 is never denoised")
    return sigma.double()


def precondition_coefficients(
    sigma: Float[Tensor, "*b"], sigma_data: float
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Return c_skip, c_out, c_in and c_noise of [EDM-2], each of the shape of sigma and float64.

    Raises ValueError for sigma <= 0.
    """
    s = _positive(sigma)
    total = s**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = s * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = s.log() / 4
    return c_skip, c_out, c_in, c_noise


def precondition(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b *s"],
    sigma: Float[Tensor, " b"],
    sigma_data: float,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *s"]:
    """Return D(x; sigma) of [EDM-1], in the shape and dtype of x.

    `network(c_in x, sigma)` is evaluated in `dtype` and everything else in float64, [EDM-9]. The network is given sigma
    itself, in float64, from which it forms c_noise and its noise gate: were sigma rounded to `dtype` before the
    logarithm, nearby noise levels would coincide. Raises ValueError for sigma <= 0.
    """
    c_skip, c_out, c_in, _ = precondition_coefficients(sigma, sigma_data)
    x64 = x.double()
    raw = network((per_sample(c_in, x64) * x64).to(dtype), sigma.double())
    return (per_sample(c_skip, x64) * x64 + per_sample(c_out, x64) * raw.double()).to(x.dtype)


def loss_weight(sigma: Float[Tensor, "*b"], sigma_data: float) -> Float[Tensor, "*b"]:
    """Return lambda(sigma) of [EDM-3] in float64, which makes the loss of an untrained network 1 at every noise level.

    Raises ValueError for sigma <= 0.
    """
    s = _positive(sigma)
    return (s**2 + sigma_data**2) / (s * sigma_data) ** 2


def training_sigma(normal: Float[Tensor, " count"], mean: float = -1.2, std: float = 1.2) -> Float[Tensor, " count"]:
    """Turn standard normal numbers into noise levels for training, ln sigma ~ N(mean, std^2), float64, [EDM-4]."""
    return torch.exp(mean + std * normal.double())


def draw_sigma(count: int, generator: torch.Generator, mean: float = -1.2, std: float = 1.2) -> Float[Tensor, " count"]:
    """Draw `count` noise levels for training from the generator, [EDM-4] and [EDM-8]."""
    return training_sigma(torch.randn(count, generator=generator, dtype=torch.float64), mean, std)


def edm_loss(
    denoise: Denoise,
    x: Float[Tensor, "b *s"],
    noise: Float[Tensor, "b *s"],
    sigma: Float[Tensor, " b"],
    sigma_data: float,
    valid: Bool[Tensor, "b *s"] | None = None,
) -> Float[Tensor, ""]:
    """Return the training loss of [EDM-3], a scalar averaged over samples and points; `noise` is standard normal.

    Points that are not `valid` are left out of the average, [EDM-11]. The network still sees them, so x must be finite
    there too. Raises ValueError when no point is valid and for sigma <= 0.
    """
    if valid is not None and not bool(valid.any()):
        raise ValueError("no point is valid: a loss over nothing is not zero; leave the sample out")
    error = denoise(x + per_sample(sigma, x) * noise, sigma) - x
    weighted = per_sample(loss_weight(sigma, sigma_data), x) * error**2
    return weighted.mean() if valid is None else weighted[valid].mean()


def schedule(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " levels"]:
    """Return the steps + 1 noise levels of [EDM-5], which decrease to 0, in float64.

    Raises ValueError for steps < 1, rho <= 0, or unless 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"the sampler needs at least one step, got {steps}")
    if not 0 < sigma_min < sigma_max or not math.isfinite(sigma_max):
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    top = sigma_max ** (1 / rho)
    bottom = sigma_min ** (1 / rho)
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def _derivative(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """Return dx/dsigma = (x - D(x; sigma)) / sigma of the probability-flow equation."""
    level = torch.full((x.shape[0],), sigma, dtype=torch.float64, device=x.device)
    return (x - denoise(x, level).double()) / sigma


def heun_step(
    denoise: Denoise,
    x: Float[Tensor, "b *s"],
    sigma: float,
    sigma_next: float,
    gamma: float = 0.0,
    noise: Float[Tensor, "b *s"] | None = None,
) -> Float[Tensor, "b *s"]:
    """Take one step from noise level `sigma` to `sigma_next`, [EDM-6] and [EDM-7], as algorithm 2 of EDM has it.

    x is float64. `noise`, which is S_noise times standard normal numbers, is added first and raises the noise level to
    sigma_hat = (1 + gamma) sigma. A step to `sigma_next` = 0 has no corrector.
    """
    sigma_hat = (1 + gamma) * sigma
    x_hat = x
    if gamma > 0 and noise is not None:
        x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * noise
    d = _derivative(denoise, x_hat, sigma_hat)
    x_next = x_hat + (sigma_next - sigma_hat) * d
    if sigma_next != 0:
        d_prime = _derivative(denoise, x_next, sigma_next)
        x_next = x_hat + (sigma_next - sigma_hat) * (d + d_prime) / 2
    return x_next


def sample(
    denoise: Denoise,
    latents: Float[Tensor, "b *s"],
    sigmas: Float[Tensor, " levels"],
    churn: Churn = Churn(),
    noises: Float[Tensor, "steps b *s"] | None = None,
    progress: Callable[[], None] | None = None,
) -> Float[Tensor, "b *s"]:
    """Sample by the stochastic Heun method, algorithm 2 of EDM, [EDM-6] and [EDM-7]; returns float64, [EDM-9].

    latents and noises are standard normal; there is one noise field per step, and churn needs them, [EDM-8]. `progress`
    is called after each step. Raises ValueError for churn without noises of that shape and for levels that do not
    decrease strictly to 0, and NotFiniteError when a state stops being finite, [EDM-12].
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    if steps < 1 or levels[-1] != 0 or not all(a > b for a, b in pairwise(levels)):
        raise ValueError(f"noise levels must decrease strictly to 0, got {levels}; make them with schedule()")
    if churn.s_churn > 0 and (noises is None or noises.shape != (steps, *latents.shape)):
        got = "none" if noises is None else str(tuple(noises.shape))
        raise ValueError(f"churn needs one noise field per step, of shape {(steps, *latents.shape)}, got {got}")
    x: Tensor = levels[0] * latents.double()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        noise = None if noises is None else churn.s_noise * noises[i].double()
        x = heun_step(denoise, x, sigma, sigma_next, churn.gamma(sigma, steps), noise)
        finite = torch.isfinite(x).flatten(1).all(1)
        if not bool(finite.all()):
            raise NotFiniteError(torch.nonzero(~finite).flatten().tolist(), i + 1, steps, sigma)
        if progress is not None:
            progress()
    return x


def euler_sample(
    denoise: Denoise, latents: Float[Tensor, "b *s"], sigmas: Float[Tensor, " levels"]
) -> Float[Tensor, "b *s"]:
    """Sample by Euler's method, of first order and n evaluations of D: the baseline that shows Heun's second order.

    latents are standard normal. Returns float64.
    """
    x: Tensor = sigmas[0].item() * latents.double()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        x = x + (sigma_next - sigma) * _derivative(denoise, x, sigma)
    return x


def gaussian_denoiser(mean: Float[Tensor, " v"], covariance: Float[Tensor, "v v"]) -> Denoise:
    """Return the exact denoiser of x ~ N(mean, covariance) on vectors [b, v], [EDM-10]: the oracle of linear tests."""
    spectrum: tuple[Tensor, Tensor] = torch.linalg.eigh(covariance.double())
    values, vectors = spectrum

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        gain = values / (values + sigma.double()[:, None] ** 2)
        return mean + (((x - mean) @ vectors) * gain) @ vectors.T

    return denoise
