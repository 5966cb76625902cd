"""`python -m storm_ref.experiments.bench` measures this machine; `... scale` makes the long runs, which resume.

Both leave in --out: cost.json, fidelity.json, pictures, and index.html that shows them beside the paper's figures.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from storm_ref.experiments import fidelity
from storm_ref.experiments.bench import history, machine, report, scale, timing
from storm_ref.experiments.bench.history import Job
from storm_ref.workbench.io import bundled
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.progress import Progress, plain_console, shown
from storm_ref.workbench.prior.model import load

__all__ = ["main"]

Values = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, and write the report; returns the exit code."""
    arguments = _parser().parse_args(argv)
    console = plain_console()
    try:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
        arguments.out.mkdir(parents=True, exist_ok=True)
        with shown(console, remaining=True, lines=True) as progress:
            run = _scale if arguments.command == "scale" else _bench
            run(arguments, progress)
    except KeyboardInterrupt:
        print("bench: stopped; parts that were done are kept, and long runs go on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    values = _read(arguments.out / "cost.json")
    report.write(arguments.out, values, _read(arguments.out / "fidelity.json"), report.scale_records(arguments.out))
    console.print(_table(values))
    console.print(f"pictures and the paper's figures beside these: {arguments.out / 'index.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m storm_ref.experiments.bench", description=(__doc__ or "").strip())
    parser.add_argument("command", nargs="?", choices=("all", "scale"), default="all", help="which runs (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        default=None,
        help=f"some of {', '.join(PARTS)}; with scale: {', '.join(scale.JOBS)}",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="trained weights whose fidelity is measured (default: the bundled ones)",
    )
    parser.add_argument("--threads", type=int, default=machine.cores(), metavar="N", help="number of CPU threads")
    return parser


def _names(given: str | None, known: Sequence[str]) -> list[str]:
    names = list(known) if given is None else given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only: there is no {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _bench(arguments: argparse.Namespace, progress: Progress) -> None:
    """Add each part to cost.json when it is done; parts that were not asked for stay as they were."""
    names = _names(arguments.only, list(PARTS))
    if "fidelity" in names:
        load(_model(arguments))  # refused now rather than after the other parts
    for name in names:
        results = PARTS[name](arguments, progress)
        values = _read(arguments.out / "cost.json") | results | {"machine": machine.describe(arguments.threads)}
        _write(arguments.out / "cost.json", values)


def _model(arguments: argparse.Namespace) -> Path:
    return bundled.weights() if arguments.model is None else arguments.model


def _scale(arguments: argparse.Namespace, progress: Progress) -> None:
    for name in _names(arguments.only, list(scale.JOBS)):
        scale.run(name, replace(scale.JOBS[name], threads=arguments.threads), arguments.out / "scale", progress)


def _growth(arguments: argparse.Namespace, progress: Progress) -> Values:
    records = timing.growth(progress=progress)
    by = {m: [r for r in records if r["method"] == m] for m in ("tiled", "full", "timesformer")}
    sizes = [r["tokens"] for r in by["tiled"]]
    counted = timing.counted(timing.ten_million(depth=1), sizes)
    return {
        **{f"exponent_{m}": timing.time_exponent(rows) for m, rows in by.items()},
        **{f"counted_exponent_{m}": value for m, value in counted.items()},
        "growth": records,
    }


def _dense(arguments: argparse.Namespace, progress: Progress) -> Values:
    comparison = timing.ratio_to_dense(progress=progress)
    return {"ratio_to_dense": comparison["ratio"], "dense": comparison}


def _sampler(arguments: argparse.Namespace, progress: Progress) -> Values:
    runs = []
    for i, (c, steps) in enumerate(((timing.ten_million(), 3), (timing.small(), 20))):
        runs.append(timing.sampler_overhead(c, steps))
        progress("the sampler's own time", i + 1, 2, "")
    return {"sampler_overhead": max(run["overhead"] for run in runs), "sampler": runs}


def _history(arguments: argparse.Namespace, progress: Progress) -> Values:
    jobs = [Job(k) for k in (1, 12, 96, 750, 6000)] + [Job(k, "equations") for k in (1, 12, 96, 750)]
    jobs.append(Job(177_500, grid=(56, 64)))
    records = history.sweep([replace(job, threads=arguments.threads) for job in jobs], progress)
    at = {(r["frames"], r["form"]): r for r in records}
    most, few = at[6000, "folded"], at[96, "folded"]
    return {
        "tokens": most["tokens"],
        "tokens_per_s": most["tokens_per_s"],
        "tokens_per_s_compress": most["tokens_per_s_compress"],
        "tokens_per_s_compress_equations": at[750, "equations"]["tokens_per_s_compress"],
        "peak_rss_gb": most["peak_bytes"] / 1e9,
        "rss_growth_k96_to_k6000": most["peak_bytes"] / few["peak_bytes"] - 1,
        "rss_growth_k96_to_k6000_compressing": _growth_of_peak(few, most),
        "rss_growth_k96_to_k750_equations": _growth_of_peak(at[96, "equations"], at[750, "equations"]),
        "history": records,
    }


def _growth_of_peak(few: Values, most: Values) -> float:
    """The growth of the peak before the denoise, which may well hold more than the memory did."""
    return float(most["peak_bytes_compress"] / few["peak_bytes_compress"] - 1)


def _fidelity(arguments: argparse.Namespace, progress: Progress) -> Values:
    results = fidelity.run(_model(arguments), progress=lambda label, done, total: progress(label, done, total, ""))
    _write(arguments.out / "fidelity.json", results)
    return {"fidelity": report.fidelity_headline(results)}


PARTS: Mapping[str, Callable[[argparse.Namespace, Progress], Values]] = {
    "growth": _growth,
    "dense": _dense,
    "sampler": _sampler,
    "history": _history,
    "fidelity": _fidelity,
}


def _table(values: Values) -> Table:
    """A table of the project's aims and of what was measured here."""
    table = Table("figure", "here", "aim", title="linear cost, on this machine")
    for aim in report.AIMS:
        if aim.key in values:
            table.add_row(
                aim.text, aim.show(values[aim.key]), f"{aim.words} {'ok' if aim.met(values[aim.key]) else 'NO'}"
            )
    return table


def _read(path: Path) -> Values:
    if not path.exists():
        return {}
    values: Values = json.loads(path.read_text())
    return values


def _write(path: Path, values: Values) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    sys.exit(main())
