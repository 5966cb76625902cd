"""`python -m conformance explain CASE`: which requirement, which code, where it first goes wrong, and likely why."""

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.console import Console

from conformance.adapter import Adapter, Array, describe, load_adapter
from conformance.authoring.traceability import code_places, requirements
from conformance.explain.stages import axis_names, by_axis, free_running, looks_like, stages
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.runner import FAILED, Outcome, everything, judge, judge_law
from conformance.judging.vectors import load_cases
from conformance.ports.checked import Port
from conformance.protocol.atomic import write_atomically

__all__ = ["draw_error", "explain"]

CODE_LINES = 24  # of a function; the rest is a click away


def explain(name: str, adapter: Adapter, args: argparse.Namespace) -> int:
    """Explain one case or law to the terminal. Exit code 0 when it passes, 1 when it does not."""
    from conformance.laws import all_laws

    try:
        info = describe(adapter)
        cases, laws = load_cases(), all_laws()
        subject = next((s for s in everything(cases, laws) if s.id == name), None)
        if subject is None:
            raise ValueError(f"there is no case or law {name!r}; python -m conformance list shows them all")
        port = Port(adapter, info, args.dtype)
        outcome = judge(port, subject) if isinstance(subject, Case) else judge_law(port, subject, args.seed)
        _Explanation(port, outcome, cases, args).tell()
    finally:
        close = getattr(adapter, "close", None)
        if close is not None:
            close()
    return 0 if outcome.verdict == "pass" else 1


class _Explanation:
    """Told from the outside in: verdict, requirement, code, first difference, shape of the error, suspects, command."""

    def __init__(self, port: Port, outcome: Outcome, cases: list[Case], args: argparse.Namespace) -> None:
        self.port, self.outcome, self.cases, self.args = port, outcome, cases, args
        self.reference = load_adapter("conformance.adapters.reference:adapter")
        self.console = Console()

    def say(self, line: str = "") -> None:
        # Strings of the port are text, never markup.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def head(self, title: str) -> None:
        self.say()
        self.console.print(title, style="bold", markup=False, highlight=False)

    def tell(self) -> None:
        outcome = self.outcome
        self.head(f"{outcome.verdict.upper()}  {outcome.subject.id}  ({outcome.subject.op}, {outcome.dtype})")
        self.say(f"  {outcome.detail or 'within its limits'}")
        measured = outcome.measured
        if measured is not None:
            fraction = f"{measured.fraction:.3g} of the limit" if measured.limit else "nothing is allowed"
            self.say(f"  error {measured.error:.4g} ({measured.unit}), {fraction}")
        self._requirements()
        if outcome.verdict in FAILED:
            if isinstance(outcome.subject, Case):
                self._first_difference(outcome.subject)
                self._shape_of_error(outcome.subject)
            self._suspects()
        self._reproduce()

    def _requirements(self) -> None:
        known = requirements()
        self.head("What the specification says")
        for name in self.outcome.subject.requirements:
            text = known[name].text if name in known else "(no such requirement)"
            self.say(f"  [{name}] {text}")
        if self.outcome.verdict not in FAILED:
            return
        places = dict.fromkeys(place for name in self.outcome.subject.requirements for place in code_places(name))
        if places:
            self.head("How the reference does it")
        for place in list(places)[:3]:
            self.say(f"  {place.path}:{place.first}-{place.last}")
            lines = place.source.splitlines()
            for line in lines[:CODE_LINES]:
                self.say(f"    | {line}")
            if len(lines) > CODE_LINES:
                self.say(f"    | ... {len(lines) - CODE_LINES} lines more")

    def _first_difference(self, case: Case) -> None:
        if case.rejects or self.outcome.measured is None:
            return
        found = free_running(self.port, self.reference, case, self.outcome.dtype)
        if found:
            self.head("The port's own intermediates, in order")
            for stage in found:
                measured = stage.measured
                note = stage.said if measured is None else f"{measured.fraction:8.3g} of the limit {stage.said}"
                self.say(f"  {'-> ' if stage.off else '   '}{stage.name:<22} {note}")
            first = next((stage.name for stage in found if stage.off), None)
            if first is not None:
                self.say(f"  The first that is off is {first}: what comes after may only inherit it.")
        parts = stages(self.port, self.reference, case, self.outcome.dtype)
        if parts:
            self.head("Each part by itself, given the reference's intermediates")
            for name, outcome in parts:
                mark = "-> " if outcome.verdict in FAILED else "   "
                self.say(f"  {mark}{name:<22} {outcome.subject.op:<16} {outcome.verdict}  {outcome.detail}")
            wrong = [name for name, outcome in parts if outcome.verdict in FAILED]
            right = "every part that the port has is right by itself: look at how they are put together"
            self.say(f"  Wrong by itself: {', '.join(wrong)}." if wrong else f"  {right[0].upper()}{right[1:]}.")

    def _shape_of_error(self, case: Case) -> None:
        output, measured = self.outcome.output, self.outcome.measured
        if output is None or measured is None:
            return
        got = self.port.outputs(case.op, case.inputs, case.params, case.expected, self.outcome.dtype)[output]
        expected = case.expected[output]
        limit = 0.0 if measured.unit in ("values that differ", "ULP") else measured.limit
        self.head("What the error looks like")
        for sentence in looks_like(got, expected, output, limit):
            self.say(f"  {sentence}")
        for name, rms in by_axis(got, expected, output):
            self.say(f"  rms error by {name}: {_bars(rms)}")
        path = self.args.out / f"explain-{case.id.replace('/', '-')}.png"
        draw_error(got, expected, output, case.id, path)
        self.say(f"  picture: {path}")

    def _suspects(self) -> None:
        from conformance.explain.likely_mutants import LineUp  # the catalogue loads the reference

        found = LineUp(self.cases, self.port.dtype).suspects(self.port, self.outcome)
        self.head("Likeliest mistakes")
        for suspect in found[:3]:
            how = "exactly this result" if suspect.distance < 1e-6 else f"a result {suspect.distance:.2g} as far off"
            self.say(f"  {suspect.name}: {suspect.fault} ({how})")
        self.say(f"  {'also: ' if found else ''}{self.outcome.subject.meaning}")

    def _reproduce(self) -> None:
        args = self.args
        port = f"--cmd {args.cmd!r}" if args.cmd else f"--adapter {args.adapter}"
        self.head("Again")
        seed = f" --seed {args.seed}" if isinstance(self.outcome.subject, Law) else ""
        self.say(f"  python -m conformance explain {self.outcome.subject.id} {port} --dtype {self.port.dtype}{seed}")


