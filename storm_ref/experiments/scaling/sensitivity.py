"""The assumptions of the model, turned one by one: the efficiency with others, and what would give a certain one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from storm_ref.experiments.scaling.model import Machine, Workload, efficiency, era5

__all__ = ["KNOBS", "Knob", "needed", "turned"]


@dataclass(frozen=True)
class Knob:
    """An assumption to turn: its name, the unit in which it is printed, its default in that unit, and how to set it."""

    name: str
    unit: str
    default: float
    turn: Callable[[Machine, Workload, float], tuple[Machine, Workload]]
    of_work: bool = False


def _of_machine(name: str, unit: str, default: float, change: Callable[[Machine, float], Machine]) -> Knob:
    return Knob(name, unit, default, lambda machine, work, value: (change(machine, value), work))


def _of_work(name: str, unit: str, default: float, change: Callable[[Workload, float], Workload]) -> Knob:
    return Knob(name, unit, default, lambda machine, work, value: (machine, change(work, value)), of_work=True)


def _inside(machine: Machine, **change: float) -> Machine:
    return replace(machine, inside=replace(machine.inside, **change))


def _between(machine: Machine, **change: float) -> Machine:
    return replace(machine, between=replace(machine.between, **change))


KNOBS = (
    _of_machine("peak attained", "", 0.4, lambda m, v: replace(m, attained=min(v, 1.0))),
    _of_machine("memory", "TB/s", 1.6, lambda m, v: replace(m, memory_bandwidth=v * 1e12)),
    _of_machine("inside a node", "GB/s", 50.0, lambda m, v: _inside(m, bandwidth=v * 1e9)),
    _of_machine("a hop inside", "us", 5.0, lambda m, v: _inside(m, latency=v * 1e-6)),
    _of_machine("between nodes", "GB/s", 10.0, lambda m, v: _between(m, bandwidth=v * 1e9)),
    _of_machine("a hop between", "us", 10.0, lambda m, v: _between(m, latency=v * 1e-6)),
    _of_machine("launch a block", "ms", 0.5, lambda m, v: replace(m, issue=v * 1e-3)),
    _of_machine("fixed", "ms", 5.0, lambda m, v: replace(m, fixed=v * 1e-3)),
    _of_machine("jitter", "%", 1.0, lambda m, v: replace(m, jitter=v / 100)),
    _of_machine("overlap", "", 0.8, lambda m, v: replace(m, overlap=min(v, 1.0))),
    _of_work("history", "frames", 8.0, lambda w, v: replace(w, frames=round(v))),
    _of_work("side of a core", "points", 60.0, lambda w, v: replace(w, tiling=era5(round(v)))),
)


def turned(work: Workload, knob: Knob, factor: float) -> float:
    """E(32,768) on the default machine with one assumption times `factor`; shares end at one."""
    return efficiency(*knob.turn(Machine(), work, factor * knob.default))


def needed(work: Workload, knob: Knob, goal: float) -> float | None:
    """The value of one assumption with which E(32,768) is `goal`.

    Returns None if `goal` is not between the values that a 64th of the default and 64 times it give.
    """
    low = -6.0  # powers of two
    high = 6.0
    rising = turned(work, knob, 2**low) < goal
    if rising == (turned(work, knob, 2**high) < goal):
        return None
    for _ in range(12):
        middle = (low + high) / 2
        if (turned(work, knob, 2**middle) < goal) == rising:
            low = middle
        else:
            high = middle
    return float(knob.default * 2.0 ** ((low + high) / 2))
