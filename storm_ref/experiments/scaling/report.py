"""The predictions as tables and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from storm_ref.config import storm_10b, storm_10m
from storm_ref.experiments.scaling.model import SIZES, Machine, Step, Workload, best, efficiency
from storm_ref.experiments.scaling.sensitivity import KNOBS, needed, turned
from storm_ref.workbench.io.figures import COLOURS, MARKERS, TRUTH

__all__ = [
    "PAPER",
    "PARTS",
    "PRESETS",
    "Steps",
    "batch_rows",
    "picture",
    "predict",
    "prediction_rows",
    "sensitivity_rows",
]

Steps = Mapping[str, Sequence[Step]]  # by preset, in order of size

BATCHES = tuple(2**k for k in range(8, 16))  # samples of a step
PAPER = (0.61, 0.64)  # efficiency at 32,768 against 512, for 10 M and for 10 B
PRESETS = {"10 M": storm_10m(), "10 B": storm_10b()}
PARTS = ("compute", "tp", "tile", "fsdp", "ddp", "fixed")  # of a step


def predict(samples: int = 512, training: bool = True) -> dict[str, list[Step]]:
    """The fastest step at each size, by preset."""
    works = {name: Workload(config, samples=samples, training=training) for name, config in PRESETS.items()}
    return {name: [best(Machine(), work, size) for size in SIZES] for name, work in works.items()}


def _efficiencies(steps: Sequence[Step]) -> list[float]:
    first = steps[0].total * steps[0].mesh.size
    return [first / step.mesh.size / step.total for step in steps]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def prediction_rows(steps: Steps) -> list[list[str]]:
    """Rows of preset, accelerators, mesh, seconds, efficiency in % and the parts of the step in %."""
    rows = []
    for name, of_preset in steps.items():
        for step, share in zip(of_preset, _efficiencies(of_preset), strict=True):
            mesh = "x".join(map(str, step.mesh.shape))
            parts = [_percent(getattr(step, part) / step.total) for part in PARTS]
            rows.append([name, f"{step.mesh.size:,}", mesh, f"{step.total:.3g}", _percent(share), *parts])
    return rows


def sensitivity_rows(samples: int = 512) -> list[list[str]]:
    """Rows of assumption and value; then, for each preset, E(32,768) in % with half and twice the value, and the value
    that gives the middle of PAPER.

    A dash says that no value does or, for tiles and history, that none was looked for.
    """
    rows = []
    for knob in KNOBS:
        cells = [knob.name, f"{knob.default:g} {knob.unit}".strip()]
        for config in PRESETS.values():
            work = Workload(config, samples=samples)
            value = None if knob.of_work else needed(work, knob, sum(PAPER) / 2)
            cells += [_percent(turned(work, knob, 0.5)), _percent(turned(work, knob, 2.0))]
            cells.append("-" if value is None else f"{value:.3g}")
        rows.append(cells)
    return rows


def batch_rows() -> list[list[str]]:
    """Rows of the samples of a step, and E(32,768) in % for each preset."""
    works = [Workload(config) for config in PRESETS.values()]
    return [[f"{b:,}", *(_percent(efficiency(Machine(), replace(w, samples=b))) for w in works)] for b in BATCHES]


def picture(steps: Steps) -> Figure:
    """Efficiency against accelerators; and how accelerators spend their time, over that of the baseline's step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _draw_efficiency(left, steps)
    _draw_parts(right, steps)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.grid(alpha=0.3)
    figure.suptitle("Strong scaling of one training step as the cost model predicts it; machine and batch are assumed")
    return figure


def _draw_efficiency(axis: Axes, steps: Steps) -> None:
    for (name, of_preset), colour, marker in zip(steps.items(), COLOURS, MARKERS, strict=False):
        sizes = [step.mesh.size for step in of_preset]
        shares = [100 * share for share in _efficiencies(of_preset)]
        axis.semilogx(sizes, shares, color=colour, marker=marker, label=f"model, {name}")
    axis.errorbar(
        [SIZES[-1]],
        [50 * sum(PAPER)],
        50 * (PAPER[1] - PAPER[0]),
        color=TRUTH,
        capsize=6,
        lw=3,
        ls="",
        label="paper, both sizes: 61-64 %",
    )
    axis.set(xlabel="accelerators", ylabel="strong-scaling efficiency against 512 (%)", ylim=(0, 105))
    axis.legend(loc="lower left")


def _draw_parts(axis: Axes, steps: Steps) -> None:
    highest = 0.0
    for k, (name, of_preset) in enumerate(steps.items()):
        first = of_preset[0].total * of_preset[0].mesh.size
        places = [2.0 ** (0.38 * k - 0.19) * step.mesh.size for step in of_preset]
        bottom = [0.0] * len(of_preset)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            height = [getattr(step, part) * step.mesh.size / first for step in of_preset]
            axis.bar(
                places,
                height,
                [0.22 * place for place in places],
                bottom,
                label=None if k else part,
                color=colour,
                edgecolor="white",
                lw=0.5,
                hatch="//" if k else None,
            )
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
        for place, top in zip(places, bottom, strict=True):
            axis.annotate(name, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=7, rotation=90)
        highest = max(highest, *bottom)
    axis.axhline(1, color=TRUTH, lw=0.8, ls="--")
    label = "accelerators x time of a step,\nover that of 512 (dashed: ideal)"
    axis.set(xlabel="accelerators", ylabel=label, ylim=(0, 1.15 * highest))
    axis.legend(title="part of the step (10 B hatched)", ncols=3, loc="upper left")
