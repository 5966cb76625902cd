"""The page index.html: figures beside their aims and the paper's, and pictures, all made from the JSON files."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm_ref.experiments.bench import pictures
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.figures import save

__all__ = ["AIMS", "Aim", "fidelity_headline", "paper_table", "scale_records", "write"]

Values = Mapping[str, Any]
Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Aim:
    """An aim for a figure of cost.json: `words` state it, `met` judges a value, and `form` prints one."""

    key: str
    text: str
    words: str
    met: Callable[[float], bool]
    form: str = "{:.3f}"

    def show(self, value: int | float) -> str:
        """The value in the form for readers."""
        return self.form.format(value)


AIMS = (
    Aim("counted_exponent_tiled", "counted exponent, tiled, in tokens", "1.000", lambda v: abs(v - 1) < 5e-4),
    Aim("counted_exponent_frames", "counted exponent, memory, in frames", "1.000", lambda v: abs(v - 1) < 5e-4),
    Aim("counted_exponent_full", "counted exponent, full attention, same range", ">= 1.9", lambda v: v >= 1.9),
    Aim("exponent_tiled", "time exponent, tiled", "<= 1.05", lambda v: v <= 1.05),
    Aim("ratio_to_dense", "time of tiled attention / dense of equal work", "<= 1.15", lambda v: v <= 1.15),
    Aim("sampler_overhead", "sampler, tiling and blending / network", "<= 3 %", lambda v: v <= 0.03, "{:.2%}"),
    Aim("tokens", "tokens of history", "196.6 M", lambda v: v >= 196.6e6, "{:,.0f}"),
    Aim("peak_rss_gb", "peak resident memory (GB)", "<= 2", lambda v: v <= 2),
    Aim("rss_growth_k96_to_k6000", "its growth from 96 to 6,000 frames", "<= 2 %", lambda v: v <= 0.02, "{:+.2%}"),
)


def fidelity_headline(measured: Values) -> dict[str, Any]:
    """A few numbers of fidelity.json: the fields sampled with the most steps, by subject, halo and blend."""
    result: dict[str, Any] = {}
    for name, about in measured.items():
        rows = [r for r in about["sampled"] if r["method"] == "every evaluation"]
        most = max(r["steps"] for r in rows)
        result[name] = [
            {k: r[k] for k in ("steps", "halo", "blend", "relative", "over_spread")} for r in rows if r["steps"] == most
        ]
    return result


def scale_records(folder: Path) -> dict[str, Values]:
    """The records of the long runs that were made."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "scale").glob("*.json"))}


# The paper's tables


def _history_row(record: Values) -> str:
    seconds = record["seconds_compress"] + record["seconds_denoise"]
    return (
        f"{record['tokens']:,} tokens, {record['peak_bytes'] / 1e9:.2f} GB, {seconds:,.1f} s "
        f"({record['seconds_compress']:,.1f} s compressing, {record['seconds_denoise']:,.1f} s one tiled evaluation; "
        f"threads: {record['threads']})"
    )


def _domain_row(record: Values) -> str:
    seconds = record["seconds_compress"] + record["seconds_denoise"]
    return (
        f"{record['grid'][0]:,} x {record['grid'][1]:,} points ({record['tokens']:,} tokens with one past frame), "
        f"{record['peak_bytes'] / 1e9:.2f} GB, {seconds:,.0f} s, {record['weights'] / 1e6:.2f} M weights "
        f"(threads: {record['threads']})"
    )


_SAMPLE = "theirs is a sample on their accelerators; ours one evaluation of the 10 M network on the processor above"
_FOLDED = (
    "the memory of this specification folds into means for each head and place (experiments/folded.py), which theirs "
    "may not; with every token made it runs at {:,.0f} tokens/s"
)


def paper_table(values: Values, scale: Mapping[str, Values]) -> list[Row]:
    """Rows of the experiment, the paper's figure, the one measured here, and what differs."""
    rows: list[Row] = []
    if "history" in values:
        at = {(r["frames"], r["form"]): r for r in values["history"]}
        slow = _FOLDED.format(values["tokens_per_s_compress_equations"])
        most = _history_row(at[6000, "folded"])
        rows.append(("Table II, STORM with tiling", "196.6 M tokens, 46.0 GB, 1.54 s", most, f"{_SAMPLE}; {slow}"))
    if "growth" in values:
        last = [r for r in values["growth"] if r["method"] == "timesformer"][-1]
        here = f"{last['tokens']:,} tokens, {last['peak_live_bytes'] / 1e9:.2f} GB, {last['seconds']:.1f} s"
        why = "ours is one block of width 256; a size more takes more time or memory than tiles of 262,144 tokens"
        rows.append(("Table II, TimeSformer", "3.1 M tokens, 55.0 GB, 0.080 s", here, why))
    if "history" in values:
        here = _history_row(at[177_500, "folded"])
        why = "same frames; their tokens a frame are not known, 3,584 give their total to 0.2 %"
        rows.append(("Table III, longest history", "177.5 k frames, 635 M tokens", here, why))
    for name, why in (
        ("domain", "tiny network, from disk to disk"),
        ("era5", "ERA5's grid, 10 M network, from disk to disk"),
    ):
        if name in scale:
            theirs = "30,400 x 60,800 points, 3.7 B tokens"
            rows.append(("Table III, largest single frame", theirs, _domain_row(scale[name]), why))
    if "tokens" in scale:
        why = "theirs is joint in space and time on 128 GPUs; ours long in time: 610,352 frames of 32,768 tokens"
        rows.append(("Table III, joint", "about 20 B tokens", _history_row(scale["tokens"]), why))
    if "equations" in scale:
        why = "the same history with every token made, as the equations are written"
        theirs = "196.6 M tokens, 46.0 GB, 1.54 s"
        rows.append(("Table II, STORM with tiling", theirs, _history_row(scale["equations"]), why))
    return rows


