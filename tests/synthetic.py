"""Synthetic weather for tests of the workbench: smooth anomalies that persist, and a daily cycle."""

from pathlib import Path

import numpy as np
import torch

from storm_ref.workbench.io.data import Fields, to_dataset

STEP = np.timedelta64(6, "h")
SPLIT = np.datetime64("2001-03-16")


def fields(
    channels: int = 2, grid: tuple[int, int] = (12, 16), days: int = 20, periodic: bool = False, gaps: bool = False
) -> Fields:
    """Return fields every 6 hours from 1 March 2001: A_t = 0.8 A_{t-1} + smooth noise, plus 3 sin of the solar time.

    gaps: one corner of the first channel is never valid, and one frame in seven lacks a row.
    """
    draw = np.random.default_rng(3)
    count = days * 4
    height, width = grid
    lag = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in grid]
    if periodic:
        lag[1] = np.minimum(lag[1], width - lag[1])
    root = [np.linalg.cholesky(np.exp(-q / 4.0) + 1e-9 * np.eye(len(q))) for q in lag]
    noise = root[0] @ draw.standard_normal((count, channels, *grid)) @ root[1].T
    anomaly = np.zeros_like(noise)
    anomaly[0] = noise[0]
    for t in range(1, count):
        anomaly[t] = 0.8 * anomaly[t - 1] + 0.6 * noise[t]
    time = np.datetime64("2001-03-01", "ns") + np.arange(count) * STEP
    longitude = np.arange(width) * (360 / width if periodic else 1.0)
    angle = 2 * np.pi * ((np.arange(count) % 4)[:, None] / 4 + longitude / 360)
    values = (280 + anomaly + 3 * np.sin(angle)[:, None, None, :]).astype(np.float32)
    valid = np.ones(values.shape, bool)
    if gaps:
        valid[:, 0, :2, :2] = False
        valid[::7, :, 5] = False
    return Fields(
        time=time,
        latitude=60 - np.arange(height) * 1.0,
        longitude=longitude,
        values=values,
        valid=valid,
        static=np.arange(height * width, dtype=np.float32).reshape(1, *grid),
        variables=tuple("abc"[:channels]),
        static_names=("ground",),
        units=("K",) * channels,
        attributes=({},) * channels,
        periodic=periodic,
    )


def record(path: Path, grid: tuple[int, int] = (12, 16), periodic: bool = False) -> Path:
    """Write the weather to a file with three constant fields: the ground, a network of instruments and an empty one."""
    weather = fields(grid=grid, periodic=periodic)
    dataset = to_dataset(weather.values[None], weather, weather.time).isel(member=0, drop=True)
    dataset["ground"] = ("latitude", "longitude"), weather.static[0]
    dataset["network"] = ("latitude", "longitude"), (weather.static[0] % 5 == 0).astype(np.float32)
    dataset["nowhere"] = ("latitude", "longitude"), np.zeros(grid, np.float32)
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


def bits(network: torch.nn.Module) -> bytes:
    """Return all weights as bytes."""
    return b"".join(p.detach().numpy().tobytes() for p in network.parameters())
