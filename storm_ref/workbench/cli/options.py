"""The options of the command line: what each command accepts, how words become values, and checks that need data."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from storm_ref.parallel.mesh import TIMEOUT, Mesh
from storm_ref.tiling import Tiling
from storm_ref.workbench.io import bundled, data
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.run.analysis import GUIDANCE, DrawSettings
from storm_ref.workbench.run.training import TrainSettings

__all__ = [
    "RENAMED",
    "check_output",
    "date_in_record",
    "draw_settings",
    "name_bundled_files",
    "parse",
    "train_settings",
]

# Old names of options, which are refused, and the new ones.
RENAMED = {
    "--rank": "--covariance-rank",
    "--rate": "--learning-rate",
    "--step": "--time-step",
    "--steps": "--sampler-steps",
    "--mix": "--mixed-transitions",
    "--fit": "--grid-mismatch",
    "--recompute": "--activation-checkpointing",
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command and its options. Exits with code 2 and the reason on standard error when they cannot be understood.

    An option keeps its full name: shortened ones could be taken for another.
    """
    parser = argparse.ArgumentParser(
        prog="storm_ref", description="Run STORM on your own data, or on the bundled world.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, text in (
        ("train", _add_train, "train a model on the first part of a record"),
        ("assimilate", _add_assimilate, "draw ensembles given observations, score them and follow a vortex"),
        ("forecast", _add_forecast, "draw an ensemble in which every member continues from its own past"),
        ("verify", _add_verify, "score an ensemble from a file against the truth"),
        ("trial", _add_trial, "train before a date, analyse after it, and score beside optimal interpolation"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=_DefaultsShown,
            allow_abbrev=False,
        )
        command.add_argument(
            "--threads",
            type=int,
            default=torch.get_num_threads(),
            metavar="N",
            help="number of CPU threads; results are bitwise reproducible for a given number",
        )
        add(command)
    for word in words:
        option = word.partition("=")[0]
        if option in RENAMED:
            parser.error(f"{option} is now called {RENAMED[option]}")
    return parser.parse_args(words)


class _DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to a help text where there is one and the text does not name it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0 or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# Options that several commands share.


def _add_data(command: argparse.ArgumentParser, variables: str) -> None:
    group = command.add_argument_group("data")
    _add_record(group, "record to read, CF NetCDF or Zarr")
    group.add_argument(
        "--variables",
        type=_names,
        metavar="A,B",
        help="variables by their names in the file, CF standard names or the names that ERA5, GRIB and HRRR use "
        f"(default: {variables})",
    )
    group.add_argument(
        "--grid-mismatch",
        choices=("pad", "crop"),
        help="what to do where the patch does not divide the grid: pad it in the south and east with points that are "
        "not scored, or crop it there (default: refuse it)",
    )


def _add_record(parser: Any, text: str) -> None:
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"{text} (default: the bundled world)")


def _add_training(command: argparse.ArgumentParser) -> Any:
    settings = TrainSettings()
    group = command.add_argument_group("network and training")
    group.add_argument(
        "--static",
        type=_names,
        metavar="A,B",
        help="constant fields that the network is conditioned on (default: all of the record)",
    )
    group.add_argument(
        "--time-step",
        type=_time_step,
        default="6h",
        metavar="STEP",
        help="time between two frames, such as 90min, 6h or 1d",
    )
    group.add_argument(
        "--patch", type=_size, metavar="HxW", help="grid points of a token (default: chosen from the grid)"
    )
    for option, default, text in (
        ("--frames", settings.frames, "number of past frames that the network is conditioned on"),
        ("--width", settings.width, "width of the network's embedding"),
        ("--depth", settings.depth, "number of the network's blocks"),
        (
            "--covariance-rank",
            settings.covariance_rank,
            "number of leading directions in the covariance, at most a quarter of all; 0 is plain EDM",
        ),
        ("--train-steps", settings.steps, "number of optimiser steps; 0 leaves the network off"),
        ("--batch", settings.batch, "number of transitions in an optimiser step"),
        (
            "--mixed-transitions",
            settings.mixed_transitions,
            "number of transitions mixed into one sample; 1 turns mixing off",
        ),
    ):
        group.add_argument(option, type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--learning-rate", type=float, default=settings.learning_rate, metavar="R", help="peak learning rate of AdamW"
    )
    group.add_argument(
        "--season",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="condition the network on the time of year, or do not (default: only if the record covers a year)",
    )
    return group


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument("--members", type=int, default=16, metavar="N", help="number of ensemble members")
    group.add_argument(
        "--sampler-steps", type=int, default=16, metavar="N", help="number of steps of the diffusion sampler"
    )
    _add_seed(group)


