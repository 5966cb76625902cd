"""Guidance: the score of the observations' likelihood, added to the prior's score at every evaluation of the sampler.

With xhat = D(x; sigma), its Jacobian J = dD/dx, observations y = H(x_0) + N(0, R), and H' the derivative of H at xhat:

[GUIDE-1] guided mean  xhat + sigma^2 J^T H'^T W (y - H(xhat)); it takes the place of D in the sampler, so that guidance
          enters both predictor and corrector
[GUIDE-2] dps    W = R^-1                                                        (the paper's method)
[GUIDE-3] pigdm  W = (R + r^2 H' H'^T)^-1,  r^2 = sigma^2 sigma_d^2 / (sigma^2 + sigma_d^2)
[GUIDE-4] sda    W = (R + gamma sigma^2 I)^-1
[GUIDE-5] mmps   W = (R + sigma^2 H' J H'^T)^-1 by conjugate gradients with a stated number of steps
[GUIDE-6] R is a variance, one per observation, in the square of the state's unit
[GUIDE-7] unobserved points are left out of y and H, never masked by multiplication: NaN * 0 is NaN
[GUIDE-8] for a Gaussian prior N(mu, C) and linear H, mmps solved to convergence is exact: guided mean = E[x_0 | x, y]
[GUIDE-9] dps with a scalar prior variance c samples variance c exp(-c / R), not c R / (c + R); it is stiff: with fewer
          than about 1.3 c / R steps errors may grow
[GUIDE-10] without any observation the guided mean is xhat
[GUIDE-11] an observation that reads outside the state, has a weight that is not finite, or is of a state of another
           shape is refused
[GUIDE-12] a claim names the method with its parameters (gamma, sigma_d, steps, residual) and the number of sampler
           steps; this module has one function per method, with the parameters as arguments

Only mmps targets the Bayesian posterior of the prior that the network has learned; the others target approximations of
it that can be computed.
References: DPS, Chung et al. (2023); PiGDM, Song et al. (2023); SDA, Rozet & Louppe (2023); MMPS, Rozet et al. (2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from storm_ref.edm import Denoise, per_sample

__all__ = [
    "Observations",
    "ObservationsLike",
    "OperatorObservations",
    "conjugate_gradient",
    "dps",
    "mmps",
    "pigdm",
    "sda",
]


@runtime_checkable
class ObservationsLike(Protocol):
    """The interface that guidance needs: y, the diagonal of R, and H as a differentiable function."""

    @property
    def value(self) -> Tensor:
        """The observed values y, [n]."""
        ...

    @property
    def variance(self) -> Tensor:
        """The diagonal of R, [n]."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """Return H(x), [..., n], for states x [..., C, H, W]."""
        ...


def _check_values(value: Tensor, variance: Tensor) -> None:
    if value.shape != variance.shape or value.ndim != 1:
        got = f"{tuple(value.shape)} and {tuple(variance.shape)}"
        raise ValueError(f"observations need one value and one variance each, of shapes [n] and [n]; got {got}")
    for place in torch.nonzero(~torch.isfinite(value)).flatten().tolist():
        raise ValueError(f"observation {place} is {value[place].item()}; leave missing ones out, do not mask them")
    for place in torch.nonzero(~(torch.isfinite(variance) & (variance > 0))).flatten().tolist():
        raise ValueError(
            f"the error variance of observation {place} is {variance[place].item()}; give a positive, finite variance "
            "(not a standard deviation)"
        )


@dataclass(frozen=True)
class Observations:
    """Point observations through a sparse linear H: each is a weighted sum of m points of the flattened state.

    Raises ValueError for values or weights that are not finite, [GUIDE-7] and [GUIDE-11], for variances that are not
    positive and finite, [GUIDE-6], and for indices outside the state, [GUIDE-11].
    """

    value: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]  # the diagonal of R, [GUIDE-6]
    index: Int[Tensor, "n m"]  # into the flattened (C, H, W) state
    weight: Float[Tensor, "n m"]  # m = 4 for bilinear interpolation, m = 1 for a grid point
    shape: tuple[int, ...]  # (C, H, W) of the state

    def __post_init__(self) -> None:
        _check_values(self.value, self.variance)
        if self.index.shape != self.weight.shape or len(self.index) != len(self.value):
            got = f"{tuple(self.index.shape)} and {tuple(self.weight.shape)} for {len(self.value)} values"
            raise ValueError(f"index and weight must both be [n, m] for n values, got {got}")
        outside = ((self.index < 0) | (self.index >= torch.Size(self.shape).numel())).any(-1)
        for place in torch.nonzero(outside).flatten().tolist():
            reads = self.index[place].tolist()
            raise ValueError(f"observation {place} reads points {reads}, outside the state of shape {self.shape}")
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError("a weight of an observation is not finite; every weight must be a finite number")

    def apply(self, x: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b n"]:
        """Return H x. Raises ValueError for a state of another shape, [GUIDE-11]."""
        if tuple(x.shape[-3:]) != tuple(self.shape):
            got = tuple(x.shape[-3:])
            raise ValueError(f"these observations are of a state of shape {tuple(self.shape)}, got {got}")
        return (x.flatten(-3)[..., self.index] * self.weight.to(x)).sum(-1)

    def adjoint(self, d: Float[Tensor, "*b n"]) -> Float[Tensor, "*b c h w"]:
        """Return H^T d, where several observations of one point add up."""
        flat = d.new_zeros(*d.shape[:-1], torch.Size(self.shape).numel())
        flat.index_add_(-1, self.index.flatten(), (d[..., None] * self.weight.to(d)).flatten(-2))
        return flat.reshape(*d.shape[:-1], *self.shape)


@dataclass(frozen=True)
class OperatorObservations:
    """Observations through any differentiable operator, for instance wind speed from u and v.

    `operator` maps states [..., C, H, W] to [..., n]. Raises ValueError for values that are not finite, [GUIDE-7], and
    for variances that are not positive and finite, [GUIDE-6].
    """

    value: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]
    operator: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        _check_values(self.value, self.variance)

    def apply(self, x: Tensor) -> Tensor:
        """Return H(x)."""
        return self.operator(x)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Float[Tensor, "m n"], steps: int, tolerance: float = 1e-10
) -> Float[Tensor, "m n"]:
    """Solve A x = b for m systems at once, where `apply` multiplies by the symmetric, positive A, [GUIDE-5].

    It starts from x = 0 and takes at most `steps` steps, fewer once every residual is below `tolerance` |b|. A system
    whose curvature is not positive stops where it is: the rest of its A is not a covariance. Raises ValueError for
    steps < 1.
    """
    if steps < 1:
        raise ValueError(f"conjugate gradients need at least one step, got {steps}")
    x = torch.zeros_like(b)
    residual = b
    direction = residual
    squared = (residual * residual).sum(-1, keepdim=True)
    limit = tolerance**2 * squared
    for _ in range(steps):
        if bool((squared <= limit).all()):
            break
        product = apply(direction)
        curvature = (direction * product).sum(-1, keepdim=True)
        active = (curvature > 0) & (squared > limit)
        step = torch.where(active, squared / torch.where(active, curvature, 1), 0)
        x = x + step * direction
        residual = residual - step * product
        squared_next = (residual * residual).sum(-1, keepdim=True)
        conjugate = residual + squared_next / torch.where(squared > 0, squared, 1) * direction
        direction = torch.where(active, conjugate, direction)
        squared = torch.where(active, squared_next, 0)
    return x


@dataclass(frozen=True)
class _Linearised:
    """D and H linearised at one (x, sigma): products with J^T, H' and H'^T. Batch first; products are detached."""

    x: Tensor
    denoised: Tensor  # D(x; sigma), differentiable in x
    linearisation_point: Tensor  # the value of D(x; sigma), where H is linearised
    predicted: Tensor  # H(linearisation_point), differentiable in linearisation_point
    cotangent: Tensor  # a variable d in the space of observations
    pullback: Tensor  # H'^T d, linear in d: its own transpose is H', so that H' needs reverse mode alone
    innovation: Tensor  # y - H(xhat)

    def jacobian_t(self, v: Tensor) -> Tensor:
        """Return J^T v."""
        return torch.autograd.grad(self.denoised, self.x, v, retain_graph=True)[0]

    def operator(self, v: Tensor) -> Tensor:
        """Return H' v."""
        return torch.autograd.grad(self.pullback, self.cotangent, v, retain_graph=True)[0]

    def operator_t(self, d: Tensor) -> Tensor:
        """Return H'^T d."""
        return torch.autograd.grad(self.predicted, self.linearisation_point, d, retain_graph=True)[0]


