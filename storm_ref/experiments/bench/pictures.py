"""Pictures of the bench: labelled axes and units, colours that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from storm_ref.workbench.io.figures import COLOURS, MARKERS, TRUTH

__all__ = ["cone", "fields", "growth", "halo", "history", "reach", "sampled", "seams", "sizes"]

Record = Mapping[str, Any]
_NAMES = {"tiled": "tiled", "full": "full attention", "timesformer": "TimeSformer (8 frames)"}
_GIGA = 1e9


def _style(axis: Axes, **labels: str) -> None:
    axis.set(**labels)
    axis.grid(alpha=0.3)


def growth(records: Sequence[Record], exponents: Mapping[str, float]) -> Figure:
    """Seconds and multiply-adds against tokens, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharex=True)
    for (method, name), colour, marker in zip(_NAMES.items(), COLOURS, MARKERS, strict=False):
        rows = [r for r in records if r["method"] == method]
        tokens = [r["tokens"] for r in rows]
        label = f"{name}: exponent {exponents[method]:.2f}"
        axes[0].loglog(tokens, [r["seconds"] for r in rows], color=colour, marker=marker, label=label)
        axes[1].loglog(tokens, [r["multiply_adds"] for r in rows], color=colour, marker=marker)
    _style(axes[0], xlabel="tokens", ylabel="time of one evaluation (s)", title="measured")
    _style(axes[1], xlabel="tokens", ylabel="multiply-adds of one evaluation", title="counted")
    axes[0].legend()
    figure.suptitle(
        "One block of the 10 M network: cost against tokens, each as far as the tiled one's time and memory go"
    )
    return figure


def history(records: Sequence[Record]) -> Figure:
    """Peak memory and rate of the compression against K, by form."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
    for form, colour, marker in zip(("folded", "equations"), COLOURS, MARKERS, strict=False):
        rows = [r for r in records if r["form"] == form and r["grid"] == [128, 256]]
        frames = [r["frames"] for r in rows]
        axes[0].semilogx(frames, [r["peak_bytes"] / _GIGA for r in rows], color=colour, marker=marker, label=form)
        axes[1].loglog(frames, [r["tokens_per_s_compress"] for r in rows], color=colour, marker=marker, label=form)
    top = max(r["peak_bytes"] for r in records) / _GIGA
    axes[0].set_ylim(0, 1.25 * top)
    _style(axes[0], xlabel="past frames K", ylabel="peak resident memory (GB)", title="memory does not grow with K")
    _style(axes[1], xlabel="past frames K", ylabel="tokens compressed per second", title="rate of the compression")
    axes[0].legend(title="form of the memory")
    figure.suptitle("K frames of 32,768 tokens through the memory and one tiled denoise, 10 M network")
    return figure


def _by_sigma(axis: Axes, records: Sequence[Record], x: str, y: str, **line: Any) -> None:
    sigmas = sorted({r["sigma"] for r in records})
    for sigma, colour, marker in zip(sigmas, COLOURS, MARKERS, strict=False):
        rows = [r for r in records if r["sigma"] == sigma]
        axis.plot([r[x] for r in rows], [r[y] for r in rows], color=colour, marker=marker, label=f"{sigma:g}", **line)


def sizes(about: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The sizes of the grid of one part of `fidelity.run`: generic weights have several grids."""
    grids: Mapping[str, Any] = about["about"]
    return grids if "core" in grids else next(v for k, v in grids.items() if part in k)


def _widest(records: Sequence[Record]) -> list[Record]:
    """The record with the widest blend, for each halo and sigma."""
    best: dict[tuple[float, float], Record] = {}
    for r in records:
        key = (r["halo"], r["sigma"])
        if key not in best or r["blend"] > best[key]["blend"]:
            best[key] = r
    return list(best.values())


def halo(measured: Mapping[str, Any]) -> Figure:
    """Error of one tiled evaluation against the halo, generic and trained weights, and against cost."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    for row, (name, about) in zip(axes, measured.items(), strict=True):
        core = max(sizes(about, "halo")["core"])
        # A halo that covers the domain leaves rounding alone, which a logarithmic axis should not run down to.
        records = [{**r, "cores": r["halo"] / core} for r in _widest(about["halo"]) if r["relative"] > 1e-5]
        _by_sigma(row[0], records, "cores", "relative")
        _by_sigma(row[1], records, "cost_over_untiled", "relative")
        row[1].axvline(1, color=TRUTH, lw=0.8, ls="--")
        for axis in row:
            axis.set_yscale("log")
        _style(row[0], xlabel="halo (cores)", ylabel="error / contribution of the network", title=f"{name} weights")
        _style(row[1], xlabel="multiply-adds / those of the untiled network", ylabel="", title=f"{name} weights")
        row[1].set_xscale("log")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", title="noise level")
    figure.suptitle(
        "One evaluation: tiled against untiled, RMS, widest legal blend (dashed: where tiling costs as much)"
    )
    return figure


def sampled(measured: Mapping[str, Any]) -> Figure:
    """Difference of sampled fields against the number of steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, (name, about) in zip(axes, measured.items(), strict=True):
        records = about["sampled"]
        cuts = sorted({(r["halo"], r["blend"]) for r in records if r["method"] == "every evaluation"})
        for (h, b), colour, marker in zip(cuts, COLOURS, MARKERS, strict=False):
            for method, style in (("every evaluation", "-"), ("once", "")):
                rows = [r for r in records if (r["method"], r["halo"], r["blend"]) == (method, h, b)]
                label = f"halo {h}, blend {b}" + (", blended once" if method == "once" else "")
                fill = "full" if style else "none"
                axis.plot(
                    [r["steps"] for r in rows],
                    [r["relative"] for r in rows],
                    color=colour,
                    marker=marker,
                    ls=style,
                    fillstyle=fill,
                    ms=6 if style else 10,
                    label=label if rows else None,
                )
        rows = [r for r in records if r["method"] == "untiled" and r["relative"] > 0]
        axis.plot(
            [r["steps"] for r in rows], [r["relative"] for r in rows], color=TRUTH, ls=":", label="untiled: steps"
        )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
        axis.minorticks_off()
        _style(axis, xlabel="sampler steps", title=f"{name} weights")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("difference from the untiled field / the field (RMS)")
    figure.suptitle(
        "Sampled fields from the same noise: tiled against untiled (dotted: the sampler's own error in steps)"
    )
    return figure


