"""python -m storm_ref {train, assimilate, forecast, verify, trial}: the workbench from the command line.

Tables and progress go to the terminal, numbers to result.json, fields to NetCDF, pictures to PNG. Progress bars are
shown on a terminal only. Exit code 0: done; 2: refused, with the reason in a sentence and nothing written.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from storm_ref import __version__
from storm_ref.tiling import Tiling
from storm_ref.workbench import data, outputs
from storm_ref.workbench import model as models
from storm_ref.workbench.analysis import GUIDANCE, DrawSettings, analyse, counter, cycle, score_table
from storm_ref.workbench.data import Fields
from storm_ref.workbench.demonstration import DemonstrationSettings, demonstrate
from storm_ref.workbench.ensembles import match, read_ensemble
from storm_ref.workbench.model import Model
from storm_ref.workbench.observations import from_mask, from_stations, read_stations
from storm_ref.workbench.training import TrainSettings, prepare, train
from storm_ref.workbench.trial import TrialSettings, run_trial

__all__ = ["main"]

TINY = Path(__file__).parents[2] / "tiny_data"
WORLD, WEIGHTS = TINY / "world.nc", TINY / "storm_tiny.safetensors"
WORLD_SPLIT = "2000-09-28"  # three quarters of the bundled world are for training


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        run: Callable[[argparse.Namespace, Mapping[str, str]], None] = arguments.run
        run(arguments, _about(words, arguments))
    except (ValueError, OSError) as error:
        print(f"storm_ref {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _about(words: Sequence[str], arguments: argparse.Namespace) -> dict[str, str]:
    """How the output came about: attributes of every file written."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "xarray"))
    return {
        "title": f"storm_ref {arguments.command}",
        "command": shlex.join(["python", "-m", "storm_ref", *words]),
        "source": f"storm_ref {__version__} ({versions})",
        "seed": str(getattr(arguments, "seed", "")),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="storm_ref", description="STORM on your own data, or on the bundled world.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add, text in (
        ("train", _train, _add_train, "train a model on the first part of a record"),
        ("assimilate", _assimilate, _add_assimilate, "draw ensembles given observations, score them, follow a vortex"),
        ("forecast", _forecast, _add_forecast, "draw an ensemble that runs on by itself"),
        ("verify", _verify, _add_verify, "score an ensemble against the truth"),
        ("trial", _trial, _add_trial, "train before a date, analyse after it, score; beside optimal interpolation"),
    ):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--threads", type=int, default=torch.get_num_threads(), help="results repeat for a given number")
        sub.set_defaults(run=run)
        add(sub)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=WORLD, metavar="FILE", help="CF NetCDF or Zarr")
    parser.add_argument("--variables", type=_names, metavar="A,B", help="by name or standard name (default: all)")
    parser.add_argument("--static", type=_names, metavar="A,B", help="constant fields shown to the network (default: all)")
    parser.add_argument("--fit", choices=("pad", "crop"), help="what to do with a grid the patch does not divide")


def _add_drawing(parser: argparse.ArgumentParser, obs_std: str) -> None:
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler")
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="covariance", help="how observations enter")
    parser.add_argument("--observed", type=_fractions, default="0,0.1,0.2,0.5", metavar="F,F", help="shares of the points")
    parser.add_argument("--obs-std", type=_numbers, default=obs_std, metavar="S[,S]", help="error, in the variables' units")
    parser.add_argument("--seed", type=int, default=0)
    _add_tiling(parser)


def _add_tiling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tile", type=_pair, metavar="HxW", help="core of a tile in grid points (default: by the grid)")
    parser.add_argument("--halo", type=_pair, default="0x0", metavar="HxW", help="seen beyond the core, on each side")
    parser.add_argument("--blend", type=_pair, default="0x0", metavar="HxW", help="half-width of the blending")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_training(parser)
    parser.add_argument("--split", type=_time, metavar="DATE", help=f"train before it (bundled world: {WORLD_SPLIT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/model.safetensors"), metavar="FILE")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="kept while training; an existing one is resumed")


