"""Draw the pictures of docs/illustrations.md: what chapters of the specification say, computed by the reference.

python docs/illustrations.py
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from storm_ref import edm, tiling

__all__ = ["guidance_methods", "main", "ring_analysis", "sampled_variances", "tile_seam"]

Vector = NDArray[np.float64]

FOLDER = Path(__file__).parent
# The colour-blind-safe colours of Okabe and Ito; lines differ in their dashes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", (0, (6, 1)))
INK = "#1b1f24"
MUTED = "#6a737d"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#c9d0d8",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


def _panels() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    return figure, list(figure.subplots(1, 2))


def tile_seam() -> Figure:
    """Draw weights that sum to one, [TILE-5], and the sum that a plain Hann window over the extents has instead."""
    axis = tiling.Axis(48, 12, 6, 4)
    extents = [extent.numpy() for extent in tiling.extents(axis)]
    right = [weight.numpy() for weight in tiling.weights(axis)]
    wrong = [np.hanning(len(extent)) for extent in extents]
    figure, panels = _panels()
    for panel, weights, title in zip(panels, (right, wrong), ("TILE-4", "numpy.hanning over the extent"), strict=True):
        total = np.zeros(axis.length)
        for number, (points, weight) in enumerate(zip(extents, weights, strict=True)):
            total[points] += weight
            panel.plot(points, weight, color=COLOURS[number], linestyle=DASHES[number], marker="o", markersize=2.2)
        panel.plot(total, color=INK, linewidth=2.4, label="sum of all tiles")
        for boundary in range(axis.core, axis.length, axis.core):
            panel.axvline(boundary - 0.5, color=MUTED, linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="grid point", ylabel="weight", ylim=(-0.05, 1.55))
        panel.legend(loc="upper right")
    return figure


def sampled_variances(c: Vector, r: Vector, sd: float = 1.5, gamma: float = 0.1) -> dict[str, Vector]:
    """Return the variance that each guidance method samples for a scalar Gaussian, by the closed forms of chapter 07.

    c: variance of the prior; r: error variance of the one observation; sd: the data scale of pigdm; gamma: that of sda.
    """
    beta = r * sd**2 / (r + sd**2)
    q = r / (gamma * c)
    inner = (sd**2 - c) / (c * (beta - c)) + (sd**2 - beta) * np.log(c / beta) / (beta - c) ** 2
    return {
        "mmps: the posterior": c * r / (c + r),
        "pigdm": c * np.exp(-(c**2) / (r + sd**2) * inner),
        "sda": c * np.exp(-(q - 1 - np.log(q)) / (gamma * (q - 1) ** 2)),
        "dps": c * np.exp(-c / r),
    }


def _density(x: Vector, variance: float) -> Vector:
    return np.asarray(np.exp(-(x**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance), np.float64)


def guidance_methods() -> Figure:
    """Draw the densities that four methods sample, [GUIDE-8] and [GUIDE-9], and their variances against the truth."""
    x = np.linspace(-3, 3, 181)
    ratio = np.logspace(-2, 1, 91) * 1.003  # off the points where the closed forms are 0 / 0
    example = sampled_variances(np.ones(1), np.full(1, 0.3))
    curves = sampled_variances(np.ones_like(ratio), 1 / ratio)
    figure, (densities, variances) = _panels()
    densities.plot(x, _density(x, 1.0), color=MUTED, linestyle=":", label="prior")
    for number, name in enumerate(example):
        style = {"color": COLOURS[number], "linestyle": DASHES[number]}
        densities.plot(x, _density(x, float(example[name][0])), label=name, **style)
        variances.loglog(ratio, curves[name] / curves["mmps: the posterior"], **style)
    densities.set(xlabel="state", ylabel="density", ylim=(0, 2.9), title="prior variance 1, error variance 0.3")
    densities.legend(loc="upper left", ncols=2)
    variances.set(xlabel="prior variance / error variance", ylabel="sampled / true variance", ylim=(0.01, 10))
    variances.minorticks_off()
    return figure


def _members(mean: Vector, covariance: Vector, latents: Vector) -> Vector:
    """Sample N(mean, covariance) by the reference's sampler and its exact denoiser, [EDM-7] and [EDM-10]."""
    denoise = edm.gaussian_denoiser(torch.from_numpy(mean), torch.from_numpy(covariance))
    samples = edm.sample(denoise, torch.from_numpy(latents), edm.schedule(40))
    return np.asarray(samples.numpy(), np.float64)


def ring_analysis() -> Figure:
    """Draw ensembles on a ring without and with observations, with the truth and the exact mean and spread.

    The exact guided mean of a Gaussian prior is the denoiser of its posterior, [GUIDE-8].
    """
    rng = np.random.default_rng(11)
    points = 60
    error = 0.03
    gap = np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
    prior = np.exp(-np.minimum(gap, points - gap) / 8.0)
    truth = np.linalg.cholesky(prior) @ rng.standard_normal(points)
    where = np.array([4, 9, 14, 30, 33, 36, 52])
    observed = truth[where] + np.sqrt(error) * rng.standard_normal(len(where))
    gain = prior[:, where] @ np.linalg.inv(prior[np.ix_(where, where)] + error * np.eye(len(where)))
    latents = rng.standard_normal((10, points))
    figure, panels = _panels()
    for panel, mean, covariance, title in (
        (panels[0], np.zeros(points), prior, "forecast: no observations"),
        (panels[1], gain @ observed, prior - gain @ prior[where], "analysis: seven observations"),
    ):
        spread = 2 * np.sqrt(np.diag(covariance))
        panel.fill_between(np.arange(points), mean - spread, mean + spread, color=COLOURS[0], alpha=0.18, linewidth=0)
        panel.plot(_members(mean, covariance, latents).T, color=COLOURS[0], linewidth=0.7)
        panel.plot(truth, color=INK, linewidth=2.2, label="truth")
        panel.plot([], color=COLOURS[0], linewidth=0.7, label="members")
        panel.set(title=title, xlabel="grid point", ylabel="state", ylim=(-3.2, 3.9))
    panels[1].plot(where, observed, "o", color=COLOURS[1], markersize=5, label="observations")
    panels[1].legend(loc="upper right", ncols=3)
    return figure


PICTURES = {"seam.png": tile_seam, "guidance.png": guidance_methods, "ring.png": ring_analysis}


def main() -> None:
    """Write every picture beside this file."""
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw().savefig(FOLDER / name, dpi=110)


if __name__ == "__main__":
    main()
