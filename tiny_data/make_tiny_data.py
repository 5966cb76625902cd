"""120 days of chaotic two-layer quasi-geostrophic weather in a channel, written as a small ERA5-like `world.nc`.

Potential vorticity q_i of layer i (1 above, 2 below), streamfunction psi_i, temperature T, in megametres, days, kelvin:

    q_i = lap psi_i + F (psi_j - psi_i),   u_i = -d psi_i/dy,   v_i = d psi_i/dx
    dq_i/dt + (u_i + U_i) d(q_i + h_i)/dx + v_i d(q_i + h_i + Q_i)/dy
        = F (psi_i - psi_j)/tau - [i = 2] r lap psi_2 - D q_i
    dT/dt + (u_2 + U_2) dT/dx + v_2 d(T + Tbar)/dy = (T_land - T)/tau_T - D T

(j the other layer). U, Q, Tbar are a baroclinically unstable jet, to which tau relaxes the flow; r is friction at the
ground, h_2 the mountains, D an eighth-order diffusion. Nothing is stirred at random: the disorder is the flow's own.
Sine series in latitude (free-slip walls), Fourier series in longitude, products free of aliasing (two-thirds rule).

Why the arithmetic looks as it does: a chaotic flow turns a difference in the last bit into other weather in months, and
last bits of numpy.fft, exp, sin, BLAS, numpy.sum and complex products differ between processors and builds. So every
number here comes from elementwise + - * / and sqrt on real float64 arrays, which IEEE 754 rounds in one way only: a
radix-2 transform with real and imaginary parts apart, roots of unity by halving chords, rational hills, an implicit
(rational) diffusion. The seed noise is `PCG64.random_raw`: NumPy keeps that stream from version to version, where
`Generator`'s may change.

References: Phillips, Tellus 6 (1954) 273 (the two-layer model); Held and Larichev, J. Atmos. Sci. 53 (1996) 946 (its
turbulence); Swarztrauber, Parallel Comput. 1 (1984) 45 (the self-sorting transform).
"""

import argparse
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from storm_ref.workbench.io.atomic import replacing

__all__ = [
    "Flow", "Physics", "advance", "build", "differences", "fft", "fft2", "frames", "from_grid", "ifft2", "invert",
    "main", "make_flow", "roots", "spin_up", "surface", "tendency", "to_grid", "write",
]  # fmt: skip

Array = np.ndarray
N, PI = 128, 3.141592653589793  # N points round a circle of longitude, N from wall to wall and back again
SPEED = 1e6 / 86400.0  # m s-1 in one megametre a day
SPIN_UP, DAYS, FRAME = 40, 120, 24  # days, days, steps in 6 hours
REVERSED = (-np.arange(N)) % N


@dataclass(frozen=True)
class Physics:
    """Constants of the flow, in megametres, days and kelvin; rates of zero switch a process off."""

    length: float = 28.3  # a circle of latitude at 45 N
    width: float = 8.9  # 80 degrees of latitude
    coupling: float = 3.0  # F: deformation radius 1 / sqrt(2 F) = 410 km
    beta: float = 1.4
    shear: float = 1.6  # of the jets, upper over lower layer: 19 m/s
    steering: float = 0.3  # the lower jet: 3 m/s
    friction: float = 0.25
    cooling: float = 1.0 / 20.0
    relaxation: float = 1.0 / 6.0
    gradient: float = 40.0  # kelvin from wall to wall
    mountains: float = 0.9  # potential vorticity of one kilometre of ground
    diffusion: float = 30.0  # a day, at the shortest wave kept
    step: float = 1.0 / (4 * FRAME)


