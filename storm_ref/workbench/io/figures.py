"""Figures of an assimilation, with labelled axes, units, and colours that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from storm_ref.workbench.io.atomic import replacing

__all__ = ["crps_by_fraction", "intensity", "maps", "save", "spread_against_error", "tracks", "training"]

# Okabe & Ito (2008): black for the truth, the others in the order of the series.
TRUTH = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
Array = NDArray[np.floating]
Line = tuple[Array, Array]  # longitudes and latitudes of a track, degrees


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it. Raises OSError, naming the path, when writing fails."""
    try:
        with replacing(path) as part:
            figure.savefig(part, dpi=120, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)


def maps(
    latitude: Array,
    longitude: Array,
    truth: Array,
    forecast: Array,
    analysis: Array,
    observed: NDArray[np.bool_],
    label: str,
    title: str,
) -> Figure:
    """Maps of the truth, the means of forecast and analysis [H, W], their absolute errors, and the observed points.

    label: the name of the field with its unit. title: that of the whole figure.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained", sharex=True, sharey=True)
    fields = {"truth": truth, "forecast-only mean": forecast, "posterior mean": analysis}
    errors = {"forecast-only": np.abs(forecast - truth), "posterior": np.abs(analysis - truth)}
    low = float(np.min(truth))
    high = float(np.max(truth))
    worst = max(float(np.quantile(errors["forecast-only"], 0.99)), 1e-12)
    for axis, (name, field) in zip(axes[0], fields.items(), strict=True):
        mesh = axis.pcolormesh(longitude, latitude, field, vmin=low, vmax=high, cmap="cividis", shading="nearest")
        axis.set_title(name)
    figure.colorbar(mesh, ax=axes[0], label=label)
    axes[1, 0].pcolormesh(longitude, latitude, observed, vmin=0, vmax=1, cmap="Greys", shading="nearest")
    axes[1, 0].set_title(f"observed points ({observed.mean():.0%}, black)")
    for axis, (name, error) in zip(axes[1, 1:], errors.items(), strict=True):
        mesh = axis.pcolormesh(longitude, latitude, error, vmin=0, vmax=worst, cmap="magma_r", shading="nearest")
        axis.set_title(f"|{name} mean - truth|, mean {error.mean():.2f}")
    figure.colorbar(mesh, ax=axes[1], label=f"error of {label}")
    for axis in axes[:, 0]:
        axis.set_ylabel("latitude (degrees north)")
    for axis in axes[1]:
        axis.set_xlabel("longitude (degrees east)")
    figure.suptitle(title)
    return figure


def crps_by_fraction(curves: Mapping[str, Mapping[float, float]], unit: str, title: str) -> Figure:
    """CRPS at points not observed against the fraction observed, one line for each method."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axis.plot([100 * f for f in curve], list(curve.values()), color=colour, marker=marker, label=name)
    axis.set(xlabel="points observed (%)", ylabel=f"CRPS at points not observed ({unit})", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def spread_against_error(pairs: Mapping[str, tuple[Array, Array]], unit: str, title: str, bins: int = 8) -> Figure:
    """RMS error against ensemble spread, in groups of points of like spread; on the dashed line the two are equal.

    pairs: by name, the spread at each point, multiplied by sqrt(1 + 1/M), and the error of the mean there.
    """
    figure, axis = plt.subplots(figsize=(5.4, 5), layout="constrained")
    top = 0.0
    for (name, (spread, error)), colour, marker in zip(pairs.items(), COLOURS, MARKERS, strict=False):
        groups = np.array_split(np.argsort(spread, axis=None), bins)
        x = [float(np.sqrt(np.mean(spread.ravel()[group] ** 2))) for group in groups]
        y = [float(np.sqrt(np.mean(error.ravel()[group] ** 2))) for group in groups]
        axis.plot(x, y, color=colour, marker=marker, label=name)
        top = max(top, *x, *y)
    axis.plot([0, top * 1.05], [0, top * 1.05], color=TRUTH, lw=0.8, ls="--", label="spread = error")
    axis.set(xlabel=f"ensemble spread ({unit})", ylabel=f"RMS error of the mean ({unit})", title=title)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def tracks(truth: Line, ensembles: Mapping[str, Sequence[Line]], title: str) -> Figure:
    """One panel for each ensemble, with the track of the vortex in every member and the true one."""
    figure, axes = plt.subplots(
        1,
        len(ensembles),
        figsize=(5.6 * len(ensembles), 4.6),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, (name, members), colour in zip(axes[0], ensembles.items(), COLOURS, strict=False):
        for number, (longitude, latitude) in enumerate(members):
            label = None if number else f"{len(members)} members"
            axis.plot(longitude, latitude, color=colour, lw=1, alpha=0.55, label=label)
            axis.plot(longitude[-1], latitude[-1], color=colour, marker=".", alpha=0.8)
        true_longitude, true_latitude = truth
        axis.plot(true_longitude, true_latitude, color=TRUTH, lw=2, label="truth")
        axis.plot(true_longitude[0], true_latitude[0], color=TRUTH, marker="o", ls="", label="start")
        axis.set(title=name, xlabel="longitude (degrees east)")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_ylabel("latitude (degrees north)")
    figure.suptitle(title)
    return figure


def _density(values: Array, at: Array) -> Array:
    """Kernel density of the values, with a Gaussian kernel of Silverman's width."""
    spread = max(float(np.std(values, ddof=1)), 1e-3 * (abs(float(np.mean(values))) + 1e-9))
    width = 0.9 * spread * len(values) ** -0.2
    kernel = np.exp(-0.5 * ((at[:, None] - values) / width) ** 2)
    return np.asarray(kernel.mean(1) / (width * np.sqrt(2 * np.pi)))


def intensity(truth: float, ensembles: Mapping[str, Array], title: str) -> Figure:
    """Density of the largest wind of the vortex over the members of each ensemble, beside the true wind, in m/s."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    winds = np.concatenate([np.asarray(v) for v in ensembles.values()] + [np.array([truth])])
    margin = 0.3 * (winds.max() - winds.min()) + 0.5
    at = np.linspace(max(winds.min() - margin, 0), winds.max() + margin, 300)
    for (name, values), colour, style in zip(ensembles.items(), COLOURS, ("-", "--", "-.", ":"), strict=False):
        label = f"{name} (mean {np.mean(values):.1f})"
        axis.plot(at, _density(np.asarray(values), at), color=colour, ls=style, label=label)
        axis.plot(values, np.zeros(len(values)), color=colour, marker="|", ls="", ms=12)
    axis.axvline(truth, color=TRUTH, lw=2, label=f"truth ({truth:.1f})")
    axis.set(xlabel="largest 10 m wind of the vortex (m/s)", ylabel="density (s/m)", title=title)
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def training(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """EDM loss against the training step, one line for each curve, given as (steps, losses)."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, (steps, losses)), colour, style in zip(curves.items(), COLOURS, ("-", "--", "-."), strict=False):
        axis.plot(steps, losses, color=colour, ls=style, label=name)
    axis.set(xlabel="training step", ylabel="EDM loss (1 for an untrained network)", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
