"""The shape of an error: where along the axes of an output it lies, a description in words, and a picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from conformance.adapter import Array
from conformance.protocol.atomic import write_atomically

__all__ = ["AXES", "axis_names", "bars", "by_axis", "draw_error", "looks_like"]

# Names of the axes of outputs, for words and pictures; others are called axis 0, 1, ...
AXES: dict[str, tuple[str, ...]] = {
    "tokens": ("sample", "token", "value"),
    "x": ("sample", "channel", "row", "column"),
    "raw": ("sample", "channel", "row", "column"),
    "denoised": ("sample", "channel", "row", "column"),
    "guided": ("sample", "channel", "row", "column"),
    "blended": ("sample", "channel", "row", "column"),
    "memory": ("sample", "row", "column", "feature"),
    "y": ("sample", "token", "feature"),
    "gamma": ("sample", "head"),
    "embedding": ("sample", "feature"),
    "samples": ("member", "variable"),
    "states": ("analysis", "member", "variable"),
    "noise": ("draw", "member", "variable"),
    "position": ("row", "column", "coordinate"),
    "sigmas": ("level",),
    "sigma": ("sample",),
    "crps": ("point",),
    "counts": ("rank",),
    "weights": ("point",),
    "points": ("point",),
    "means": ("analysis", "variable"),
    "covariances": ("analysis", "row", "column"),
}


def axis_names(output: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return a name for each axis of an output of this shape."""
    known = AXES.get(output, ())
    return known if len(known) == len(shape) else tuple(f"axis {i}" for i in range(len(shape)))


def by_axis(got: Array, expected: Array, output: str) -> list[tuple[str, Array]]:
    """Return the root mean square error along each axis of more than one element, with the axis's name."""
    error = np.nan_to_num(np.abs(got - expected), nan=np.inf)
    profiles = []
    for axis, name in enumerate(axis_names(output, error.shape)):
        if error.shape[axis] > 1:
            others = tuple(other for other in range(error.ndim) if other != axis)
            profiles.append((name, np.sqrt((error**2).mean(others))))
    return profiles


def looks_like(got: Array, expected: Array, output: str, limit: float) -> list[str]:
    """Describe the error in sentences: a factor, an offset, values in other places, a part of an axis.

    limit: what an error along an axis must exceed to be seen there.
    """
    error = np.abs(got - expected)
    size = float(np.sqrt((error**2).mean())) if error.size else 0.0
    if size == 0.0 or not np.isfinite(size):
        return []
    candidates = (_factor(got, expected, size), _offset(got, expected, size))
    sentences = [sentence for sentence in candidates if sentence][:1]
    sentences += _moved(got, expected, output)
    for name, rms in by_axis(got, expected, output):
        bad = rms > limit
        if 0 < bad.sum() < len(rms):
            few = bad.sum() <= len(rms) / 2
            listed = np.flatnonzero(bad if few else ~bad)
            places = ", ".join(str(i) for i in listed[:8]) + (" ..." if len(listed) > 8 else "")
            sentences.append(f"only {'' if few else 'all but '}{name} {places}")
    return sentences


def _factor(got: Array, expected: Array, size: float) -> str:
    norm = float((expected**2).sum())
    if norm == 0 or expected.size < 3:
        return ""
    factor = float((got * expected).sum()) / norm
    rest = float(np.sqrt(((got - factor * expected) ** 2).mean()))
    return f"every value is {factor:.6g} times the right one" if rest < 1e-6 * size else ""


def _offset(got: Array, expected: Array, size: float) -> str:
    if expected.size < 3:
        return ""
    offset = float((got - expected).mean())
    rest = float((got - expected - offset).std())
    return f"every value is {offset:.6g} off" if rest < 1e-6 * size else ""


def _moved(got: Array, expected: Array, output: str) -> list[str]:
    if not np.array_equal(np.sort(got, axis=None), np.sort(expected, axis=None)):
        return []
    for axis, name in enumerate(axis_names(output, expected.shape)):
        if np.array_equal(np.flip(got, axis), expected):
            return [f"the values are right, in the reverse order along {name}"]
    return ["the values are right and in the wrong places"]


def bars(values: Array) -> str:
    """Draw numbers as a line of characters of eight heights, infinite ones the highest, zeros as dots; 64 at most."""
    top = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    heights = np.nan_to_num(values / top, posinf=1.0)
    shown = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * height))] if height else "." for height in heights[:64])
    return shown + (" ..." if len(heights) > 64 else "")


def draw_error(got: Array, expected: Array, output: str, title: str, path: Path) -> None:
    """Write a PNG with what was expected, what came, and the error where it is largest.

    Outputs of two axes or more are drawn as maps of the last two, others as lines. Raises ImportError without
    matplotlib.
    """
    # Optional: everything else that `explain` says needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    error = np.abs(got - expected)
    names = axis_names(output, error.shape)
    worst = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), error.shape) if error.ndim else ()
    lead = tuple(int(i) for i in worst[: max(error.ndim - 2, 0)])
    where = "".join(f", {name} {i}" for name, i in zip(names, lead, strict=False))
    top = float(np.abs(expected[lead]).max(initial=0.0)) or 1.0
    signed: dict[str, Any] = {"cmap": "PuOr", "vmin": -top, "vmax": top}
    panels = (
        ("expected", expected[lead], signed),
        ("got", got[lead], signed),
        ("|got - expected|", error[lead], {"cmap": "cividis"}),
    )
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {output}{where} (normalised units)")
    for axes, (name, values, colours) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set_title(name)
        if values.ndim == 2:
            figure.colorbar(axes.imshow(values, aspect="auto", **colours), ax=axes)
            axes.set_xlabel(names[-1])
            axes.set_ylabel(names[-2])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.plot(np.atleast_1d(values).ravel(), color="#0072B2", marker=".")
            axes.set_xlabel(names[-1] if names else "")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path, picture.getvalue())
