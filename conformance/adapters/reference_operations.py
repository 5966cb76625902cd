"""The operations of the reference that run in one process, each in a few lines of PyTorch.

`OPERATIONS` has every operation but those of chapter 9, by name; `run_as` calls one with NumPy arrays in and out. A
port in Python can start from a copy of this file.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conformance.adapter import Array, Unsupported
from conformance.adapters import probes
from conformance.protocol.operations import OPERATIONS as TABLE
from storm_ref import (
    assimilation,
    attention,
    config,
    cost,
    denoiser,
    edm,
    guidance,
    memory,
    tiling,
    tokenisation,
    verification,
)

__all__ = ["OPERATIONS", "Operation", "Params", "Tensors", "run_as"]

Tensors = Mapping[str, Tensor]
Params = Mapping[str, Any]
Operation = Callable[[Tensors, Params], Tensors]  # arrays by name and settings in, arrays by name out


def _patchify(i: Tensors, p: Params) -> Tensors:
    return {"tokens": tokenisation.patchify(i["x"], tuple(p["patch"]))}


def _unpatchify(i: Tensors, p: Params) -> Tensors:
    return {"x": tokenisation.unpatchify(i["tokens"], tuple(p["patch"]), p["rows"])}


def _position(i: Tensors, p: Params) -> Tensors:
    patch = tuple(p["patch"])
    if p["kind"] == "sphere":
        return {"position": tokenisation.sphere_position(i["latitude"], i["longitude"], patch)}
    if p["kind"] == "region":
        return {"position": tokenisation.region_position(i["latitude"], i["longitude"], patch, p["length"])}
    return {"position": tokenisation.latitude_position(i["latitude"], len(i["longitude"]) // patch[1], patch)}


def _memory(i: Tensors, p: Params) -> Tensors:
    batch, _, locations, heads, features = i["value"].shape
    state = memory.memory_start(i["value"].dtype, (batch, locations, heads, features))
    scores, values = (torch.split(i[name], p["chunks"], 1) for name in ("score", "value"))
    for score, value in zip(scores, values, strict=True):
        state = memory.memory_update(state, score, value)
    return {"memory": memory.memory_finish(state)}


def _network(i: Tensors, p: Params) -> denoiser.Storm:
    """The network with the given weights, made without drawing any; operations that need some of them get no more."""
    with torch.device("meta"):
        network = denoiser.Storm(_config(p))
    network.load_state_dict(_weights(i), strict=False, assign=True)
    return probes.watch_network(network)


def _weights(i: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): value for name, value in i.items() if name.startswith("weights.")}


def _past(i: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return i["past"], i["past_static"], i["age"], i["position"]


def _embed(i: Tensors, p: Params) -> Tensors:
    return {"tokens": _network(i, p).embed(i["x"], i["static"], i["position"][None])}


def _embed_history(i: Tensors, p: Params) -> Tensors:
    return {"tokens": _network(i, p).embed_past(*_past(i))}


def _compress(i: Tensors, p: Params) -> Tensors:
    return {"memory": _network(i, p).compress(*_past(i), p["chunk"])}


def _gate(i: Tensors, p: Params) -> Tensors:
    return {"gamma": attention.noise_gate(i["sigma"], i["alpha"], i["beta"])}


def _mask(window: Params | None) -> Tensor | None:
    return None if window is None else attention.window_mask(**window)


def _attention(i: Tensors, p: Params) -> Tensors:
    return {"y": attention.attention(i["q"], i["k"], i["v"], _mask(p["window"]))}


def _block(i: Tensors, p: Params) -> Tensors:
    weights = _weights(i)
    hidden, width = weights["mlp.0.weight"].shape
    with torch.device("meta"):
        block = attention.Block(width, p["heads"], hidden // width)
    block.load_state_dict(weights, assign=True)
    probes.watch_block(block)
    probes.take("gamma", attention.noise_gate(i["sigma"], block.gate_alpha, block.gate_beta))
    return {"y": block(i["x"], i["memory"], i["embedding"], i["sigma"], _mask(p["window"]))}


def _noise_embedding(i: Tensors, p: Params) -> Tensors:
    return {"embedding": _network(i, p).embed_sigma(i["sigma"])}


def _final(i: Tensors, p: Params) -> Tensors:
    return {"raw": _network(i, p).finish(i["tokens"], i["embedding"], p["rows"])}


def _config(p: Params) -> config.StormConfig:
    return config.StormConfig(**p["config"] | {"patch": tuple(p["config"]["patch"])})


def _count_weights(i: Tensors, p: Params) -> Tensors:
    with torch.device("meta"):
        return {"count": torch.tensor(denoiser.count_weights(denoiser.Storm(_config(p))), device="cpu")}


def _condition(network: denoiser.Storm, i: Tensors, p: Params) -> denoiser.Condition:
    return denoiser.Condition(i["static"], network.compress(*_past(i), p["chunk"]), i["position"][None], p["periodic"])


def _denoise(i: Tensors, p: Params) -> Tensors:
    network = _network(i, p)
    return {"denoised": denoiser.denoiser(network, _condition(network, i, p))(i["x"], i["sigma"])}


def _denoise_tiled(i: Tensors, p: Params) -> Tensors:
    return {"denoised": _tiled_network(i, p)(i["x"], i["sigma"])}


def _tiled_network(i: Tensors, p: Params) -> edm.Denoise:
    network = _network(i, p)
    tiles = tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"]))
    return tiling.tiled_denoiser(network, _condition(network, i, p), tiles, p["together"])


def _tile_geometry(i: Tensors, p: Params) -> Tensors:
    axis = tiling.Axis(**p)
    extents = tiling.extents(axis)
    sizes = torch.tensor([len(extent) for extent in extents])
    return {"cores": torch.tensor(tiling.cores(axis)), "sizes": sizes, "points": torch.cat(extents)}


def _tile_weights(i: Tensors, p: Params) -> Tensors:
    return {"weights": torch.cat(tiling.weights(tiling.Axis(**p)))}


def _tiled_denoise(i: Tensors, p: Params) -> Tensors:
    def affine_denoiser(z: Tensor, sigma: Tensor, batch: Sequence[tiling.Tile]) -> Tensor:
        members = len(z) // len(batch)
        field = torch.stack([i["field"][:, tile.rows[:, None], tile.cols] for tile in batch])
        average = p["mean"] * z.mean((-2, -1), keepdim=True)
        result: Tensor = p["own"] * z + average + field.repeat_interleave(members, 0)
        return result / (1 + sigma**2)[:, None, None, None]

    denoise = tiling.blend_tiles(affine_denoiser, tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"])))
    x = i["x"]
    for evaluation in range(p["evaluations"]):
        x = denoise(x, i["sigma"])
        probes.take(f"evaluation.{evaluation}", x)
    return {"denoised": x}


def _precondition(i: Tensors, p: Params) -> Tensors:
    c_skip, c_out, c_in, c_noise = edm.precondition_coefficients(i["sigma"], p["sigma_data"])
    weight = edm.loss_weight(i["sigma"], p["sigma_data"])
    return {"c_skip": c_skip, "c_out": c_out, "c_in": c_in, "c_noise": c_noise, "loss_weight": weight}


def _schedule(i: Tensors, p: Params) -> Tensors:
    return {"sigmas": edm.schedule(**p)}


def _sample(i: Tensors, p: Params) -> Tensors:
    denoise = probes.watch_denoise(edm.gaussian_denoiser(i["mean"], i["covariance"]), "state.", "denoised.")
    return {"samples": edm.sample(denoise, i["latents"], i["sigmas"], edm.Churn(**p["churn"]), i.get("noises"))}


def _sampler_step(i: Tensors, p: Params) -> Tensors:
    denoise, churn = edm.gaussian_denoiser(i["mean"], i["covariance"]), edm.Churn(**p["churn"])
    noise = churn.s_noise * i["noise"] if "noise" in i else None
    gamma = churn.gamma(p["sigma"], p["steps"])
    return {"x": edm.heun_step(denoise, i["x"], p["sigma"], p["next"], gamma, noise)}


def _training_sigma(i: Tensors, p: Params) -> Tensors:
    return {"sigma": edm.training_sigma(i["normal"])}


def _loss_of(network: denoiser.Storm, i: Tensors, p: Params) -> Tensor:
    denoise = probes.watch_denoise(denoiser.denoiser(network, _condition(network, i, p)), denoised="denoised")
    sigma_data = network.config.sigma_data
    return edm.edm_loss(denoise, i["clean"], i["noise"], i["sigma"], sigma_data, i.get("valid"))


def _loss(i: Tensors, p: Params) -> Tensors:
    return {"loss": _loss_of(_network(i, p), i, p)}


def _gradients(i: Tensors, p: Params) -> Tensors:
    network = _network(i, p)
    names, parameters = zip(*network.named_parameters(), strict=True)
    loss = _loss_of(network, i, p)
    gradients = torch.autograd.grad(loss, parameters)
    return {"loss": loss} | {f"gradients.{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def _as_field(v: Tensor) -> Tensor:
    """Vectors [m, v] as fields of one channel and one row."""
    return v.unsqueeze(-2).unsqueeze(-2)


def _gaussian_fields(i: Tensors) -> edm.Denoise:
    denoise = edm.gaussian_denoiser(i["mean"], i["covariance"])

    def on_fields(x: Tensor, sigma: Tensor) -> Tensor:
        return _as_field(denoise(x[:, 0, 0], sigma))

    return on_fields


def _speed(pairs: Tensor) -> Callable[[Tensor], Tensor]:
    """Wind speeds sqrt(x_i^2 + x_j^2) of pairs of state variables."""
    return lambda x: (x.flatten(-3)[..., pairs] ** 2).sum(-1).sqrt()


def _observations(i: Tensors) -> guidance.ObservationsLike:
    if "pairs" in i:
        return guidance.OperatorObservations(i["value"], i["variance"], _speed(i["pairs"]))
    n, v = i["operator"].shape
    return guidance.Observations(i["value"], i["variance"], torch.arange(v).expand(n, v), i["operator"], (1, 1, v))


def _guide(p: Params) -> assimilation.Guide:
    methods: dict[str, Callable[..., assimilation.Guide]] = {
        "dps": lambda: guidance.dps,
        "pigdm": lambda: lambda denoise, seen: guidance.pigdm(denoise, seen, p["sigma_data"]),
        "sda": lambda: lambda denoise, seen: guidance.sda(denoise, seen, p["gamma"]),
        "mmps": lambda: lambda denoise, seen: guidance.mmps(denoise, seen, p["steps"]),
    }
    return methods[p["method"]]()


def _guided_mean(i: Tensors, p: Params) -> Tensors:
    guided = _guide(p)(probes.watch_denoise(_gaussian_fields(i), denoised="denoised"), _observations(i))
    return {"guided": guided(_as_field(i["x"]), i["sigma"])[:, 0, 0]}


def _assimilate(i: Tensors, p: Params) -> Tensors:
    noise = torch.cat([i["latents"][None], i["noises"]]) if "noises" in i else i["latents"][None]
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn(**p["churn"]), p["together"])
    seen = _observations(i) if len(i["value"]) else None
    guide = _guide(p) if p["method"] else None
    denoise = probes.watch_denoise(_gaussian_fields(i), "state.", "denoised.")
    drawn = assimilation.draw_members(denoise, _as_field(noise), sampler, seen, guide)
    return {"samples": drawn[:, 0, 0]}


def _guided_denoise(i: Tensors, p: Params) -> Tensors:
    seen = guidance.Observations(i["value"], i["variance"], i["index"], i["weight"], tuple(i["x"].shape[1:]))
    denoise = probes.watch_denoise(_tiled_network(i, p), denoised="denoised")
    return {"guided": _guide(p)(denoise, seen)(i["x"], i["sigma"])}


def _analysis(i: Tensors, p: Params) -> Tensors:
    noise = torch.cat([i["latents"][None], i["noises"]]) if "noises" in i else i["latents"][None]
    shape = tuple(i["latents"].shape[1:])
    seen = guidance.Observations(i["value"], i["variance"], i["index"], i["weight"], shape) if "value" in i else None
    denoise = probes.watch_denoise(_tiled_network(i, p), "state.", "denoised.")
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn(**p["churn"]))
    guide = _guide(p) if p["method"] else None
    return {"samples": assimilation.draw_members(denoise, noise, sampler, seen, guide)}


def _cycle(i: Tensors, p: Params) -> Tensors:
    """x_k = A_1 x_{k-1} + A_2 x_{k-2} + ... + q: each member's denoiser is exact for its own history."""
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn())

    def draw(history: Sequence[Tensor], seen: guidance.ObservationsLike | None, k: int) -> Tensor:
        means = sum(past @ a.T for past, a in zip(reversed(history), i["model"], strict=True))
        assert isinstance(means, Tensor)
        error = edm.gaussian_denoiser(torch.zeros_like(means[0]), i["covariance"])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return _as_field(means + error(x[:, 0, 0] - means, sigma))

        noise = _as_field(i["latents"][k : k + 1])
        guide = None if seen is None else _guide(p)
        return assimilation.draw_members(denoise, noise, sampler, seen, guide)[:, 0, 0]

    names = ("value", "variance", "operator")
    analyses = [
        _observations({name: i[name] if name == "operator" else i[name][k] for name in names}) if there else None
        for k, there in enumerate(p["observed"])
    ]
    return {"states": torch.stack(list(assimilation.cycle(list(i["history"]), analyses, draw)))}