@dataclass(frozen=True)
class Flow:
    """Operators made from `Physics`: spectral ones [x, y] over 128 x 128, fields [y, x] over 63 x 128 inner points."""

    physics: Physics
    laplace: Array  # -(kx^2 + ky^2)
    own: Array  # psi_i = own q_i + other q_j
    other: Array
    minus: Array  # kx - ky
    plus: Array  # kx + ky
    damp: Array  # one implicit step of diffusion, zero beyond the truncation
    wind: tuple[Array, Array]  # U_i
    slope_x: tuple[Array, Array]  # d h_i / dx
    slope_y: tuple[Array, Array]  # d (h_i + Q_i) / dy
    slope_t: Array  # d Tbar / dy
    warm: Array  # T_land, spectral, real and imaginary part


PHYSICS = Physics()
PACKING = {"u10": (0.02, 0.0), "v10": (0.02, 0.0), "t2m": (0.02, 270.0)}  # scale factor, offset
NAMES = {  # standard name, long name, units
    "orography": ("surface_altitude", "Height of the ground", "m"),
    "lsm": ("land_area_fraction", "Land-sea mask", "1"),
    "u10": ("eastward_wind", "10 metre U wind component", "m s-1"),
    "v10": ("northward_wind", "10 metre V wind component", "m s-1"),
    "t2m": ("air_temperature", "2 metre temperature", "K"),
}
RESTART = {
    "q1": {"long_name": "potential vorticity of the upper layer, departure from the jet's", "units": "day-1"},
    "q2": {"long_name": "potential vorticity of the lower layer, departure from the jet's", "units": "day-1"},
    "t": {"long_name": "temperature, departure from the zonal mean of the jet", "units": "K"},
}


def roots(n: int) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Cosine and sine of 2 pi j / n, n = 4, 8 ...: a chord's midpoint, put back on the circle, halves its angle."""
    c, s = np.array([1.0, 0.0, -1.0, 0.0]), np.array([0.0, 1.0, 0.0, -1.0])
    while len(c) < n:
        mc, ms = c + np.roll(c, -1), s + np.roll(s, -1)
        radius = np.sqrt(mc * mc + ms * ms)
        c, s = np.stack([c, mc / radius], 1).reshape(-1), np.stack([s, ms / radius], 1).reshape(-1)
    return c, s


COS, SIN = roots(N)


