"""Honest variants are ports that are right but round differently. The suite must raise no alarm on any of them.

Each is the reference with parts computed in another order or by another formula, as another framework, machine or
author would compute them. `HONEST` has them by name; `--adapter conformance.mutants.honest:NAME` judges one.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from conformance.adapter import Adapter, Array, Info
from conformance.adapters import reference_operations as adapter
from conformance.adapters import reference_ranks as parallel
from conformance.mutants.mutant import MutantPort, Patch, edit
from storm_ref import assimilation, attention, edm, guidance, memory, tiling, tokenisation, verification
from storm_ref.attention import MultiHead
from storm_ref.denoiser import Condition, Storm
from storm_ref.memory import MemoryState
from storm_ref.parallel import tensor
from storm_ref.parallel.mesh import Mesh

__all__ = ["HONEST", "Honest", "honest_adapter"]


@dataclass(frozen=True)
class Honest:
    """One honest variant: a description of its difference, the patches that make it, and a number of threads."""

    description: str
    changes: Callable[[], Sequence[Patch]] = tuple
    threads: int = 1


class _Threads:
    """A port that computes with several threads."""

    def __init__(self, port: MutantPort, threads: int) -> None:
        self.port = port
        self.threads = threads

    def describe(self) -> Info:
        return self.port.describe()

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.port.run(op, inputs, params, probes)
        finally:
            torch.set_num_threads(before)


# Products of matrices


def _split(self: nn.Linear, x: Tensor) -> Tensor:
    """Sum over the inner dimension in three parts."""
    parts = torch.arange(x.shape[-1]).tensor_split(3)
    total = sum(x[..., part] @ self.weight[:, part].T for part in parts if len(part))
    assert isinstance(total, Tensor)
    return total if self.bias is None else total + self.bias


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def _permuted(self: nn.Linear, x: Tensor) -> Tensor:
    order = _order(x.shape[-1])
    return F.linear(x[..., order], self.weight[:, order], self.bias)


def _permuted_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    keys = _order(k.shape[-2])
    inner = _order(q.shape[-1])
    seen = None if mask is None else mask[:, keys]
    return attention.attention_by_definition(q[..., inner], k[:, :, keys][..., inner], v[:, :, keys], seen)


def _pairwise(self: nn.Linear, x: Tensor) -> Tensor:
    """Form all products, then add them pair by pair."""
    terms = x[..., None, :] * self.weight
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = torch.cat([terms[..., :half] + terms[..., half : 2 * half], terms[..., 2 * half :]], -1)
    return terms[..., 0] if self.bias is None else terms[..., 0] + self.bias


def _einsum(self: nn.Linear, x: Tensor) -> Tensor:
    total = torch.einsum("oi,...i->...o", self.weight, x)
    return total if self.bias is None else self.bias + total


class _Wide(torch.autograd.Function):
    """The product x W^T in a wider format, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.dtype != torch.float64:
            return (x.double() @ weight.double().T).to(x.dtype)
        wide = np.matmul(x.numpy().astype(np.longdouble), weight.numpy().astype(np.longdouble).T)
        return torch.from_numpy(np.asarray(wide).astype(np.float64))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


def _wide(self: nn.Linear, x: Tensor) -> Tensor:
    total: Tensor = _Wide.apply(x, self.weight)  # type: ignore[no-untyped-call]
    return total if self.bias is None else total + self.bias


