"""The reference as a port: each operation in a few lines of PyTorch. A port in Python can start from a copy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import storm_ref
from conformance.adapter import Array, Info, Unsupported
from storm_ref import (
    assimilation,
    attention,
    config,
    denoiser,
    edm,
    guidance,
    memory,
    tiling,
    tokenisation,
    verification,
)

__all__ = ["OPERATIONS", "Reference", "adapter"]

Tensors = Mapping[str, Tensor]
Params = Mapping[str, Any]


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
    state = memory.memory_start(i["value"])
    scores, values = (torch.split(i[name], p["chunks"], 1) for name in ("score", "value"))
    for score, value in zip(scores, values, strict=True):
        state = memory.memory_update(state, score, value)
    return {"memory": memory.memory_finish(state)}


def _network(i: Tensors, p: Params) -> denoiser.Storm:
    """The network with the given weights. Made without drawing any; `compress` alone needs only some of them."""
    settings = p["config"] | {"patch": tuple(p["config"]["patch"])}
    with torch.device("meta"):
        network = denoiser.Storm(config.StormConfig(**settings))
    weights = {name.removeprefix("weights."): value for name, value in i.items() if name.startswith("weights.")}
    network.load_state_dict(weights, strict="weights.final.weight" in i, assign=True)
    return network


def _compress(i: Tensors, p: Params) -> Tensors:
    network = _network(i, p)
    return {"memory": network.compress(i["past"], i["past_static"], i["age"], i["position"], p["chunk"])}


def _gate(i: Tensors, p: Params) -> Tensors:
    return {"gamma": attention.noise_gate(i["sigma"], i["alpha"], i["beta"])}


def _mask(window: Params | None) -> Tensor | None:
    return None if window is None else attention.window_mask(**window)


def _attention(i: Tensors, p: Params) -> Tensors:
    return {"y": attention.attention(i["q"], i["k"], i["v"], _mask(p["window"]))}


def _block(i: Tensors, p: Params) -> Tensors:
    weights = {name.removeprefix("weights."): value for name, value in i.items() if name.startswith("weights.")}
    hidden, width = weights["mlp.0.weight"].shape
    with torch.device("meta"):
        block = attention.Block(width, p["heads"], hidden // width)
    block.load_state_dict(weights, assign=True)
    return {"y": block(i["x"], i["memory"], i["embedding"], i["sigma"], _mask(p["window"]))}


def _denoise(i: Tensors, p: Params) -> Tensors:
    network = _network(i, p)
    remembered = network.compress(i["past"], i["past_static"], i["age"], i["position"], p["chunk"])
    condition = denoiser.Condition(i["static"], remembered, i["position"], p["periodic"])
    return {"denoised": denoiser.bind(network, condition)(i["x"], i["sigma"])}


def _tile_geometry(i: Tensors, p: Params) -> Tensors:
    axis = tiling.Axis(**p)
    extents = tiling.extents(axis)
    sizes = torch.tensor([len(extent) for extent in extents])
    return {"cores": torch.tensor(tiling.cores(axis)), "sizes": sizes, "points": torch.cat(extents)}


def _tile_weights(i: Tensors, p: Params) -> Tensors:
    return {"weights": torch.cat(tiling.weights(tiling.Axis(**p)))}


def _tiled_denoise(i: Tensors, p: Params) -> Tensors:
    def local(z: Tensor, sigma: Tensor, batch: Sequence[tiling.Tile]) -> Tensor:
        members = len(z) // len(batch)
        field = torch.stack([i["field"][:, tile.rows[:, None], tile.cols] for tile in batch])
        average = p["mean"] * z.mean((-2, -1), keepdim=True)
        result: Tensor = p["own"] * z + average + field.repeat_interleave(members, 0)
        return result / (1 + sigma**2)[:, None, None, None]

    denoise = tiling.tiled(local, tiling.Tiling(tiling.Axis(**p["y"]), tiling.Axis(**p["x"])))
    x = i["x"]
    for _ in range(p["evaluations"]):
        x = denoise(x, i["sigma"])
    return {"denoised": x}


def _precondition(i: Tensors, p: Params) -> Tensors:
    c_skip, c_out, c_in, c_noise = edm.precondition_coefficients(i["sigma"], p["sigma_data"])
    weight = edm.loss_weight(i["sigma"], p["sigma_data"])
    return {"c_skip": c_skip, "c_out": c_out, "c_in": c_in, "c_noise": c_noise, "loss_weight": weight}


def _schedule(i: Tensors, p: Params) -> Tensors:
    return {"sigmas": edm.schedule(**p)}


def _sample(i: Tensors, p: Params) -> Tensors:
    denoise = edm.gaussian_denoiser(i["mean"], i["covariance"])
    return {"samples": edm.sample(denoise, i["latents"], i["sigmas"], edm.Churn(**p["churn"]), i.get("noises"))}


def _as_field(v: Tensor) -> Tensor:
    """Vectors [m, v] as fields of one channel and one row."""
    return v.unsqueeze(-2).unsqueeze(-2)


def _gaussian_fields(i: Tensors) -> edm.Denoise:
    denoise = edm.gaussian_denoiser(i["mean"], i["covariance"])

    def on_fields(x: Tensor, sigma: Tensor) -> Tensor:
        return _as_field(denoise(x[:, 0, 0], sigma))

    return on_fields


def _observations(i: Tensors) -> guidance.Observations:
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
    guided = _guide(p)(_gaussian_fields(i), _observations(i))
    return {"guided": guided(_as_field(i["x"]), i["sigma"])[:, 0, 0]}


def _assimilate(i: Tensors, p: Params) -> Tensors:
    noise = torch.cat([i["latents"][None], i["noises"]]) if "noises" in i else i["latents"][None]
    sampler = assimilation.Sampler(i["sigmas"], edm.Churn(**p["churn"]), p["together"])
    seen = _observations(i) if len(i["value"]) else None
    guide = _guide(p) if p["method"] else None
    drawn = assimilation.draw_members(_gaussian_fields(i), _as_field(noise), sampler, seen, guide)
    return {"samples": drawn[:, 0, 0]}


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


OPERATIONS: dict[str, Callable[[Tensors, Params], Tensors]] = {
    "patchify": _patchify,
    "unpatchify": _unpatchify,
    "position": _position,
    "memory": _memory,
    "compress": _compress,
    "gate": _gate,
    "attention": _attention,
    "block": _block,
    "denoise": _denoise,
    "tile_geometry": _tile_geometry,
    "tile_weights": _tile_weights,
    "tiled_denoise": _tiled_denoise,
    "precondition": _precondition,
    "schedule": _schedule,
    "sample": _sample,
    "guided_mean": _guided_mean,
    "assimilate": _assimilate,
    "linear_cycle": _linear_cycle,
    "crps": _crps,
    "spread_skill": _spread_skill,
}


class Reference:
    """storm_ref behind the protocol."""

    def describe(self) -> Info:
        """Every operation, in float64."""
        return Info("storm_ref", storm_ref.__version__, frozenset(OPERATIONS))

    def run(self, op: str, inputs: dict[str, Array], params: dict[str, Any]) -> Mapping[str, Array]:
        """Arrays to tensors, the operation, tensors to arrays."""
        if op not in OPERATIONS:
            raise Unsupported(op)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        return {name: value.detach().numpy() for name, value in OPERATIONS[op](tensors, params).items()}


adapter = Reference()
