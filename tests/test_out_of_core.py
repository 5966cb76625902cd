"""Out of core: bit for bit the tiled denoiser in memory, through interruptions and damage, in bounded memory.

The oracle is `tiled_denoiser` on whole tensors, and `Storm.compress`."""

import gc
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from counting import Live
from hypothesis import given
from hypothesis import strategies as st
from small_problems import NETWORK, normal
from torch import Tensor

from storm_ref.config import StormConfig
from storm_ref.denoiser import Condition, Storm, randomise
from storm_ref.experiments.out_of_core import Domain, compress, create, denoise, open_array
from storm_ref.tiling import Axis, Tiling, batches, tiled_denoiser, tiles
from storm_ref.tokenisation import latitude_position, region_position, sphere_position

CONFIG = StormConfig(2, 1, (2, 2), width=8, heads=2, depth=1, mlp_ratio=2, position_octaves=2, noise_features=4)
# Four tiles meet at corners, extents wrap, the last core is short, and tiles have four shapes, two batches each.
TILING = Tiling(Axis(14, 4, 4, 2, patch=2), Axis(16, 4, 4, 2, True, 2))
BATCHES, ROWS, TOGETHER = 8, 4, 2
SIGMA = 0.7


class Interrupted(Exception):
    """Raised in the middle of a run."""


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Interrupted

    return progress


# Worlds: the same numbers in memory and on disk


@dataclass(frozen=True)
class World:
    """A network with generic weights, its condition and state in memory, and the axes."""

    network: Storm
    condition: Condition
    x: Tensor
    latitude: Tensor
    longitude: Tensor

    def want(self, tiling: Tiling, tiles_per_batch: int, sigma: float = SIGMA) -> Tensor:
        with torch.no_grad():
            level = torch.tensor([sigma], dtype=torch.float64)
            return tiled_denoiser(self.network, self.condition, tiling, tiles_per_batch)(self.x[None], level)[0]


def world(
    tiling: Tiling,
    config: StormConfig = CONFIG,
    dtype: torch.dtype = torch.float64,
    state: torch.dtype = torch.float64,
    periodic: bool = True,
) -> World:
    height, width = tiling.y.length, tiling.x.length
    lat = torch.linspace(83.3, -71.7, height, dtype=torch.float64)
    lon = torch.arange(width, dtype=torch.float64) * ((360 if periodic else 77) / width) - 13.1
    rows, cols = height // config.patch[0], width // config.patch[1]
    places = {
        1: lambda: latitude_position(lat, cols, config.patch).contiguous(),
        2: lambda: region_position(lat, lon, config.patch, 50.0),
        3: lambda: sphere_position(lat, lon, config.patch),
    }[config.position_features]()
    network = Storm(config)
    randomise(network, torch.Generator().manual_seed(5))
    memory = normal(1, rows, cols, config.width, seed=2).to(dtype)
    static = normal(1, config.static_channels, height, width, seed=1)
    x = normal(config.channels, height, width, seed=3).to(state)
    return World(network.to(dtype), Condition(static, memory, places[None], periodic), x, lat, lon)


def store(path: Path, values: np.ndarray, kind: str = "memmap") -> Any:
    if kind == "zarr":
        array = create(path, values.shape, [min(n, 5 + k) for k, n in enumerate(values.shape)], values.dtype.name)
    else:
        dtype = values.dtype.newbyteorder(">") if kind == "foreign" else values.dtype
        array = np.memmap(path, dtype, "w+", shape=values.shape, order="F" if kind == "foreign" else "C")
    if values.size:
        array[...] = values
    return array


@dataclass(frozen=True)
class OnDisk:
    """A world in a folder, with room for the result and for an unfinished run."""

    world: World
    domain: Domain
    out: Any
    run: Path

    def denoise(
        self, tiling: Tiling = TILING, tiles_per_batch: int = TOGETHER, sigma: float = SIGMA, **other: Any
    ) -> Tensor:
        denoise(self.world.network, self.domain, sigma, tiling, self.out, self.run, tiles_per_batch, **other)
        return torch.from_numpy(np.array(self.out[...], np.dtype(self.out.dtype).newbyteorder("=")))


def on_disk(folder: Path, w: World, kind: str = "memmap", given: bool = False) -> OnDisk:
    def put(name: str, values: Tensor) -> Any:
        return store(folder / name, values.numpy(), kind)

    domain = Domain(
        put("state", w.x),
        put("static", w.condition.static[0]),
        put("memory", w.condition.memory[0]),
        w.latitude,
        w.longitude,
        w.condition.periodic,
        put("position", w.condition.position[0]) if given else None,
    )
    return OnDisk(w, domain, put("out", torch.full_like(w.x, torch.nan)), folder / "run")


