"""The small synthetic world: its arithmetic, its flow, its file. `-s -k world` prints what its README reports."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from tiny_data import make_tiny_data as tiny

WORLD = Path(tiny.__file__).with_name("world.nc")
Array = np.ndarray


@pytest.fixture(scope="module")
def world() -> Iterator[xr.Dataset]:
    with xr.open_dataset(WORLD, engine="h5netcdf") as data:
        yield data.load()


@pytest.fixture(scope="module")
def packed() -> Iterator[xr.Dataset]:
    with xr.open_dataset(WORLD, engine="h5netcdf", decode_cf=False) as data:
        yield data.load()


@pytest.fixture(scope="module")
def start() -> Array:
    with xr.open_dataset(WORLD, group="restart", engine="h5netcdf") as data:
        return np.stack([data[name].values.astype(np.float64) for name in ("q1", "q2", "t")])


@pytest.fixture(scope="module")
def flow() -> tiny.Flow:
    return tiny.make_flow(tiny.PHYSICS)


def random_fields(flow: tiny.Flow, seed: int, scale: float = 1.0) -> Array:
    """q_1, q_2, T of large scale at the inner points."""
    rough = tiny.from_grid(flow, scale * np.random.default_rng(seed).standard_normal((3, 63, 128)))
    return tiny.to_grid(rough * (flow.laplace > -40.0))


def vorticity(world: xr.Dataset) -> Array:
    u, v = world.u10.values, world.v10.values
    east = (np.roll(v, -1, 2) - np.roll(v, 1, 2)) / (2 * world.zonal_spacing)
    return np.asarray(east - np.gradient(u, world.meridional_spacing, axis=1))


# --- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 8, 64, 128])
def test_roots_value(n: int) -> None:
    c, s = tiny.roots(n)
    angle = 2 * np.pi * np.arange(n) / n
    assert np.abs(c - np.cos(angle)).max() < 1e-15
    assert np.abs(s - np.sin(angle)).max() < 1e-15


@given(st.sampled_from([2, 4, 8, 16, 32, 64, 128]), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_fft_value(n: int, m: int, seed: int) -> None:
    re, im = np.random.default_rng(seed).standard_normal((2, n, m))
    want, (got_re, got_im) = np.fft.fft(re + 1j * im, axis=0), tiny.fft(re, im)
    assert np.abs(got_re + 1j * got_im - want).max() < 4e-15 * n


@pytest.mark.parametrize("n", [3, 12, 256])
def test_fft_invalid_length(n: int) -> None:
    with pytest.raises(ValueError, match=f"length {n} "):
        tiny.fft(np.zeros((n, 1)), np.zeros((n, 1)))


def test_fft2_value_and_inverse() -> None:
    re, im = np.random.default_rng(0).standard_normal((2, 128, 128))
    spectrum = tiny.fft2(re, im)
    assert np.abs(spectrum[0] + 1j * spectrum[1] - np.fft.fft2(re + 1j * im).T).max() < 1e-11
    back = tiny.ifft2(spectrum[0] / 128**2, spectrum[1] / 128**2)
    assert np.abs(back[0] - re).max() < 1e-14 and np.abs(back[1] - im).max() < 1e-14


def test_source_exact_operations_only() -> None:
    """Every NumPy name in the generator is an exact or correctly rounded operation: its docstring's promise."""
    exact = {
        "abs", "add", "arange", "array", "ascontiguousarray", "concatenate", "empty", "float32", "float64", "int16",
        "maximum", "minimum", "ndarray", "random", "repeat", "rint", "roll", "sqrt", "stack", "subtract", "uint64",
        "where", "zeros", "zeros_like",
    }  # fmt: skip
    tree = ast.parse(Path(tiny.__file__).read_text())
    nodes = [*ast.walk(tree)]
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    used = {n.attr for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "np"}
    assert used <= exact, f"not known to be exact: {used - exact}"
    methods = {n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert not methods & {"sum", "mean", "std", "dot", "prod", "normal", "standard_normal", "integers"}
    operators = {type(n.op) for n in nodes if isinstance(n, ast.BinOp)}
    assert not operators & {ast.MatMult, ast.Pow}


# --- flow -----------------------------------------------------------------------------------------------------------


def doubled(field: Array) -> Array:
    """Odd continuation of [63, x] to the [128, x] that the walls' images make."""
    wall = np.zeros((1, field.shape[1]))
    return np.concatenate([wall, field, wall, -field[::-1]])


def derivative(field: Array, y: int, x: int) -> Array:
    """Spectral derivatives of [128, x], y and x times, by NumPy's transforms."""
    k = np.fft.fftfreq(128, 1 / 128)
    ky, kx = (1j * np.pi / tiny.PHYSICS.width * k)[:, None], 2j * np.pi / tiny.PHYSICS.length * k
    return np.asarray(np.fft.ifft2(ky**y * kx**x * np.fft.fft2(field)).real)


def streamfunctions(flow: tiny.Flow, fields: Array) -> list[Array]:
    state = tiny.from_grid(flow, fields)
    return [*tiny.ifft2(*tiny.invert(flow, state[0], state[1]))]


@pytest.mark.parametrize("seed", range(3))
def test_invert_gives_vorticity_back(flow: tiny.Flow, seed: int) -> None:
    q = random_fields(flow, seed)
    psi = streamfunctions(flow, q)
    for own, other, want in ((psi[0], psi[1], q[0]), (psi[1], psi[0], q[1])):
        got = derivative(own, 2, 0) + derivative(own, 0, 2) + tiny.PHYSICS.coupling * (other - own)
        assert np.abs(got - doubled(want)).max() < 1e-12


def test_tendency_value(flow: tiny.Flow) -> None:
    """Against the equations of the docstring, term by term, with NumPy's transforms and the layers apart."""
    p, fields = tiny.PHYSICS, random_fields(flow, 5, scale=3.0)
    y = np.arange(1, 64)[:, None] * np.pi / 64
    jet, bend = np.sin(y) ** 2, 2 * (np.pi / p.width) ** 2 * np.cos(2 * y)
    hill = tiny.ground()[1] * np.sin(y) * p.mountains
    hill = tiny.to_grid(np.concatenate([tiny.spectrum(hill, 0 * hill) * flow.damp] * 2))[0]
    psi, t = streamfunctions(flow, fields), doubled(fields[2])
    rates = []
    for i, (own, other) in enumerate(((psi[0], psi[1]), (psi[1], psi[0]))):
        mean = (p.steering + (p.shear if i == 0 else 0)) * jet
        mean_pv = p.beta - (p.steering + (p.shear if i == 0 else 0)) * bend + (1 - 2 * i) * p.coupling * p.shear * jet
        u, v = mean - derivative(own, 1, 0)[1:64], derivative(own, 0, 1)[1:64]
        q = doubled(fields[i] + i * hill)
        drag = i * p.friction * (derivative(own, 2, 0) + derivative(own, 0, 2))
        slow = p.coupling * (own - other) * p.cooling - drag
        rates.append(slow[1:64] - u * derivative(q, 0, 1)[1:64] - v * (derivative(q, 1, 0)[1:64] + mean_pv))
    warm = tiny.ifft2(*flow.warm)[0]
    slide = derivative(t, 1, 0)[1:64] - 2 * p.gradient / p.width * jet
    rates.append(-u * derivative(t, 0, 1)[1:64] - v * slide + p.relaxation * (warm - t)[1:64])
    got = tiny.tendency(flow, tiny.from_grid(flow, fields)) * (flow.damp > 0)
    want = tiny.from_grid(flow, np.stack(rates))
    assert np.abs(got - want).max() < 1e-13 * np.abs(want).max() * 10


def test_advance_conserves_energy_and_enstrophy() -> None:
    """Without forcing and friction the truncated equations keep both; the drift is of second order in the step."""
    still = replace(
        tiny.PHYSICS, shear=0.0, steering=0.0, friction=0.0, cooling=0.0, relaxation=0.0, mountains=0.0, diffusion=0.0
    )
    drift = []
    for parts in (1, 2):
        flow = tiny.make_flow(replace(still, step=still.step / parts))
        run = tiny.advance(flow, tiny.from_grid(flow, random_fields(flow, 7, scale=8.0)))
        first, last = (tiny.to_grid(state) for state in islice(run, 0, 48 * parts + 1, 48 * parts))
        values = []
        for now in (first, last):
            psi = streamfunctions(flow, now)
            energy = -0.5 * sum(float((a[1:64] * q).sum()) for a, q in zip(psi, now[:2], strict=True))
            values.append((energy, float((now[:2] ** 2).sum())))
        assert np.abs(last - first)[:2].max() > 0.1 * np.abs(first[:2]).max(), "the flow stood still"
        drift.append([abs(b / a - 1) for a, b in zip(*values, strict=True)])
    assert max(drift[0]) < 1e-3
    assert all(fine < coarse / 3 for coarse, fine in zip(*drift, strict=True)), drift


def test_frames_regenerate_first_day(flow: tiny.Flow, start: Array, packed: xr.Dataset) -> None:
    made = tiny.surface(tiny.frames(flow, start, 5))
    for name in ("u10", "v10", "t2m"):
        assert np.array_equal(packed[name].values[:5], made[name]), f"{name}: not the stored weather, bit for bit"
    for name in ("orography", "lsm"):
        assert np.array_equal(packed[name].values, made[name])


@pytest.mark.slow
def test_world_error_doubling_time(flow: tiny.Flow, start: Array) -> None:
    """A relative error of 1e-6 in the vorticity doubles in one to three days: chaos, at the pace of weather."""
    nudge = np.array([1 + 1e-6, 1 + 1e-6, 1.0])[:, None, None]
    one, two = (tiny.frames(flow, s, 100)[:, :2] for s in (start, start * nudge))
    error = np.sqrt(((one - two) ** 2).mean((1, 2, 3)))
    doublings = np.polyfit(np.arange(100) / 4, np.log2(error), 1)[0]
    print(f"error-doubling time {1 / doublings:.2f} days over 25 days")
    assert error[-1] < 0.1, "saturated: a shorter record would do"
    assert 1.0 < 1 / doublings < 3.0


# --- file -----------------------------------------------------------------------------------------------------------


def test_world_metadata(world: xr.Dataset, packed: xr.Dataset) -> None:
    assert WORLD.stat().st_size <= 4_000_000
    assert world.attrs["Conventions"] == "CF-1.8" and "ynthetic" in world.attrs["comment"]
    assert "history" not in world.attrs
    assert {n: world[n].attrs["units"] for n in world.data_vars} == {
        "orography": "m", "lsm": "1", "u10": "m s-1", "v10": "m s-1", "t2m": "K"
    }  # fmt: skip
    assert {n: world[n].attrs["axis"] for n in world.coords} == {"time": "T", "latitude": "Y", "longitude": "X"}
    assert all({"standard_name", "long_name"} <= world[n].attrs.keys() for n in world.variables)
    assert world.t2m.dims == ("time", "latitude", "longitude") and world.t2m.shape == (480, 32, 64)
    assert world.lsm.dims == world.orography.dims == ("latitude", "longitude")
    assert packed.time.attrs["units"].startswith("hours since") and packed.u10.dtype == np.int16
    assert np.all(np.diff(world.time.values) == np.timedelta64(6, "h"))
    assert np.allclose(np.diff(world.longitude), 360 / 64) and np.allclose(np.diff(world.latitude), 80 / 32)


def test_world_ranges(world: xr.Dataset) -> None:
    assert all(np.isfinite(world[n].values).all() for n in world.data_vars)
    speed = np.hypot(world.u10, world.v10)
    assert 20 < float(speed.max()) < 40 and 4 < float(speed.mean()) < 12
    assert float(world.t2m.min()) > 230 and float(world.t2m.max()) < 320
    assert float(world.lsm.min()) == 0 and float(world.lsm.max()) == 1 and 0.1 < float(world.lsm.mean()) < 0.5
    assert float(world.orography.min()) == 0 and 1000 < float(world.orography.max()) < 4000
    assert float(world.orography.values[world.lsm.values == 0].max()) == 0


def test_world_temperature_structure(world: xr.Dataset) -> None:
    """Cold north, cold mountains, days warmer than nights and most of all on land, autumn colder than summer."""
    t, land, low = world.t2m, world.lsm.values > 0.9, world.orography.values < 100
    assert float(t[:, 0].mean() - t[:, -1].mean()) > 25
    hour = (world.time.dt.hour.values[:, None] + world.longitude.values / 15) % 24
    noon, night = (np.abs(hour - h)[:, None, :] < 3.0 for h in (14, 2))
    swing = [float(t.values[noon & m].mean() - t.values[night & m].mean()) for m in (land & low, world.lsm.values == 0)]
    assert swing[0] > 4 > 2 > swing[1] > 0
    assert float(t[120:200].mean() - t[-40:].mean()) > 2


def test_world_predictability(world: xr.Dataset) -> None:
    """Persistence over 6 hours errs by 0.2 to 0.5 of the variability about the mean state; over a day by far more."""
    for name in ("u10", "v10", "t2m"):
        x = world[name].values
        spread = (x - x.mean(0)).std()
        six, day = (float(np.sqrt(((x[n:] - x[:-n]) ** 2).mean()) / spread) for n in (1, 4))
        print(f"{name}: std {x.std():.2f}, about the time mean {spread:.2f}; persistence 6 h {six:.2f}, 24 h {day:.2f}")
        assert 0.2 < six < 0.5 and day > 1.5 * six * (name != "t2m")


def test_world_stationary(world: xr.Dataset) -> None:
    enstrophy = (vorticity(world) ** 2).mean((1, 2))
    quarters = enstrophy.reshape(4, -1).mean(1)
    print("enstrophy by quarter, 1e-10 s-2:", np.round(quarters * 1e10, 2))
    assert np.abs(quarters / quarters.mean() - 1).max() < 0.15


def tracks(zeta: Array, threshold: float, reach: float) -> list[list[tuple[int, int]]]:
    """Largest values of 5 x 5 cells above the threshold, linked to the nearest within `reach` cells a frame later."""
    live: list[list[tuple[int, int]]] = []
    done: list[list[tuple[int, int]]] = []
    for field in zeta:
        around = np.stack([np.roll(field, (a, b), (0, 1)) for a in range(-2, 3) for b in range(-2, 3)])
        peaks = (field == around.max(0)) & (field > threshold)
        peaks[:2], peaks[-2:] = False, False
        free, kept = [(int(i), int(j)) for i, j in np.argwhere(peaks)], []
        for path in live:
            near = [np.hypot(i - path[-1][0], (j - path[-1][1] + 32) % 64 - 32) for i, j in free]
            if near and min(near) <= reach:
                kept.append([*path, free.pop(int(np.argmin(near)))])
            else:
                done.append(path)
        live = kept + [[point] for point in free]
    return done + live


def test_world_vortices(world: xr.Dataset) -> None:
    """Cyclones above 3e-5 s-1 that are followed for two days or more, and travel."""
    lasting = [p for p in tracks(vorticity(world), 3e-5, 2.5) if len(p) > 8]
    travel = [np.hypot(p[-1][0] - p[0][0], (p[-1][1] - p[0][1] + 32) % 64 - 32) for p in lasting]
    longest = (max(map(len, lasting)) - 1) / 4
    four = sum(len(p) > 16 for p in lasting)
    print(f"{len(lasting)} cyclones >= 2 days, {four} >= 4, longest {longest} days, {np.median(travel):.1f} cells")
    assert len(lasting) > 100 and longest > 6 and np.median(travel) > 4


def test_write_same_bytes(tmp_path: Path, start: Array, flow: tiny.Flow) -> None:
    groups = tiny.build(tiny.surface(tiny.frames(flow, start, 2)), start)
    for name in ("a.nc", "b.nc"):
        tiny.write(tmp_path / name, groups)
    assert (tmp_path / "a.nc").read_bytes() == (tmp_path / "b.nc").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nc", "b.nc"]
    assert tiny.differences(tmp_path / "a.nc", groups) == []


def test_differences_names_one_bit(tmp_path: Path, start: Array, flow: tiny.Flow) -> None:
    tiny.write(tmp_path / "a.nc", tiny.build(tiny.surface(tiny.frames(flow, start, 2)), start))
    other = tiny.build(tiny.surface(tiny.frames(flow, start, 2)), start)
    other[None]["v10"].values[1, 3, 5] += 1
    other["restart"]["q2"].attrs["units"] = "s-1"
    assert tiny.differences(tmp_path / "a.nc", other) == ["q2", "v10"]


def test_surface_invalid_range() -> None:
    fields = np.zeros((1, 3, 32, 64))
    fields[0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="v10"):
        tiny.surface(fields)


def test_main_invalid_check_without_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        tiny.main(["--check", "--out", str(tmp_path / "none.nc")])


def test_main_check_tells_one_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of one day from the first noise: --check accepts it, and refuses it with one number changed."""
    monkeypatch.setattr(tiny, "SPIN_UP", 0)
    monkeypatch.setattr(tiny, "DAYS", 1)
    path = tmp_path / "day.nc"
    assert tiny.main(["--out", str(path)]) == 0
    assert tiny.main(["--check", "--out", str(path)]) == 0
    with h5py.File(path, "r+") as file:
        file["u10"][2, 5, 7] += 1
    before = path.read_bytes()
    assert tiny.main(["--check", "--out", str(path)]) == 1
    assert path.read_bytes() == before, "--check wrote"


@pytest.mark.slow
def test_main_check_regenerates_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.main(["--check"]) == 0, capsys.readouterr().out