def fft(re: Float[Array, "n m"], im: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Discrete Fourier transform along the first axis, sign -1, no factor; n = 2, 4, ... 128, else ValueError."""
    n, m = re.shape
    if n < 2 or N % n:
        raise ValueError(f"fft: length {n} is not one of 2, 4, ... {N}; pad or resample the field")
    half, stride = n // 2, 1
    while half:
        (ar, br), (ai, bi) = re.reshape(2, half, stride, m), im.reshape(2, half, stride, m)
        wr, wi = (w[: N // 2 : N // (2 * half)].reshape(-1, 1, 1) for w in (COS, SIN))
        re, im = np.empty((half, 2, stride, m)), np.empty((half, 2, stride, m))
        np.add(ar, br, out=re[:, 0])
        np.add(ai, bi, out=im[:, 0])
        dr, di = ar - br, ai - bi
        np.add(dr * wr, di * wi, out=re[:, 1])
        np.subtract(di * wr, dr * wi, out=im[:, 1])
        half, stride = half // 2, stride * 2
    return re.reshape(n, m), im.reshape(n, m)


def fft2(re: Float[Array, "y x"], im: Float[Array, "y x"]) -> tuple[Float[Array, "x y"], Float[Array, "x y"]]:
    """Transform along both axes; the result is left transposed, [x wave, y wave]."""
    re, im = fft(re, im)
    return fft(np.ascontiguousarray(re.T), np.ascontiguousarray(im.T))


def ifft2(re: Float[Array, "x y"], im: Float[Array, "x y"]) -> tuple[Float[Array, "y x"], Float[Array, "y x"]]:
    """Back to the grid. No factor: spectra here carry the 1 / N^2 (exact, a power of two)."""
    im, re = fft2(im, re)
    return re, im


def extend(inner: Float[Array, "63 x"]) -> Float[Array, "128 x"]:
    """Odd continuation across both walls."""
    wall = np.zeros((1, inner.shape[1]))
    return np.concatenate([wall, inner, wall, -inner[::-1]])


def spectrum(first: Float[Array, "63 x"], second: Float[Array, "63 x"]) -> Float[Array, "2 x y"]:
    """Sine-Fourier spectrum of two real fields that ride as one complex field, first + i second."""
    return np.stack(fft2(extend(first), extend(second))) * (1.0 / (N * N))


def gradient_pair(re: Array, im: Array, wave: Array) -> list[tuple[Array, Array]]:
    """Parts of i `wave` f even and odd in latitude, for both real fields in f: its two derivatives by one transform."""
    fields = ifft2(-wave * im, wave * re)
    return [(0.5 * (w[1:64] + w[:64:-1]), 0.5 * (w[1:64] - w[:64:-1])) for w in fields]


def invert(flow: Flow, re: Array, im: Array) -> tuple[Array, Array]:
    """Streamfunctions psi_1 + i psi_2 from q_1 + i q_2 (spectra [x, y]); i conj f(-k) is f with its layers swapped."""
    return flow.own * re - flow.other * im[REVERSED], flow.own * im - flow.other * re[REVERSED]


def tendency(flow: Flow, state: Float[Array, "4 x y"]) -> Float[Array, "4 x y"]:
    """Right-hand side without diffusion. The state is spectral: re and im of q_1 + i q_2, then re and im of T."""
    p, (qr, qi, tr, ti) = flow.physics, state
    pr, pi = invert(flow, qr, qi)
    winds, slopes = gradient_pair(pr, pi, flow.minus), gradient_pair(qr, qi, flow.plus)
    advection = []
    for (u, v), (gy, gx), mean, hx, qy in zip(winds, slopes, flow.wind, flow.slope_x, flow.slope_y, strict=True):
        total = u + mean
        advection.append(-(total * (gx + hx) + v * (gy + qy)))
    ty, tx = gradient_pair(tr, ti, flow.plus)[0]
    advection_t = -(total * tx + v * (ty + flow.slope_t))  # the lower layer's wind, last of the loop
    dq, dt = spectrum(*advection), spectrum(advection_t, np.zeros_like(advection_t))
    rub, cool = -0.5 * p.friction * flow.laplace, p.coupling * p.cooling
    dq[0] += rub * (pr + pr[REVERSED]) + cool * (pr + pi[REVERSED])
    dq[1] += rub * (pi - pi[REVERSED]) + cool * (pi + pr[REVERSED])
    return np.concatenate([dq, dt + p.relaxation * (flow.warm - state[2:])])


def advance(flow: Flow, state: Float[Array, "4 x y"]) -> Iterator[Float[Array, "4 x y"]]:
    """The state now, a step later, and so on: Adams-Bashforth of order 3, begun by orders 1, 2; implicit diffusion."""
    past: list[Array] = []
    while True:
        yield state
        past = [tendency(flow, state), *past[:2]]
        if len(past) == 1:
            slope = past[0]
        elif len(past) == 2:
            slope = 1.5 * past[0] - 0.5 * past[1]
        else:
            slope = (23.0 * past[0] - 16.0 * past[1] + 5.0 * past[2]) / 12.0
        state = (state + flow.physics.step * slope) * flow.damp


def bumps(*hills: tuple[float, float, float, float, float]) -> Float[Array, "63 x"]:
    """Sum of rational hills (longitude, latitude, half-width in each, height), degrees, on the inner points."""
    lon, lat = np.arange(N) * (360.0 / N), np.arange(1, 64)[:, None] * 1.25
    total = np.zeros((63, N))
    for lon0, lat0, wide, tall, height in hills:
        east = np.abs(lon - lon0)
        x, y = np.minimum(east, 360.0 - east) / wide, (lat - lat0) / tall
        r2 = x * x + y * y
        total = total + height / (1.0 + r2 * r2)
    return total


def ground() -> tuple[Float[Array, "63 x"], Float[Array, "63 x"]]:
    """Land fraction 0..1 and height of the ground in kilometres."""
    land = bumps(
        (50, 52, 45, 17, 1), (25, 22, 17, 14, 1), (95, 32, 20, 12, 0.8), (250, 52, 26, 15, 1), (278, 18, 10, 11, 0.9)
    )
    island = bumps((312, 71, 13, 6, 1))
    lsm = np.minimum(np.maximum(np.maximum(3.0 * land - 1.3, 4.0 * island - 1.6), 0.0), 1.0)
    rise = bumps(
        (85, 34, 15, 7, 2.6), (242, 46, 6, 15, 1.9), (20, 46, 8, 5, 1.2), (30, 14, 7, 8, 1.0), (310, 71, 12, 6, 1.8)
    )
    return lsm, np.maximum(rise - 0.15, 0.0) * lsm


def make_flow(physics: Physics) -> Flow:
    """Make the operators for these constants."""
    p = physics
    k = np.where(np.arange(N) < N // 2, np.arange(N), np.arange(N) - N).astype(np.float64)
    kx, ky, kept = (k * (2.0 * PI / p.length))[:, None], (k * (PI / p.width))[None, :], np.abs(k) <= N // 3
    k2 = kx * kx + ky * ky
    det = np.where(k2 > 0.0, k2, 1.0) * (k2 + 2.0 * p.coupling)
    r2 = (k * k)[:, None] / (N // 3 * (N // 3)) + (k * k)[None, :] / (N // 3 * (N // 3))
    damp = (kept[:, None] & kept[None, :]) / (1.0 + p.step * p.diffusion * (r2 * r2 * r2 * r2))
    sine, cosine = SIN[1:64, None] + np.zeros((1, N)), COS[2:128:2, None] + np.zeros((1, N))
    jet, bend = sine * sine, 2.0 * (PI / p.width) * (PI / p.width) * cosine  # sin^2 and its second derivative
    lsm, height = ground()
    hill = spectrum(p.mountains * height * sine, 0.0 * height) * damp  # the sine takes the hills to zero at the walls
    hy, hx = gradient_pair(hill[0], hill[1], kx + ky)[0]
    lean = p.coupling * p.shear * jet
    return Flow(
        p, laplace=-k2, own=(k2 > 0.0) * -(k2 + p.coupling) / det, other=(k2 > 0.0) * -p.coupling / det,
        minus=kx - ky, plus=kx + ky, damp=damp,
        wind=((p.shear + p.steering) * jet, p.steering * jet), slope_x=(0.0 * hx, hx),
        slope_y=(p.beta - (p.shear + p.steering) * bend + lean, p.beta - p.steering * bend - lean + hy),
        slope_t=-2.0 * p.gradient / p.width * jet, warm=spectrum(5.0 * lsm * sine, 0.0 * lsm) * damp,
    )  # fmt: skip


def to_grid(state: Float[Array, "4 x y"]) -> Float[Array, "3 63 x"]:
    """q_1, q_2, T at the inner points."""
    return np.stack([*ifft2(state[0], state[1]), ifft2(state[2], state[3])[0]])[:, 1:64]


def from_grid(flow: Flow, fields: Float[Array, "3 63 x"]) -> Float[Array, "4 x y"]:
    """The spectral state of these q_1, q_2, T, without the waves beyond the truncation."""
    kept = flow.damp > 0.0
    return np.concatenate([spectrum(fields[0], fields[1]), spectrum(fields[2], 0.0 * fields[2])]) * kept


def spin_up(flow: Flow, seed: int, days: int, show: bool = False) -> Float[Array, "3 63 x"]:
    """Weather grown from large-scale noise: q_1, q_2, T, rounded to float32 so that the file holds them exactly."""
    noise = (np.random.PCG64(seed).random_raw(2 * 63 * 8) >> np.uint64(44)).astype(np.float64) / 524288.0 - 1.0
    rough = np.repeat(noise.reshape(2, 63, 8), N // 8, axis=2)
    state = from_grid(flow, np.concatenate([4.0 * rough, np.zeros((1, 63, N))])) * (flow.laplace > -6.25)
    run = advance(flow, state)
    for _ in track(range(days * 4 * FRAME), "spin-up", console=Console(stderr=True), disable=not show):
        state = next(run)
    return to_grid(state).astype(np.float32).astype(np.float64)


def frames(flow: Flow, start: Float[Array, "3 63 x"], count: int, show: bool = False) -> Float[Array, "t 3 32 64"]:
    """u, v (m/s) of the lower layer and T (K, departure from Tbar) every 6 hours from `start`, on the 32 x 64 grid."""
    run, out = advance(flow, from_grid(flow, start)), np.empty((count, 3, 32, 64))
    k = np.arange(N)
    coarse = (np.minimum(k, N - k) < 32) * 1.0  # no wave that the stored grid would fold
    for n in track(range(count), "frames", console=Console(stderr=True), disable=not show):
        state = next(run) * (coarse[:, None] * coarse[None, :])
        u, v = gradient_pair(*invert(flow, state[0], state[1]), flow.minus)[1]
        fields = SPEED * (u + flow.wind[1]), SPEED * v, ifft2(state[2], state[3])[0][1:64]
        out[n] = np.stack(fields)[:, ::2, ::2]
        for _ in range(FRAME - 1 if n + 1 < count else 0):
            next(run)
    return out


def surface(fields: Float[Array, "t 3 32 64"]) -> dict[str, Array]:
    """The channels as stored: u10, v10, t2m in 16-bit integers (else ValueError), the constant ones in float32."""
    lsm, height = (field[::2, ::2] for field in ground())
    y, frame, (cosine, sine) = (np.arange(32) + 0.5)[:, None] / 32.0, np.arange(len(fields))[:, None, None], roots(64)
    tbar = 301.0 - PHYSICS.gradient * (y - sine[1::2, None] / (2.0 * PI))
    day = frame / 4.0 - 40.0  # from the warmest day on; a year's cosine near its peak is a parabola
    season = (2.0 + 8.0 * y) * (0.7 + 0.6 * lsm) * (1.0 - day * day / 6750.0)
    solar = cosine[(16 * frame + np.arange(64) - 32 - 5) % 64]  # peaks 5/64 of a day after local noon
    diurnal = (0.5 + 4.5 * lsm) * (1.0 - 0.6 * y) * solar
    calm = 1.0 - 0.2 * lsm  # land is rougher
    exact = {"u10": fields[:, 0] * calm, "v10": fields[:, 1] * calm}
    exact["t2m"] = tbar + season + fields[:, 2] - 5.0 * height + diurnal
    stored = {"orography": (1000.0 * height).astype(np.float32), "lsm": lsm.astype(np.float32)}
    for name, (scale, offset) in PACKING.items():
        whole = np.rint((exact[name] - offset) / scale)
        if not np.abs(whole).max() <= 32766:  # a NaN fails too
            raise ValueError(f"surface: {name} reaches {np.abs(exact[name]).max()}, past its packing: shorten the step")
        stored[name] = whole.astype(np.int16)
    return stored


def build(channels: dict[str, Array], start: Float[Array, "3 63 x"]) -> dict[str | None, xr.Dataset]:
    """Groups of the file, still packed: the data at the root (None) and the flow's state at their first frame."""
    data, attributes = {}, {
        "Conventions": "CF-1.8",
        "title": "A small synthetic world: two-layer quasi-geostrophic weather in a channel",
        "source": "tiny_data/make_tiny_data.py (two-layer quasi-geostrophic model)",
        "comment": "Synthetic: no observation went in. The flow lives in a flat channel: its derivatives take the "
        "zonal_spacing and meridional_spacing (metres) in every row. Group restart: the state at the first frame.",
        "zonal_spacing": PHYSICS.length * 1e6 / 64, "meridional_spacing": PHYSICS.width * 1e6 / 32,
    }  # fmt: skip
    axes = {
        "time": (6 * np.arange(len(channels["u10"])), "i4", "hours since 2000-07-01 00:00:00", "T"),
        "latitude": (1.25 + 2.5 * np.arange(32), "f4", "degrees_north", "Y"),
        "longitude": (5.625 * np.arange(64), "f4", "degrees_east", "X"),
    }
    coords = {
        name: (name, values.astype(kind), {"units": units, "standard_name": name, "long_name": name, "axis": axis})
        for name, (values, kind, units, axis) in axes.items()
    }
    coords["time"][2]["calendar"] = "proleptic_gregorian"
    for name, (standard, long, units) in NAMES.items():
        packing = dict(zip(("scale_factor", "add_offset"), PACKING.get(name, ()), strict=False))
        about = {"units": units, "standard_name": standard, "long_name": long} | packing
        data[name] = (tuple(axes)[3 - channels[name].ndim :], channels[name], about)
    state = {n: (("y", "x"), f.astype(np.float32), RESTART[n]) for n, f in zip(RESTART, start, strict=True)}
    return {None: xr.Dataset(data, coords, attributes), "restart": xr.Dataset(state)}


def write(path: Path, groups: dict[str | None, xr.Dataset]) -> None:
    """Write all groups to one NetCDF-4 file, atomically."""
    with replacing(path) as part:
        for group, data in groups.items():
            squeeze = {"zlib": True, "complevel": 9, "shuffle": True, "_FillValue": None}
            encoding: dict[Hashable, dict[str, Any]] = {
                name: squeeze if data[name].ndim > 1 else {"_FillValue": None} for name in data.variables
            }
            for name in PACKING.keys() & data.keys():
                encoding[name] = squeeze | {"chunksizes": (min(80, data.sizes["time"]), 32, 64)}
            mode: Literal["a", "w"] = "w" if group is None else "a"
            data.to_netcdf(part, mode=mode, group=group, engine="h5netcdf", encoding=encoding)


def differences(path: Path, groups: dict[str | None, xr.Dataset]) -> list[str]:
    """Names of the variables that differ, in any bit or attribute, between a file and the data just made."""
    wrong: list[str] = []
    for group, new in groups.items():
        with xr.open_dataset(path, group=group, engine="h5netcdf", decode_cf=False) as old:
            common = old.variables.keys() & new.variables.keys()
            wrong += map(str, old.variables.keys() ^ new.variables.keys())
            wrong += [str(n) for n in common if old[n].dtype != new[n].dtype or not old[n].identical(new[n])]
            wrong += ["attributes"] if old.attrs != new.attrs else []
    return sorted(wrong)


def main(argv: list[str] | None = None) -> int:
    """Make `world.nc`, or with --check compare it with a fresh run: 0 the same bit for bit, 1 not."""
    parser = argparse.ArgumentParser(description="Make the small synthetic world, bit for bit.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("world.nc"))
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    args = parser.parse_args(argv)
    if args.check and not args.out.is_file():
        parser.error(f"--check: no file {args.out}; make it first, without --check")
    flow, show = make_flow(PHYSICS), sys.stderr.isatty()
    start = spin_up(flow, seed=1, days=SPIN_UP, show=show)
    made = build(surface(frames(flow, start, 4 * DAYS, show)), start)
    if not args.check:
        write(args.out, made)
        print(f"{args.out}: {args.out.stat().st_size} bytes, {4 * DAYS} frames")
        return 0
    wrong = differences(args.out, made)
    print(f"{args.out}: " + ("differs in " + ", ".join(wrong) if wrong else "the same, bit for bit"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