def _fused(
    self: MultiHead, x: Tensor, context: Tensor, head_weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Project keys and values, and in self-attention queries too, by one product that is split afterwards."""
    width = len(self.query.weight)  # that of the rank's heads
    both = torch.cat([self.key.weight, self.value.weight])
    if context is x:
        q, k, v = torch.split(x @ torch.cat([self.query.weight, both]).T, width, -1)
    else:
        q = x @ self.query.weight.T
        k, v = torch.split(context @ both.T, width, -1)
    q = q + self.query.bias
    v = v + self.value.bias
    q, k, v = (rearrange(t, "b n (a d) -> b a n d", a=self.heads) for t in (q, k, v))
    y = attention.attention(q, k, v, mask)
    y = y if head_weight is None else y * head_weight[:, :, None, None]
    return self.out(rearrange(y, "b a n d -> b n (a d)"))  # type: ignore[no-any-return]


# Attention, norms, activations


def _online(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend to three keys at a time, with a running maximum, denominator and numerator."""
    maximum = q.new_full(q.shape[:-1], -1e30)
    denominator = q.new_zeros(q.shape[:-1])
    numerator = torch.zeros_like(q)
    for at in range(0, k.shape[-2], 3):
        part = slice(at, at + 3)
        score = q @ k[:, :, part].mT * q.shape[-1] ** -0.5
        score = score if mask is None else score.masked_fill(~mask[:, part], -torch.inf)
        new = torch.maximum(maximum, score.amax(-1).detach())
        keep = torch.exp(maximum - new)
        weight = torch.exp(score - new[..., None])
        denominator = denominator * keep + weight.sum(-1)
        numerator = numerator * keep[..., None] + weight @ v[:, :, part]
        maximum = new
    return numerator / denominator[..., None]


def _softmax_wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    score = (q @ k.mT).double() / q.shape[-1] ** 0.5
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    return torch.softmax(score, -1).to(v.dtype) @ v


def _two_pass(x: Tensor) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred * torch.rsqrt((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + 1e-6)


def _welford(x: Tensor) -> Tensor:
    """Update mean and squares value by value, in float32 or better as such kernels do."""
    wide = x if x.dtype == torch.float64 else x.float()
    mean = torch.zeros_like(wide[..., 0])
    squares = torch.zeros_like(wide[..., 0])
    for i in range(x.shape[-1]):
        difference = wide[..., i] - mean
        mean = mean + difference / (i + 1)
        squares = squares + difference * (wide[..., i] - mean)
    return ((wide - mean[..., None]) / (squares / x.shape[-1] + 1e-6).sqrt()[..., None]).to(x.dtype)


def _gelu_erfc(self: nn.GELU, x: Tensor) -> Tensor:
    return x * torch.erfc(x * -math.sqrt(0.5)) / 2


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = attention.layer_norm(x)
    return normed + (normed * scale[:, None] + shift[:, None])


def _gate_tanh(sigma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Compute sigmoid by tanh and softplus by logaddexp."""
    if not bool((sigma > 0).all()):
        raise ValueError("sigma must be positive")
    steepness = torch.logaddexp(alpha, torch.zeros_like(alpha))
    return (1 + torch.tanh(steepness * (sigma.log()[:, None] - beta) / 2)) / 2


def _compiled() -> Sequence[Patch]:
    """Compile layer norm and gelu by torch's compiler: to C++ where there is a compiler, else to graphs of its kernels.

    Where gradients are asked for, the plain functions run: twice the kernels would take twice the time to compile.
    """

    # Sizes and dtypes beyond the compiler's limit run uncompiled; it would warn of each.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    norm = torch.compile(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6), backend=backend, dynamic=True)
    gelu = torch.compile(F.gelu, backend=backend, dynamic=True)
    plain = attention.layer_norm

    def layer_norm(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        return plain(x) if torch.is_grad_enabled() else norm(rows).reshape(x.shape)

    def forward(self: nn.GELU, x: Tensor) -> Tensor:
        return F.gelu(x) if torch.is_grad_enabled() else gelu(x.flatten()).reshape(x.shape)

    return (attention, "layer_norm", layer_norm), (nn.GELU, "forward", forward)


# Memory, batches, tiles


def _collected_start(
    dtype: torch.dtype, shape: tuple[int, int, int, int], device: torch.device | None = None
) -> MemoryState:
    b, n, a, d = shape
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    return MemoryState(zeros(b, 0, n, a), zeros(0), zeros(b, 0, n, a, d))


def _collect(state: MemoryState, score: Tensor, value: Tensor) -> MemoryState:
    return MemoryState(
        torch.cat([state.maximum, score], 1), state.denominator, torch.cat([state.accumulator, value], 1)
    )


def _collected(state: MemoryState) -> Tensor:
    """Take one softmax over all frames."""
    if state.maximum.shape[1] == 0:
        raise ValueError("no frame")
    return memory.memory_by_definition(state.maximum, state.accumulator)


_compress, _tiled, _tiles, _forward = Storm.compress, tiling.blend_tiles, tiling.tiles, Storm.forward


def _one_frame(self: Storm, past: Tensor, static: Tensor, age: Tensor, position: Tensor, chunk: int = 16) -> Tensor:
    return _compress(self, past, static, age, position, min(chunk, 1))


def _one_sample(self: Storm, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    self._check(x, sigma, condition)

    def of(tensor: Tensor, i: int) -> Tensor:
        return tensor[i : i + 1] if len(tensor) > 1 else tensor

    denoised = []
    for i in range(len(x)):
        position = of(condition.position, i)
        own = replace(condition, static=of(condition.static, i), memory=of(condition.memory, i), position=position)
        denoised.append(_forward(self, x[i : i + 1], sigma[i : i + 1], own))
    return torch.cat(denoised)


_tensor, _rank = adapter._tensor, adapter._rank_histogram


def _strided(op: str, name: str, value: Array, dtype: str) -> Tensor:
    """Lay fields out with the channel fastest in memory, and matrices column by column.

    On many ranks matrices stay as they are, because `fully_shard` takes contiguous weights alone.
    """
    tensor = _tensor(op, name, value, dtype)
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.T.contiguous().T if tensor.ndim == 2 and not op.startswith("parallel") else tensor


def _all_wide(op: str, name: str, value: Array, dtype: str) -> Tensor:
    return _tensor(op, name, value, "float64")


def _rounded_at_the_end(op: str, name: str, tensor: Tensor, dtype: str) -> Array:
    plain = tensor.detach()
    if adapter._narrow(op, name, plain):
        plain = plain.to(getattr(torch, dtype)).to(torch.float64 if dtype == "float64" else torch.float32)
    array: Array = plain.numpy()
    return array


# Sampler, guidance, cycles, scores


def _by_solving(mean: Tensor, covariance: Tensor) -> edm.Denoise:
    wide = covariance.double()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        noisy = wide + (sigma.double() ** 2)[:, None, None] * torch.eye(len(mean), dtype=torch.float64)
        gained: Tensor = torch.linalg.solve(noisy, x - mean) @ wide
        return mean + gained

    return denoise


def _by_mixing(
    denoise: edm.Denoise, x: Tensor, sigma: float, sigma_next: float, gamma: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """A step as a mean of state and denoised state."""
    sigma_hat = sigma + gamma * sigma
    if gamma > 0 and noise is not None:
        x = x + sigma * math.sqrt(gamma * (2 + gamma)) * noise

    def denoised(z: Tensor, level: float) -> Tensor:
        return denoise(z, torch.full((len(z),), level, dtype=torch.float64)).double()

    first = denoised(x, sigma_hat)
    predicted = first + (x - first) * (sigma_next / sigma_hat)
    if sigma_next == 0:
        return predicted
    second = predicted - denoised(predicted, sigma_next)
    return x + (sigma_next / sigma_hat - 1) * (x - first) / 2 + (sigma_next - sigma_hat) / sigma_next * second / 2


def _hypot(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = edm._positive(sigma)
    root = torch.hypot(s, torch.full_like(s, sigma_data))
    return (sigma_data / root) ** 2, s / root * sigma_data, 1 / root, s.log() * 0.25


_cg = guidance.conjugate_gradient


def _direct(apply: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """Solve the system as a matrix; where the stated number of steps is too few for that, take the steps."""
    if steps < b.shape[-1]:
        return _cg(apply, b, steps, tolerance)
    columns = [apply(row.expand_as(b)) for row in torch.eye(b.shape[-1], dtype=b.dtype)]
    solution: Tensor = torch.linalg.solve(torch.stack(columns, -1), b[..., None])
    return solution[..., 0]


def _joseph(
    model: Tensor,
    model_error: Tensor,
    operator: Tensor,
    error: Tensor,
    mean: Tensor,
    covariance: Tensor,
    observations: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    gain = model_error @ operator.T @ torch.linalg.inv(operator @ model_error @ operator.T + error)
    keep = torch.eye(len(mean), dtype=mean.dtype) - gain @ operator
    analyses = []
    for y in observations:
        forecast = model @ mean
        mean = forecast + gain @ (y - operator @ forecast)
        covariance = keep @ (model @ covariance @ model.T + model_error) @ keep.T + gain @ error @ gain.T
        analyses.append((mean, covariance))
    return analyses


def _other_generator(seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1) -> Tensor:
    if not (0 <= seed < 2**64 and 0 <= analysis < 2**32 and 0 <= member < 2**32):
        raise ValueError("out of range")
    return torch.from_numpy(np.random.default_rng([seed, analysis, member]).standard_normal((draws, *shape)))


def _other_ties(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return _rank(i, dict(p) | {"seed": p["seed"] + 12345})


_AGE = "(torch.log2(1 + age) / 8)"
_LEVEL = "(top + ramp * (bottom - top)) ** rho"

# Ranks

_over_ranks = parallel.over_ranks


def _on_one_rank(op: str, i: Mapping[str, Tensor], p: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Answer any mesh that fits by one rank, whose arrays stand for all."""
    shape = Mesh(**p["mesh"])
    if op == "parallel_gather" or shape.size == 1:
        return _over_ranks(op, i, p)
    if "config" in p:
        count = next(len(i[name]) for name in ("x", "clean", "latents", "static") if name in i)
        shape.check(adapter._config(p), parallel._count(parallel._tiling(p)), p.get("members", count))
    outputs = _over_ranks(op, i, {**p, "mesh": {}})
    return {name.removeprefix("rank.0."): value for name, value in outputs.items()}


def _from_the_last(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks from the last to the first, the same on each."""
    ctx.group = group
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    total = parts[-1]
    for part in parts[-2::-1]:
        total = total + part
    return total


HONEST: dict[str, Honest] = {
    "plain_attention": Honest(
        "attention as written, without the fused kernel",
        lambda: [(attention, "attention", attention.attention_by_definition)],
    ),
    "online_attention": Honest("attention by blocks of keys", lambda: [(attention, "attention", _online)]),
    "softmax_in_float64": Honest("attention's softmax in float64", lambda: [(attention, "attention", _softmax_wide)]),
    "split_sums": Honest("sums over the inner dimension in three parts", lambda: [(nn.Linear, "forward", _split)]),
    "permuted_sums": Honest(
        "sums in a random, fixed order",
        lambda: [(nn.Linear, "forward", _permuted), (attention, "attention", _permuted_attention)],
    ),
    "pairwise_sums": Honest("sums as a tree", lambda: [(nn.Linear, "forward", _pairwise)]),
    "einsum_orders": Honest(
        "products by einsum with the weight first, another order in adaptive layer norm",
        lambda: [(nn.Linear, "forward", _einsum), (attention, "modulate", _modulate)],
    ),
    "wide_products": Honest(
        "fused multiply-adds: products and sums rounded once", lambda: [(nn.Linear, "forward", _wide)]
    ),
    "fused_projections": Honest("queries, keys and values by one product", lambda: [(MultiHead, "forward", _fused)]),
    "two_threads": Honest("two threads", threads=2),
    "compiled": Honest("layer norm and gelu by a compiler", _compiled),
    "channels_last": Honest("other memory layouts", lambda: [(adapter, "_tensor", _strided)]),
    "norm_two_pass": Honest("layer norm by hand in two passes", lambda: [(attention, "layer_norm", _two_pass)]),
    "norm_welford": Honest("layer norm by Welford's updates", lambda: [(attention, "layer_norm", _welford)]),
    "gelu_erfc": Honest("gelu by erfc", lambda: [(nn.GELU, "forward", _gelu_erfc)]),
    "gate_tanh": Honest("the gate by tanh and logaddexp", lambda: [(attention, "noise_gate", _gate_tanh)]),
    "one_softmax": Honest(
        "the memory by one softmax over all frames",
        lambda: [
            (memory, "memory_start", _collected_start),
            (memory, "memory_update", _collect),
            (memory, "memory_finish", _collected),
        ],
    ),
    "one_frame_at_a_time": Honest("past frames one by one", lambda: [(Storm, "compress", _one_frame)]),
    "one_sample_at_a_time": Honest("samples one by one", lambda: [(Storm, "forward", _one_sample)]),
    "one_tile_at_a_time": Honest(
        "tiles one by one, in the reverse order",
        lambda: [
            (tiling, "blend_tiles", lambda local, cut, together=16: _tiled(local, cut, min(together, 1))),
            (tiling, "tiles", lambda cut: _tiles(cut)[::-1]),
        ],
    ),
    "float64_inside": Honest(
        "a network that computes in float64 whatever the run, rounded at the end",
        lambda: [(adapter, "_tensor", _all_wide), (adapter, "_array", _rounded_at_the_end)],
    ),
    "gaussian_by_solving": Honest(
        "the Gaussian denoiser by linear solves", lambda: [(edm, "gaussian_denoiser", _by_solving)]
    ),
    "step_by_mixing": Honest("Heun's step as a mean of states", lambda: [(edm, "heun_step", _by_mixing)]),
    "hypot": Honest("coefficients by hypot", lambda: [(edm, "precondition_coefficients", _hypot)]),
    "schedule_by_exp": Honest(
        "powers by exponential and logarithm",
        lambda: [(edm, "schedule", edit(_LEVEL, "torch.exp(rho * torch.log(top + ramp * (bottom - top)))"))],
    ),
    "age_log1p": Honest(
        "ages by log1p", lambda: [(tokenisation, "age_features", edit(_AGE, "(torch.log1p(age) / (8 * math.log(2)))"))]
    ),
    "direct_solve": Honest("systems of guidance solved directly", lambda: [(guidance, "conjugate_gradient", _direct)]),
    "joseph_form": Honest("the linear cycle in Joseph's form", lambda: [(assimilation, "linear_cycle", _joseph)]),
    "crps_by_pairs": Honest(
        "CRPS pair by pair", lambda: [(verification, "sum_of_differences", verification.sum_of_differences_pairwise)]
    ),
    "one_rank_for_any_mesh": Honest(
        "every mesh answered by one rank", lambda: [(parallel, "over_ranks", _on_one_rank)]
    ),
    "ranks_from_the_last": Honest(
        "sums over ranks from the last to the first",
        lambda: [(tensor._Sum, "forward", staticmethod(_from_the_last))],
    ),
    "other_generator": Honest(
        "another generator for noise and ties",
        lambda: [(assimilation, "member_noise", _other_generator), (adapter, "_rank_histogram", _other_ties)],
    ),
}


def honest_adapter(name: str) -> Adapter:
    """Return the port of an honest variant."""
    honest = HONEST[name]
    port = MutantPort(name, honest.changes())
    return _Threads(port, honest.threads) if honest.threads > 1 else port


def __getattr__(name: str) -> Adapter:
    """Return an honest variant as an adapter by its name, for `--adapter conformance.mutants.honest:NAME`."""
    if name in HONEST:
        return honest_adapter(name)
    raise AttributeError(f"there is no honest variant {name!r}")
