"""python -m storm_ref {train, assimilate, forecast, verify, trial}: the workbench from the command line.

Tables go to standard output, numbers to result.json, fields to NetCDF and pictures to PNG. Progress bars appear on a
terminal only. The exit code is 0 when the work is done, and 2 when it is refused: then the reason and the remedy are on
standard error and nothing is written.

Under torchrun, `--mesh ddp=1,fsdp=1,tile=2,tp=2` divides the work of train and assimilate among that many processes,
with the same results to rounding. Only the main rank prints and writes. The exit code is 1 when a rank failed, or
waited for others in vain.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from rich.console import Console
from rich.table import Column, Table

from storm_ref import __version__
from storm_ref.guidance import Observations
from storm_ref.parallel.mesh import CollectiveError, World, start
from storm_ref.workbench.cli import outputs
from storm_ref.workbench.cli.options import (
    check_output,
    date_in_record,
    draw_settings,
    name_bundled_files,
    parse,
    train_settings,
)
from storm_ref.workbench.io import data
from storm_ref.workbench.io.collective import on_every_rank, on_main_rank
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.io.ensembles import match, read_ensemble
from storm_ref.workbench.io.observations import from_mask, from_stations, read_stations
from storm_ref.workbench.io.progress import plain_console, shown
from storm_ref.workbench.prior import model as models
from storm_ref.workbench.prior.model import Model
from storm_ref.workbench.run.analysis import DrawSettings, analyse, counter, cycle, score_table
from storm_ref.workbench.run.demonstration import DemonstrationSettings, demonstrate
from storm_ref.workbench.run.training import Samples, TrainSettings, check_shares, prepare, train
from storm_ref.workbench.run.trial import TrialSettings, run_trial

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = words[words[:1] == ["--"] :]  # it keeps torchrun from reading our options; some versions pass it on
    arguments = parse(words)
    arguments.world = World.alone()
    try:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
        arguments.world = _world(arguments)
        name_bundled_files(arguments)
        _COMMANDS[arguments.command](arguments, _attributes(words, arguments))
    except (ValueError, OSError) as error:
        _complain(arguments, error)
        return 2
    except RuntimeError as error:  # process groups raise it when another rank is gone or does not answer
        if arguments.world.mesh.size == 1:
            raise
        traceback.print_exc()
        _complain(arguments, _failure(error, arguments.world))
        return 1
    arguments.world.close()
    return 0


def _world(arguments: argparse.Namespace) -> World:
    """The mesh of processes that this one belongs to.

    Raises ValueError for torchrun without --mesh, and for --mesh without torchrun.
    """
    mesh = getattr(arguments, "mesh", None)
    if mesh is not None:
        return start(mesh, arguments.timeout, "cpu")  # where the workbench keeps models and data
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        count = os.environ["WORLD_SIZE"]
        raise ValueError(
            f"{count} processes were started, and no --mesh says how they share the work: add one, or start one"
        )
    return World.alone()


def _failure(error: RuntimeError, world: World) -> str:
    """A line on a failed collective call, with the ranks that no longer answer."""
    silent = world.unresponsive_ranks()
    ranks = f"; no word from rank {', '.join(map(str, silent))}" if silent else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"failed, or waited in vain for another rank{ranks} ({lines[0]})"


def _complain(arguments: argparse.Namespace, error: object) -> None:
    """Print an error on standard error: once when all ranks have it, else with the rank that has it."""
    world: World = arguments.world
    alone = world.mesh.size == 1  # perhaps because the mesh was refused on all ranks alike
    rank = int(os.environ.get("RANK", 0)) if alone else world.rank
    common = alone or isinstance(error, CollectiveError)
    if common and rank:
        return
    where = "" if common else f" (rank {rank})"
    print(f"storm_ref {arguments.command}{where}: {error}", file=sys.stderr, flush=True)


def _attributes(words: Sequence[str], arguments: argparse.Namespace) -> dict[str, str]:
    """Global attributes that say how a file came about."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "xarray"))
    return {
        "title": f"storm_ref {arguments.command}",
        "command": shlex.join(["python", "-m", "storm_ref", *words]),
        "source": f"storm_ref {__version__} ({versions})",
        "seed": str(getattr(arguments, "seed", "")),
    }