def _noise(i: Tensors, p: Params) -> Tensors:
    where = (p["seed"], p["analysis"], p["member"])
    return {"noise": assimilation.member_noise(*where, p["shape"], p["draws"])}


def _linear_cycle(i: Tensors, p: Params) -> Tensors:
    means, covariances = zip(*assimilation.linear_cycle(**i), strict=True)
    return {"means": torch.stack(means), "covariances": torch.stack(covariances)}


def _crps(i: Tensors, p: Params) -> Tensors:
    score = verification.crps_fair if p["fair"] else verification.crps_ensemble
    return {"crps": score(i["members"], i["truth"])}


def _spread_skill(i: Tensors, p: Params) -> Tensors:
    where = {"weights": i.get("weights"), "mask": i.get("mask")}
    return {
        "rmse": verification.rmse(i["members"], i["truth"], **where),
        "spread": verification.spread(i["members"], **where),
        "ratio": verification.spread_skill(i["members"], i["truth"], **where),
    }


def _average(i: Tensors, p: Params) -> Tensors:
    return {"average": verification.average(i["score"], weights=i.get("weights"), mask=i.get("mask"))}


def _area_weights(i: Tensors, p: Params) -> Tensors:
    return {"weights": verification.area_weights(i["latitude"]).flatten()}


