"""python -m storm_ref {train, assimilate, forecast, verify, trial}: the workbench from the command line.

Tables go to standard output, numbers to result.json, fields to NetCDF, pictures to PNG. Progress bars are shown on a
terminal only. Exit code 0: done; 2: refused, the reason and the remedy on standard error and nothing written.

Under torchrun, `--mesh ddp=1,fsdp=1,tile=2,tp=2` shares out the work of train and assimilate among as many processes,
with the same results to rounding. The first rank alone prints and writes. Exit code 1: a rank failed, or waited for
others in vain.
"""

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped
from rich.console import Console
from rich.table import Column, Table

from storm_ref import __version__
from storm_ref.guidance import Observations
from storm_ref.parallel.mesh import TIMEOUT, CollectiveError, Mesh, World, start
from storm_ref.tiling import Tiling
from storm_ref.workbench.io import data, outputs
from storm_ref.workbench.io.data import Fields
from storm_ref.workbench.io.ensembles import match, read_ensemble
from storm_ref.workbench.io.observations import from_mask, from_stations, read_stations
from storm_ref.workbench.io.progress import plain_console, shown
from storm_ref.workbench.prior import model as models
from storm_ref.workbench.prior.model import Model
from storm_ref.workbench.run.analysis import GUIDANCE, DrawSettings, analyse, counter, cycle, score_table
from storm_ref.workbench.run.demonstration import DemonstrationSettings, demonstrate
from storm_ref.workbench.run.training import Samples, TrainSettings, check_shares, prepare, train
from storm_ref.workbench.run.trial import TrialSettings, run_trial

__all__ = ["main"]

T = TypeVar("T")

TINY = Path(__file__).parents[3] / "tiny_data"
WORLD, WEIGHTS = TINY / "world.nc", TINY / "storm_tiny.safetensors"
WORLD_SPLIT = "2000-09-28"  # three quarters of the bundled world are for training


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = words[words[:1] == ["--"] :]  # with which torchrun is kept from our options; some versions hand it on
    arguments = _parser().parse_args(words)
    arguments.world = None
    try:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
        arguments.world = _world(arguments)
        run: Callable[[argparse.Namespace, Mapping[str, str]], None] = arguments.run
        run(arguments, _about(words, arguments))
    except (ValueError, OSError) as error:
        _complain(arguments, error)
        return 2
    except RuntimeError as error:  # what process groups raise when another rank is gone or does not answer
        if arguments.world is None:
            raise
        traceback.print_exc()
        silent = arguments.world.unresponsive_ranks()
        missed = f"; no word from rank {', '.join(map(str, silent))}" if silent else ""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        _complain(arguments, f"failed, or waited in vain for another rank{missed} ({first})")
        return 1
    if arguments.world is not None:
        arguments.world.close()
    return 0


def _world(arguments: argparse.Namespace) -> World | None:
    """The ranks that this process is one of, or None. Raises ValueError for torchrun without --mesh, or the reverse."""
    mesh = getattr(arguments, "mesh", None)
    if mesh is not None:
        return start(mesh, arguments.timeout, "cpu")  # where the workbench keeps models and data
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        many = os.environ["WORLD_SIZE"]
        raise ValueError(
            f"{many} processes were started, and no --mesh says how they share the work: add one, or start one"
        )
    return None


def _complain(arguments: argparse.Namespace, error: object) -> None:
    """To standard error: once for what all ranks agree on, else with the rank that it happened on."""
    rank = arguments.world.rank if arguments.world is not None else int(os.environ.get("RANK", 0))
    if rank and (arguments.world is None or isinstance(error, CollectiveError)):
        return
    where = "" if arguments.world is None or isinstance(error, CollectiveError) else f" (rank {rank})"
    print(f"storm_ref {arguments.command}{where}: {error}", file=sys.stderr, flush=True)


