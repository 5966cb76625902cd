"""A model: the network and everything else needed to draw a state given past ones, in one safetensors file.

    past frames   become anomalies (background.py), which the network compresses into its memory, [NET-2]
    x             = (state - background) / std is what is diffused
    D(x; s)       is evaluated by tiles, with the covariance of the departures (covariance.py)

The file holds tensors and JSON, so that loading it runs no code.
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
from storm_ref.workbench.prior.background import Background
from storm_ref.workbench.prior.covariance import Covariance, covariance_denoiser, sharded_covariance_denoiser

__all__ = ["Model", "Prior", "default_patch", "default_tiling", "load", "read_tensors", "save", "write_tensors"]

_KIND = "storm-ref model 1"
_HOUR = np.timedelta64(1, "h")
# Names of tensors in the file, kept so that every file written so far can be read.
_BACKGROUND_KEYS = {
    "climatology": "climate.mean",
    "regression": "climate.slope",
    "anomaly_std": "climate.anomaly_std",
    "departure_std": "climate.departure_std",
    "longitude": "climate.longitude",
}


def default_patch(height: int, width: int, most: int = 24) -> tuple[int, int]:
    """Return the largest patch of at most `most` points that divides the grid.

    Of several equally large ones it is the squarest, and of two equally square ones the wider.
    """
    heights = [n for n in range(1, min(height, most) + 1) if not height % n]
    widths = [n for n in range(1, min(width, most) + 1) if not width % n]
    patches = [(y, x) for y in heights for x in widths if y * x <= most]
    return max(patches, key=lambda patch: (patch[0] * patch[1], min(patch), patch[1]))


def default_tiling(model: "Model", most: int = 1024) -> Tiling:
    """Return the tiling that the model was trained with, else one chosen by the size of the grid.

    Up to `most` tokens it is a single tile. Beyond that cores have 24 x 24 tokens, fewer where 24 does not divide a
    periodic axis, with a halo of a third and a blend of a sixth of the core.
    """
    if model.tiling is not None:
        return model.tiling
    grid = (len(model.latitude), len(model.longitude))
    patch = model.config.patch
    rows = grid[0] // patch[0]
    cols = grid[1] // patch[1]
    if rows * cols <= most:
        return Tiling.whole(grid, model.periodic, patch)
    core_rows = min(24, rows)
    core_cols = max(c for c in range(1, 25) if not cols % c) if model.periodic else min(24, cols)

    def points(divisor: int) -> tuple[int, int]:
        return max(core_rows // divisor, 1) * patch[0], max(core_cols // divisor, 1) * patch[1]

    return Tiling.of(grid, core=points(1), halo=points(3), blend=points(6), periodic=model.periodic, patch=patch)


@dataclass(frozen=True)
class Prior:
    """The prior of one analysis: state = background + std * x, with D for x. A batch of 1 is shared by all members."""

    background: Float[Tensor, "b c h w"]  # physical units
    std: Float[Tensor, " c"]
    denoise: Denoise
    covariance: Covariance  # of x
    world: World = field(default_factory=World.alone)  # `denoise` is of this data rank's members

    def physical(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        """Convert members from normalised departures to the units of the file."""
        return self.background + self.std[:, None, None] * x


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its background, covariance and grid."""

    config: StormConfig
    network: Storm
    background: Background
    covariance: Covariance
    static: Float[Tensor, "s h w"]  # constant fields, each with mean 0 and standard deviation 1 over the grid
    latitude: Float[Tensor, " h"]  # degrees
    longitude: Float[Tensor, " w"]  # degrees east
    periodic: bool
    season: bool  # whether the network is conditioned on the season (TrainSettings.season)
    frames: int  # K
    time_step: np.timedelta64
    variables: tuple[str, ...]
    units: tuple[str, ...]
    training: Mapping[str, Any] = field(default_factory=dict)  # a record for readers: settings, losses
    tiling: Tiling | None = None  # used in training, and the default in sampling
    world: World = field(default_factory=World.alone)  # the ranks over which `shard` partitioned the network

    @property
    def position(self) -> Float[Tensor, "rows cols p"]:
        """Positions of the tokens: on the sphere for a periodic grid, else in units of the region's longer side."""
        if self.periodic:
            return sphere_position(self.latitude, self.longitude, self.config.patch)
        sides = (float(a.max() - a.min()) for a in (self.latitude, self.longitude))
        return region_position(self.latitude, self.longitude, self.config.patch, max(*sides, 1e-6))

    def forcing(self, time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t s h w"]:
        """Return the constant fields and the known forcings at these times, in float32."""
        known = torch.from_numpy(calendar(time, self.latitude.numpy(), self.longitude.numpy()))
        constant = self.static.float().expand(len(known), -1, -1, -1)
        return torch.cat([constant, known if self.season else known[:, :2]], 1)

    def anomalies(self, values: Float[Tensor, "t c h w"], time: Shaped[np.ndarray, " t"]) -> Float[Tensor, "t c h w"]:
        """Return the normalised anomalies of past frames, which the network is conditioned on, in float32."""
        return (self.background.anomalies(values, time) / self.background.anomaly_std[:, None, None]).float()

    def denoiser(
        self,
        past: Float[Tensor, "b k c h w"],
        past_static: Float[Tensor, "b k s h w"],
        age: Float[Tensor, "b k"],
        static: Float[Tensor, "bs s h w"],
        tiles: Tiling | ShardedTiles | None,
        tiles_per_batch: int = 16,
    ) -> Denoise:
        """Return D(x; s) given normalised anomalies of past frames, newest first, their forcings and ages in hours.

        static: the forcings of the analysis. tiles: a tiling, this rank's share of one, or None for the whole domain at
        once; `tiles_per_batch` applies to a tiling.
        """
        if isinstance(tiles, ShardedTiles):
            memory = compress_sharded(self.network, past, past_static, age, self.position, tiles)
            placeholder = memory.new_zeros(1).expand(1, *self.position.shape[:2], self.config.width)
            condition = Condition(static, placeholder, self.position[None], self.periodic)
            return sharded_covariance_denoiser(self.network, condition, tiles, self.covariance, memory)
        memory = self.network.compress(past, past_static, age, self.position)
        condition = Condition(static, memory, self.position[None], self.periodic)
        return covariance_denoiser(self.network, condition, tiles, self.covariance, tiles_per_batch)

    def prior(
        self,
        past: Float[Tensor, "b k c h w"],
        times: Shaped[np.ndarray, " k"],
        when: np.datetime64,
        tiling: Tiling | None = None,
    ) -> Prior:
        """Return the prior at `when` given K past frames at `times`, newest first, in physical units.

        A batch of 1 is broadcast to all members; of a larger one each data rank takes its own members.
        """
        batch = len(past)
        at = np.array([when])
        anomalies = torch.stack([self.background.anomalies(frames, times) for frames in past])
        normalised = (anomalies / self.background.anomaly_std[:, None, None]).float()
        if batch > 1:
            own = self.world.share(batch)
            normalised = normalised[own.start : own.stop]
        members = len(normalised)
        age = torch.from_numpy(np.asarray((at[:, None] - times) / _HOUR, np.float64)).expand(members, -1)
        past_static = self.forcing(times).expand(members, -1, -1, -1, -1)
        cut = tiling or default_tiling(self)
        tiles = cut if self.world.mesh.tile == 1 else ShardedTiles(cut, self.world)
        with torch.no_grad():
            denoise = self.denoiser(normalised, past_static, age, self.forcing(at), tiles)
        background = self.background.predict(anomalies, np.repeat(at, batch))
        return Prior(background, self.background.departure_std, denoise, self.covariance, self.world)

    def prior_at(self, fields: Fields, when: np.datetime64, tiling: Tiling | None = None) -> Prior:
        """Return the prior at `when` given the true past in `fields`.

        Raises ValueError when the fields do not match the model or hold too little of the past.
        """
        self.check(fields)
        index, _ = history(fields.time, when, self.frames, self.time_step)
        return self.prior(torch.from_numpy(fields.values[index])[None], fields.time[index], when, tiling)

    def check_shares(self, world: World, tiling: Tiling | None, members: int) -> None:
        """Raise ValueError, saying what to change, when a rank would get no heads, tiles or members, [PAR-4]."""
        cut = tiling or default_tiling(self)
        world.mesh.check(self.config, len(cores(cut.y)) * len(cores(cut.x)), members)

    def shard(self, world: World) -> "Model":
        """Partition the network over the ranks of a world, in place, and return a model that draws on all of them.

        The model it is called on must not be used any more.
        """
        network = tensor_parallel(self.network, world)
        shard_weights(network, network, world, keep=True)
        if world.mesh.data > 1:
            register_fsdp_forward_method(network, "compress")
        return replace(self, network=network, world=world)

    def check(self, fields: Fields) -> None:
        """Raise ValueError, naming what differs, unless the fields have the variables and the grid of this model."""
        if fields.variables != self.variables:
            raise ValueError(f"the model is of {self.variables}, the data of {fields.variables}: choose its variables")
        for name, expected, given in (
            ("latitudes", self.latitude.numpy(), fields.latitude),
            ("longitudes", self.longitude.numpy(), fields.longitude),
        ):
            if expected.shape != given.shape or not np.allclose(expected, given, atol=1e-4):
                raise ValueError(f"the {name} of the data are not the model's: interpolate to its grid or retrain")


def save(model: Model, path: Path) -> None:
    """Write the model to one safetensors file, which replaces `path` when it is complete.

    Background and covariance are rounded to float32.
    """
    tensors = {f"network.{name}": weight for name, weight in model.network.state_dict().items()}
    tensors |= {key: getattr(model.background, name).float() for name, key in _BACKGROUND_KEYS.items()}
    tensors |= {f"covariance.{name}": getattr(model.covariance, name).float() for name in ("vectors", "values", "rest")}
    tensors |= {"static": model.static.float(), "latitude": model.latitude, "longitude": model.longitude}
    about = {
        "config": asdict(model.config),
        "shape": model.covariance.shape,
        "periodic": model.periodic,
        "season": model.season,
        "frames": model.frames,
        "step_ns": int(model.time_step / np.timedelta64(1, "ns")),
        "variables": model.variables,
        "units": model.units,
        "training": dict(model.training),
        "tiling": model.tiling and asdict(model.tiling),
    }
    write_tensors(path, _KIND, tensors, about)


def load(path: Path) -> Model:
    """Read a model from its file.

    Raises ValueError, naming the file, when it is truncated, of another kind, or its parts do not fit one another.
    """
    tensors, about = read_tensors(path, _KIND)
    try:
        return _assemble(tensors, about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its parts do not fit one another ({error}); train the model again") from error


def _assemble(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Model:
    sizes: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in about["config"].items()}
    config = StormConfig(**sizes)
    network = Storm(config)
    prefix = "network."
    network.load_state_dict({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    background = Background(**{name: tensors[key].double() for name, key in _BACKGROUND_KEYS.items()})
    covariance = Covariance(
        vectors=tensors["covariance.vectors"].double(),
        values=tensors["covariance.values"].double(),
        rest=tensors["covariance.rest"].double(),
        shape=tuple(about["shape"]),
    )
    expected = (config.channels, len(tensors["latitude"]), len(tensors["longitude"]))
    if covariance.shape != expected or background.climatology.shape[1:] != expected:
        raise ValueError(f"climatology {tuple(background.climatology.shape)} and grid {expected} differ")
    return Model(
        config=config,
        network=network.eval(),
        background=background,
        covariance=covariance,
        static=tensors["static"],
        latitude=tensors["latitude"],
        longitude=tensors["longitude"],
        periodic=bool(about["periodic"]),
        season=bool(about["season"]),
        frames=int(about["frames"]),
        time_step=np.timedelta64(int(about["step_ns"]), "ns"),
        variables=tuple(about["variables"]),
        units=tuple(about["units"]),
        training=about["training"],
        tiling=_read_tiling(about.get("tiling")),
    )


def _read_tiling(about: Mapping[str, Any] | None) -> Tiling | None:
    return None if about is None else Tiling(Axis(**about["y"]), Axis(**about["x"]))


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file of a stated `kind` that carries `about` as JSON; it replaces `path` when complete."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        save_file(contiguous, part, {"kind": kind, "about": json.dumps(about)})


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and `about` of a file of this kind.

    Raises ValueError, naming the file and the remedy, for one that cannot be read or is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as safetensors ({error}); check the path, or copy or make the file again"
        ) from error
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: this is {metadata.get('kind', 'something else')!r}, not {kind!r}: give another file")
    return tensors, json.loads(metadata["about"])
