"""`python -m conformance explain CASE`: requirement, code of the reference, first wrong stage, likely mistakes."""

import argparse
import shlex
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from conformance.adapter import Adapter, describe, load_adapter
from conformance.explain.code import code_places
from conformance.explain.error import bars, by_axis, draw_error, looks_like
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.requirements import requirements
from conformance.judging.runner import FAILED, Outcome, everything, judge, judge_law
from conformance.judging.vectors import load_cases
from conformance.laws import all_laws
from conformance.ports.checked import Port

__all__ = ["explain"]

CODE_LINES = 24  # shown of a function; its file and lines are named
PLACES = 3  # functions shown
MUTANTS = 3  # likely mistakes shown


def explain(name: str, adapter: Adapter, args: argparse.Namespace) -> int:
    """Explain one case or law to the terminal. Returns the exit code: 0 when it passes, 1 when it does not.

    Raises ValueError for a name that no case or law has.
    """
    try:
        info = describe(adapter)
        cases = load_cases()
        subject = next((s for s in everything(cases, all_laws()) if s.id == name), None)
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
    """One explanation, from the outside in: verdict, requirement, code, first difference, error, mistakes, command."""

    def __init__(self, port: Port, outcome: Outcome, cases: list[Case], args: argparse.Namespace) -> None:
        self.port = port
        self.outcome = outcome
        self.cases = cases
        self.args = args
        self.console = Console()

    def say(self, line: str = "") -> None:
        # Strings of the port are text, never markup.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def head(self, title: str) -> None:
        self.say()
        self.console.print(title, style="bold", markup=False, highlight=False)

    def tell(self) -> None:
        """Print all sections that apply."""
        failed = self.outcome.verdict in FAILED
        self._verdict()
        self._requirements()
        if failed:
            self._code()
            runs_reference = _has_torch()
            if isinstance(self.outcome.subject, Case):
                if runs_reference:
                    self._first_difference(self.outcome.subject)
                self._shape_of_error(self.outcome.subject)
            self._likely_mistakes(runs_reference)
        self._again()

    def _verdict(self) -> None:
        outcome = self.outcome
        self.head(f"{outcome.verdict.upper()}  {outcome.subject.id}  ({outcome.subject.op}, {outcome.dtype})")
        self.say(f"  {outcome.detail or 'within its limits'}")
        measured = outcome.measured
        if measured is not None:
            fraction = f"{measured.fraction:.3g} of the limit" if measured.limit else "nothing is allowed"
            self.say(f"  error {measured.error:.4g} ({measured.unit}), {fraction}")

    def _requirements(self) -> None:
        known = requirements()
        self.head("What the specification says")
        for name in self.outcome.subject.requirements:
            text = known[name].text if name in known else "(the specification is not installed here, or has no such id)"
            self.say(f"  [{name}] {text}")

    def _code(self) -> None:
        named = self.outcome.subject.requirements
        places = list(dict.fromkeys(place for name in named for place in code_places(name)))
        if places:
            self.head("How the reference does it")
        for place in places[:PLACES]:
            self.say(f"  {place.path}:{place.first}-{place.last}")
            lines = place.source.splitlines()
            for line in lines[:CODE_LINES]:
                self.say(f"    | {line}")
            if len(lines) > CODE_LINES:
                self.say(f"    | ... {len(lines) - CODE_LINES} more lines")

    def _first_difference(self, case: Case) -> None:
        if case.rejects or self.outcome.measured is None:
            return
        from conformance.explain.stages import free_running, stages  # noqa: PLC0415  # needs torch, for the reference

        reference = load_adapter("conformance.adapters.reference:adapter")
        compared = free_running(self.port, reference, case, self.outcome.dtype)
        if compared:
            self.head("The port's own intermediates, in order")
            for stage in compared:
                measured = stage.measured
                note = stage.note if measured is None else f"{measured.fraction:8.3g} of the limit {stage.note}"
                self.say(f"  {'-> ' if stage.off else '   '}{stage.name:<22} {note}")
            first = next((stage.name for stage in compared if stage.off), None)
            if first is not None:
                self.say(f"  The first that is off is {first}: what comes after may only inherit it.")
        parts = stages(self.port, reference, case, self.outcome.dtype)
        if parts:
            self.head("Each part by itself, given the reference's intermediates")
            for name, outcome in parts:
                mark = "-> " if outcome.verdict in FAILED else "   "
                self.say(f"  {mark}{name:<22} {outcome.subject.op:<16} {outcome.verdict}  {outcome.detail}")
            wrong = [name for name, outcome in parts if outcome.verdict in FAILED]
            right = "Every part that the port has is right by itself: look at how they are put together."
            self.say(f"  Wrong by itself: {', '.join(wrong)}." if wrong else f"  {right}")

    def _shape_of_error(self, case: Case) -> None:
        output = self.outcome.output
        measured = self.outcome.measured
        if output is None or measured is None:
            return
        got = self.port.outputs(case.op, case.inputs, case.params, case.expected, self.outcome.dtype)[output]
        expected = case.expected[output]
        limit = 0.0 if measured.unit in ("values that differ", "ULP") else measured.limit
        self.head("What the error looks like")
        for sentence in looks_like(got, expected, output, limit):
            self.say(f"  {sentence}")
        for name, rms in by_axis(got, expected, output):
            self.say(f"  rms error by {name}: {bars(rms)}")
        path: Path = self.args.out / f"explain-{case.id.replace('/', '-')}.png"
        try:
            draw_error(got, expected, output, case.id, path)
        except ImportError:
            self.say("  There is no picture, because matplotlib is not installed.")
        else:
            self.say(f"  picture: {path}")

    def _likely_mistakes(self, runs_reference: bool) -> None:
        self.head("Likeliest mistakes")
        if not runs_reference:
            self.say(
                "  Naming likely mistakes, and the first stage that is off, runs the reference, which needs PyTorch: "
                "pip install 'storm-ref[reference]'."
            )
            self.say(f"  {self.outcome.subject.meaning}")
            return
        from conformance.mutants.likely_mutants import LineUp  # noqa: PLC0415  # needs torch, for the reference

        likely = LineUp(self.cases, self.port.dtype).likely(self.port, self.outcome)
        for mutant in likely[:MUTANTS]:
            same = mutant.distance < 1e-6
            how = "exactly this result" if same else f"a result {mutant.distance:.2g} as far off"
            self.say(f"  {mutant.name}: {mutant.fault} ({how})")
        self.say(f"  {'also: ' if likely else ''}{self.outcome.subject.meaning}")

    def _again(self) -> None:
        args = self.args
        port = f"--cmd {shlex.quote(args.cmd)}" if args.cmd else f"--adapter {args.adapter}"
        self.head("Again")
        seed = f" --seed {args.seed}" if isinstance(self.outcome.subject, Law) else ""
        self.say(f"  python -m conformance explain {self.outcome.subject.id} {port} --dtype {self.port.dtype}{seed}")


def _has_torch() -> bool:
    """Tell whether the reference can run: it needs torch, an optional dependency of the suite."""
    return find_spec("torch") is not None
