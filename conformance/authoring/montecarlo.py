"""Monte-Carlo arithmetic: the distance by which honest rounding may move a result, [NUM-13].

The reference runs S times in the dtype of the run with every operation randomly rounded: a result r of an elementwise
operation becomes r (1 + u xi), xi uniform in [-1, 1] and u the unit round-off of r's dtype; a sum of n terms gains
sqrt(n) u xi times the sum of their magnitudes, which covers every order of summation in its typical size; a matrix that
is factored or solved is perturbed by n u xi times its largest element, the backward error of a stable algorithm;
composite kernels (softmax, layer norm, attention) are taken apart first. Copies, views and selections do not round. The
limits are K times the largest RMS and the largest single error of the S runs against the float64 truth.

Exact zeros stay exact, and an output that no operation rounds has the limit of one rounding of its largest value.

Parker (1997), Monte Carlo arithmetic; Higham & Mary (2019) for the square root of n.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from conformance.adapter import Adapter, Array, Arrays
from conformance.judging.tolerance import Limits, MonteCarlo
from conformance.protocol.operations import DTYPES, OPERATIONS, UNIT, to_dtype

__all__ = ["RUNS", "K", "RandomRounding", "monte_carlo"]

RUNS = 16
K = 4.0

_UNIT = {torch.float64: UNIT["float64"], torch.float32: UNIT["float32"], torch.bfloat16: UNIT["bfloat16"]}
aten = torch.ops.aten

# Operations that move or choose numbers, or make exact ones. All else rounds.
_EXACT = {
    aten.clone, aten.copy_, aten.cat, aten.stack, aten.index, aten.index_select, aten.gather, aten.where,
    aten.amax, aten.amin, aten.max, aten.min, aten.maximum, aten.minimum, aten.sort, aten.argmax, aten.clamp,
    aten.neg, aten.abs, aten.sign, aten.relu, aten.floor, aten.round, aten.ceil, aten.isfinite,
    aten.masked_fill, aten.masked_fill_, aten.masked_select, aten.fill_, aten.zero_, aten.scatter, aten.embedding,
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.zeros, aten.ones, aten.full, aten.empty,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten.arange, aten.eye, aten.scalar_tensor, aten.lift_fresh, aten._local_scalar_dense, aten.detach_,
    aten.flip, aten.roll, aten.repeat, aten.constant_pad_nd, aten.diag_embed, aten.tril, aten.triu, aten._unsafe_view,
    aten.slice_backward, aten.select_backward, aten.slice_scatter, aten.select_scatter,
}  # fmt: skip
_COMPOSITE = [
    aten.native_layer_norm, aten.native_layer_norm_backward, aten._softmax, aten._softmax_backward_data,
    aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten.softplus, aten.softplus_backward, aten.addmm,
    aten.var_mean,
]  # fmt: skip
_FACTORISATIONS = {aten._linalg_eigh, aten._linalg_solve_ex, aten.linalg_inv_ex, aten.linalg_cholesky_ex}
_CONVERSIONS = {aten._to_copy, aten.to}


def _products(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Return the sum of magnitudes and the number of terms of a matrix product."""
    return a.double().abs() @ b.double().abs(), a.shape[-1]


def _sum_of_magnitudes(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """Return the sum of magnitudes and the number of terms of an operation that sums, None for one that does not."""
    if packet in (aten.mm, aten.bmm, aten.mv, aten.dot):
        return _products(args[0], args[1])
    if packet in (aten.addmm, aten.baddbmm):
        magnitude, terms = _products(args[1], args[2])
        return magnitude + args[0].double().abs(), terms + 1
    if packet in (aten.sum, aten.mean, aten.cumsum):
        x = args[0].double().abs()
        total = packet(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "dtype"})
        return total, max(1, round(x.numel() / max(total.numel(), 1)) if packet is not aten.cumsum else x.shape[-1])
    if packet in (aten.index_add, aten.index_add_, aten.index_put, aten.index_put_, aten.scatter_add):
        return None  # few terms a point: rounded as an elementwise operation
    return None


class RandomRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which every torch operation that rounds does so at random, as the module's docstring says."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = generator
        self.decompositions = _decompositions()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.decompositions:
            with self:
                return self.decompositions[func](*args, **kwargs)
        packet = func.overloadpacket
        if packet in _FACTORISATIONS:
            args = (self._perturbed(args[0], packet is aten._linalg_eigh), *args[1:])
        out = func(*args, **kwargs)
        if packet in _EXACT or func.is_view or (packet in _CONVERSIONS and not self._narrows(args[0], out)):
            return out
        summed = _sum_of_magnitudes(packet, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype in _UNIT and not tensor.is_meta:
                self._round(tensor, summed)
        return out

    @staticmethod
    def _narrows(before: Any, after: Tensor) -> bool:
        return isinstance(before, Tensor) and _UNIT.get(before.dtype, 1.0) < _UNIT.get(after.dtype, 0.0)

    def _round(self, tensor: Tensor, summed: tuple[Tensor, int] | None) -> None:
        unit = _UNIT[tensor.dtype]
        plain = tensor.detach()
        xi = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64).mul_(2).sub_(1)
        if summed is None:
            plain.copy_(plain.double() * xi.mul_(unit).add_(1))
        else:
            plain.copy_(plain.double() + summed[0] * xi.mul_(unit * math.sqrt(summed[1])))

    def _perturbed(self, matrix: Tensor, symmetric: bool) -> Tensor:
        xi = 2 * torch.rand(matrix.shape, generator=self.generator, dtype=torch.float64) - 1
        xi = (xi + xi.mT) / 2 if symmetric else xi
        return matrix + (matrix.shape[-1] * _UNIT[matrix.dtype] * float(matrix.abs().max()) * xi).to(matrix)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return how torch's own compilers take composite kernels apart into simple ones."""
    from torch._decomp import get_decompositions  # noqa: PLC0415  # slow to load, and only freezing needs it

    return dict(get_decompositions(_COMPOSITE))


def _rounded_runs(
    reference: Adapter,
    op: str,
    inputs: Arrays,
    params: Mapping[str, Any],
    dtype: str,
    seed: int,
    probes: Sequence[str],
) -> list[Mapping[str, Array]]:
    runs = []
    for run in range(RUNS):
        mode = RandomRounding(torch.Generator().manual_seed(seed + run))
        with sdpa_kernel(SDPBackend.MATH), mode:
            result = reference.run(op, to_dtype(op, inputs, dtype), {**params, "dtype": dtype}, probes)
        assert isinstance(result, Mapping)
        runs.append(result)
    return runs


def monte_carlo(
    reference: Adapter,
    op: str,
    inputs: Arrays,
    params: Mapping[str, Any],
    expected: Arrays,
    why: str,
    seed: int,
    dtypes: tuple[str, ...] = DTYPES,
) -> MonteCarlo:
    """Return the limits of every output, and of every probe as `probe.NAME`, in each of the dtypes.

    expected: their float64 values, from which errors are taken. why: the reason that the limits are shown with. seed:
    that of the first run's random rounding.
    """
    probes = [name.removeprefix("probe.") for name in expected if name.startswith("probe.")]
    limits: dict[str, dict[str, Limits]] = {}
    for dtype in dtypes:
        if limits and not OPERATIONS[op].narrow:  # the same float64 runs whatever the dtype
            limits[dtype] = limits[dtypes[0]]
            continue
        runs = _rounded_runs(reference, op, inputs, params, dtype, seed, probes)
        limits[dtype] = {}
        for name, truth in expected.items():
            unit = UNIT[dtype] if OPERATIONS[op].is_narrow(name) else UNIT["float64"]
            floor = unit * float(np.abs(truth).max(initial=0.0))
            errors = [np.abs(run[name].astype(np.float64) - truth) for run in runs]
            rms = max((float(np.sqrt((e**2).mean())) if e.size else 0.0 for e in errors), default=0.0)
            largest = max(float(e.max(initial=0.0)) for e in errors)
            limits[dtype][name] = Limits(_digits(K * max(rms, floor)), _digits(K * max(largest, floor)))
    return MonteCarlo(why, limits, K, RUNS, seed)


def _digits(value: float) -> float:
    """Round up to four digits: a limit is no more precise than the runs behind it."""
    if value == 0 or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / step) * step:.4g}")
