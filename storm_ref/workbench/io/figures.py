"""Pictures of an assimilation: labelled axes and units, colours that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.run.vortices import Track

__all__ = ["crps_by_fraction", "intensity", "maps", "save", "spread_against_error", "tracks", "training"]

# Okabe & Ito (2008): black for the truth, the others in the order of the series.
TRUTH = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
Array = NDArray[np.floating]


def save(figure: Figure, path: Path) -> None:
    """Write aside, then rename; close the figure."""
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
    """Truth, both means, both absolute errors and where it was observed; `label` names the field and its unit."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained", sharex=True, sharey=True)
    fields, errors = (truth, forecast, analysis), (np.abs(forecast - truth), np.abs(analysis - truth))
    low, high = float(np.min(truth)), float(np.max(truth))
    worst = max(float(np.quantile(errors[0], 0.99)), 1e-12)
    for axis, field, name in zip(axes[0], fields, ("truth", "forecast-only mean", "posterior mean"), strict=True):
        shown = axis.pcolormesh(longitude, latitude, field, vmin=low, vmax=high, cmap="cividis", shading="nearest")
        axis.set_title(name)
    figure.colorbar(shown, ax=axes[0], label=label)
    axes[1, 0].pcolormesh(longitude, latitude, observed, vmin=0, vmax=1, cmap="Greys", shading="nearest")
    axes[1, 0].set_title(f"observed points ({observed.mean():.0%}, black)")
    for axis, error, name in zip(axes[1, 1:], errors, ("forecast-only", "posterior"), strict=True):
        shown = axis.pcolormesh(longitude, latitude, error, vmin=0, vmax=worst, cmap="magma_r", shading="nearest")
        axis.set_title(f"|{name} mean - truth|, mean {error.mean():.2f}")
    figure.colorbar(shown, ax=axes[1], label=f"error of {label}")
    for axis in axes[:, 0]:
        axis.set_ylabel("latitude (degrees north)")
    for axis in axes[1]:
        axis.set_xlabel("longitude (degrees east)")
    figure.suptitle(title)
    return figure


def crps_by_fraction(curves: Mapping[str, Mapping[float, float]], unit: str, title: str) -> Figure:
    """CRPS at points not observed against the fraction observed, one line a method."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axis.plot([100 * f for f in curve], list(curve.values()), color=colour, marker=marker, label=name)
    axis.set(xlabel="points observed (%)", ylabel=f"CRPS at points not observed ({unit})", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def spread_against_error(pairs: Mapping[str, tuple[Array, Array]], unit: str, title: str, bins: int = 8) -> Figure:
    """RMS error against ensemble spread, points grouped by spread; on the line, spread tells the error.

    pairs: name -> (spread at each point, already times sqrt(1 + 1/M); error of the mean there).
    """
    figure, axis = plt.subplots(figsize=(5.4, 5), layout="constrained")
    top = 0.0
    for (name, (spread, error)), colour, marker in zip(pairs.items(), COLOURS, MARKERS, strict=False):
        order = np.argsort(spread, axis=None)
        groups = np.array_split(order, bins)
        x = [float(np.sqrt(np.mean(spread.ravel()[g] ** 2))) for g in groups]
        y = [float(np.sqrt(np.mean(error.ravel()[g] ** 2))) for g in groups]
        axis.plot(x, y, color=colour, marker=marker, label=name)
        top = max(top, *x, *y)
    axis.plot([0, top * 1.05], [0, top * 1.05], color=TRUTH, lw=0.8, ls="--", label="spread = error")
    axis.set(xlabel=f"ensemble spread ({unit})", ylabel=f"RMS error of the mean ({unit})", title=title)
    axis.set_aspect("equal")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def tracks(truth: Track, ensembles: Mapping[str, Sequence[Track]], title: str) -> Figure:
    """One panel an ensemble: every member's track of the vortex, and the true one."""
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
        for number, member in enumerate(members):
            axis.plot(
                member.longitude,
                member.latitude,
                color=colour,
                lw=1,
                alpha=0.55,
                label=None if number else f"{len(members)} members",
            )
            axis.plot(member.longitude[-1], member.latitude[-1], color=colour, marker=".", alpha=0.8)
        axis.plot(truth.longitude, truth.latitude, color=TRUTH, lw=2, label="truth")
        axis.plot(truth.longitude[0], truth.latitude[0], color=TRUTH, marker="o", ls="", label="start")
        axis.set(title=name, xlabel="longitude (degrees east)")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_ylabel("latitude (degrees north)")
    figure.suptitle(title)
    return figure


def _density(values: Array, at: Array) -> Array:
    """Gaussian kernel density with Silverman's width."""
    spread = max(float(np.std(values, ddof=1)), 1e-3 * (abs(float(np.mean(values))) + 1e-9))
    width = 0.9 * spread * len(values) ** -0.2
    kernel = np.exp(-0.5 * ((at[:, None] - values) / width) ** 2)
    return np.asarray(kernel.mean(1) / (width * np.sqrt(2 * np.pi)))


def intensity(truth: float, ensembles: Mapping[str, Array], title: str) -> Figure:
    """Densities over the members of the vortex's largest wind, against the true one."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    every = np.concatenate([np.asarray(v) for v in ensembles.values()] + [np.array([truth])])
    margin = 0.3 * (every.max() - every.min()) + 0.5
    at = np.linspace(max(every.min() - margin, 0), every.max() + margin, 300)
    for (name, values), colour, style in zip(ensembles.items(), COLOURS, ("-", "--", "-.", ":"), strict=False):
        axis.plot(
            at, _density(np.asarray(values), at), color=colour, ls=style, label=f"{name} (mean {np.mean(values):.1f})"
        )
        axis.plot(values, np.zeros(len(values)), color=colour, marker="|", ls="", ms=12)
    axis.axvline(truth, color=TRUTH, lw=2, label=f"truth ({truth:.1f})")
    axis.set(xlabel="largest 10 m wind of the vortex (m/s)", ylabel="density (s/m)", title=title)
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def training(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """EDM loss against training step, one line a curve (steps, losses)."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, (steps, losses)), colour, style in zip(curves.items(), COLOURS, ("-", "--", "-."), strict=False):
        axis.plot(steps, losses, color=colour, ls=style, label=name)
    axis.set(xlabel="training step", ylabel="EDM loss (1 for an untrained network)", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
