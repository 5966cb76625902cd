"""The stage of an operation at which a port first goes wrong. The reference runs here, to explain and never to judge.

Free-running: the port is asked for its intermediates, which are compared with the reference's in the order in which
they arise; the first that is off is the place to look. Stage by stage: each part of an operation is run by itself on
the *reference's* intermediates, so that a part which only inherits an error is told from one that makes it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from conformance.adapter import Adapter, Array, Arrays
from conformance.authoring.montecarlo import monte_carlo
from conformance.judging.case import Case
from conformance.judging.runner import Outcome, judge
from conformance.judging.tolerance import Measured
from conformance.ports.checked import Fault, Missing, Port, Refused, Wrong
from conformance.protocol.operations import OPERATIONS, round_to, to_dtype

__all__ = ["Stage", "free_running", "probe_names", "stages"]

COMPRESS = ("history", "score", "value", "mixed")


def probe_names(case: Case) -> tuple[str, ...]:
    """Return the names of a case's intermediates, in the order in which they arise; see adapters/probes.py."""
    op, params = case.op, case.params
    if op == "compress":
        return COMPRESS
    if op == "block":
        return ("gamma", "spatial", "temporal")
    if op in ("denoise", "loss", "gradients"):
        blocks = [f"block.{at}" for at in range(params["config"]["depth"])]
        last = () if op == "denoise" else ("denoised",)
        return (*COMPRESS, "memory", "tokens", "embedding", *blocks, "raw", *last)
    if op in ("sample", "assimilate", "analysis"):
        count = 2 * (len(case.inputs["sigmas"]) - 1) - 1
        return tuple(f"{kind}.{at}" for at in range(count) for kind in ("state", "denoised"))
    if op in ("guided_mean", "guided_denoise"):
        return ("denoised",)
    if op == "tiled_denoise":
        return tuple(f"evaluation.{at}" for at in range(params["evaluations"]))
    return ()


@dataclass(frozen=True)
class Stage:
    """One comparison of an intermediate.

    `measured` is None where the port offers nothing to compare, and `note` tells why.
    """

    name: str
    measured: Measured | None
    note: str = ""

    @property
    def off(self) -> bool:
        """True for an intermediate beyond its limit."""
        return self.measured is not None and not self.measured.passed


def _trace(reference: Adapter, case: Case, dtype: str, probes: tuple[str, ...]) -> dict[str, Array]:
    inputs = {name: _representable(case.op, name, value, dtype) for name, value in case.inputs.items()}
    result = reference.run(case.op, to_dtype(case.op, inputs, "float64"), {**case.params, "dtype": "float64"}, probes)
    assert isinstance(result, Mapping)
    return dict(result)


def _representable(op: str, name: str, value: Array, dtype: str) -> Array:
    floating = np.issubdtype(value.dtype, np.floating)
    return round_to(value, dtype) if floating and OPERATIONS[op].is_narrow(name) else value


def free_running(port: Port, reference: Adapter, case: Case, dtype: str) -> list[Stage]:
    """Compare the port's own intermediates with the reference's, in order; none where the operation has none."""
    probes = probe_names(case)
    if not probes:
        return []
    try:
        got = port.call(case.op, case.inputs, case.params, probes, dtype)
    except (Refused, Missing, Fault, Wrong) as error:
        return [Stage(case.op, None, f"{type(error).__name__.lower()}: {error}")]
    truth = _trace(reference, case, dtype, probes)
    limits = monte_carlo(
        reference, case.op, case.inputs, case.params, truth, why="intermediates", seed=0, dtypes=(dtype,)
    )
    compared = []
    for name in probes:
        key = f"probe.{name}"
        if key not in got:
            compared.append(Stage(name, None, "the port does not offer this probe"))
        elif got[key].shape != truth[key].shape:
            shapes = f"shape {list(got[key].shape)}, the reference has {list(truth[key].shape)}"
            compared.append(Stage(name, Measured(np.inf, 0.0, "shape", ()), shapes))
        else:
            value = np.nan_to_num(got[key].astype(np.float64), nan=np.inf)
            compared.append(Stage(name, limits.measure(value, truth[key], dtype, key)))
    return compared


