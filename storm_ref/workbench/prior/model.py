"""A model: the network and all it needs to draw today's state from past ones, in one safetensors file.

    past frames -> anomalies (climate.py), memory ([NET-2]);  what is diffused: (state - background) / std
    D(x; s)     by tiles, with the covariance of the departures (covariance.py)

The file holds tensors and JSON, nothing that could run code when it is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise
from storm_ref.parallel.halo import ShardedTiles, compress_sharded
from storm_ref.parallel.mesh import World
from storm_ref.parallel.shard import shard_weights
from storm_ref.parallel.tensor import tensor_parallel
from storm_ref.tiling import Axis, Tiling, cores
from storm_ref.tokenisation import region_position, sphere_position
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.data import Fields, calendar, history
from storm_ref.workbench.prior.background import Climate
from storm_ref.workbench.prior.covariance import Covariance, bind_covariance_sharded, covariance_denoiser

__all__ = ["Model", "Prior", "default_patch", "default_tiling", "load", "read_tensors", "save", "write_tensors"]

_KIND = "storm-ref model 1"
_HOUR = np.timedelta64(1, "h")


def default_patch(height: int, width: int, most: int = 24) -> tuple[int, int]:
    """The largest patch of at most `most` points that divides the grid; of equals the squarest, then the flattest."""
    sides = [[n for n in range(1, min(size, most) + 1) if not size % n] for size in (height, width)]
    fits = [(y, x) for y in sides[0] for x in sides[1] if y * x <= most]
    return max(fits, key=lambda p: (p[0] * p[1], min(p), p[1]))


def default_tiling(model: "Model", most: int = 1024) -> Tiling:
    """The tiles it was trained with. Else one tile for at most `most` tokens; beyond that cores of 24 x 24 tokens, as
    far as they divide a periodic axis, with a halo of a third and a blend of a sixth of the core.
    """
    if model.tiling is not None:
        return model.tiling
    grid, patch = (len(model.latitude), len(model.longitude)), model.config.patch
    tokens = [n // p for n, p in zip(grid, patch, strict=True)]
    if tokens[0] * tokens[1] <= most:
        return Tiling.whole(grid, model.periodic, patch)
    cores = [min(24, tokens[0]), min(24, tokens[1])]
    if model.periodic:
        cores[1] = max(c for c in range(1, 25) if not tokens[1] % c)
    size = [c * p for c, p in zip(cores, patch, strict=True)]
    halo, blend = ([max(c // part, 1) * p for c, p in zip(cores, patch, strict=True)] for part in (3, 6))
    return Tiling.of(grid, (size[0], size[1]), (halo[0], halo[1]), (blend[0], blend[1]), model.periodic, patch)


@dataclass(frozen=True)
class Prior:
    """One analysis before its observations: state = background + std * x, and D for x."""

    background: Float[Tensor, "b c h w"]
    std: Float[Tensor, " c"]
    denoise: Denoise
    covariance: Covariance
    world: World | None = None  # where the network runs on many ranks: `denoise` is then of this rank's members

    def physical(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        """Members in the units of the file."""
        return self.background + self.std[:, None, None] * x


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its climate, covariance and grid. `training` is a record for readers: settings, losses, times."""

    config: StormConfig
    network: Storm
    climate: Climate
    covariance: Covariance
    static: Float[Tensor, "s h w"]  # constant fields, each with mean 0 and standard deviation 1 over the grid
    latitude: Float[Tensor, " h"]
    longitude: Float[Tensor, " w"]
    periodic: bool
    season: bool  # whether the network is told the season (TrainSettings.season)
    frames: int
    step: np.timedelta64
    variables: tuple[str, ...]
    units: tuple[str, ...]
    training: Mapping[str, Any] = field(default_factory=dict)
    tiling: Tiling | None = None  # that it was trained with, and is run with unless the user says otherwise
    world: World | None = None  # of the ranks that the network is spread over, see `spread`

    @property
    def position(self) -> Float[Tensor, "rows cols p"]:
        """On the sphere when the grid goes round it, else in units of the region's larger side."""
        if self.periodic:
            return sphere_position(self.latitude, self.longitude, self.config.patch)
        sides = (float(a.max() - a.min()) for a in (self.latitude, self.longitude))
        return region_position(self.latitude, self.longitude, self.config.patch, max(*sides, 1e-6))

    def forcing(self, time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t s h w"]:
        """Constant fields and known forcings at these times, float32."""
        known = torch.from_numpy(calendar(time, self.latitude.numpy(), self.longitude.numpy()))
        still = self.static.float().expand(len(known), -1, -1, -1)
        return torch.cat([still, known if self.season else known[:, :2]], 1)

    def anomalies(self, values: Float[Tensor, "t c h w"], time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t c h w"]:
        """What the network is shown of past frames, float32."""
        return (self.climate.anomalies(values, time) / self.climate.anomaly_std[:, None, None]).float()

    def prior(
        self,
        past: Float[Tensor, "b k c h w"],
        times: Shaped[np.ndarray, " k"],
        when: np.datetime64,
        tiling: Tiling | None = None,
    ) -> Prior:
        """The prior at `when` given K past frames, newest first, in the file's units; batch 1 serves every member."""
        batch, at = len(past), np.array([when])
        anomalies = torch.stack([self.climate.anomalies(frames, times) for frames in past])
        shown = (anomalies / self.climate.anomaly_std[:, None, None]).float()
        if self.world is not None and batch > 1:
            own = self.world.share(batch)
            shown = shown[own.start : own.stop]
        age = torch.from_numpy(np.asarray((at[:, None] - times) / _HOUR, np.float64)).expand(len(shown), -1)
        static = self.forcing(times).expand(len(shown), -1, -1, -1, -1)
        with torch.no_grad():
            denoise = self._denoise(shown, static, age, self.forcing(at), tiling or default_tiling(self))
        background = self.climate.background(anomalies, np.repeat(at, batch))
        return Prior(background, self.climate.departure_std, denoise, self.covariance, self.world)

    def _denoise(self, past: Tensor, static: Tensor, age: Tensor, now: Tensor, tiling: Tiling) -> Denoise:
        if self.world is None or self.world.mesh.tile == 1:
            memory = self.network.compress(past, static, age, self.position)
            condition = Condition(now, memory, self.position[None], self.periodic)
            return covariance_denoiser(self.network, condition, tiling, self.covariance)
        parts = ShardedTiles(tiling, self.world)
        memory = compress_sharded(self.network, past, static, age, self.position, parts)
        nothing = memory.new_zeros(1).expand(1, *self.position.shape[:2], self.config.width)
        condition = Condition(now, nothing, self.position[None], self.periodic)
        return bind_covariance_sharded(self.network, condition, parts, self.covariance, memory)

    def check_shares(self, world: World, tiling: Tiling | None, members: int) -> None:
        """Raises ValueError, saying what to change, when heads, tiles or members cannot be shared out, [PAR-4]."""
        cut = tiling or default_tiling(self)
        world.mesh.check(self.config, len(cores(cut.y)) * len(cores(cut.x)), members)

    def spread(self, world: World) -> "Model":
        """The same model on the ranks of a world, ready to draw; the one given is not to be used any more."""
        network = tensor_parallel(self.network, world)
        shard_weights(network, network, world, keep=True)
        if world.mesh.data > 1:
            register_fsdp_forward_method(network, "compress")
        return replace(self, network=network, world=world)

    def prior_at(self, fields: Fields, when: np.datetime64, tiling: Tiling | None = None) -> Prior:
        """The prior at `when` from the true past in `fields`. Raises ValueError when they are not of this model's kind,
        or hold too little of the past.
        """
        self.check(fields)
        index, _ = history(fields.time, when, self.frames, self.step)
        return self.prior(torch.from_numpy(fields.values[index])[None], fields.time[index], when, tiling)

    def check(self, fields: Fields) -> None:
        """Raises ValueError naming what differs, unless variables and grid are those of this model."""
        if fields.variables != self.variables:
            raise ValueError(f"the model is of {self.variables}, the data of {fields.variables}: choose its variables")
        for name, mine, theirs in (
            ("latitudes", self.latitude.numpy(), fields.latitude),
            ("longitudes", self.longitude.numpy(), fields.longitude),
        ):
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, atol=1e-4):
                raise ValueError(f"the {name} of the data are not the model's: interpolate to its grid or retrain")


def save(model: Model, path: Path) -> None:
    """Write the model to one file, under a temporary name first."""
    parts = {"climate": model.climate, "covariance": model.covariance}
    tensors = {f"network.{k}": v for k, v in model.network.state_dict().items()}
    tensors |= {f"{p}.{k}": v.float() for p, o in parts.items() for k, v in vars(o).items() if isinstance(v, Tensor)}
    tensors |= {"static": model.static.float(), "latitude": model.latitude, "longitude": model.longitude}
    about = {
        "config": asdict(model.config), "shape": model.covariance.shape, "periodic": model.periodic,
        "season": model.season, "frames": model.frames, "step_ns": int(model.step / np.timedelta64(1, "ns")),
        "variables": model.variables, "units": model.units, "training": dict(model.training),
        "tiling": model.tiling and asdict(model.tiling),
    }  # fmt: skip
    write_tensors(path, _KIND, tensors, about)


def load(path: Path) -> Model:
    """Read a model. Raises ValueError, naming the file, when it is truncated, foreign, or its parts do not fit."""
    tensors, about = read_tensors(path, _KIND)
    try:
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        config = StormConfig(**sizes)
        network = Storm(config)
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        network.load_state_dict(weights)
        part = {
            p: {k.removeprefix(f"{p}."): v.double() for k, v in tensors.items() if k.startswith(f"{p}.")}
            for p in ("climate", "covariance")
        }
        model = Model(
            config, network.eval(), Climate(**part["climate"]),
            Covariance(**part["covariance"], shape=tuple(about["shape"])),
            tensors["static"], tensors["latitude"], tensors["longitude"],
            bool(about["periodic"]), bool(about["season"]), int(about["frames"]),
            np.timedelta64(int(about["step_ns"]), "ns"), tuple(about["variables"]), tuple(about["units"]),
            about["training"], _read_tiling(about.get("tiling")),
        )  # fmt: skip
        expected = (config.channels, len(model.latitude), len(model.longitude))
        if model.covariance.shape != expected or model.climate.mean.shape[1:] != expected:
            raise ValueError(f"climate {tuple(model.climate.mean.shape)} and grid {expected} differ")
        return model
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its parts do not fit one another ({error}); train the model again") from error


def _read_tiling(about: Mapping[str, Any] | None) -> Tiling | None:
    return None if about is None else Tiling(Axis(**about["y"]), Axis(**about["x"]))


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file that says what `kind` it is and carries `about` as JSON; renamed into place when complete."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(whole, part, {"kind": kind, "about": json.dumps(about)})


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and `about` of a file of this kind; ValueError naming the file and the remedy for any other."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}); check the path, or copy or make the file again"
        ) from error
    if about.get("kind") != kind:
        raise ValueError(f"{path}: this is {about.get('kind', 'something else')!r}, not {kind!r}: give another file")
    return tensors, json.loads(about["about"])