def _together(world: World | None, work: Callable[[], T]) -> T:
    """Every rank does it, and all fail if one does."""
    if world is None:
        return work()
    result, error = [], None
    try:
        result.append(work())
    except (ValueError, OSError) as e:
        error = str(e)
    world.raise_together(error)
    return result[0]


def _first(world: World | None, write: Callable[[], None]) -> None:
    """The first rank does it, and all fail if it does."""
    _together(world, write if world is None or world.is_main else lambda: None)


def _console(world: World | None) -> Console:
    """The first rank speaks for all."""
    return plain_console() if world is None or world.is_main else Console(quiet=True)


def _about(words: Sequence[str], arguments: argparse.Namespace) -> dict[str, str]:
    """How the output came about: attributes of every file written."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "xarray"))
    return {
        "title": f"storm_ref {arguments.command}",
        "command": shlex.join(["python", "-m", "storm_ref", *words]),
        "source": f"storm_ref {__version__} ({versions})",
        "seed": str(getattr(arguments, "seed", "")),
    }


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there is one and the text does not name it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or "default:" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="storm_ref", description="STORM on your own data, or on the bundled world.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add, text in (
        ("train", _train, _add_train, "train a model on the first part of a record"),
        ("assimilate", _assimilate, _add_assimilate, "draw ensembles given observations, score them, follow a vortex"),
        ("forecast", _forecast, _add_forecast, "draw an ensemble in which every member runs on from its own past"),
        ("verify", _verify, _add_verify, "score an ensemble on disk against the truth"),
        ("trial", _trial, _add_trial, "train before a date, analyse after it, score beside optimal interpolation"),
    ):
        sub = commands.add_parser(name, help=text, description=text.capitalize() + ".", formatter_class=_Help)
        threads = "of the processor; results repeat bit for bit with the same number"
        sub.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help=threads)
        sub.set_defaults(run=run)
        add(sub)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    record = "the record, CF NetCDF or Zarr (default: the bundled world)"
    parser.add_argument("--data", type=Path, default=WORLD, metavar="FILE", help=record)
    names = "by the file's name or the standard name (default: the model's; of a model to be trained, all)"
    parser.add_argument("--variables", type=_names, metavar="A,B", help=names)
    fit = "what to do with a grid that the patch does not divide (default: refuse it)"
    parser.add_argument("--fit", choices=("pad", "crop"), help=fit)


def _add_drawing(parser: argparse.ArgumentParser, obs_std: str) -> None:
    _add_sampling(parser)
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="covariance", help="how observations enter")
    shares = "shares of the points that are observed, each scored on its own"
    parser.add_argument("--observed", type=_fractions, default="0,0.1,0.2,0.5", metavar="F,F", help=shares)
    error = "standard deviation of the observations' errors, one or one a variable, in their units"
    parser.add_argument("--obs-std", type=_numbers, default=obs_std, metavar="S[,S]", help=error)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--members", type=int, default=16, metavar="N", help="size of the ensemble")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="of the sampler")
    _add_seed(parser)
    _add_tiles(parser, "by the grid")


def _add_tiles(parser: argparse.ArgumentParser, plain: str) -> None:
    parser.add_argument("--tile", type=_pair, metavar="HxW", help=f"core of a tile, grid points (default: {plain})")
    parser.add_argument("--halo", type=_pair, metavar="HxW", help="seen beyond the core on each side (default: 0)")
    parser.add_argument("--blend", type=_pair, metavar="HxW", help="half-width of the blending (default: 0)")


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    text = "share the work among the processes that torchrun started, e.g. ddp=1,fsdp=1,tile=2,tp=2"
    parser.add_argument("--mesh", type=_mesh, metavar="AXES", help=text)
    wait = "seconds that a rank waits for another before it gives up"
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help=wait)


def _mesh(text: str) -> Mesh:
    try:
        return Mesh.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="all random numbers follow from it")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_training(parser)
    _add_tiles(parser, "one tile")
    parser.add_argument("--split", type=_time, metavar="DATE", help=f"train before it (bundled world: {WORLD_SPLIT})")
    _add_seed(parser)
    parser.add_argument("--out", type=Path, default=Path("build/model.safetensors"), metavar="FILE", help="the model")
    kept = "kept while training, a folder under --mesh; if it exists it is resumed, on any mesh or none"
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help=kept)
    _add_mesh(parser)
    twice = "under --mesh: keep only what blocks take in, and run them twice; less memory, more time"
    parser.add_argument("--recompute", action="store_true", help=twice)


def _add_training(parser: argparse.ArgumentParser) -> None:
    plain = TrainSettings()
    shown = "constant fields shown to the network (default: all)"
    parser.add_argument("--static", type=_names, metavar="A,B", help=shown)
    parser.add_argument("--step", type=_step, default="6h", help="from one frame to the next")
    parser.add_argument("--patch", type=_pair, metavar="HxW", help="grid points of a token (default: by the grid)")
    for name, text in (
        ("frames", "past frames"),
        ("width", "embedding of the network"),
        ("depth", "layers of the network"),
        ("rank", "leading directions of the covariance; 0 is plain EDM"),
        ("train-steps", "0 leaves the network off"),
        ("batch", "transitions a step"),
        ("mix", "transitions mixed into one; 1 is none"),
    ):
        fields = {"train-steps": "steps", "rank": "covariance_rank", "mix": "mixed_transitions"}
        default = getattr(plain, fields.get(name, name))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--rate", type=float, default=plain.learning_rate, metavar="R", help="learning rate")
    told = "tell the network the season, or not (default: when the record covers a year)"
    parser.add_argument("--season", action=argparse.BooleanOptionalAction, default=None, help=told)


def _add_assimilate(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_drawing(parser, "0.5")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FILE", help="from train (default: the bundled one)"
    )
    parser.add_argument("--start", type=_time, metavar="DATE", help=f"first analysis (bundled world: {WORLD_SPLIT})")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="analyses scored")
    parser.add_argument("--cycle", type=int, default=12, metavar="N", help="steps of the cycles; 0 leaves them out")
    given = parser.add_mutually_exclusive_group()
    table = "assimilate this table of observations (CSV, NetCDF or Zarr) instead of random points"
    given.add_argument("--stations", type=Path, metavar="FILE", help=table)
    mask = "or observe the data, without errors added, where this constant field of theirs is above 1/2"
    given.add_argument("--mask", metavar="NAME", help=mask)
    parser.add_argument("--out", type=Path, default=Path("build/assimilation"), metavar="DIR", help="for all results")
    _add_mesh(parser)


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, metavar="FILE", help="from train (default: the bundled one)"
    )
    parser.add_argument("--start", type=_time, metavar="DATE", help=f"first frame drawn (bundled world: {WORLD_SPLIT})")
    parser.add_argument("--lead", type=int, default=8, metavar="N", help="frames drawn, one of the model's steps apart")
    _add_sampling(parser)
    parser.add_argument("--out", type=Path, default=Path("build/forecast.nc"), metavar="FILE", help=".nc or .zarr")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    ensemble = "the ensemble, from assimilate, trial or forecast"
    parser.add_argument("--analysis", type=Path, default=Path("build/forecast.nc"), metavar="FILE", help=ensemble)
    truth = "the truth (default: the bundled world)"
    parser.add_argument("--data", type=Path, default=WORLD, metavar="FILE", help=truth)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores here as JSON, too")


def _add_trial(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    _add_training(parser)
    _add_drawing(parser, "0.3")
    parser.add_argument("--split", type=_time, metavar="DATE", help=f"train before, test from (bundled: {WORLD_SPLIT})")
    parser.add_argument("--stop", type=_time, metavar="DATE", help="test before it (default: to the end)")
    parser.add_argument("--out", type=Path, default=Path("build/trial"), metavar="DIR", help="for all results")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.1,0.5") from error


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(_numbers(text)))


def _pair(text: str) -> tuple[int, int]:
    """ "8" or "8x16"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8 or 8x16")
    return int(match[1]), int(match[2] or match[1])


