"""A plot of error over limit as inline SVG, with a row for each chapter and a mark for each measured case."""

import html
import math
from collections import Counter
from typing import Any

from conformance.report.summary import FAILED, chapters, error_text, fraction, text

__all__ = ["CLASSES", "error_plot"]

# The name of each class of tolerance, and its mark as an SVG path around the origin. Shapes differ, not colours alone.
CLASSES = {
    "exact": ("exact", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"),
    "ulp": ("ULP", "M0 -5L5 4H-5z"),
    "bound": ("bound", "M-3.6 -3.6h7.2v7.2h-7.2z"),
    "monte_carlo": ("Monte-Carlo", "M0 -5.2L5.2 0L0 5.2L-5.2 0z"),
    "either": ("either", "M-5 -1.6h3.4v-3.4h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4z"),
}
LEFT, ZERO, WIDTH, INFINITE = 104, 110, 440, 110  # pixels: names, column without error, axis, column off the scale
LOWEST, HIGHEST = -4, 6  # decades: what is less stands at the edge, what is more is off the scale
STEP, PER_LINE = 10, 9  # between marks; marks side by side in a column
RIGHT = LEFT + ZERO + WIDTH


def error_plot(data: dict[str, Any]) -> str:
    """Draw the plot; empty when nothing was measured."""
    rows = {name: [e for e in group if fraction(e) is not None] for name, group in chapters(data).items()}
    rows = {name: group for name, group in rows.items() if group}
    logs = [math.log10(f) for group in rows.values() for e in group if (f := fraction(e)) and math.isfinite(f)]
    if not rows:
        return ""
    low = max(LOWEST, math.floor(min(logs, default=-1)))
    high = min(HIGHEST, max(1, math.ceil(max(logs, default=1))))
    body = ""
    top = 26.0
    for name, group in rows.items():
        marks, height = _row(group, top, min(low, 0), high)
        body += f'<text x="0" y="{top + height / 2 + 4:.0f}">{html.escape(text(name, 20))}</text>{marks}'
        top += height
        body += f'<path class="grid" d="M0 {top:.0f}H{RIGHT + INFINITE}"/>'
    return _frame(body, top, min(low, 0), high, sum(map(len, rows.values())))


def _x(log: float, low: int, high: int) -> float:
    return LEFT + ZERO + WIDTH * (min(max(log, low), high) - low) / (high - low)


def _row(group: list[dict[str, Any]], top: float, low: int, high: int) -> tuple[str, float]:
    """Draw the marks of a chapter and return the height they take; marks of one place stand one above the other."""
    places: list[tuple[float, int]] = []  # x, line
    taken: Counter[int] = Counter()
    for entry in group:
        value = fraction(entry)
        assert value is not None
        if value == 0 or value > 10**HIGHEST:
            column = -1 if value == 0 else -2
            left = LEFT if value == 0 else RIGHT
            places.append((left + 16 + STEP * (taken[column] % PER_LINE), taken[column] // PER_LINE))
        else:
            x = _x(math.log10(value), low, high)
            column = round(x / STEP)
            places.append((x, taken[column]))
        taken[column] += 1
    height = 18 + STEP * (1 + max(line for _, line in places))
    marks = [_mark(e, x, top + 14 + STEP * line) for e, (x, line) in zip(group, places, strict=True)]
    return "".join(marks), height


def _mark(entry: dict[str, Any], x: float, y: float) -> str:
    kind = entry["class"] if entry["class"] in CLASSES else "either"
    failed = " failed" if entry["verdict"] in FAILED else ""
    title = html.escape(f"{text(entry['id'], 80)}: {text(error_text(entry), 120)}")
    place = f'transform="translate({x:.1f} {y:.1f})" d="{CLASSES[kind][1]}"'
    return f'<path class="mark {kind}{failed}" {place}><title>{title}</title></path>'


def _frame(body: str, bottom: float, low: int, high: int, marks: int) -> str:
    """Draw axis, limit line, columns and legend around the marks."""
    limit = _x(0, low, high)
    size = f'width="{RIGHT + INFINITE - limit:.1f}" height="{bottom - 20:.0f}"'
    parts = [f'<rect class="beyond" x="{limit:.1f}" y="20" {size}/>']
    for log in range(low, high + 1):
        x = _x(log, low, high)
        parts.append(f'<path class="grid" d="M{x:.1f} 20V{bottom:.0f}"/>')
        power = str(log).replace("-", "\u2212")
        label = {0: "1", 1: "10"}.get(log, f'10<tspan dy="-4" font-size="9">{power}</tspan>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.0f}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="limit" d="M{limit:.1f} 20V{bottom:.0f}"/>{body}')
    columns = ((LEFT + ZERO / 2, "no error"), (limit, "limit"), (RIGHT + INFINITE / 2, "off the scale"))
    parts += [f'<text x="{x:.0f}" y="14" text-anchor="middle" class="quiet">{name}</text>' for x, name in columns]
    parts.append(f'<text x="{LEFT + ZERO + WIDTH / 2}" y="{bottom + 36:.0f}" text-anchor="middle">error / limit</text>')
    for at, (kind, (name, path)) in enumerate(CLASSES.items()):
        x, y = LEFT + 16 + 120 * at, bottom + 60
        parts.append(f'<path class="mark {kind}" transform="translate({x} {y:.0f})" d="{path}"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 4:.0f}">{name}</text>')
    label = f"Error divided by limit for {marks} cases, by chapter, on a logarithmic axis; beyond the limit they fail"
    size = f"0 0 {RIGHT + INFINITE} {bottom + 70:.0f}"
    return f'<svg class="plot" role="img" aria-label="{label}" viewBox="{size}">{"".join(parts)}</svg>'
