"""The networks that are measured, each with states of its grid, and the tilings that are tried on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.edm import Denoise
from storm_ref.tiling import Tiling
from storm_ref.tokenisation import sphere_position
from storm_ref.workbench.io.data import Fields, history
from storm_ref.workbench.prior import covariance as covariances
from storm_ref.workbench.prior.covariance import Covariance, covariance_denoiser
from storm_ref.workbench.prior.model import Model

__all__ = [
    "Subject",
    "blend_widths",
    "default_core",
    "generic",
    "legal_halos",
    "tiling_of",
    "trained",
    "without_gradient",
]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network on a grid, with T true states (or smooth fields) in float64 and the condition that belongs to each."""

    name: str
    network: Storm
    condition: Condition  # a batch of T
    covariance: Covariance
    core: tuple[int, int]  # in points
    states: Float[Tensor, "t c h w"]
    latitude: Float[Tensor, " h"]

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of latitudes and of longitudes."""
        return self.states.shape[-2], self.states.shape[-1]

    @property
    def tokens(self) -> tuple[int, int]:
        """Numbers of rows and of columns of tokens."""
        rows, cols = self.condition.position.shape[-3:-1]
        return rows, cols

    def at(self, index: int) -> "Subject":
        """The subject at one of its times; the one condition then serves any number of members."""
        one = slice(index, index + 1)
        condition = replace(self.condition, static=self.condition.static[one], memory=self.condition.memory[one])
        return replace(self, condition=condition, states=self.states[one])

    def untiled(self) -> Denoise:
        """The denoiser D."""
        return self.tiled(Tiling.whole(self.grid, self.condition.periodic, self.network.config.patch))

    def tiled(self, tiling: Tiling) -> Denoise:
        """The denoiser T[D]."""
        return without_gradient(covariance_denoiser(self.network, self.condition, tiling, self.covariance))

    def network_off(self) -> Denoise:
        """The denoiser G, that is D with F = 0."""
        return lambda x, s: covariances.precondition(lambda z, _: torch.zeros_like(z), x, s, self.covariance)


def without_gradient(denoise: Denoise) -> Denoise:
    """The same denoiser, recording for gradients only if the state asks for one."""

    def denoise_recording_if_asked(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.requires_grad):
            return denoise(x, sigma)

    return denoise_recording_if_asked


def generic(
    grid: tuple[int, int],
    core: tuple[int, int],
    generator: torch.Generator,
    count: int = 1,
    width: int = 64,
    heads: int = 4,
    depth: int = 3,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Subject:
    """A network of random weights (`denoiser.randomise`) with one point a token on a globe.

    Its `count` states of 2 channels and its memory of 3 past frames are smooth random fields of variance 1.
    """
    network = Storm(StormConfig(2, 1, (1, 1), width, heads, depth, window=window))
    randomise(network, generator)
    network = network.to(dtype).requires_grad_(False)
    latitude = 90 - (torch.arange(grid[0], dtype=torch.float64) + 0.5) * 180 / grid[0]
    longitude = torch.arange(grid[1], dtype=torch.float64) * 360 / grid[1]
    position = sphere_position(latitude, longitude, (1, 1))
    fields = _smooth_fields((count, 1 + 3 + 3, 2, *grid), generator).to(dtype)
    static = fields[:, 0, :1]
    past = fields[:, 1:4]
    past_static = fields[:, 4:, :1]
    age = torch.tensor([6.0, 12.0, 18.0], dtype=torch.float64).expand(count, -1)
    memory = network.compress(past, past_static, age, position)
    return Subject(
        name="generic",
        network=network,
        condition=Condition(static, memory, position[None], periodic=True),
        covariance=covariances.white((2, *grid)),
        core=core,
        states=_smooth_fields((count, 2, *grid), generator),
        latitude=latitude,
    )


def _smooth_fields(shape: Sequence[int], generator: torch.Generator, power: float = 3.0) -> Float[Tensor, "..."]:
    """Random fields of variance 1, periodic along the last axis only; amplitude falls as wave number^(-power / 2)."""
    height, width = shape[-2:]
    noise = torch.fft.fft2(torch.randn(*shape[:-2], 2 * height, width, generator=generator, dtype=torch.float64))
    ky = torch.fft.fftfreq(2 * height, 0.5 / height)
    kx = torch.fft.fftfreq(width, 1 / width)
    amplitude = (1 + (ky[:, None] / 2) ** 2 + kx**2).double() ** (-power / 4)
    field: Tensor = torch.fft.ifft2(noise * amplitude).real[..., :height, :]
    return field / field.std((-2, -1), keepdim=True)


def trained(
    model: Model, fields: Fields, when: Shaped[np.ndarray, " t"], core: tuple[int, int] | None = None
) -> Subject:
    """A trained model at the true states of the times `when`, with cores of `default_core` unless given.

    Raises ValueError when the fields are not those the model was trained for.
    """
    model.check(fields)
    histories = [history(fields.time, time, model.frames, model.time_step) for time in when]
    index = np.stack([frames for frames, _ in histories])
    age = torch.from_numpy(np.stack([ages for _, ages in histories]))
    values = torch.from_numpy(fields.values)
    past = torch.stack([model.background.anomalies(values[i], fields.time[i]) for i in index])
    normalised = (past / model.background.anomaly_std[:, None, None]).float()
    static = torch.stack([model.forcing(fields.time[i]) for i in index])
    with torch.no_grad():
        memory = model.network.compress(normalised, static, age, model.position)
    now = values[np.searchsorted(fields.time, when)].double()
    return Subject(
        name="trained",
        network=model.network,
        condition=Condition(model.forcing(when), memory, model.position[None], model.periodic),
        covariance=model.covariance,
        core=core or default_core(model),
        states=(now - model.background.predict(past, when)) / model.background.departure_std[:, None, None],
        latitude=model.latitude,
    )


def default_core(model: Model, least: int = 6) -> tuple[int, int]:
    """The largest cores, in points, that cut each axis into at least `least` equal tiles; one patch where none does."""

    def size(length: int, patch: int) -> int:
        tokens = length // patch
        return patch * max([c for c in range(1, tokens + 1) if not tokens % c and tokens // c >= least], default=1)

    patch = model.config.patch
    return size(len(model.latitude), patch[0]), size(len(model.longitude), patch[1])


def tiling_of(subject: Subject, halo: int, blend: int = 0) -> Tiling:
    """A tiling with the subject's cores and this halo on both axes; `blend` is reduced to what each core allows.

    Raises ValueError for a halo or a blend that is no multiple of the patch or not legal, as `tiling.Axis` does.
    """
    patch = subject.network.config.patch
    widest = [core // p // 2 * p for core, p in zip(subject.core, patch, strict=True)]
    return Tiling.of(
        subject.grid,
        subject.core,
        halo=(halo, halo),
        blend=(min(blend, widest[0]), min(blend, widest[1])),
        periodic=subject.condition.periodic,
        patch=patch,
    )


def legal_halos(subject: Subject) -> list[int]:
    """Halos in points: 0, then doubling from one patch up, and the largest, with which extents cover the circle."""
    patch = max(subject.network.config.patch)
    space = subject.grid[1] - subject.core[1]
    largest = (space // 2 if subject.condition.periodic else space) // patch * patch
    doubling = [patch * 2**i for i in range(12)]
    return [0, *(halo for halo in doubling if halo < largest), largest]


def blend_widths(subject: Subject, halo: int) -> list[int]:
    """Blends in points: none, half of the halo and the widest that is legal."""
    patch = max(subject.network.config.patch)
    widest = min(halo, max(subject.core) // 2 // patch * patch)
    return sorted({0, min(halo // 2 // patch * patch, widest), widest})