def _linearise(denoise: Denoise, observations: ObservationsLike, x: Tensor, sigma: Tensor) -> _Linearised:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        denoised = denoise(x, sigma)
        point = denoised.detach().clone().requires_grad_()
        predicted = observations.apply(point)
        cotangent = torch.zeros_like(predicted, requires_grad=True)
        pullback = torch.autograd.grad(predicted, point, cotangent, create_graph=True)[0]
    return _Linearised(
        x=x,
        denoised=denoised,
        linearisation_point=point,
        predicted=predicted,
        cotangent=cotangent,
        pullback=pullback,
        innovation=observations.value.to(predicted) - predicted.detach(),
    )


# Takes D and H linearised at (x, sigma), and sigma; returns W (y - H(xhat)), [m, n].
_Weighting = Callable[[_Linearised, Tensor], Tensor]


def _guided(denoise: Denoise, observations: ObservationsLike, weighting: _Weighting) -> Denoise:
    """Return the guided mean of [GUIDE-1] for a given W; without observations it is D itself, [GUIDE-10]."""
    if observations.value.numel() == 0:
        return denoise

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        linear = _linearise(denoise, observations, x, sigma)
        score = linear.jacobian_t(linear.operator_t(weighting(linear, sigma)))
        return linear.denoised.detach() + per_sample(sigma**2, x) * score

    return guided