def _add_training(parser: argparse.ArgumentParser) -> None:
    plain = TrainSettings()
    parser.add_argument("--step", type=data.parse_step, default="6h", help="from the newest past frame to the analysis")
    parser.add_argument("--patch", type=_pair, metavar="HxW", help="grid points of a token (default: by the grid)")
    for name, text in (
        ("frames", "past frames"),
        ("width", "of the network"),
        ("depth", "of the network"),
        ("rank", "leading directions of the covariance; 0 is plain EDM"),
        ("train-steps", "0 leaves the network off"),
        ("batch", "transitions a step"),
        ("mix", "transitions mixed into one; 1 is none"),
    ):
        default = getattr(plain, {"train-steps": "steps"}.get(name, name))
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--rate", type=float, default=plain.rate, help="learning rate")


def _add_assimilate(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_drawing(parser, "0.5")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="from train")
    parser.add_argument("--start", type=_time, metavar="DATE", help=f"first analysis (bundled world: {WORLD_SPLIT})")
    parser.add_argument("--count", type=int, default=6, help="analyses scored")
    parser.add_argument("--cycle", type=int, default=12, help="steps of the cycles; 0 leaves them out")
    parser.add_argument("--stations", type=Path, metavar="FILE", help="assimilate this table of observations instead")
    parser.add_argument("--mask", metavar="NAME", help="or the data where this constant field of theirs is above 1/2")
    parser.add_argument("--out", type=Path, default=Path("build/assimilation"), metavar="DIR")


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FILE", help="from train")
    parser.add_argument("--start", type=_time, metavar="DATE", help=f"first frame drawn (bundled world: {WORLD_SPLIT})")
    parser.add_argument("--lead", type=int, default=8, help="steps")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="steps of the sampler")
    parser.add_argument("--seed", type=int, default=0)
    _add_tiling(parser)
    parser.add_argument("--out", type=Path, default=Path("build/forecast.nc"), metavar="FILE")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--analysis", type=Path, default=Path("build/forecast.nc"), metavar="FILE", help="the ensemble")
    parser.add_argument("--data", type=Path, default=WORLD, metavar="FILE", help="the truth")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores here as JSON, too")


def _add_trial(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_training(parser)
    _add_drawing(parser, "0.3")
    parser.add_argument("--split", type=_time, metavar="DATE", help=f"train before, test from (bundled: {WORLD_SPLIT})")
    parser.add_argument("--stop", type=_time, metavar="DATE", help="test before it (default: to the end)")
    parser.add_argument("--out", type=Path, default=Path("build/trial"), metavar="DIR")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(float(part) for part in text.split(",")))


