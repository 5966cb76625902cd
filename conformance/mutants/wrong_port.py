"""Wrong ports: the reference with one deliberate fault each, of the kind that a careful porter makes.

`python -m conformance --adapter conformance.mutants.wrong_port:gate_reversed`, or any other name in `FAULTS`; `adapter`
is one of them. A fault is put into the reference for the duration of a call and acts wherever the function is used.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import layer_norm

from conformance.adapter import Array, Info
from conformance.adapters.storm_ref import Reference
from storm_ref import assimilation, attention, denoiser, edm, guidance, memory, tiling, tokenisation, verification

__all__ = ["FAULTS", "WrongPort", "adapter"]

Patch = tuple[ModuleType | type, str, Any]  # where, the name, what stands there instead


@dataclass(frozen=True)
class WrongPort:
    """The reference with its fault; `caught_by` is the case that is made for it."""

    fault: str
    caught_by: str
    patches: tuple[Patch, ...]

    def describe(self) -> Info:
        """The reference's claims under the fault's name."""
        return replace(Reference().describe(), name=f"wrong port ({self.fault})")

    def run(self, op: str, inputs: dict[str, Array], params: dict[str, Any]) -> Mapping[str, Array]:
        """One operation with the fault in place."""
        with ExitStack() as stack:
            for where, name, wrong in self.patches:
                stack.enter_context(patch.object(where, name, wrong))
            return Reference().run(op, inputs, params)


_patchify, _gate, _weights = tokenisation.patchify, attention.noise_gate, tiling.weights
_coefficients, _noise_features, _ages = (
    edm.precondition_coefficients,
    denoiser.noise_features,
    tokenisation.age_features,
)
_observations = guidance.Observations


def _column_major(x: Tensor, size: tuple[int, int]) -> Tensor:
    cols = x.shape[-1] // size[1]
    return rearrange(_patchify(x, size), "... (i j) v -> ... (j i) v", j=cols)


def _crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    return _patchify(x[..., : x.shape[-2] // size[0] * size[0], : x.shape[-1] // size[1] * size[1]], size)


def _update_without_rescaling(state: memory.MemoryState, score: Tensor, value: Tensor) -> memory.MemoryState:
    maximum = torch.maximum(state.maximum, score.amax(1))
    weight = torch.exp(score - maximum[:, None])
    return memory.MemoryState(
        maximum,
        state.denominator * torch.exp(state.maximum - maximum) + weight.sum(1),
        state.accumulator + torch.einsum("bkna,bknad->bnad", weight, value),
    )


def _plain_hann(axis: tiling.Axis) -> list[Tensor]:
    """sin^2(pi k / (4 b)) in place of k + 1/2, on both sides of a seam."""
    half = math.pi / (8 * axis.blend) if axis.blend else 0.0
    return [torch.where((w > 0) & (w < 1), torch.sin(torch.asin(w.sqrt()) - half) ** 2, w) for w in _weights(axis)]


def _tapered_edges(axis: tiling.Axis) -> list[Tensor]:
    found = _weights(axis)
    if not axis.periodic and len(found) > 1:
        ramp = torch.sin(math.pi * (torch.arange(2 * axis.blend).double() + 0.5) / (4 * axis.blend)) ** 2
        found[0][: len(ramp)] *= ramp
        found[-1][-len(ramp) :] *= ramp.flip(0)
    return found


def _unquartered(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c_skip, c_out, c_in, c_noise = _coefficients(sigma, sigma_data)
    return c_skip, c_out, c_in, 4 * c_noise


def _ramp_over_n(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.arange(steps, dtype=torch.float64) / steps
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def _squared_variance(value: Tensor, variance: Tensor, *rest: Any) -> guidance.Observations:
    return _observations(value, variance**2, *rest)


def _straight_through(denoise: edm.Denoise) -> edm.Denoise:
    """The same values with dD/dx = 1."""

    def identity_slope(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma).detach() + x - x.detach()

    return identity_slope


def _without_jacobian(method: Callable[..., edm.Denoise]) -> Callable[..., edm.Denoise]:
    return lambda denoise, *settings: method(_straight_through(denoise), *settings)


def _kalman_filter(
    model: Tensor,
    model_error: Tensor,
    operator: Tensor,
    error: Tensor,
    mean: Tensor,
    covariance: Tensor,
    observations: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    result = []
    for y in observations:
        forecast = model @ covariance @ model.T + model_error
        gain = forecast @ operator.T @ torch.linalg.inv(operator @ forecast @ operator.T + error)
        keep = torch.eye(len(mean), dtype=mean.dtype) - gain @ operator
        mean, covariance = keep @ model @ mean + gain @ y, keep @ forecast
        result.append((mean, covariance))
    return result


def _port(fault: str, caught_by: str, *patches: Patch) -> WrongPort:
    return WrongPort(fault, caught_by, patches)


token_column_major = _port(
    "tokens column-major",
    "tokenisation/order",
    (tokenisation, "patchify", _column_major),
    (denoiser, "patchify", _column_major),
)
crop_in_silence = _port(
    "what the patch does not divide is cropped",
    "tokenisation/refuses-rows",
    (tokenisation, "patchify", _crop),
    (denoiser, "patchify", _crop),
)
memory_not_rescaled = _port(
    "the memory's accumulator is not rescaled",
    "memory/chunks",
    (memory, "memory_update", _update_without_rescaling),
)
age_in_days = _port(
    "age in days",
    "memory/compress",
    (denoiser, "age_features", lambda age, octaves: _ages(age / 24, octaves)),
)
gate_reversed = _port(
    "gate reversed",
    "attention/gate",
    (attention, "noise_gate", lambda *a: 1 - _gate(*a)),
)
layer_norm_eps = _port(
    "layer norm with eps 1e-5",
    "attention/block-near-constant",
    (attention, "layer_norm", lambda x: layer_norm(x, x.shape[-1:], eps=1e-5)),
)
embedding_unquartered = _port(
    "noise embedding of ln sigma without 1/4",
    "denoiser/generic-weights",
    (denoiser, "noise_features", lambda c_noise, count: _noise_features(4 * c_noise, count)),
)
last_layer_unmodulated = _port(
    "last layer without its modulation",
    "denoiser/rectangular-patch",
    (denoiser, "modulate", lambda x, shift, scale: attention.layer_norm(x)),
)
hann_periodic = _port("Hann weights without the half", "tiling/weights-periodic", (tiling, "weights", _plain_hann))
edges_tapered = _port("weights taper at closed edges", "tiling/weights-closed", (tiling, "weights", _tapered_edges))
c_noise_unquartered = _port(
    "c_noise without 1/4",
    "edm/coefficients",
    (edm, "precondition_coefficients", _unquartered),
)
schedule_over_n = _port("schedule with i/n", "edm/schedule-default", (edm, "schedule", _ramp_over_n))
churn_everywhere = _port(
    "churn at every noise level",
    "edm/sample-churn",
    (edm.Churn, "gamma", lambda self, sigma, steps: min(self.s_churn / steps, math.sqrt(2) - 1)),
)
variance_as_std = _port(
    "R taken as a standard deviation",
    "guidance/dps",
    (guidance, "Observations", _squared_variance),
)
jacobian_dropped = _port(
    "J^T left out of the score",
    "guidance/mmps",
    *((guidance, name, _without_jacobian(getattr(guidance, name))) for name in ("dps", "pigdm", "sda", "mmps")),
)
kalman_gain = _port(
    "the Kalman filter instead of the cycle",
    "assimilation/linear-cycle",
    (assimilation, "linear_cycle", _kalman_filter),
)
crps_biased = _port(
    "fair CRPS with M^2",
    "verification/crps-fair",
    (verification, "crps_fair", verification.crps_ensemble),
)

FAULTS: dict[str, WrongPort] = {name: port for name, port in list(globals().items()) if isinstance(port, WrongPort)}

adapter = gate_reversed