# train


def _train(arguments: argparse.Namespace, attributes: Mapping[str, str]) -> None:
    world: World = arguments.world
    settings = replace(
        train_settings(arguments),
        tile=arguments.tile,
        halo=arguments.halo or (0, 0),
        blend=arguments.blend or (0, 0),
    )

    def prepare_training() -> tuple[Model, Samples]:
        return _prepare(arguments, settings)

    model, samples = on_every_rank(world, prepare_training)
    console = plain_console(world.is_main)
    with shown(console) as progress:
        model = train(
            model,
            samples,
            settings,
            progress,
            arguments.checkpoint,
            world=world,
            activation_checkpointing=arguments.activation_checkpointing,
        )

    def write_model() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        models.save(model, arguments.out)

    on_main_rank(world, write_model)
    losses = [loss for _, loss in model.training["held_back"]]
    _print_line(console, f"loss on the held-back part {losses[0]:.4f} -> {min(losses):.4f} (network off -> on)")
    _print_line(console, f"written: {arguments.out}")


def _prepare(arguments: argparse.Namespace, settings: TrainSettings) -> tuple[Model, Samples]:
    """An untrained model and the samples to train it on, once it is known that the results can be written."""
    check_output(arguments.out)
    if arguments.checkpoint is not None:
        check_output(arguments.checkpoint, "either", option="--checkpoint")
    fields = _training_fields(arguments, settings)
    split = date_in_record(arguments, "split", fields)
    when = data.targets(fields.time, arguments.time_step, None, split, settings.frames)
    model, samples = prepare(fields, when, arguments.time_step, settings)
    check_shares(model, settings, arguments.world)
    if arguments.checkpoint is not None:
        arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    return model, samples


def _training_fields(arguments: argparse.Namespace, settings: TrainSettings) -> Fields:
    return data.read(
        arguments.data,
        arguments.variables,
        arguments.static,
        patch=settings.patch or (1, 1),
        grid_mismatch=arguments.grid_mismatch,
    )


# assimilate


def _assimilate(arguments: argparse.Namespace, attributes: Mapping[str, str]) -> None:
    world: World = arguments.world

    def read_inputs() -> tuple[Model, Fields, DrawSettings]:
        check_output(arguments.out, "folder")
        model, fields = _load(arguments, (arguments.mask,) if arguments.mask else ())
        drawing = draw_settings(arguments, fields, model.config.patch)
        model.check_shares(world, drawing.tiling, drawing.members)
        return model, fields, drawing

    model, fields, drawing = on_every_rank(world, read_inputs)
    model = model.shard(world)
    console = plain_console(world.is_main)
    run = _analyse_given if arguments.stations or arguments.mask else _demonstrate
    written = run(arguments, attributes, model, fields, drawing, console)
    _print_line(console, "written: " + ", ".join(str(path) for path in written))


def _load(arguments: argparse.Namespace, static: tuple[str, ...] = ()) -> tuple[Model, Fields]:
    """A model and the data for it. The model carries its own constant fields; `static` names others to read."""
    model = models.load(arguments.weights)
    fields = data.read(
        arguments.data,
        arguments.variables or model.variables,
        static,
        patch=model.config.patch,
        grid_mismatch=arguments.grid_mismatch,
    )
    model.check(fields)
    return model, fields


def _demonstrate(
    arguments: argparse.Namespace,
    attributes: Mapping[str, str],
    model: Model,
    fields: Fields,
    drawing: DrawSettings,
    console: Console,
) -> list[Path]:
    """Analyse random points of the record, cycle, print the scores, and return the files written."""
    settings = DemonstrationSettings(
        fractions=arguments.observed,
        start=date_in_record(arguments, "start", fields),
        count=arguments.count,
        cycle=arguments.cycle,
        drawing=drawing,
    )
    with shown(console) as progress:
        result = demonstrate(model, fields, settings, progress)
    written: list[Path] = []

    def write_results() -> None:
        source = str(arguments.data)
        written.extend(outputs.write_demonstration(result, fields, attributes, arguments.out, source))

    on_main_rank(arguments.world, write_results)
    console.print(_score_table(result.scores, {"STORM": result.scores["fractions"]}))
    _print_vortex(console, result.scores.get("cycle", {}))
    return written


