"""`python -m storm_ref.experiments.scaling`: strong scaling as the cost model predicts it, beside the paper's figure.

Prints the tables of docs/scale.md, and leaves scaling.json and scaling.png in --out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from storm_ref.experiments.scaling import report
from storm_ref.experiments.scaling.model import Machine
from storm_ref.workbench.io.atomic import replacing
from storm_ref.workbench.io.figures import save
from storm_ref.workbench.io.progress import plain_console

__all__ = ["main"]

Rows = Sequence[Sequence[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write scaling.json and scaling.png; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m storm_ref.experiments.scaling", description="predict strong scaling by a cost model"
    )
    parser.add_argument("--out", type=Path, default=Path("build/scaling"), metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--batch", type=int, default=512, metavar="N", help="samples of a step on all ranks together (default: 512)"
    )
    arguments = parser.parse_args(argv)
    try:
        _run(arguments.out, arguments.batch)
    except (ValueError, OSError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


def _run(out: Path, samples: int) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, and results go to a folder: name another")
    if samples < 1:
        raise ValueError(f"--batch must be at least 1, got {samples}")
    steps = report.predict(samples)
    tables: dict[str, Rows] = {
        "training": report.prediction_rows(steps),
        "evaluation": report.prediction_rows(report.predict(samples, training=False)),
        "sensitivities": report.sensitivity_rows(samples),
        "batches": report.batch_rows(),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "scaling.json", samples, steps, tables)
    save(report.picture(steps), out / "scaling.png")
    _show(samples, tables)
    plain_console().print(f"written: {out / 'scaling.json'}, {out / 'scaling.png'}")


def _write(path: Path, samples: int, steps: report.Steps, tables: dict[str, Rows]) -> None:
    record = {
        "machine": asdict(Machine()),
        "samples": samples,
        "paper": report.PAPER,
        "steps": {name: [asdict(step) | {"total": step.total} for step in run] for name, run in steps.items()},
        "tables": tables,
    }
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")


def _show(samples: int, tables: dict[str, Rows]) -> None:
    console = plain_console()
    columns = ("preset", "ranks", "mesh", "s", "E", *report.PARTS)
    legend = "mesh: ddp x fsdp x tile x tp; E and parts in %"
    console.print(_table(f"One training step, {samples:,} samples\n{legend}", columns, tables["training"]))
    console.print(_table(f"One evaluation, {samples:,} members\n{legend}", columns, tables["evaluation"]))
    names = [f"{name}\n{which}" for name in report.PRESETS for which in ("half", "twice", "paper")]
    title = "E(32,768) in % with half and twice of an assumption,\nand what it would have to be for 62.5 %"
    console.print(_table(title, ("assumption", "value", *names), tables["sensitivities"]))
    console.print(_table("E(32,768) in %", ("samples", *report.PRESETS), tables["batches"]))
    console.print("The paper: 61-64 % for both sizes. Machine, batch and tiles are assumptions, see docs/scale.md.")


def _table(title: str, heads: Sequence[str], rows: Rows) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, title_justify="left")
    for k, head in enumerate(heads):
        table.add_column(head, justify="right" if k else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
