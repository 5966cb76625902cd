"""Guidance: the score of the observations' likelihood, added to the prior's score at every evaluation of the sampler.

With xhat = D(x; sigma), its Jacobian J = dD/dx, observations y = H(x_0) + N(0, R), H' the derivative of H at xhat:

[GUIDE-1] guided mean  xhat + sigma^2 J^T H'^T W (y - H(xhat)); it takes the place of D in the sampler, so guidance
          enters both predictor and corrector
[GUIDE-2] dps    W = R^-1                                                        (the paper's method)
[GUIDE-3] pigdm  W = (R + r^2 H' H'^T)^-1,  r^2 = sigma^2 sigma_d^2 / (sigma^2 + sigma_d^2)
[GUIDE-4] sda    W = (R + gamma sigma^2 I)^-1
[GUIDE-5] mmps   W = (R + sigma^2 H' J H'^T)^-1 by conjugate gradients with a stated number of steps
[GUIDE-6] R is a variance, one an observation, in the units of the state squared
[GUIDE-7] unobserved points are left out of y and H, never masked by multiplication: NaN * 0 is NaN
[GUIDE-8] for a Gaussian prior N(mu, C) and linear H, mmps solved to convergence is exact: guided mean = E[x_0 | x, y]
[GUIDE-9] dps with a scalar prior variance c samples variance c exp(-c / R), not c R / (c + R); it is stiff: below about
          1.3 c / R steps errors may grow
[GUIDE-10] no observation: the guided mean is xhat

Only mmps targets the Bayesian posterior of the prior that the network has learned; the others target computable
approximations.
References: DPS, Chung et al. (2023); PiGDM, Song et al. (2023); SDA, Rozet & Louppe (2023); MMPS, Rozet et al. (2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from storm_ref.edm import Denoise

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
    """What guidance needs: y [n], the diagonal of R [n], and H as a differentiable function."""

    @property
    def value(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    def apply(self, x: Tensor) -> Tensor:
        """H(x): [..., C, H, W] -> [..., n]."""
        ...


def _check_values(value: Tensor, variance: Tensor) -> None:
    if value.shape != variance.shape or value.ndim != 1:
        got = f"{tuple(value.shape)} and {tuple(variance.shape)}"
        raise ValueError(f"one value and one variance an observation, [n] and [n]: got {got}")
    for place in torch.nonzero(~torch.isfinite(value)).flatten().tolist():
        raise ValueError(f"observation {place} is {value[place].item()}; leave missing ones out, do not mask them")
    for place in torch.nonzero(~(torch.isfinite(variance) & (variance > 0))).flatten().tolist():
        raise ValueError(
            f"the error variance of observation {place} is {variance[place].item()}; give a positive, finite variance "
            "(not a standard deviation)"
        )


@dataclass(frozen=True)
class Observations:
    """Point observations through a sparse linear H: each reads m points of the flattened state with m weights.

    Raises ValueError on non-finite values or weights, variances that are not positive, and indices outside the state.
    """

    value: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]  # R's diagonal, [GUIDE-6]
    index: Int[Tensor, "n m"]  # into the flattened (C, H, W) state
    weight: Float[Tensor, "n m"]  # bilinear m = 4, a grid point m = 1
    shape: tuple[int, ...]

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
            raise ValueError("a weight of an observation is not finite; every weight must be a number")

    def apply(self, x: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b n"]:
        """H x. Raises ValueError for a state of another shape."""
        if tuple(x.shape[-3:]) != tuple(self.shape):
            got = tuple(x.shape[-3:])
            raise ValueError(f"these observations are of a state of shape {tuple(self.shape)}, got {got}")
        return (x.flatten(-3)[..., self.index] * self.weight.to(x)).sum(-1)

    def adjoint(self, d: Float[Tensor, "*b n"]) -> Float[Tensor, "*b c h w"]:
        """H^T d; several observations of one point add up."""
        flat = d.new_zeros(*d.shape[:-1], torch.Size(self.shape).numel())
        flat.index_add_(-1, self.index.flatten(), (d[..., None] * self.weight.to(d)).flatten(-2))
        return flat.reshape(*d.shape[:-1], *self.shape)


@dataclass(frozen=True)
class OperatorObservations:
    """Observations through any differentiable operator, for instance wind speed from u and v."""

    value: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]
    operator: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        _check_values(self.value, self.variance)

    def apply(self, x: Tensor) -> Tensor:
        """H(x)."""
        return self.operator(x)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Float[Tensor, "m n"], steps: int, tolerance: float = 1e-10
) -> Float[Tensor, "m n"]:
    """Solve A w = b for m systems at once, A symmetric positive; at most `steps` steps, fewer once every residual is
    below `tolerance` |b|. A system whose curvature is not positive stops where it is: the rest of A is not a
    covariance.

    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"conjugate gradients need at least one step, got {steps}")
    w, r = torch.zeros_like(b), b
    p, rr = r, (r * r).sum(-1, keepdim=True)
    limit = tolerance**2 * rr
    for _ in range(steps):
        if bool((rr <= limit).all()):
            break
        ap = apply(p)
        curvature = (p * ap).sum(-1, keepdim=True)
        active = (curvature > 0) & (rr > limit)
        step = torch.where(active, rr / torch.where(active, curvature, 1), 0)
        w, r = w + step * p, r - step * ap
        after = (r * r).sum(-1, keepdim=True)
        p, rr = torch.where(active, r + after / torch.where(rr > 0, rr, 1) * p, p), torch.where(active, after, 0)
    return w