def _rank_histogram(i: Tensors, p: Params) -> Tensors:
    generator = torch.Generator().manual_seed(p["seed"])
    return {"counts": verification.rank_histogram(i["members"], i["truth"], generator, mask=i.get("mask"))}


def _multiply_adds(i: Tensors, p: Params) -> Tensors:
    c, tiles = _config(p), tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"]))
    if [tiles.y.length, tiles.x.length] != list(p["grid"]):
        raise ValueError(f"the axes are {tiles.y.length} and {tiles.x.length} long, the grid is {p['grid']}")
    compress = cost.memory(c, p["grid"][0] // c.patch[0] * (p["grid"][1] // c.patch[1]), p["frames"])
    counts = {"compress": compress, "denoise": cost.tiled_evaluation(c, tiles)}
    return {name: torch.tensor(count.multiply_adds) for name, count in counts.items()}


OPERATIONS: dict[str, Operation] = {
    "patchify": _patchify,
    "unpatchify": _unpatchify,
    "position": _position,
    "embed": _embed,
    "embed_history": _embed_history,
    "memory": _memory,
    "compress": _compress,
    "gate": _gate,
    "attention": _attention,
    "block": _block,
    "noise_embedding": _noise_embedding,
    "final": _final,
    "count_weights": _count_weights,
    "denoise": _denoise,
    "tile_geometry": _tile_geometry,
    "tile_weights": _tile_weights,
    "tiled_denoise": _tiled_denoise,
    "denoise_tiled": _denoise_tiled,
    "precondition": _precondition,
    "schedule": _schedule,
    "sampler_step": _sampler_step,
    "sample": _sample,
    "training_sigma": _training_sigma,
    "loss": _loss,
    "gradients": _gradients,
    "guided_mean": _guided_mean,
    "guided_denoise": _guided_denoise,
    "assimilate": _assimilate,
    "analysis": _analysis,
    "linear_cycle": _linear_cycle,
    "cycle": _cycle,
    "noise": _noise,
    "crps": _crps,
    "spread_skill": _spread_skill,
    "average": _average,
    "area_weights": _area_weights,
    "rank_histogram": _rank_histogram,
    "multiply_adds": _multiply_adds,
}

WITH_GRADIENTS = ("gradients", "parallel_gradients")


def run_as(
    operations: Mapping[str, Operation],
    op: str,
    inputs: Mapping[str, Array],
    params: Params,
    probes_asked: Sequence[str] = (),
) -> dict[str, Array]:
    """Call one of these operations in the dtype of the run, NumPy arrays in and out. Raises Unsupported for another."""
    if op not in operations:
        raise Unsupported(op)
    settings = {name: value for name, value in params.items() if name != "dtype"}
    tensors = {name: _tensor(op, name, value, params["dtype"]) for name, value in inputs.items()}
    with nullcontext() if op in WITH_GRADIENTS else torch.no_grad(), _records(probes_asked) as records:
        results = dict(operations[op](tensors, settings))
    for name in probes_asked:
        if name in records:
            results[f"probe.{name}"] = _joined(name, records[name])
    return {name: _array(op, name, value, params["dtype"]) for name, value in results.items()}


def _records(asked: Sequence[str]) -> Any:
    return probes.recorded() if asked else nullcontext({})


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Join the records of chunks of frames along dimension 1; of anything else the first record stands."""
    return torch.cat(parts, 1) if name in ("history", "score", "value") else parts[0]


def _tensor(op: str, name: str, value: Array, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
    return tensor.to(getattr(torch, dtype)) if _narrow(op, name, tensor) else tensor


def _array(op: str, name: str, tensor: Tensor, dtype: str) -> Array:
    plain = tensor.detach()
    if _narrow(op, name, plain):
        plain = plain.to(getattr(torch, dtype)).to(torch.float64 if dtype == "float64" else torch.float32)
    array: Array = plain.numpy()
    return array


def _narrow(op: str, name: str, tensor: Tensor) -> bool:
    known = TABLE.get(op)
    return tensor.is_floating_point() and known is not None and known.is_narrow(name)