def fields(about: Mapping[str, Any], title: str) -> Figure:
    """One sampled field untiled, tiled, and their difference, with the cores' boundaries."""
    shown = about["pictures"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.1), layout="constrained", sharex=True, sharey=True)
    untiled = np.asarray(shown["untiled"])
    top = float(np.quantile(np.abs(untiled), 0.995))
    worst = float(np.abs(np.asarray(shown["difference"])).max()) or 1.0
    for axis, name, limit in zip(axes, ("untiled", "tiled", "difference"), (top, top, worst), strict=True):
        image = axis.imshow(np.asarray(shown[name]), vmin=-limit, vmax=limit, cmap="PuOr", interpolation="nearest")
        axis.set(title="tiled less untiled" if name == "difference" else name, xlabel="column (points)")
        figure.colorbar(image, ax=axis, label="standard deviations", shrink=0.8)
    core = sizes(about, "pictures")["core"]
    for n, line in ((untiled.shape[0], axes[2].axhline), (untiled.shape[1], axes[2].axvline)):
        step = core[0] if line == axes[2].axhline else core[1]
        for at in range(step, n, step):
            line(at - 0.5, color=TRUTH, lw=0.3, alpha=0.5)
    axes[0].set_ylabel("row (points)")
    figure.suptitle(f"{title}: halo {shown['halo']}, blend {shown['blend']}, {shown['steps']} steps (lines: cores)")
    return figure


def cone(about: Mapping[str, Any], title: str) -> Figure:
    """The response of one point to noise in each tile, with one more evaluation before the end in each panel."""
    maps = about["cone"]["maps"]
    count = len(maps["tiled"])
    figure, axes = plt.subplots(2, count, figsize=(2.3 * count + 1, 3.4), layout="constrained", squeeze=False)
    for row, name in zip(axes, ("tiled", "untiled"), strict=True):
        for k, (axis, values) in enumerate(zip(row, maps[name], strict=True)):
            shown = np.log10(np.maximum(np.asarray(values), 1e-300))
            shown[shown < -200] = np.nan  # nothing at all: beyond the cone
            image = axis.imshow(shown, vmin=-8, vmax=0, cmap="cividis", interpolation="nearest")
            axis.set_facecolor("#ffffff")
            axis.set(xticks=[], yticks=[], title=f"{k + 1} before" if name == "tiled" else "")
        row[0].set_ylabel(f"{name}\nrow of tiles")
    for axis in axes[-1]:
        axis.set_xlabel("column of tiles")
    figure.colorbar(image, ax=axes, label="log10 of the response\n(standard deviations)")
    figure.suptitle(
        f"{title}: response of one point to noise in each tile,\nby the evaluations before the end (white: none)"
    )
    return figure


def reach(measured: Mapping[str, Any]) -> Figure:
    """The response against distance, one evaluation before the end and at the first: how much arrives from afar."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (name, about) in zip(axes, measured.items(), strict=True):
        for kind, colour, marker in zip(("tiled", "untiled"), COLOURS, MARKERS, strict=False):
            records = about["cone"]["records"][kind]
            steps = sorted({r["k"] for r in records})
            for k, style in ((steps[0], ":"), (steps[-1], "-")):
                rows = [r for r in records if r["k"] == k and r["reached"]]
                axis.semilogy(
                    [r["distance"] for r in rows],
                    [r["answer"] for r in rows],
                    color=colour,
                    marker=marker,
                    ls=style,
                    label=f"{kind}, {k} evaluation{'s' if k > 1 else ''}",
                )
        _style(axis, xlabel="distance (tiles)", title=f"{name} weights")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("largest response to noise of one point\n(standard deviations)")
    figure.suptitle("How much arrives from far away")
    return figure


def seams(measured: Mapping[str, Any]) -> Figure:
    """Steps between neighbours of sampled fields by their place in the core, over those of the untiled field."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (name, about) in zip(axes, measured.items(), strict=True):
        rows = [r for r in about["seams"] if r["sigma"] is None and r["along"] == "x" and r["method"] == "tiled"]
        for r, colour, marker in zip(rows, COLOURS, MARKERS, strict=False):
            places = range(len(r["over_untiled"]))
            label = f"halo {r['halo']}, blend {r['blend']}"
            axis.errorbar(
                places,
                r["over_untiled"],
                yerr=r["over_untiled_error"],
                color=colour,
                marker=marker,
                capsize=3,
                label=label,
            )
        axis.axhline(1, color=TRUTH, lw=0.8, ls="--")
        _style(axis, xlabel="place of the step in the core (points; 0: across the boundary)", title=f"{name} weights")
        if rows:
            axis.legend()
    axes[0].set_ylabel("step between neighbours,\ntiled / untiled (RMS)")
    figure.suptitle("Seams in sampled fields (1: none), mean over members with its standard error")
    return figure