def _bars(values: Array) -> str:
    """Eight heights a value; infinite ones as the highest."""
    top = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    heights = np.nan_to_num(values / top, posinf=1.0)
    shown = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * height))] if height else "." for height in heights[:64])
    return shown + (" ..." if len(heights) > 64 else "")


def draw_error(got: Array, expected: Array, output: str, title: str, path: Path) -> None:
    """Expected, got and the size of the error: maps of the last two axes where the error is largest, or lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    error = np.abs(got - expected)
    names = axis_names(output, error.shape)
    at = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), error.shape) if error.ndim else ()
    lead = tuple(int(i) for i in at[: max(error.ndim - 2, 0)])
    where = ", ".join(f"{name} {i}" for name, i in zip(names, lead, strict=False))
    panels = (("expected", expected[lead]), ("got", got[lead]), ("|got - expected|", error[lead]))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {output}{', ' + where if where else ''} (normalised units)")
    for axes, (name, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set_title(name)
        if values.ndim == 2:
            top = float(np.abs(expected[lead]).max()) or 1.0
            signed = {"cmap": "PuOr", "vmin": -top, "vmax": top}
            image = axes.imshow(values, aspect="auto", **({"cmap": "cividis"} if "|" in name else signed))
            figure.colorbar(image, ax=axes)
            axes.set_xlabel(names[-1])
            axes.set_ylabel(names[-2])
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.plot(np.atleast_1d(values).ravel(), color="#0072B2", marker=".")
            axes.set_xlabel(names[-1] if names else "")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path, picture.getvalue())
