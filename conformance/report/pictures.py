"""Illustrations of the specification for the HTML report, drawn from its formulas alone: nothing of a port is in them.

Drawn by matplotlib as SVG that takes its colours from the page (style.py), so that one picture serves light and dark,
and its text as text. The same input gives the same bytes.
"""

import io
import itertools
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = [
    "Picture",
    "assimilation",
    "cost_curves",
    "guidance_methods",
    "illustrations",
    "sampled_variances",
    "svg",
    "tile_seam",
    "tile_weights",
]

Vector = NDArray[np.float64]

# Stand-ins for the colours of the page. Matplotlib writes them as they are, and `svg` puts variables in their place.
INK, MUTED, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#01010{n}" for n in range(2, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", CARD: "page"} | {c: f"s{n}" for n, c in enumerate(SERIES, 1)}
_STYLE: Any = {
    "svg.hashsalt": "storm", "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "text.color": INK,
    "axes.titlecolor": INK, "axes.titlesize": 10, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "legend.fontsize": 9, "lines.linewidth": 1.6, "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": True, "mathtext.fontset": "dejavusans",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An SVG, what it shows (for those who do not see it), and what to look at."""

    title: str
    svg: str
    caption: str


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an inline SVG element in the page's colours, its ids beginning with `name`, with a label."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'xlink:href="#', 'href="#', text)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg role="img" aria-label="{label}" {box.group()} stroke-linejoin="round">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", opening, text, count=1)).strip()


def _figure(panels: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


# Tiles


def tile_weights(n: int, c: int, h: int, b: int) -> list[tuple[int, Vector]]:
    """First point and weights of each tile of a closed axis, [TILE-2] to [TILE-4]."""
    found = []
    for start in range(0, n, c):
        first, last = max(start - h, 0), min(start + c + h, n)
        point = np.arange(first, last) + 0.5
        weight = np.ones(last - first)
        for boundary, sign in ((start, 1.0), (start + c, -1.0)):
            if 0 < boundary < n:
                inside = np.clip(sign * (point - boundary) / (2 * b) + 0.5, 0.0, 1.0)  # (k + 1/2) / 2b
                weight *= np.sin(np.pi / 2 * inside) ** 2
        found.append((first, weight))
    return found


def tile_seam() -> Picture:
    """Weights that sum to one, and what a plain Hann window over the extents makes of a constant field."""
    n, c, h, b = 48, 12, 6, 4
    right = tile_weights(n, c, h, b)
    wrong = [(first, np.hanning(len(weight))) for first, weight in right]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2)
        for axis, tiles, title in ((axes[0], right, "TILE-4"), (axes[1], wrong, "numpy.hanning over the extent")):
            total = np.zeros(n)
            for number, (first, weight) in enumerate(tiles):
                at = np.arange(first, first + len(weight))
                total[at] += weight
                style = ("-", "--", "-.", ":")[number % 4]
                axis.plot(at, weight, style, color=SERIES[number], marker="o", markersize=2.2)
            axis.plot(np.arange(n), total, color=INK, linewidth=2.4, label="sum of all tiles")
            for boundary in range(c, n, c):
                axis.axvline(boundary - 0.5, color=MUTED, linewidth=0.8, linestyle=":")
            axis.set(title=title, xlabel="grid point", ylabel="weight", ylim=(-0.05, 1.55))
            axis.legend(loc="upper right")
        drawn = svg(figure, "seam", "Weights of four tiles along an axis and their sum, right and wrong")
    caption = (
        f"Four tiles of core {c} with halo {h} and blend half-width {b} on a closed axis. The heavy line is the sum "
        "of the weights: what becomes of a field of ones. Left it is one everywhere, also at the ends, where "
        "nothing tapers. Right every window is zero at both of its ends: the field is lost at the edges and uneven "
        "in between."
    )
    return Picture("Tile weights and the seam (TILE-4, TILE-5)", drawn, caption)


# Cost


def cost_curves() -> Picture:
    """Multiply-adds of one block against tokens a frame: full attention, divided, STORM dense, STORM tiled."""
    n, t, d = np.logspace(3, 6.5, 80), 8, 256
    core, tile = 32**2, (32 + 2 * 8) ** 2
    curves = {
        "all tokens of 8 frames": 12 * t * n * d**2 + 2 * d * (t * n) ** 2,
        "TimeSformer, 8 frames": 17 * t * n * d**2 + 2 * d * t * n * (t + n),
        "STORM, one tile": 16 * n * d**2 + 4 * d * n**2 + 9 * d**2,
        "STORM, tiles": n / core * (16 * tile * d**2 + 4 * d * tile**2 + 9 * d**2),
    }
    with matplotlib.rc_context(_STYLE):
        figure, (axis,) = _figure(1, 3.4)
        for number, (name, cost) in enumerate(curves.items()):
            style: Any = {"linestyle": ("-", "--", "-.", "-")[number], "linewidth": (1.6, 1.6, 1.6, 2.6)[number]}
            axis.loglog(n, cost, color=SERIES[number], **style)
            slope = np.log(cost[-1] / cost[-20]) / np.log(n[-1] / n[-20])
            label = f"{name}: slope {slope:.2f}"
            axis.text(n[-1] * 1.08, cost[-1], label, va="center", fontsize=9, color=SERIES[number])
        axis.set(xlabel="tokens of a frame", ylabel="multiply-adds of a block", xlim=(n[0], n[-1]))
        axis.minorticks_off()
        drawn = svg(figure, "cost", "Multiply-adds of a block against tokens of a frame for four ways to attend")
    caption = (
        "Closed forms of chapter 05 (COST-2) and of the baselines: width 256, tiles of 32 x 32 core tokens with a "
        "halo of 8. Look at the slopes: compression takes away the frames, not the square; tiles of fixed size "
        "take away the square, at a constant price for the halo."
    )
    return Picture("Cost against size (TILE-10, COST-2)", drawn, caption)


# Guidance and assimilation


def sampled_variances(c: Vector, r: Vector, sd: float = 1.5, gamma: float = 0.1) -> dict[str, Vector]:
    """Variances that the methods sample for a prior N(0, c) and one observation of error variance r (chapter 07)."""
    beta, q = r * sd**2 / (r + sd**2), r / (gamma * c)
    inner = (sd**2 - c) / (c * (beta - c)) + (sd**2 - beta) * np.log(c / beta) / (beta - c) ** 2
    return {
        "mmps: the posterior": c * r / (c + r),
        "pigdm": c * np.exp(-(c**2) / (r + sd**2) * inner),
        "sda": c * np.exp(-(q - 1 - np.log(q)) / (gamma * (q - 1) ** 2)),
        "dps": c * np.exp(-c / r),
    }


def guidance_methods() -> Picture:
    x, one, r = np.linspace(-3, 3, 181), np.ones(1), np.full(1, 0.3)
    ratio = np.logspace(-2, 1, 91) * 1.003  # off the points where the closed forms are 0 / 0
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2)
        axes[0].plot(x, _density(x, 1.0), color=MUTED, linestyle=":", label="prior")
        for number, (name, variance) in enumerate(sampled_variances(one, r).items()):
            style: Any = {"linestyle": ("-", "--", "-.", (0, (6, 1)))[number], "color": SERIES[number]}
            axes[0].plot(x, _density(x, float(variance[0])), label=name, **style)
            curves = sampled_variances(np.ones_like(ratio), 1 / ratio)
            axes[1].loglog(ratio, curves[name] / curves["mmps: the posterior"], **style)
        axes[0].set(xlabel="state", ylabel="density", ylim=(0, 2.9), title="prior variance 1, error variance 0.3")
        axes[0].legend(loc="upper left", ncols=2)
        axes[1].set(xlabel="prior variance / error variance", ylabel="sampled / true variance", ylim=(0.01, 10))
        axes[1].minorticks_off()
        drawn = svg(figure, "methods", "Densities and variances that four guidance methods sample")
    caption = (
        "What each method samples for a scalar Gaussian, by the closed forms of chapter 07 (pigdm with a data "
        "scale of 1.5, sda with gamma 0.1). Only mmps, solved to convergence, gives the posterior (1 on the "
        "right). dps is far too narrow once the observation is much better than the prior, and a port of it has to "
        "be wrong by just that."
    )
    return Picture("Which posterior a method samples (GUIDE-8, GUIDE-9)", drawn, caption)


def _density(x: Vector, variance: float) -> Vector:
    return np.asarray(np.exp(-(x**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance), np.float64)


def _sample(mean: Vector, covariance: Vector, start: Vector, steps: int = 40) -> Vector:
    """Heun's method of [EDM-7] on the schedule of [EDM-5] with the exact denoiser of N(mean, covariance), [EDM-10].

    start: standard normal latents [members, points]. The denoiser of the posterior is the guided mean, [GUIDE-8].
    """
    values, vectors = np.linalg.eigh(covariance)
    ramp = np.arange(steps) / (steps - 1)
    sigma = np.append((80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0)

    def slope(x: Vector, s: float) -> Vector:
        """(x - D) / sigma"""
        return np.asarray(((x - mean) @ vectors * (s / (values + s**2))) @ vectors.T, np.float64)

    x: Vector = sigma[0] * start
    for now, then in itertools.pairwise(sigma):
        first = slope(x, now)
        ahead = x + (then - now) * first
        x = ahead if then == 0 else np.asarray(x + (then - now) * (first + slope(ahead, then)) / 2, np.float64)
    return x


def assimilation() -> Picture:
    """From the prior's ensemble to the analysis on a ring of points: members by the sampler, truth and exact answer."""
    rng, n, r = np.random.default_rng(11), 60, 0.03
    gap = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    prior = np.exp(-np.minimum(gap, n - gap) / 8.0)
    truth = np.linalg.cholesky(prior) @ rng.standard_normal(n)
    where = np.array([4, 9, 14, 30, 33, 36, 52])
    observed = truth[where] + np.sqrt(r) * rng.standard_normal(len(where))
    gain = prior[:, where] @ np.linalg.inv(prior[np.ix_(where, where)] + r * np.eye(len(where)))
    analysis = prior - gain @ prior[where]
    noise = rng.standard_normal((10, n))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2)
        for axis, mean, covariance, title in (
            (axes[0], np.zeros(n), prior, "forecast: no observations"),
            (axes[1], gain @ observed, analysis, "analysis: seven observations"),
        ):
            spread = 2 * np.sqrt(np.diag(covariance))
            axis.fill_between(np.arange(n), mean - spread, mean + spread, color=SERIES[0], alpha=0.18, linewidth=0)
            members = _sample(mean, covariance, noise)
            axis.plot(members.T, color=SERIES[0], linewidth=0.7)
            axis.plot(truth, color=INK, linewidth=2.2, label="truth")
            axis.plot([], color=SERIES[0], linewidth=0.7, label="members")
            axis.set(title=title, xlabel="grid point", ylabel="state", ylim=(-3.2, 3.9))
        axes[1].plot(where, observed, "o", color=SERIES[1], markersize=5, label="observations")
        axes[1].legend(loc="upper right", ncols=3)
        drawn = svg(figure, "cycle", "An ensemble without and with seven observations, and the truth")
    caption = (
        "One stage end to end where the answer is known: a Gaussian prior on a ring, its exact denoiser, exact "
        "guidance, 40 Heun steps from noise, ten members. The band is the exact mean with two standard deviations. "
        "Look at the gaps between observations: there the members part again, and the band is as wide as they are."
    )
    return Picture("An analysis end to end (EDM-7, GUIDE-1, DA-1)", drawn, caption)


def illustrations() -> list[Picture]:
    """All pictures, in the order of the chapters."""
    return [tile_seam(), cost_curves(), guidance_methods(), assimilation()]