def _add_observations(command: argparse.ArgumentParser, obs_std: str) -> Any:
    group = command.add_argument_group("observations")
    group.add_argument(
        "--guidance", choices=tuple(GUIDANCE), default="covariance", help="how observations guide the sampler"
    )
    group.add_argument(
        "--observed",
        type=_fractions,
        default="0,0.1,0.2,0.5",
        metavar="F,F",
        help="fractions of the grid points that are observed, each analysed and scored by itself",
    )
    group.add_argument(
        "--obs-std",
        type=_numbers,
        default=obs_std,
        metavar="S[,S]",
        help="standard deviation of the observation errors in the units of the variables, one for all or one for each",
    )
    return group


def _add_tiles(command: argparse.ArgumentParser, plain: str) -> None:
    sizes = "Sizes are in grid points: 8x16 is 8 rows by 16 columns, and 8 is 8 by 8."
    group = command.add_argument_group("tiles", sizes)
    group.add_argument("--tile", type=_size, metavar="HxW", help=f"core of a tile (default: {plain})")
    group.add_argument("--halo", type=_size, metavar="HxW", help="context on each side of the core (default: 0)")
    group.add_argument("--blend", type=_size, metavar="HxW", help="half-width of the blending zone (default: 0)")


def _add_mesh(command: argparse.ArgumentParser) -> Any:
    group = command.add_argument_group("many processes")
    group.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXES",
        help="sizes of the axes over which the processes that torchrun started divide the work, such as tile=2,tp=2; "
        "an axis that is left out has size 1",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="seconds that a rank waits for another before it gives up",
    )
    return group


def _add_seed(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers")


def _add_weights(group: Any) -> None:
    group.add_argument("--weights", type=Path, metavar="FILE", help="model that train wrote (default: the bundled one)")


# The options of each command.


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_data(command, "all")
    command.add_argument(
        "--split",
        type=_date,
        metavar="DATE",
        help=f"train on what precedes this date (bundled world: {bundled.TRAINING_END})",
    )
    _add_seed(_add_training(command))
    _add_tiles(command, "one tile")
    _add_mesh(command).add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="with --mesh: keep only the inputs of each block and run it again for the gradient, which takes less "
        "memory and more time",
    )
    command.add_argument(
        "--out", type=Path, default=Path("build/model.safetensors"), metavar="FILE", help="file for the trained model"
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="training state, saved while training and resumed if it exists, on any mesh or none; a folder with --mesh",
    )


def _add_assimilate(command: argparse.ArgumentParser) -> None:
    _add_data(command, "those of the model")
    _add_weights(command)
    command.add_argument(
        "--start",
        type=_date,
        metavar="DATE",
        help=f"first analysis (bundled world: {bundled.TRAINING_END}); with --stations, the only one",
    )
    command.add_argument("--count", type=int, default=6, metavar="N", help="number of analyses that are scored")
    command.add_argument(
        "--cycle", type=int, default=12, metavar="N", help="number of time steps in a cycle; 0 leaves the cycles out"
    )
    given = _add_observations(command, "0.5").add_mutually_exclusive_group()
    given.add_argument(
        "--stations",
        type=Path,
        metavar="FILE",
        help="assimilate this table of observations (CSV, NetCDF or Zarr) instead of random points",
    )
    given.add_argument(
        "--mask",
        metavar="NAME",
        help="observe the grid points where this constant field of the record is above 1/2, without adding errors",
    )
    _add_sampling(command)
    _add_tiles(command, "those of the model")
    _add_mesh(command)
    command.add_argument(
        "--out", type=Path, default=Path("build/assimilation"), metavar="DIR", help="folder for all results"
    )


def _add_forecast(command: argparse.ArgumentParser) -> None:
    _add_data(command, "those of the model")
    _add_weights(command)
    command.add_argument(
        "--start", type=_date, metavar="DATE", help=f"first frame drawn (bundled world: {bundled.TRAINING_END})"
    )
    command.add_argument(
        "--lead", type=int, default=8, metavar="N", help="number of frames drawn, each a time step of the model later"
    )
    _add_sampling(command)
    _add_tiles(command, "those of the model")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("build/forecast.nc"),
        metavar="FILE",
        help="file for the ensemble, .nc or .zarr",
    )


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--analysis",
        type=Path,
        default=Path("build/forecast.nc"),
        metavar="FILE",
        help="ensemble that assimilate, trial or forecast wrote",
    )
    _add_record(command, "record that holds the truth, CF NetCDF or Zarr")
    command.add_argument("--out", type=Path, metavar="FILE", help="file for the scores as JSON, beside the table")


def _add_trial(command: argparse.ArgumentParser) -> None:
    _add_data(command, "all")
    _add_training(command)
    _add_observations(command, "0.3")
    _add_sampling(command)
    _add_tiles(command, "chosen from the grid")
    command.add_argument(
        "--split",
        type=_date,
        metavar="DATE",
        help=f"train before this date and test from it on (bundled world: {bundled.TRAINING_END})",
    )
    command.add_argument(
        "--stop", type=_date, metavar="DATE", help="test before this date (default: to the end of the record)"
    )
    command.add_argument("--out", type=Path, default=Path("build/trial"), metavar="DIR", help="folder for all results")