def _pair(text: str) -> tuple[int, int]:
    """ "8" or "8x16"."""
    parts = [int(part) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8 or 8x16")
    return parts[0], parts[-1]


def _time(text: str) -> np.datetime64:
    try:
        return np.datetime64(text).astype("datetime64[ns]")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2019-03-25 or 2019-03-25T06") from error


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """A progress bar for each kind of work, on a terminal; silence elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        known: dict[str, Any] = {}

        def advance(label: str, done: int, total: int, note: str) -> None:
            if label not in known:
                known[label] = bars.add_task(label, total=total, note=note)
            bars.update(known[label], completed=done, note=note)

        yield advance


def _read(arguments: argparse.Namespace, patch: tuple[int, int] | None, variables: tuple[str, ...] | None = None) -> Fields:
    chosen = arguments.variables or variables
    return data.read(arguments.data, chosen, arguments.static, patch=patch or (1, 1), fit=arguments.fit)


def _split(arguments: argparse.Namespace, name: str) -> np.datetime64:
    given = getattr(arguments, name)
    if given is None and arguments.data == WORLD:
        return _time(WORLD_SPLIT)
    if given is None:
        raise ValueError(f"say with --{name} DATE where the training part of {arguments.data} ends")
    return np.datetime64(given)


def _one_or_many(numbers: tuple[float, ...], fields: Fields) -> float | tuple[float, ...]:
    if len(numbers) not in (1, len(fields.variables)):
        raise ValueError(f"--obs-std has {len(numbers)} numbers for {len(fields.variables)} variables {fields.variables}")
    return numbers[0] if len(numbers) == 1 else numbers


def _tiling(arguments: argparse.Namespace, fields: Fields, patch: tuple[int, int]) -> Tiling | None:
    if arguments.tile is None:
        return None
    grid = (len(fields.latitude), len(fields.longitude))
    return Tiling.of(grid, arguments.tile, arguments.halo, arguments.blend, fields.periodic, patch)


def _drawing(arguments: argparse.Namespace, fields: Fields, patch: tuple[int, int]) -> DrawSettings:
    return DrawSettings(
        members=arguments.members,
        seed=arguments.seed,
        obs_std=_one_or_many(arguments.obs_std, fields) if "obs_std" in arguments else 1.0,
        guidance=getattr(arguments, "guidance", "covariance"),
        sampler_steps=arguments.steps,
        tiling=_tiling(arguments, fields, patch),
    )


def _training(arguments: argparse.Namespace) -> TrainSettings:
    names = ("patch", "frames", "width", "depth", "rank", "batch", "mix", "rate", "seed")
    return TrainSettings(steps=arguments.train_steps, **{name: getattr(arguments, name) for name in names})


def _train(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    settings = _training(arguments)
    fields = _read(arguments, settings.patch)
    when = data.targets(fields.time, arguments.step, None, _split(arguments, "split"), settings.frames)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    with _bars(console) as progress:
        model = train(*prepare(fields, when, arguments.step, settings), settings, progress, arguments.checkpoint)
    models.save(model, arguments.out)
    held = model.training["held_back"]
    best = min(loss for _, loss in held)
    console.print(f"{arguments.out}: loss on the held-back part {held[0][1]:.4f} -> {best:.4f} (network off -> on)")


def _load(arguments: argparse.Namespace) -> tuple[Model, Fields]:
    model = models.load(arguments.weights)
    return model, _read(arguments, model.config.patch, model.variables)


def _assimilate(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    model, fields = _load(arguments)
    drawing = _drawing(arguments, fields, model.config.patch)
    console = Console()
    if arguments.stations or arguments.mask:
        written = _assimilate_given(arguments, about, model, fields, drawing, console)
    else:
        start = _split(arguments, "start")
        settings = DemonstrationSettings(arguments.observed, start, arguments.count, arguments.cycle, drawing)
        with _bars(console) as progress:
            result = demonstrate(model, fields, settings, progress)
        written = outputs.write_demonstration(result, fields, about, arguments.out, str(arguments.data))
        console.print(_score_table(result.scores, {"STORM": result.scores["fractions"]}))
        for name, row in result.scores.get("cycle", {}).items():
            if "vortex" in row:
                v = row["vortex"]
                console.print(
                    f"vortex, {name}: {v['last_track_error_deg']:.1f} degrees off at the end, wind "
                    f"{v['last_wind_mean']:.1f} +- {v['last_wind_std']:.1f} m/s (true {v['last_wind_true']:.1f})"
                )
    console.print("written: " + ", ".join(str(path) for path in written))


def _assimilate_given(
    arguments: argparse.Namespace,
    about: Mapping[str, str],
    model: Model,
    fields: Fields,
    drawing: DrawSettings,
    console: Console,
) -> list[Path]:
    """Assimilate the observations of a file: an analysis at --start, or at each time that a table has."""
    if arguments.stations:
        table = read_stations(arguments.stations)
        when = np.unique(table.time) if arguments.start is None else np.array([arguments.start])
        tolerance = np.timedelta64(0, "ns") if arguments.start is None else model.step // 2
        found = [from_stations(table, fields, t, tolerance) for t in when]
        observations = [observations for observations, _ in found]
        for t, (_, report) in zip(when, found, strict=True):
            console.print(f"{np.datetime_as_string(t, unit='m')}: {report}")
    else:
        start = _split(arguments, "start")
        when = data.targets(fields.time, model.step, start, None, model.frames)[: arguments.count]
        chosen = data.read(arguments.data, model.variables, (arguments.mask,), patch=model.config.patch, fit=arguments.fit)
        mask = chosen.static[0] > 0.5
        truth = fields.values[np.searchsorted(fields.time, when)]
        std = np.asarray(drawing.obs_std, np.float64)
        observations = [from_mask(field, mask, std if std.ndim else float(std)) for field in truth]
    with _bars(console) as progress:
        members = analyse(model, fields, when, observations, drawing, counter(progress, "analyses", len(when)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    data.write(data.to_dataset(members.numpy(), fields, when, about), arguments.out / "analysis.nc")
    return [arguments.out / "analysis.nc"]


def _forecast(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    model, fields = _load(arguments)
    start = data.targets(fields.time, model.step, _split(arguments, "start"), None, model.frames)[0]
    when = start + model.step * np.arange(arguments.lead)
    drawing, console = _drawing(arguments, fields, model.config.patch), Console()
    with _bars(console) as progress:
        tell = counter(progress, "forecast", len(when))
        members = cycle(model, fields, when, [None] * len(when), drawing, tell)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    data.write(data.to_dataset(members.numpy(), fields, when, about), arguments.out)
    console.print(f"written: {arguments.out}")


def _verify(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    ensemble = read_ensemble(arguments.analysis)
    truth = data.read(arguments.data, ensemble.variables)
    ensemble, target, valid = match(ensemble, truth)
    table, result = Table("time", "variable", "CRPS", "RMSE", "spread", "spread-skill"), {}
    parts = {str(np.datetime_as_string(t, unit="m")): slice(k, k + 1) for k, t in enumerate(ensemble.time)}
    for label, part in {**parts, "all": slice(None)}.items():
        scores = score_table(ensemble.values[:, part], target[part], torch.from_numpy(valid[part]), truth)
        result[label] = scores
        for name, row in scores.items():
            table.add_row(label, name, *(f"{row[key]:.3f}" for key in ("crps", "rmse", "spread", "spread_skill")))
    Console().print(table)
    if arguments.out is not None:
        where = {"analysis": str(arguments.analysis), "data": str(arguments.data)}
        outputs.write_json(arguments.out, {"by_time": result, **where})


def _trial(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    training = _training(arguments)
    fields = _read(arguments, training.patch)
    split = _split(arguments, "split")
    patch = training.patch or models.default_patch(len(fields.latitude), len(fields.longitude))
    drawing = _drawing(arguments, fields, patch)
    settings = TrialSettings(split, arguments.step, arguments.observed, arguments.stop, drawing, training)
    console = Console()
    with _bars(console) as progress:
        result = run_trial(fields, settings, progress)
    written = outputs.write_trial(result, fields, about, arguments.out, str(arguments.data))
    scores = result.scores
    tables = {
        "STORM": scores["fractions"],
        "Gaussian prior alone (network off)": scores["gaussian"]["fractions"],
        "optimal interpolation": scores["optimal_interpolation"]["fractions"],
    }
    console.print(_score_table(scores, tables))
    console.print(f"persistence: RMSE {scores['persistence']['rmse']:.3f} {scores['unit']}; {scores['wall_s']:.0f} s in all")
    console.print("written: " + ", ".join(str(path) for path in written))


def _score_table(scores: Mapping[str, Any], tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """One row a method and fraction; the last column compares its CRPS with the same method's forecast."""
    table = Table("method", "observed", "CRPS", "RMSE", "spread", "spread-skill", "CRPS saved", title=f"unit: {scores['unit']}")
    for name, fractions in tables.items():
        alone = fractions.get("0.0")
        for f, row in fractions.items():
            saved = f"{1 - row['crps'] / alone['crps']:.0%}" if alone and f != "0.0" else ""
            numbers = (f"{row[key]:.3f}" for key in ("crps", "rmse", "spread", "spread_skill"))
            table.add_row(name, f"{float(f):.0%}", *numbers, saved)
        table.add_section()
    return table