@dataclass(frozen=True)
class _Linearised:
    """D and H at one (x, sigma), and products with J^T, H' and H'^T; batch first, results detached."""

    x: Tensor
    graph: Tensor  # D(x; sigma), differentiable in x
    point: Tensor  # its value, where H is linearised
    seen: Tensor  # H(point), differentiable in point
    probe: Tensor  # a variable d in the space of observations
    pulled: Tensor  # H'^T d, linear in d: its own transpose is H', so forward products need reverse mode alone
    innovation: Tensor  # y - H(xhat)

    def jacobian_t(self, v: Tensor) -> Tensor:
        """J^T v."""
        return torch.autograd.grad(self.graph, self.x, v, retain_graph=True)[0]

    def operator(self, v: Tensor) -> Tensor:
        """H' v."""
        return torch.autograd.grad(self.pulled, self.probe, v, retain_graph=True)[0]

    def operator_t(self, d: Tensor) -> Tensor:
        """H'^T d."""
        return torch.autograd.grad(self.seen, self.point, d, retain_graph=True)[0]


def _linearise(denoise: Denoise, observations: ObservationsLike, x: Tensor, sigma: Tensor) -> _Linearised:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        graph = denoise(x, sigma)
        point = graph.detach().clone().requires_grad_()
        seen = observations.apply(point)
        probe = torch.zeros_like(seen, requires_grad=True)
        pulled = torch.autograd.grad(seen, point, probe, create_graph=True)[0]
    return _Linearised(x, graph, point, seen, probe, pulled, observations.value.to(seen) - seen.detach())


def _over(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))


# Given D, H and their products at (x, sigma): W (y - H xhat), [m, n].
_Weighting = Callable[[_Linearised, Tensor], Tensor]


def _guided(denoise: Denoise, observations: ObservationsLike, weighting: _Weighting) -> Denoise:
    """[GUIDE-1] for a given W."""
    if observations.value.numel() == 0:
        return denoise

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        at = _linearise(denoise, observations, x, sigma)
        score = at.jacobian_t(at.operator_t(weighting(at, sigma)))
        return at.graph.detach() + _over(sigma**2, x) * score

    return guided


def dps(denoise: Denoise, observations: ObservationsLike) -> Denoise:
    """W = R^-1, [GUIDE-2]."""

    def weighting(at: _Linearised, sigma: Tensor) -> Tensor:
        return at.innovation / observations.variance.to(at.innovation)

    return _guided(denoise, observations, weighting)


def pigdm(denoise: Denoise, observations: ObservationsLike, sigma_data: float, steps: int = 100) -> Denoise:
    """W = (R + r^2 H' H'^T)^-1, [GUIDE-3], by at most `steps` conjugate-gradient steps.

    One step is enough when every observation is of a point of its own and R is uniform.
    """

    def weighting(at: _Linearised, sigma: Tensor) -> Tensor:
        variance, s2 = observations.variance.to(at.innovation), _over(sigma**2, at.innovation)
        r2 = s2 * sigma_data**2 / (s2 + sigma_data**2)
        return conjugate_gradient(lambda d: variance * d + r2 * at.operator(at.operator_t(d)), at.innovation, steps)

    return _guided(denoise, observations, weighting)


def sda(denoise: Denoise, observations: ObservationsLike, gamma: float) -> Denoise:
    """W = (R + gamma sigma^2 I)^-1, [GUIDE-4]. Raises ValueError for gamma < 0."""
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")

    def weighting(at: _Linearised, sigma: Tensor) -> Tensor:
        return at.innovation / (observations.variance.to(at.innovation) + gamma * _over(sigma**2, at.innovation))

    return _guided(denoise, observations, weighting)


def mmps(denoise: Denoise, observations: ObservationsLike, steps: int, tolerance: float = 1e-10) -> Denoise:
    """W = (R + sigma^2 H' J H'^T)^-1, [GUIDE-5], by at most `steps` conjugate-gradient steps.

    sigma^2 J is the covariance of x_0 given x, hence symmetric for an exact denoiser; the product is formed with J^T,
    which reverse-mode differentiation gives.
    """

    def weighting(at: _Linearised, sigma: Tensor) -> Tensor:
        variance, s2 = observations.variance.to(at.innovation), _over(sigma**2, at.innovation)
        return conjugate_gradient(
            lambda d: variance * d + s2 * at.operator(at.jacobian_t(at.operator_t(d))), at.innovation, steps, tolerance
        )

    return _guided(denoise, observations, weighting)