# Words to values. argparse shows the message of an ArgumentTypeError only.


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.1,0.5") from error


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(_numbers(text)))


def _size(text: str) -> tuple[int, int]:
    """Rows and columns from "8" or "8x16"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8 or 8x16")
    return int(match[1]), int(match[2] or match[1])


def _with_its_message(convert: Callable[[str], Any], text: str) -> Any:
    try:
        return convert(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _time_step(text: str) -> np.timedelta64:
    step: np.timedelta64 = _with_its_message(data.parse_step, text)
    return step


def _mesh(text: str) -> Mesh:
    mesh: Mesh = _with_its_message(Mesh.parse, text)
    return mesh


def _date(text: str) -> np.datetime64:
    match = re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d)?)?)?", text)
    try:
        if match is None:
            raise ValueError(text)
        return np.datetime64(text, "ns")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2019-03-25 or 2019-03-25T06") from error


# Checks of options, alone and against the data, and the settings that they stand for.


def name_bundled_files(arguments: argparse.Namespace) -> None:
    """Put the bundled files in the place of --data and --weights that were not given.

    Raises ValueError when one is needed and missing.
    """
    arguments.on_bundled_world = getattr(arguments, "data", None) is None
    if arguments.on_bundled_world:
        arguments.data = bundled.world()
    if "weights" in arguments and arguments.weights is None:
        arguments.weights = bundled.weights()


def check_output(
    path: Path,
    kind: Literal["file", "folder", "either"] = "file",
    suffixes: tuple[str, ...] = (),
    option: str = "--out",
) -> None:
    """Make sure, before the work rather than after it, that a file or folder can be written at `path`.

    Raises ValueError, naming the option, the reason and the remedy, when it cannot.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (kind == "folder" or existing != path) and not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is not a folder; choose another name")
    if kind == "file" and path.suffix != ".zarr" and path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; name a file in it")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {path}: {existing} may not be written; choose another place")


def date_in_record(arguments: argparse.Namespace, option: Literal["split", "start"], fields: Fields) -> np.datetime64:
    """The date of --split or --start; of the bundled world it has a default.

    Raises ValueError unless it lies in the record, or one step behind its last frame.
    """
    date: np.datetime64 | None = getattr(arguments, option)
    if date is None:
        if not arguments.on_bundled_world:
            raise ValueError(f"where does the training part of {arguments.data} end? Say so with --{option} DATE")
        date = _date(bundled.TRAINING_END)
    first, last = fields.time[0], fields.time[-1]
    spacing = last - fields.time[-2:][0]
    if not first <= date <= last + spacing:
        record = " to ".join(np.datetime_as_string(time, unit="m") for time in (first, last))
        raise ValueError(f"--{option} {np.datetime_as_string(date, unit='m')} lies outside the record ({record})")
    return date


def draw_settings(arguments: argparse.Namespace, fields: Fields, patch: tuple[int, int]) -> DrawSettings:
    """Read how to draw ensembles. Raises ValueError for numbers, tiles and errors that do not fit one another."""
    return DrawSettings(
        members=arguments.members,
        seed=arguments.seed,
        obs_std=_one_or_each(arguments.obs_std, fields) if "obs_std" in arguments else 1.0,
        guidance=getattr(arguments, "guidance", "covariance"),
        sampler_steps=arguments.sampler_steps,
        tiling=_tiling(arguments, fields, patch),
    )


def train_settings(arguments: argparse.Namespace) -> TrainSettings:
    """Sizes of the network and how it is trained, untiled. Raises ValueError for numbers that make no sense."""
    return TrainSettings(
        patch=arguments.patch,
        width=arguments.width,
        depth=arguments.depth,
        frames=arguments.frames,
        covariance_rank=arguments.covariance_rank,
        steps=arguments.train_steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        mixed_transitions=arguments.mixed_transitions,
        season=arguments.season,
        seed=arguments.seed,
    )


def _one_or_each(numbers: tuple[float, ...], fields: Fields) -> float | tuple[float, ...]:
    if len(numbers) not in (1, len(fields.variables)):
        names = ", ".join(fields.variables)
        raise ValueError(f"--obs-std has {len(numbers)} numbers: give one, or one for each of {names}")
    return numbers[0] if len(numbers) == 1 else numbers


def _tiling(arguments: argparse.Namespace, fields: Fields, patch: tuple[int, int]) -> Tiling | None:
    if arguments.tile is None:
        if arguments.halo or arguments.blend:
            raise ValueError("--halo and --blend belong to tiles of a given size: add --tile HxW")
        return None
    return Tiling.of(
        grid=(len(fields.latitude), len(fields.longitude)),
        core=arguments.tile,
        halo=arguments.halo or (0, 0),
        blend=arguments.blend or (0, 0),
        periodic=fields.periodic,
        patch=patch,
    )