def _step(text: str) -> np.timedelta64:
    try:
        return data.parse_step(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _time(text: str) -> np.datetime64:
    match = re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d(:\d\d(:\d\d)?)?)?", text)
    try:
        if match is None:
            raise ValueError(text)
        return np.datetime64(text, "ns")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2019-03-25 or 2019-03-25T06") from error


def _check_out(path: Path, suffixes: tuple[str, ...] = (), folder: bool = False, either: bool = False) -> None:
    """Raises ValueError when a file (or a folder of them) could not be written there: before the work, not after it.

    either: file or folder.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"--out {path}: the name must end in {' or '.join(suffixes)}")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (folder or there != path) and not there.is_dir():
        raise ValueError(f"--out {path}: {there} is no folder; choose another name")
    if not (folder or either) and path.suffix != ".zarr" and path.is_dir():
        raise ValueError(f"--out {path}: this is a folder; name a file in it")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {path}: {there} may not be written; choose another place")


def _split(arguments: argparse.Namespace, name: str, fields: Fields) -> np.datetime64:
    """The date given; ValueError unless it lies in the record, or directly behind its last frame."""
    given = getattr(arguments, name)
    if given is None and arguments.data != WORLD:
        raise ValueError(f"where does the training part of {arguments.data} end? Say so with --{name} DATE")
    date: np.datetime64 = _time(WORLD_SPLIT) if given is None else given
    first, last = fields.time[0], fields.time[-1]
    if not first <= date <= last + (last - fields.time[-2:][0]):
        record = " to ".join(np.datetime_as_string(t, unit="m") for t in (first, last))
        raise ValueError(f"--{name} {np.datetime_as_string(date, unit='m')} lies outside the record ({record})")
    return date


def _one_or_many(numbers: tuple[float, ...], fields: Fields) -> float | tuple[float, ...]:
    if len(numbers) not in (1, len(fields.variables)):
        names = ", ".join(fields.variables)
        raise ValueError(f"--obs-std has {len(numbers)} numbers: give one, or one for each of {names}")
    return numbers[0] if len(numbers) == 1 else numbers


def _tiling(arguments: argparse.Namespace, fields: Fields, patch: tuple[int, int]) -> Tiling | None:
    halo, blend = arguments.halo, arguments.blend
    if arguments.tile is None:
        if halo or blend:
            raise ValueError("--halo and --blend belong to tiles of a given size: add --tile HxW")
        return None
    grid = (len(fields.latitude), len(fields.longitude))
    return Tiling.of(grid, arguments.tile, halo or (0, 0), blend or (0, 0), fields.periodic, patch)


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
    names = ("patch", "frames", "width", "depth", "batch", "season", "seed")
    return TrainSettings(
        steps=arguments.train_steps,
        covariance_rank=arguments.rank,
        learning_rate=arguments.rate,
        mixed_transitions=arguments.mix,
        **{name: getattr(arguments, name) for name in names},
    )


def _train(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    tiles = {"tile": arguments.tile, "halo": arguments.halo or (0, 0), "blend": arguments.blend or (0, 0)}
    settings, checkpoint, world = replace(_training(arguments), **tiles), arguments.checkpoint, arguments.world

    def read() -> tuple[Model, Samples]:
        _check_out(arguments.out)
        if checkpoint is not None:
            _check_out(checkpoint, either=True)
        fields = _training_fields(arguments, settings)
        when = data.targets(fields.time, arguments.step, None, _split(arguments, "split", fields), settings.frames)
        prepared = prepare(fields, when, arguments.step, settings)
        if world is not None:
            check_shares(prepared[0], settings, world)
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
        return prepared

    prepared, console = _together(world, read), _console(world)
    with shown(console) as progress:
        model = train(
            *prepared, settings, progress, checkpoint, world=world, activation_checkpointing=arguments.recompute
        )

    def write() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        models.save(model, arguments.out)

    _first(world, write)
    held = model.training["held_back"]
    best = min(loss for _, loss in held)
    _say(console, f"loss on the held-back part {held[0][1]:.4f} -> {best:.4f} (network off -> on)")
    _say(console, f"written: {arguments.out}")


def _training_fields(arguments: argparse.Namespace, settings: TrainSettings) -> Fields:
    patch = settings.patch or (1, 1)
    return data.read(arguments.data, arguments.variables, arguments.static, patch=patch, fit=arguments.fit)


def _load(arguments: argparse.Namespace, static: tuple[str, ...] = ()) -> tuple[Model, Fields]:
    """A model and data for it. The model carries its own constant fields; `static` are others that are wanted."""
    model = models.load(arguments.weights)
    chosen, patch = arguments.variables or model.variables, model.config.patch
    fields = data.read(arguments.data, chosen, static, patch=patch, fit=arguments.fit)
    model.check(fields)
    return model, fields


def _assimilate(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    world = arguments.world

    def read() -> tuple[Model, Fields, DrawSettings]:
        _check_out(arguments.out, folder=True)
        model, fields = _load(arguments, (arguments.mask,) if arguments.mask else ())
        drawing = _drawing(arguments, fields, model.config.patch)
        if world is not None:
            model.check_shares(world, drawing.tiling, drawing.members)
        return model, fields, drawing

    model, fields, drawing = _together(world, read)
    if world is not None:
        model = model.shard(world)
    console = _console(world)
    written: list[Path] = []
    if arguments.stations or arguments.mask:
        given = _stations if arguments.stations else _masked
        when, observations, reports = given(arguments, model, fields, drawing)
        with shown(console) as progress:
            members = analyse(model, fields, when, observations, drawing, counter(progress, "analyses", len(when)))

        def write_members() -> None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            written.append(arguments.out / "analysis.nc")
            data.write(data.to_dataset(members.numpy(), fields, when, about), written[0])

        _first(world, write_members)
        for t, report in zip(when, reports, strict=True):
            _say(console, f"{np.datetime_as_string(t, unit='m')}: {report}")
    else:
        start = _split(arguments, "start", fields)
        settings = DemonstrationSettings(arguments.observed, start, arguments.count, arguments.cycle, drawing)
        with shown(console) as progress:
            result = demonstrate(model, fields, settings, progress)
        where = arguments.out, str(arguments.data)
        _first(world, lambda: written.extend(outputs.write_demonstration(result, fields, about, *where)))
        console.print(_score_table(result.scores, {"STORM": result.scores["fractions"]}))
        _say_vortex(console, result.scores.get("cycle", {}))
    _say(console, "written: " + ", ".join(str(path) for path in written))


def _say(console: Console, text: str) -> None:
    """A line, however long: what others read must not be folded."""
    console.print(text, soft_wrap=True)


def _say_vortex(console: Console, cycles: Mapping[str, Any]) -> None:
    for name, row in cycles.items():
        if "vortex" in row:
            v = row["vortex"]
            _say(
                console,
                f"vortex, {name}: {v['last_track_error_deg']:.1f} degrees off at the end, wind "
                f"{v['last_wind_mean']:.1f} +- {v['last_wind_std']:.1f} m/s (true {v['last_wind_true']:.1f})",
            )


# Times of the analyses, their observations, and a line on each.
_Given = tuple[Shaped[np.ndarray, " t"], list[Observations], list[str]]


def _stations(arguments: argparse.Namespace, model: Model, fields: Fields, drawing: DrawSettings) -> _Given:
    """Observations of a table: those around --start, or one analysis at each of its times."""
    table = read_stations(arguments.stations)
    if not len(table.time):
        raise ValueError(f"{arguments.stations}: empty observations: the table has no row")
    when = np.unique(table.time) if arguments.start is None else np.array([arguments.start])
    tolerance = np.timedelta64(0, "ns") if arguments.start is None else model.time_step // 2
    try:
        found = [from_stations(table, fields, t, tolerance) for t in when]
    except ValueError as error:
        raise ValueError(f"{arguments.stations}: {error}") from error
    return when, [observations for observations, _ in found], [str(report) for _, report in found]


def _masked(arguments: argparse.Namespace, model: Model, fields: Fields, drawing: DrawSettings) -> _Given:
    """Observations of the data themselves at the valid points of a constant field."""
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    when = data.targets(fields.time, model.time_step, _split(arguments, "start", fields), None, model.frames)
    when = when[: arguments.count]
    std = np.broadcast_to(np.asarray(drawing.obs_std, np.float64), len(fields.variables))
    observations = []
    for k in np.searchsorted(fields.time, when):
        observations.append(from_mask(fields.values[k], (fields.static[0] > 0.5) & fields.valid[k], std))
    return when, observations, [f"{len(o.value)} observations are used" for o in observations]


def _forecast(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    _check_out(arguments.out, (".nc", ".zarr"))
    if arguments.lead < 1:
        raise ValueError(f"--lead must be at least 1, got {arguments.lead}")
    model, fields = _load(arguments)
    start = _split(arguments, "start", fields)
    if start <= fields.time[-1]:
        start = data.targets(fields.time, model.time_step, start, None, model.frames)[0]
    when = start + model.time_step * np.arange(arguments.lead)
    drawing, console = _drawing(arguments, fields, model.config.patch), plain_console()
    with shown(console) as progress:
        tell = counter(progress, "forecast", len(when))
        members = cycle(model, fields, when, [None] * len(when), drawing, tell)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    data.write(data.to_dataset(members.numpy(), fields, when, about), arguments.out)
    _say(console, f"written: {arguments.out}")


def _verify(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    if arguments.out is not None:
        _check_out(arguments.out)
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
    if arguments.out is not None:
        where = {"analysis": str(arguments.analysis), "data": str(arguments.data)}
        outputs.write_json(arguments.out, {"all": result.pop("all"), "by_time": result, **where})
    plain_console().print(table)


def _trial(arguments: argparse.Namespace, about: Mapping[str, str]) -> None:
    _check_out(arguments.out, folder=True)
    training = _training(arguments)
    fields = _training_fields(arguments, training)
    split = _split(arguments, "split", fields)
    patch = training.patch or models.default_patch(len(fields.latitude), len(fields.longitude))
    drawing = _drawing(arguments, fields, patch)
    settings = TrialSettings(split, arguments.step, arguments.observed, arguments.stop, drawing, training)
    console = plain_console()
    with shown(console) as progress:
        result = run_trial(fields, settings, progress)
    written = outputs.write_trial(result, fields, about, arguments.out, str(arguments.data))
    scores = result.scores
    tables = {
        "STORM": scores["fractions"],
        "Gaussian, network off": scores["gaussian"]["fractions"],
        "optimal interpolation": scores["optimal_interpolation"]["fractions"],
    }
    console.print(_score_table(scores, tables))
    _say(console, f"persistence: RMSE {scores['persistence']['rmse']:.3f} {scores['unit']}")
    _say(console, f"{scores['wall_s']:.0f} s in all, of them {scores['train_s']:.0f} s to train")
    _say(console, "written: " + ", ".join(str(path) for path in written))


def _score_table(scores: Mapping[str, Any], tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """One row a method and fraction; the last column compares its CRPS with the same method's forecast."""
    # Narrow enough for 80 columns, the width where there is no terminal.
    names = ("observed", "CRPS", "RMSE", "spread", "spread/\nskill", "CRPS\nsaved")
    table = Table(Column("method", no_wrap=True), *names, title=f"unit: {scores['unit']}")
    for name, fractions in tables.items():
        alone = fractions.get("0.0")
        for f, row in fractions.items():
            saved = f"{1 - row['crps'] / alone['crps']:.0%}" if alone and f != "0.0" else ""
            numbers = (f"{row[key]:.3f}" for key in ("crps", "rmse", "spread", "spread_skill"))
            table.add_row(name, f"{float(f):.0%}", *numbers, saved)
        table.add_section()
    return table