def _part(reference: Adapter, case: Case, op: str, inputs: Arrays, params: Mapping[str, Any], dtype: str) -> Case:
    """Make a part of `case` a case of its own: inputs rounded to the dtype, values and limits from the reference."""
    rounded = {name: _representable(op, name, value, dtype) for name, value in inputs.items()}
    part = replace(case, op=op, inputs=rounded, params=params, expected={}, valid_counterpart=None)
    expected = _trace(reference, part, dtype, ())
    limits = monte_carlo(reference, op, rounded, params, expected, why="a part on its own", seed=0, dtypes=(dtype,))
    return replace(part, expected=expected, tolerance=limits)


def stages(port: Port, reference: Adapter, case: Case, dtype: str) -> list[tuple[str, Outcome]]:
    """Judge each part of a case's operation that the port has, by itself, on the reference's intermediates."""
    plan = _PLANS.get(case.op)
    if plan is None:
        return []
    traced = _trace(reference, case, dtype, probe_names(case))
    truth = {name.removeprefix("probe."): value for name, value in traced.items()}
    return [
        (name, judge(port, _part(reference, case, op, inputs, params, dtype)))
        for name, op, inputs, params in plan(case, truth)
        if port.has(op)
    ]


_Plan = Iterator[tuple[str, str, dict[str, Array], Mapping[str, Any]]]  # name, operation, inputs, params


def _only(inputs: Arrays, *names: str) -> dict[str, Array]:
    """Select the inputs of these names, and all weights."""
    return {name: v for name, v in inputs.items() if name in names or name.startswith("weights.")}


PAST = ("past", "past_static", "age", "position")


def _plan_compress(case: Case, truth: Arrays) -> _Plan:
    config = {"config": case.params["config"]}
    yield "history tokens", "embed_history", _only(case.inputs, *PAST), config
    frames = case.inputs["past"].shape[1]
    chunk = case.params["chunk"]
    chunks = [min(chunk, frames - at) for at in range(0, frames, chunk)]
    yield "average over frames", "memory", {"score": truth["score"], "value": truth["value"]}, {"chunks": chunks}


def _plan_denoise(case: Case, truth: Arrays) -> _Plan:
    config = case.params["config"]
    x = case.inputs["x"]
    sigma = case.inputs["sigma"]
    yield "coefficients", "precondition", {"sigma": sigma}, {"sigma_data": config["sigma_data"]}
    yield from _plan_compress(case, truth)
    yield "memory", "compress", _only(case.inputs, *PAST), {"config": config, "chunk": case.params["chunk"]}
    scaled = x / np.sqrt(sigma**2 + config["sigma_data"] ** 2)[:, None, None, None]
    yield "state tokens", "embed", {"x": scaled} | _only(case.inputs, "static", "position"), {"config": config}
    yield "noise embedding", "noise_embedding", _only(case.inputs, "sigma"), {"config": config}
    tokens = truth["tokens"]
    memory = truth["memory"].reshape(-1, *tokens.shape[1:])
    given = {"memory": np.broadcast_to(memory, tokens.shape), "embedding": truth["embedding"], "sigma": sigma}
    for layer in range(config["depth"]):
        prefix = f"weights.blocks.{layer}."
        own = {"weights." + k.removeprefix(prefix): v for k, v in case.inputs.items() if k.startswith(prefix)}
        yield f"block {layer}", "block", own | given | {"x": tokens}, _block_params(case)
        tokens = truth[f"block.{layer}"]
    rows = case.inputs["position"].shape[-3]
    last = _only(case.inputs) | {"tokens": tokens, "embedding": truth["embedding"]}
    yield "output layer", "final", last, {"config": config, "rows": rows}


def _block_params(case: Case) -> dict[str, Any]:
    config = case.params["config"]
    rows, cols = case.inputs["position"].shape[-3:-1]
    window = None
    if config["window"] is not None:
        window = {"rows": rows, "cols": cols, "radius": config["window"], "periodic": case.params["periodic"]}
    return {"heads": config["heads"], "window": window}