def dps(denoise: Denoise, observations: ObservationsLike) -> Denoise:
    """Return D guided with W = R^-1, [GUIDE-2]: the paper's method."""

    def weighting(linear: _Linearised, sigma: Tensor) -> Tensor:
        return linear.innovation / observations.variance.to(linear.innovation)

    return _guided(denoise, observations, weighting)


def pigdm(denoise: Denoise, observations: ObservationsLike, sigma_data: float, steps: int = 100) -> Denoise:
    """Return D guided with W = (R + r^2 H' H'^T)^-1, [GUIDE-3], by at most `steps` conjugate-gradient steps.

    One step is enough when every observation is of a point of its own and R is uniform. Raises ValueError, when it is
    evaluated, for steps < 1.
    """

    def weighting(linear: _Linearised, sigma: Tensor) -> Tensor:
        variance = observations.variance.to(linear.innovation)
        s2 = per_sample(sigma**2, linear.innovation)
        r2 = s2 * sigma_data**2 / (s2 + sigma_data**2)

        def innovation_covariance(d: Tensor) -> Tensor:
            return variance * d + r2 * linear.operator(linear.operator_t(d))

        return conjugate_gradient(innovation_covariance, linear.innovation, steps)

    return _guided(denoise, observations, weighting)


def sda(denoise: Denoise, observations: ObservationsLike, gamma: float) -> Denoise:
    """Return D guided with W = (R + gamma sigma^2 I)^-1, [GUIDE-4]. Raises ValueError for gamma < 0."""
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")

    def weighting(linear: _Linearised, sigma: Tensor) -> Tensor:
        variance = observations.variance.to(linear.innovation)
        return linear.innovation / (variance + gamma * per_sample(sigma**2, linear.innovation))

    return _guided(denoise, observations, weighting)


def mmps(denoise: Denoise, observations: ObservationsLike, steps: int, tolerance: float = 1e-10) -> Denoise:
    """Return D guided with W = (R + sigma^2 H' J H'^T)^-1, [GUIDE-5], by at most `steps` conjugate-gradient steps.

    sigma^2 J is the covariance of x_0 given x, hence symmetric for an exact denoiser; the product is formed with J^T,
    which reverse-mode differentiation gives. Raises ValueError, when it is evaluated, for steps < 1.
    """

    def weighting(linear: _Linearised, sigma: Tensor) -> Tensor:
        variance = observations.variance.to(linear.innovation)
        s2 = per_sample(sigma**2, linear.innovation)

        def innovation_covariance(d: Tensor) -> Tensor:
            return variance * d + s2 * linear.operator(linear.jacobian_t(linear.operator_t(d)))

        return conjugate_gradient(innovation_covariance, linear.innovation, steps, tolerance)

    return _guided(denoise, observations, weighting)