@pytest.fixture
def disk(tmp_path: Path) -> OnDisk:
    return on_disk(tmp_path, world(TILING))


@contextmanager
def evaluations(network: Storm) -> Iterator[list[Condition]]:
    """Record what the network was conditioned on, one entry an evaluation."""
    seen: list[Condition] = []
    hook = network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    yield seen
    hook.remove()


@st.composite
def axes(draw: st.DrawFn, patch: int, periodic: bool) -> Axis:
    """One tile, or two to four; halos up to what is allowed, wider than a core; a shorter last core; hard and soft.
    What the network sees is whole patches; a blend may end within one.
    """
    core, count = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if count == 1:
        return Axis(core * patch, core * patch, periodic=periodic)
    last = core if periodic else draw(st.integers(1, core))
    halo = draw(st.integers(0, (count - 1) * core // 2 if periodic else 2 * core + 1))
    blend = draw(st.integers(0, min(halo * patch, core * patch // 2, last * patch)))
    return Axis(((count - 1) * core + last) * patch, core * patch, halo * patch, blend, periodic)


# The denoiser


@given(st.data(), st.integers(1, 4), st.sampled_from(["memmap", "zarr", "foreign"]), st.booleans())
def test_denoise_equals_tiled_denoiser(data: st.DataObject, tiles_per_batch: int, kind: str, periodic: bool) -> None:
    """Bit for bit on any tiling, in both dtypes of the network and of the state, on every kind of array."""
    patch = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    tiling = Tiling(data.draw(axes(patch[0], False)), data.draw(axes(patch[1], periodic)))
    config = replace(CONFIG, patch=patch, static_channels=data.draw(st.integers(0, 1)))
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.float64])) for _ in range(2)]
    w = world(tiling, config, *dtypes, periodic=periodic or data.draw(st.booleans()))
    with TemporaryDirectory() as folder:
        disk = on_disk(Path(folder), w, kind)
        with evaluations(w.network) as seen:
            got = disk.denoise(tiling, tiles_per_batch)
        with evaluations(w.network) as in_memory:
            assert torch.equal(got, w.want(tiling, tiles_per_batch))
        assert len(seen) == len(in_memory) and not any(disk.run.iterdir())


@pytest.mark.parametrize("tiles_per_batch", [1, 2, 3, 16])
def test_denoise_equals_tiled_denoiser_on_the_table(disk: OnDisk, tiles_per_batch: int) -> None:
    """Corners of four tiles, where the order of adding shows, in batches that cut rows of tiles anywhere."""
    assert torch.equal(disk.denoise(tiles_per_batch=tiles_per_batch), disk.world.want(TILING, tiles_per_batch))


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(Axis(8, 4, 2, 2, True, 2), Axis(12, 4, 4, 2, True, 2)),
        Tiling(Axis(8, 4, 2, 2, True, 2), Axis(8, 4, 2, 2, True, 2)),
        Tiling(Axis(12, 4, 16, 2, patch=2), Axis(12, 4, 12, 2, patch=2)),
        Tiling(Axis(16, 4, 2, 2, patch=2), Axis(16, 4, 2, 2, patch=2)),
    ],
    ids=["both axes periodic", "two tiles meet on both sides", "every extent is the domain", "batches are not in rows"],
)
def test_denoise_equals_tiled_denoiser_at_the_limits(tmp_path: Path, tiling: Tiling) -> None:
    """Extents may be alike where the parts with weight are not: these share a batch."""
    w = world(tiling)
    assert torch.equal(on_disk(tmp_path, w).denoise(tiling, 3), w.want(tiling, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoise_blends_in_the_dtype_of_the_state(tmp_path: Path, dtype: torch.dtype) -> None:
    w = world(TILING, dtype=dtype, state=torch.float32)
    assert torch.equal(on_disk(tmp_path, w, "foreign").denoise(), w.want(TILING, TOGETHER))


@pytest.mark.parametrize("features", [1, 2, 3])
def test_denoise_takes_given_positions(tmp_path: Path, features: int) -> None:
    w = world(TILING, replace(CONFIG, position_features=features))
    assert torch.equal(on_disk(tmp_path, w, given=True).denoise(), w.want(TILING, TOGETHER))


@pytest.mark.parametrize("periodic", [False, True])
def test_denoise_closes_the_circle_of_windowed_attention(tmp_path: Path, periodic: bool) -> None:
    """A tile that covers all columns wraps inside, on a periodic domain only."""
    tiling = Tiling(Axis(12, 4, 2, 2, patch=2), Axis(12, 12, periodic=periodic, patch=2))
    w = world(tiling, replace(CONFIG, window=1), periodic=periodic)
    assert torch.equal(on_disk(tmp_path, w).denoise(tiling), w.want(tiling, TOGETHER))
    other = replace(w, condition=replace(w.condition, periodic=not periodic))
    assert not torch.equal(w.want(tiling, TOGETHER), other.want(tiling, TOGETHER))


def test_denoise_takes_a_network_of_bfloat16(tmp_path: Path) -> None:
    """Its memory is float32 on disk."""
    w = world(TILING)
    w = replace(w, network=w.network.bfloat16(), condition=replace(w.condition, memory=w.condition.memory.float()))
    assert torch.equal(on_disk(tmp_path, w).denoise(), w.want(TILING, TOGETHER))


def test_denoise_tells_the_network_what_it_is_told_in_memory(tmp_path: Path) -> None:
    """Bit for bit the positions, fields and memory of the whole domain, cropped, batch by batch; sizes at which the
    vectors of sines have remainders.
    """
    tiling = Tiling(Axis(46, 8, 2, 2, patch=2), Axis(54, 6, 4, 0, True, 2))
    w = world(tiling)
    disk = on_disk(tmp_path, w)
    with evaluations(w.network) as seen:
        disk.denoise(tiling, 5)
    every = tiles(tiling)
    for told, batch in zip(seen, batches([tile.shape for tile in every], 5), strict=True):
        want = Condition.stack([w.condition.crop(every[i].rows, every[i].cols, CONFIG.patch) for i in batch], 1)
        assert torch.equal(told.position, want.position)
        assert torch.equal(told.static, want.static) and torch.equal(told.memory, want.memory)
        assert told.periodic == want.periodic


def test_denoise_leaves_nothing_behind(disk: OnDisk) -> None:
    """The next run in the same folder sees the new state."""
    steps: list[tuple[int, int]] = []
    disk.denoise(progress=lambda *step: steps.append(step))
    assert steps == [(n, BATCHES + ROWS) for n in range(1, BATCHES + ROWS + 1)]
    assert not any(disk.run.iterdir())
    disk.domain.state[0, 1, 1] += 1.0
    changed = replace(disk.world, x=torch.from_numpy(np.array(disk.domain.state)))
    assert torch.equal(disk.denoise(), changed.want(TILING, TOGETHER))


def test_denoise_turns_gradients_off(disk: OnDisk) -> None:
    with evaluations(disk.world.network) as seen:
        disk.denoise()
    assert all(p.requires_grad for p in disk.world.network.parameters())
    assert len(seen) == BATCHES and not any(told.memory.requires_grad for told in seen)


# Interruptions


@pytest.mark.parametrize("kind", ["memmap", "zarr"])
def test_denoise_goes_on_after_an_interruption_at_any_step(tmp_path: Path, kind: str) -> None:
    """The same bits; no batch is evaluated twice, no row of cores written twice."""
    w = world(TILING)
    want = w.want(TILING, TOGETHER)
    for stop in range(1, BATCHES + ROWS + 1) if kind == "memmap" else (3, BATCHES, BATCHES + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        disk = on_disk(folder, w, kind)
        with evaluations(w.network) as first, pytest.raises(Interrupted):
            disk.denoise(progress=stop_at(stop))
        steps: list[int] = []
        with evaluations(w.network) as second:
            assert torch.equal(disk.denoise(progress=lambda done, _, steps=steps: steps.append(done)), want)
        assert (len(first), len(second)) == (min(stop, BATCHES), BATCHES - min(stop, BATCHES))
        assert steps == [*range(stop + 1, BATCHES + ROWS + 1)]
        assert not any(disk.run.iterdir())


def test_denoise_goes_on_after_many_interruptions(disk: OnDisk) -> None:
    """One step at a time."""
    want = disk.world.want(TILING, TOGETHER)
    with evaluations(disk.world.network) as seen:
        for stop in range(1, BATCHES + ROWS + 1):
            with pytest.raises(Interrupted):
                disk.denoise(progress=stop_at(stop))
        assert torch.equal(disk.denoise(), want)
    assert len(seen) == BATCHES


def test_denoise_goes_on_after_half_a_write(disk: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupted write is that of a batch's file, or of a core."""

    def half(file: Any, *values: np.ndarray) -> None:
        file.write(b"PK half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", half)
        disk.denoise()
    for cores in (0, 1, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            replace(disk, out=Breaking(disk.out, cores)).denoise()
    assert torch.equal(disk.denoise(), disk.world.want(TILING, TOGETHER))


def give_up() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Breaking:
    """An output that breaks off in the middle of a write after so many whole ones."""

    def __init__(self, array: Any, writes: int, end: Callable[[], None] = give_up) -> None:
        self.array, self.shape, self.dtype, self.left, self.end = array, array.shape, array.dtype, writes, end

    def __getitem__(self, key: Any) -> Any:
        return self.array[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.left == 0:
            self.array[key][0] = value[0]
            self.end()
        self.array[key] = value
        self.left -= 1


def test_denoise_writes_again_what_the_output_lost(tmp_path: Path, disk: OnDisk) -> None:
    """Another output on resuming, or one that lost a row: nothing is taken for written that is not there."""
    want = disk.world.want(TILING, TOGETHER)
    for stop, lose in ((BATCHES + 2, slice(None)), (BATCHES + 3, slice(5, 6)), (BATCHES + ROWS, slice(13, 14))):
        with pytest.raises(Interrupted):
            disk.denoise(progress=stop_at(stop))
        disk.out[:, lose] = 0
        with evaluations(disk.world.network) as seen:
            assert torch.equal(disk.denoise(), want)
        assert not seen


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other", "missing", "text"])
def test_denoise_makes_a_damaged_batch_again(disk: OnDisk, damage: str) -> None:
    """One evaluation for one damaged file. A flipped bit may be harmless: then none."""
    want = disk.world.want(TILING, TOGETHER)
    with pytest.raises(Interrupted):
        disk.denoise(progress=stop_at(BATCHES))
    path = disk.run / "batches" / "3.npz"
    whole = path.read_bytes()
    if damage == "flipped":
        at = len(whole) // 2  # among the numbers
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "other":
        path.write_bytes((disk.run / "batches" / "0.npz").read_bytes())
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-30], "empty": b"", "text": b"not a batch"}[damage])
    with evaluations(disk.world.network) as seen:
        assert torch.equal(disk.denoise(), want)
    assert len(seen) == 1


def test_denoise_never_uses_a_damaged_byte(tmp_path: Path) -> None:
    """Every twentieth byte of a file in turn: headers, numbers and the table of contents."""
    tiling = Tiling(Axis(4, 2, patch=2), Axis(4, 4, patch=2))
    disk = on_disk(tmp_path, world(tiling))
    want = disk.world.want(tiling, TOGETHER)
    with pytest.raises(Interrupted):
        disk.denoise(tiling, progress=stop_at(1))
    (path,) = (disk.run / "batches").iterdir()
    whole = path.read_bytes()
    for at in range(0, len(whole), 20):
        with pytest.raises(Interrupted):
            disk.denoise(tiling, progress=stop_at(2))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        (disk.run / "finished.json").unlink()
        with pytest.raises(Interrupted):
            disk.denoise(tiling, progress=stop_at(2))
        disk.out[...] = np.nan
        assert torch.equal(disk.denoise(tiling), want)
        with pytest.raises(Interrupted):
            disk.denoise(tiling, progress=stop_at(1))


def killed(folder: Path, when: str) -> None:
    """In a process of its own: dies while the third batch's file, or the seventh core, is being written."""
    disk, calls, save = reopened(folder), [], np.savez

    def half(file: Any, *values: np.ndarray) -> None:
        calls.append(file)
        save(file, *values)
        if len(calls) == 3:
            file.truncate(100)
            die()

    if when == "save":
        np.savez = half
        disk.denoise()
    replace(disk, out=Breaking(disk.out, 6, die)).denoise()


def reopened(folder: Path) -> OnDisk:
    w = world(TILING)
    arrays = [open_array(folder / name) for name in ("state", "static", "memory")]
    out = np.memmap(folder / "result", np.float64, "r+", shape=tuple(w.x.shape))
    return OnDisk(w, Domain(*arrays, w.latitude, w.longitude, True), out, folder / "run")


@pytest.mark.slow
def test_denoise_goes_on_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL twice: two batches stay done, then all and a row of cores. Inputs are Zarr, the output a memory map."""
    made = on_disk(tmp_path, world(TILING), "zarr")
    store(tmp_path / "result", np.full(made.out.shape, np.nan))
    for when, kept in (("save", 2), ("blend", BATCHES)):
        code = f"from pathlib import Path; import test_out_of_core as t; t.killed(Path({str(tmp_path)!r}), {when!r})"
        run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert len([*(tmp_path / "run" / "batches").glob("[0-9].npz")]) == kept
    assert len(json.loads((tmp_path / "run" / "finished.json").read_text())) == 1
    disk, want = reopened(tmp_path), made.world.want(TILING, TOGETHER)
    with evaluations(disk.world.network) as seen:
        assert torch.equal(disk.denoise(), want)
    assert not seen and not any(disk.run.iterdir())


# What is refused


def changed_weights(disk: OnDisk) -> OnDisk:
    network = world(TILING).network
    with torch.no_grad():
        network.blocks[0].adaptive.bias[3] += 1e-9  # type: ignore[union-attr, index, operator]
    return replace(disk, world=replace(disk.world, network=network))


def moved(disk: OnDisk, degrees: float) -> OnDisk:
    return replace(disk, domain=replace(disk.domain, longitude=disk.domain.longitude + degrees))


def other_state(disk: OnDisk) -> OnDisk:
    return replace(disk, domain=replace(disk.domain, state=np.array(disk.domain.state) + 1))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: d, {"sigma": 0.8}, r"sigma 0\.7, now 0\.8"),
        (lambda d: d, {"tiles_per_batch": 3}, "tiles_per_batch 2, now 3"),
        (lambda d: d, {"tiling": replace(TILING, x=replace(TILING.x, blend=0))}, "tiling .*'blend': 2.* now .*: 0"),
        (changed_weights, {}, "weights"),
        (lambda d: moved(d, 1.0), {}, "coordinates"),
        (other_state, {}, "state"),
    ],
    ids=["sigma", "tiles_per_batch", "tiling", "weights", "coordinates", "state"],
)
def test_denoise_invalid_folder_of_another_run(
    disk: OnDisk, change: Callable[[OnDisk], OnDisk], arguments: dict[str, Any], message: str
) -> None:
    """The message names the difference and the remedy; the earlier run can still go on."""
    want = disk.world.want(TILING, TOGETHER)
    with pytest.raises(Interrupted):
        disk.denoise(progress=stop_at(2))
    with pytest.raises(ValueError, match=f"other arguments.*{message}.*another folder, or delete"):
        change(disk).denoise(**arguments)
    with evaluations(disk.world.network) as seen:
        assert torch.equal(disk.denoise(), want)
    assert len(seen) == BATCHES - 2


def test_denoise_invalid_folder_of_something_else(disk: OnDisk) -> None:
    disk.run.mkdir()
    (disk.run / "precious").write_text("old")
    with pytest.raises(ValueError, match="something else than an unfinished run: choose another folder"):
        disk.denoise()
    assert [file.name for file in disk.run.iterdir()] == ["precious"]


def test_denoise_invalid_fingerprint_that_cannot_be_read(disk: OnDisk) -> None:
    disk.run.mkdir()
    (disk.run / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match=r"fingerprint\.json cannot be read.* delete"):
        disk.denoise()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("state", (1, 14, 16), r"state: shape \(1, 14, 16\), but the network on this grid wants \(2, 14, 16\)"),
        ("state", (2, 16, 14), r"state: shape \(2, 16, 14\)"),
        ("static", (1, 14, 18), "static fields: shape"),
        ("memory", (8, 7, 8), r"memory: shape \(8, 7, 8\), but .* wants \(7, 8, 8\)"),
        ("out", (2, 14, 14), "out: shape"),
        ("position", (7, 8, 2), r"position: shape \(7, 8, 2\), but .* \(7, 8, 3\)"),
    ],
)
def test_denoise_invalid_shape(disk: OnDisk, name: str, shape: tuple[int, ...], message: str) -> None:
    wrong = np.zeros(shape)
    other = replace(disk, out=wrong) if name == "out" else replace(disk, domain=replace(disk.domain, **{name: wrong}))
    with pytest.raises(ValueError, match=message):
        other.denoise()
    assert not disk.run.exists()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_denoise_invalid_sigma(disk: OnDisk, sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive and finite"):
        disk.denoise(sigma=sigma)


def test_denoise_invalid_settings(disk: OnDisk) -> None:
    with pytest.raises(ValueError, match="tiles_per_batch = 0"):
        disk.denoise(tiles_per_batch=0)
    with pytest.raises(ValueError, match=r"grid of \(14, 16\) but the tiling is for \(16, 16\)"):
        disk.denoise(Tiling(Axis(16, 4, patch=2), Axis(16, 4, patch=2)))
    with pytest.raises(ValueError, match=r"patch 2 must divide length, core and halo of .*halo=1"):
        disk.denoise(Tiling(Axis(14, 4, 1), Axis(16, 4)))
    with pytest.raises(ValueError, match="joins the two ends of a domain that is not"):
        replace(disk, domain=replace(disk.domain, periodic=False)).denoise()
    assert not disk.run.exists()


def test_denoise_invalid_dtype(disk: OnDisk) -> None:
    with pytest.raises(ValueError, match="out: dtype float32, but it must be float64"):
        replace(disk, out=np.zeros(disk.out.shape, np.float32)).denoise()
    with pytest.raises(ValueError, match="state: dtype int64, but it must be float32 or float64"):
        replace(disk, domain=replace(disk.domain, state=np.zeros(disk.out.shape, np.int64))).denoise()


def test_denoise_invalid_no_position(tmp_path: Path) -> None:
    disk = on_disk(tmp_path, world(TILING, replace(CONFIG, position_features=2)))
    with pytest.raises(ValueError, match="wants 2 coordinates of a point and a sphere has 3; give a position"):
        disk.denoise()


# Memory


def square(count: int) -> Tiling:
    return Tiling(Axis(8 * count, 8, 4, 2, patch=2), Axis(8 * count, 8, 4, 2, True, 2))


def numbers_of_axes(tiling: Tiling) -> int:
    """Sines and cosines of patch centres, and weights: what is held of the axes."""
    weights = [axis.length + 2 * axis.blend * (axis.length // axis.core) for axis in (tiling.y, tiling.x)]
    return 3 * (tiling.y.length + tiling.x.length) // 2 + sum(weights)


def test_denoise_peak_does_not_grow_with_the_domain(tmp_path: Path) -> None:
    """Tensors: only what is held of the axes grows. The weights of a closed axis end at it, hence not more than."""
    peaks = {}
    for count in (4, 8):
        (tmp_path / str(count)).mkdir()
        disk = on_disk(tmp_path / str(count), world(square(count)))
        with Live() as live:
            disk.denoise(square(count), 4)
        peaks[count] = live.peak - 8 * numbers_of_axes(square(count))
    assert peaks[4] == peaks[8]


@pytest.mark.slow
def test_denoise_arrays_do_not_grow_with_the_domain(tmp_path: Path) -> None:
    """Numpy's: with four times as many tiles they grow by less than one row of tiles of the state.

    Python's own objects are counted too, some 0.1 MB more of them; a row of tiles has 0.5 MB, and the state grows by 3.
    """
    peaks = {}
    config = replace(CONFIG, channels=128)
    for count in (1, 4, 8):  # the first brings what Python keeps for ever
        (tmp_path / str(count)).mkdir()
        disk = on_disk(tmp_path / str(count), world(square(count), config))
        arguments = (disk.world.network, disk.domain, SIGMA, square(count), disk.out, disk.run, 1)
        gc.collect()  # what other tests left to be collected is not to be collected meanwhile
        tracemalloc.start()
        denoise(*arguments)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8] - peaks[4] < 8 * 128 * 8 * 64


class Watched:
    """An array that remembers the largest piece asked for, and the largest written."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read = self.written = 0

    def __getitem__(self, key: Any) -> Any:
        piece = self.array[key]
        self.read = max(self.read, piece.size)
        return piece

    def __setitem__(self, key: Any, value: Any) -> None:
        self.written = max(self.written, value.size)
        self.array[key] = value


def test_denoise_reads_tiles_and_writes_cores(disk: OnDisk) -> None:
    """Nothing larger, also when it goes on and compares what is there."""
    d = disk.domain
    state, static, memory, out = (Watched(a) for a in (d.state, d.static, d.memory, disk.out))
    watched = replace(disk, domain=replace(d, state=state, static=static, memory=memory), out=out)
    with pytest.raises(Interrupted):
        denoise(disk.world.network, watched.domain, SIGMA, TILING, out, disk.run, 2, stop_at(BATCHES + 3))
    denoise(disk.world.network, watched.domain, SIGMA, TILING, out, disk.run, 2)
    assert (state.read, static.read, memory.read) == (2 * 12 * 12, 12 * 12, 8 * 6 * 6)
    assert (out.read, out.written) == (2 * 4 * 4, 2 * 4 * 4)


# Compression


@dataclass(frozen=True)
class Past:
    """K frames with their static fields and ages."""

    world: World
    past: Tensor
    static: Tensor
    ages: Tensor

    def want(self, chunk: int = 2) -> Tensor:
        with torch.no_grad():
            position = self.world.condition.position[0]
            whole = (self.past[None], self.static[None], self.ages[None])
            return self.world.network.compress(*whole, position, chunk)[0]

    def compress(self, out: Any, run: Path, past: Any = None, static: Any = None, **other: Any) -> Tensor:
        settings = {"rows": 2, "chunk": 2} | other
        past = self.past.numpy() if past is None else past
        static = self.static.numpy() if static is None else static
        w = self.world
        compress(w.network, past, static, self.ages, w.latitude, w.longitude, out, run, **settings)
        return torch.from_numpy(np.array(out[...]))


def history(frames: int = 5, dtype: torch.dtype = torch.float64, config: StormConfig = CONFIG) -> Past:
    w = world(TILING, config, dtype)
    past, static = normal(frames, 2, 14, 16, seed=7), normal(frames, 1, 14, 16, seed=8)
    return Past(w, past, static, 6.0 * torch.arange(1, frames + 1).double())


def room(path: Path, dtype: str = "float64") -> Any:
    return create(path, (7, 8, 8), (3, 8, 8), dtype)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Two orders of summation in one dtype; the bound is NETWORK, of float64, scaled to the dtype."""
    eps = torch.finfo(want.dtype).eps / torch.finfo(torch.float64).eps
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).abs().max() <= NETWORK * eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 7, 50])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_compress_equals_in_memory(tmp_path: Path, dtype: torch.dtype, rows: int, chunk: int) -> None:
    p = history(dtype=dtype)
    steps: list[tuple[int, int]] = []
    out, blocks = room(tmp_path / "out", str(dtype)[6:]), -(-7 // rows)
    got = p.compress(out, tmp_path / "run", rows=rows, chunk=chunk, progress=lambda *step: steps.append(step))
    assert_near(got, p.want(chunk))
    assert steps == [(n, blocks) for n in range(1, blocks + 1)]
    assert not any((tmp_path / "run").iterdir())


def test_compress_takes_functions_and_fields_that_stay(tmp_path: Path) -> None:
    """Frames made when asked for, no more than a chunk of a block; one static field for all frames, as both kinds."""
    p = history()
    p = replace(p, static=p.static[:1].expand(5, -1, -1, -1))
    asked: list[tuple[int, int, int, int]] = []

    def frames(k0: int, k1: int, row0: int, row1: int) -> Tensor:
        asked.append((k0, k1, row0, row1))
        return p.past[k0:k1, :, row0:row1]

    want = p.compress(room(tmp_path / "a"), tmp_path / "run")
    assert_near(want, p.want())
    made = p.compress(room(tmp_path / "b"), tmp_path / "run", past=frames, static=p.static[0].numpy())
    assert torch.equal(made, want)
    fields = lambda k0, k1, row0, row1: p.static[k0:k1, :, row0:row1]  # noqa: E731
    assert torch.equal(p.compress(room(tmp_path / "c"), tmp_path / "run", static=fields), want)
    assert max(k1 - k0 for k0, k1, _, _ in asked) == 2 and max(r1 - r0 for _, _, r0, r1 in asked) == 4


@pytest.mark.parametrize("features", [1, 2])
def test_compress_takes_given_positions(tmp_path: Path, features: int) -> None:
    p = history(config=replace(CONFIG, position_features=features))
    with pytest.raises(ValueError, match="give a position"):
        p.compress(room(tmp_path / "a"), tmp_path / "run")
    position = p.world.condition.position[0].numpy()
    assert_near(p.compress(room(tmp_path / "b"), tmp_path / "run", position=position), p.want())


def test_compress_keeps_bfloat16_in_float32(tmp_path: Path) -> None:
    p = history()
    p = replace(p, world=replace(p.world, network=p.world.network.bfloat16()))
    assert_near(p.compress(room(tmp_path / "a", "float32"), tmp_path / "run").bfloat16(), p.want())


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_compress_goes_on_after_an_interruption(tmp_path: Path, stop: int) -> None:
    """The same bits, and only the blocks that were missing, or that the output lost."""
    p = history()
    want = p.compress(room(tmp_path / "a"), tmp_path / "run")
    for lost in (0, 1):
        out = room(tmp_path / f"b{lost}")
        with pytest.raises(Interrupted):
            p.compress(out, tmp_path / "run", progress=stop_at(stop))
        if lost:
            out[2 * stop - 2] = 1.0
        steps: list[int] = []
        got = p.compress(out, tmp_path / "run", progress=lambda done, _, steps=steps: steps.append(done))
        assert torch.equal(got, want)
        assert steps == [*range(stop + 1 - lost, 5)]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda p: p, {"rows": 3}, "rows 2, now 3"),
        (lambda p: p, {"chunk": 3}, "chunk 2, now 3"),
        (lambda p: replace(p, ages=p.ages + 1), {}, "ages"),
        (lambda p: replace(p, past=p.past + 1), {}, "past"),
        (lambda p: replace(p, static=p.static + 1), {}, "static"),
    ],
    ids=["rows", "chunk", "ages", "past", "static"],
)
def test_compress_invalid_folder_of_another_run(
    tmp_path: Path, change: Callable[[Past], Past], arguments: dict[str, Any], message: str
) -> None:
    p, out = history(), room(tmp_path / "out")
    with pytest.raises(Interrupted):
        p.compress(out, tmp_path / "run", progress=stop_at(1))
    with pytest.raises(ValueError, match=f"other arguments.*{message}"):
        change(p).compress(out, tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows 0"),
        ({"chunk": 0}, "chunk 0"),
        ({"past": np.zeros((4, 2, 14, 16))}, r"past frames: shape \(4, 2, 14, 16\), but .* \(5, 2, 14, 16\)"),
        ({"static": np.zeros((5, 2, 14, 16))}, "static fields of the past: shape"),
        (
            {"past": lambda k0, k1, row0, row1: torch.zeros(k1 - k0, 3, row1 - row0, 16)},
            r"past frames 0\.\.1.*\(1, 3, 2, 16\)",
        ),
    ],
    ids=["rows", "chunk", "past", "static", "frames"],
)
def test_compress_invalid_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        history().compress(room(tmp_path / "out"), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_compress_invalid_output_and_ages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out: shape \(7, 8, 4\), but .* \(7, 8, 8\)"):
        history().compress(np.zeros((7, 8, 4)), tmp_path / "run")
    with pytest.raises(ValueError, match="out: dtype float32, but it must be float64"):
        history().compress(room(tmp_path / "a", "float32"), tmp_path / "run")
    with pytest.raises(ValueError, match="0 frames"):
        history(0).compress(room(tmp_path / "b"), tmp_path / "run")
    p = history()
    with pytest.raises(ValueError, match="hours before the analysis time and must be positive"):
        replace(p, ages=p.ages - 6).compress(room(tmp_path / "c"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compress_peak_does_not_grow_with_frames_or_rows(tmp_path: Path) -> None:
    """Tensors: only sines and cosines of the axes grow."""
    peaks = set()
    for count, frames in ((2, 4), (2, 12), (4, 4), (8, 12)):
        tiling = Tiling(Axis(8 * count, 8, patch=2), Axis(8, 8, patch=2))
        w, ages = world(tiling), torch.arange(1, frames + 1).double()
        out = np.zeros((4 * count, 4, 8))
        inputs = (lambda k0, k1, r0, r1, c=c: torch.ones(k1 - k0, c, r1 - r0, 8) for c in (2, 1))
        with Live() as live:
            compress(w.network, *inputs, ages, w.latitude, w.longitude, out, tmp_path / "run", rows=2, chunk=2)
        peaks.add(live.peak - 8 * 3 * (4 * count + 4))
    assert len(peaks) == 1


# Stores


def test_create_makes_zeros_that_open_array_reads_and_writes(tmp_path: Path) -> None:
    made = create(tmp_path / "a.zarr", (2, 5, 7), (2, 3, 3), "float32")
    assert made.metadata.zarr_format == 3 and made.shape == (2, 5, 7) and made.chunks == (2, 3, 3)
    assert made.dtype == np.float32 and not np.asarray(made[...]).any()
    open_array(tmp_path / "a.zarr")[1, 2:4] = 3.0
    assert np.asarray(open_array(tmp_path / "a.zarr")[...]).sum() == 3.0 * 2 * 7