def _analyse_given(
    arguments: argparse.Namespace,
    attributes: Mapping[str, str],
    model: Model,
    fields: Fields,
    drawing: DrawSettings,
    console: Console,
) -> list[Path]:
    """Analyse the observations of a table or a mask, print a line on each time, and return the file written."""
    if arguments.stations:
        when, observations, reports = _from_stations(arguments, model, fields)
    else:
        when, observations, reports = _from_mask(arguments, model, fields, drawing)
    with shown(console) as progress:
        members = analyse(model, fields, when, observations, drawing, counter(progress, "analyses", len(when)))
    path = arguments.out / "analysis.nc"

    def write_members() -> None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        data.write(data.to_dataset(members.numpy(), fields, when, attributes), path)

    on_main_rank(arguments.world, write_members)
    for time, report in zip(when, reports, strict=True):
        _print_line(console, f"{np.datetime_as_string(time, unit='m')}: {report}")
    return [path]


# Times of the analyses, the observations of each, and a line on each.
_Given = tuple[Shaped[np.ndarray, " t"], list[Observations], list[str]]


def _from_stations(arguments: argparse.Namespace, model: Model, fields: Fields) -> _Given:
    """Observations of a table: those within half a time step of --start, or an analysis at each time in it."""
    table = read_stations(arguments.stations)
    if not len(table.time):
        raise ValueError(f"{arguments.stations}: empty observations: the table has no row")
    when = np.unique(table.time) if arguments.start is None else np.array([arguments.start])
    tolerance = np.timedelta64(0, "ns") if arguments.start is None else model.time_step // 2
    observations = []
    reports = []
    for time in when:
        try:
            used, report = from_stations(table, fields, time, tolerance)
        except ValueError as error:
            raise ValueError(f"{arguments.stations}: {error}") from error
        observations.append(used)
        reports.append(str(report))
    return when, observations, reports


def _from_mask(arguments: argparse.Namespace, model: Model, fields: Fields, drawing: DrawSettings) -> _Given:
    """Observations of the record itself, at its valid points where a constant field is above 1/2."""
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    start = date_in_record(arguments, "start", fields)
    when = data.targets(fields.time, model.time_step, start, None, model.frames)[: arguments.count]
    std = np.broadcast_to(np.asarray(drawing.obs_std, np.float64), len(fields.variables))
    observations = []
    for frame in np.searchsorted(fields.time, when):
        mask = (fields.static[0] > 0.5) & fields.valid[frame]
        observations.append(from_mask(fields.values[frame], mask, std))
    return when, observations, [f"{len(used.value)} observations are used" for used in observations]


# forecast


def _forecast(arguments: argparse.Namespace, attributes: Mapping[str, str]) -> None:
    check_output(arguments.out, suffixes=(".nc", ".zarr"))
    if arguments.lead < 1:
        raise ValueError(f"--lead must be at least 1, got {arguments.lead}")
    model, fields = _load(arguments)
    start = date_in_record(arguments, "start", fields)
    if start <= fields.time[-1]:
        start = data.targets(fields.time, model.time_step, start, None, model.frames)[0]
    when = start + model.time_step * np.arange(arguments.lead)
    drawing = draw_settings(arguments, fields, model.config.patch)
    console = plain_console()
    with shown(console) as progress:
        advance = counter(progress, "forecast", len(when))
        members = cycle(model, fields, when, [None] * len(when), drawing, advance)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    data.write(data.to_dataset(members.numpy(), fields, when, attributes), arguments.out)
    _print_line(console, f"written: {arguments.out}")


# verify