def _plan_loss(case: Case, truth: Arrays) -> _Plan:
    x = case.inputs["clean"] + case.inputs["sigma"][:, None, None, None] * case.inputs["noise"]
    noisy = {name: v for name, v in case.inputs.items() if name not in ("clean", "noise", "valid")} | {"x": x}
    yield from _plan_denoise(replace(case, inputs=noisy), truth)
    yield "denoiser", "denoise", noisy, case.params


def _plan_tiles(case: Case, truth: Arrays) -> _Plan:
    for name, axis in (("rows", case.params["y"]), ("columns", case.params["x"])):
        yield f"geometry of {name}", "tile_geometry", {}, axis
        yield f"weights of {name}", "tile_weights", {}, axis


def _plan_denoise_tiled(case: Case, truth: Arrays) -> _Plan:
    yield from _plan_tiles(case, truth)
    names = ("x", "sigma", "static", *PAST)
    params = {name: case.params[name] for name in ("config", "chunk", "periodic")}
    yield "untiled denoiser", "denoise", _only(case.inputs, *names), params


def _plan_guided_denoise(case: Case, truth: Arrays) -> _Plan:
    yield from _plan_denoise_tiled(case, truth)
    names = ("x", "sigma", "static", *PAST)
    params = {name: case.params[name] for name in ("config", "chunk", "periodic", "y", "x", "together")}
    yield "tiled denoiser", "denoise_tiled", _only(case.inputs, *names), params


def _plan_sample(case: Case, truth: Arrays) -> _Plan:
    if case.params.get("churn"):
        return  # the state before the noise of a step is not recorded
    levels = case.inputs["sigmas"].tolist()
    prior = {name: case.inputs[name] for name in ("mean", "covariance")}
    for step, (now, after) in enumerate(pairwise(levels)):
        params = {"sigma": now, "next": after, "steps": len(levels) - 1, "churn": {}}
        yield f"step {step}", "sampler_step", prior | {"x": _vectors(truth[f"state.{2 * step}"])}, params


def _vectors(state: Array) -> Array:
    """Flatten fields of one channel and one row to vectors."""
    return state.reshape(len(state), -1)


def _plan_assimilate(case: Case, truth: Arrays) -> _Plan:
    if not case.params.get("method"):
        yield from _plan_sample(case, truth)
        return
    if case.params.get("churn"):
        return
    levels = case.inputs["sigmas"].tolist()
    names = ("mean", "covariance", "operator", "pairs", "value", "variance")
    given = {name: case.inputs[name] for name in names if name in case.inputs}
    settings = {k: v for k, v in case.params.items() if k not in ("churn", "together")}
    for step, now in enumerate(levels[:-1]):
        state = _vectors(truth[f"state.{2 * step}"])
        inputs = given | {"x": state, "sigma": np.full(len(state), now)}
        yield f"guided mean of step {step}", "guided_mean", inputs, settings


def _plan_analysis(case: Case, truth: Arrays) -> _Plan:
    names = ("static", *PAST, "value", "variance", "index", "weight")
    given = _only(case.inputs, *names)
    op = "guided_denoise" if case.params["method"] else "denoise_tiled"
    settings = {k: v for k, v in case.params.items() if k != "churn"}
    levels = case.inputs["sigmas"].tolist()
    for step, now in enumerate(levels[:-1]):
        if not case.params["churn"]:
            state = truth[f"state.{2 * step}"]
            yield f"denoiser of step {step}", op, given | {"x": state, "sigma": np.full(len(state), now)}, settings


_PLANS: dict[str, Callable[[Case, Arrays], _Plan]] = {
    "compress": _plan_compress,
    "denoise": _plan_denoise,
    "loss": _plan_loss,
    "gradients": _plan_loss,
    "tiled_denoise": _plan_tiles,
    "denoise_tiled": _plan_denoise_tiled,
    "guided_denoise": _plan_guided_denoise,
    "sample": _plan_sample,
    "assimilate": _plan_assimilate,
    "analysis": _plan_analysis,
}