_MODEL_SIZE = (
    "On model size: times of evaluations here are of networks of 0.3 M (tiny) and 10.3 M weights. Compressing history "
    "does not touch the blocks, so its rate does not depend on depth; an evaluation does, in proportion. The paper's "
    "10 B network needs 38 GB for its weights alone in float32, and about 960 times the 10 M network's multiply-adds "
    "for each token, attention aside; it is not run here."
)

# The page

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: #fff; }
.no { font-weight: bold; } .no::before { content: "\\2717 "; } .ok::before { content: "\\2713 "; }
"""


def _draw(folder: Path, values: Values, fidelity: Values) -> list[tuple[str, str]]:
    """Make the pictures; returns the file name and the caption of each."""
    made: list[tuple[str, str]] = []

    def keep(name: str, figure: Any, caption: str) -> None:
        save(figure, folder / f"{name}.png")
        made.append((f"{name}.png", caption))

    if "growth" in values:
        exponents = {m: values[f"exponent_{m}"] for m in ("tiled", "full", "timesformer")}
        keep("growth", pictures.growth(values["growth"], exponents), "Cost against tokens, measured and counted.")
    if "history" in values:
        keep("history", pictures.history(values["history"]), "Peak memory and rate against the number of past frames.")
    if fidelity:
        keep("halo", pictures.halo(fidelity), "Error of one tiled evaluation against halo and cost.")
        keep("sampled", pictures.sampled(fidelity), "Sampled fields against the number of sampler steps.")
        keep(
            "seams",
            pictures.seams(fidelity),
            "Seams: steps between neighbours of sampled fields.",
        )
        keep("reach", pictures.reach(fidelity), "How much of distant noise arrives.")
        for name, about in fidelity.items():
            title = f"{name} weights"
            keep(f"fields_{name}", pictures.fields(about, title), f"One sampled field, {title}.")
            keep(f"cone_{name}", pictures.cone(about, title), f"The dependency cone growing, {title}.")
    return made


def _cells(row: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _aims(values: Values) -> str:
    rows = []
    for aim in AIMS:
        if aim.key in values:
            mark = "ok" if aim.met(values[aim.key]) else "no"
            here = f'<td class="n {mark}">{html.escape(aim.show(values[aim.key]))}</td>'
            wanted = f'<td class="n">{html.escape(aim.words)}</td>'
            rows.append(f"<tr><td>{html.escape(aim.text)}</td>{here}{wanted}</tr>")
    return f"<table>{_cells(('figure', 'here', 'aim'), 'th')}{''.join(rows)}</table>"


def _coarse(fidelity: Values) -> str:
    rows = [
        (
            name,
            str(r["halo"]),
            "sampled field" if r["sigma"] is None else f"{r['sigma']:g}",
            f"{r['tiled']:.2e}",
            f"{r['coarse']:.2e}",
            f"{r['gain']:+.0%}",
            f"{r['coarse_cost'] / r['tiled_cost']:.2f}",
        )
        for name, about in fidelity.items()
        for r in about["coarse"]
    ]
    head = ("weights", "halo", "noise level", "tiled: error", "with coarse level", "gain", "cost / tiled")
    return f"<table>{_cells(head, 'th')}{''.join(map(_cells, rows))}</table>"


def write(folder: Path, values: Values, fidelity: Values, scale: Mapping[str, Values]) -> None:
    """Write index.html and its pictures, with the parts that were measured."""
    figures = "".join(
        f'<figure><img src="{name}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for name, text in _draw(folder, values, fidelity)
    )
    machine = values.get("machine", {})
    words = f"{machine.get('processor', 'unknown processor')}, {machine.get('threads', '?')} threads, torch "
    table = "".join(map(_cells, paper_table(values, scale)))
    head = _cells(("", "the paper", "here", "what differs"), "th")
    coarse = "<h2>A coarse second level (optional, outside the specification)</h2>" + _coarse(fidelity)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Linear cost, shown</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>Linear cost, shown</h1><p>{html.escape(words + str(machine.get("torch", "?")))}.
All numbers are in cost.json, fidelity.json and scale/.</p>
<h2>Figures and aims</h2>{_aims(values)}
<h2>Beside the paper</h2><table>{head}{table}</table><p>{html.escape(_MODEL_SIZE)}</p>
<h2>Pictures</h2>{figures}{coarse if fidelity else ""}</body></html>
"""
    with replacing(folder / "index.html") as part:
        part.write_text(page, encoding="utf-8")