def _verify(arguments: argparse.Namespace, attributes: Mapping[str, str]) -> None:
    if arguments.out is not None:
        check_output(arguments.out)
    ensemble = read_ensemble(arguments.analysis)
    truth = data.read(arguments.data, ensemble.variables)
    ensemble, target, valid = match(ensemble, truth)
    parts = {str(np.datetime_as_string(t, unit="m")): slice(k, k + 1) for k, t in enumerate(ensemble.time)}
    table = Table("time", "variable", "CRPS", "RMSE", "spread", "spread-skill")
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for label, part in {**parts, "all": slice(None)}.items():
        scores[label] = score_table(ensemble.values[:, part], target[part], torch.from_numpy(valid[part]), truth)
        for name, row in scores[label].items():
            table.add_row(label, name, *(f"{row[key]:.3f}" for key in _SCORES))
    if arguments.out is not None:
        content = {"all": scores.pop("all"), "by_time": scores}
        sources = {"analysis": str(arguments.analysis), "data": str(arguments.data)}
        outputs.write_json(arguments.out, content | sources)
    plain_console().print(table)


# trial


def _trial(arguments: argparse.Namespace, attributes: Mapping[str, str]) -> None:
    check_output(arguments.out, "folder")
    training = train_settings(arguments)
    fields = _training_fields(arguments, training)
    patch = training.patch or models.default_patch(len(fields.latitude), len(fields.longitude))
    settings = TrialSettings(
        split=date_in_record(arguments, "split", fields),
        time_step=arguments.time_step,
        fractions=arguments.observed,
        stop=arguments.stop,
        drawing=draw_settings(arguments, fields, patch),
        training=training,
    )
    console = plain_console()
    with shown(console) as progress:
        result = run_trial(fields, settings, progress)
    written = outputs.write_trial(result, fields, attributes, arguments.out, str(arguments.data))
    scores = result.scores
    tables = {
        "STORM": scores["fractions"],
        "Gaussian, network off": scores["gaussian"]["fractions"],
        "optimal interpolation": scores["optimal_interpolation"]["fractions"],
    }
    console.print(_score_table(scores, tables))
    _print_line(console, f"persistence: RMSE {scores['persistence']['rmse']:.3f} {scores['unit']}")
    _print_line(console, f"{scores['wall_s']:.0f} s in all, of them {scores['train_s']:.0f} s to train")
    _print_line(console, "written: " + ", ".join(str(path) for path in written))


_COMMANDS: Mapping[str, Callable[[argparse.Namespace, Mapping[str, str]], None]] = {
    "train": _train,
    "assimilate": _assimilate,
    "forecast": _forecast,
    "verify": _verify,
    "trial": _trial,
}


# Lines and tables

_SCORES = ("crps", "rmse", "spread", "spread_skill")


def _print_line(console: Console, text: str) -> None:
    """Print one line, however long: programs that read it must not find it folded."""
    console.print(text, soft_wrap=True)


def _print_vortex(console: Console, cycles: Mapping[str, Any]) -> None:
    """Print where each cycle's vortex ended, in degrees from the true one, and its wind beside the true wind."""
    for name, row in cycles.items():
        if "vortex" in row:
            vortex = row["vortex"]
            _print_line(
                console,
                f"vortex, {name}: {vortex['last_track_error_deg']:.1f} degrees off at the end, wind "
                f"{vortex['last_wind_mean']:.1f} +- {vortex['last_wind_std']:.1f} m/s "
                f"(true {vortex['last_wind_true']:.1f})",
            )


def _score_table(scores: Mapping[str, Any], tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """One row for each method and fraction; the last column compares its CRPS with the same method's forecast."""
    # Narrow enough for 80 columns, the width where there is no terminal.
    headings = ("observed", "CRPS", "RMSE", "spread", "spread/\nskill", "CRPS\nsaved")
    table = Table(Column("method", no_wrap=True), *headings, title=f"unit: {scores['unit']}")
    for name, fractions in tables.items():
        forecast = fractions.get("0.0")
        for fraction, row in fractions.items():
            saved = f"{1 - row['crps'] / forecast['crps']:.0%}" if forecast and fraction != "0.0" else ""
            table.add_row(name, f"{float(fraction):.0%}", *(f"{row[key]:.3f}" for key in _SCORES), saved)
        table.add_section()
    return table
