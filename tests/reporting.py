"""Made-up results for the tests of the reports: every verdict, blocked failures, and strings that mean harm."""

from typing import Any

import numpy as np

from conformance.adapter import Info
from conformance.judging.case import Case
from conformance.judging.law import Law
from conformance.judging.result import result
from conformance.judging.runner import Outcome, Run, mark_blocked, profile_result
from conformance.judging.tolerance import Bound, Exact, Measured, MustReject, Tolerance, Ulp
from conformance.protocol.operations import OPERATIONS

HOSTILE = (
    "\"'><script>document.title='owned'</script><img src=http://evil.example/i onerror=alert(1)> ]]> --> &amp; "
    "&#60;b&#62; "
    "`code` | pipe \\| [link](http://evil.example) ![i](http://evil.example) **bold** @everyone \x00\x07\x1b[31m\r\n"
    "\u202e\ud800\uffff\u2028 {{7*7}} $(id) [bold]markup[/bold]"
)


def case(name: str, op: str, requirements: tuple[str, ...] = ("TILE-4",), tolerance: Tolerance | None = None) -> Case:
    """A case of no consequence."""
    judged = tolerance or Bound(8, "eight roundings")
    return Case(
        id=name,
        op=op,
        requirements=requirements,
        profiles=("smoke", "tiling"),
        tolerance=judged,
        meaning="weights taper",
        inputs={},
        params={},
        expected={"y": np.zeros(1)},
        valid_counterpart=({}, {}) if isinstance(judged, MustReject) else None,
    )


def law(name: str, op: str, requirements: tuple[str, ...]) -> Law:
    """A law that nobody checks."""
    return Law(name, requirements, ("tiling",), (op,), "the sum is not one", lambda port, draw: None)


def off(error: float, limit: float = 1e-14) -> Measured:
    """A measured error of some output."""
    return Measured(error, limit, "absolute", (1, 3))


def run_of(outcomes: list[Outcome], name: str = "a port", expected: int | None = None) -> dict[str, Any]:
    """The result.json of these outcomes, made as `run_suite` makes it."""
    marked = mark_blocked(outcomes)
    profiles = {profile: profile_result(profile, marked, expected) for profile in ("smoke", "tiling")}
    return result(Run(Info(name, "1.0", frozenset(OPERATIONS)), "float64", 0, profiles, marked))


def passing() -> list[Outcome]:
    """A case of every kind and a law, all passed."""
    return [
        Outcome(
            case("tiling/geometry", "tile_geometry", ("TILE-2",), Exact("indices")),
            "pass", "", "float64", off(0, 0), "y",
        ),
        Outcome(case("tiling/weights", "tile_weights", tolerance=Ulp(4, "two")), "pass", "", "float64", off(1, 4), "y"),
        Outcome(case("tiling/blend", "tiled_denoise", ("TILE-6",)), "pass", "", "float64", off(1e-15), "y"),
        Outcome(
            case("tiling/refuses-halo", "tiled_denoise", ("TILE-3",), MustReject("a halo onto itself")),
            "pass", "refused: halo", "float64",
        ),
        Outcome(law("tiling/law-sum", "tiled_denoise", ("TILE-5",)), "pass", "held on 12 examples", "float64"),
    ]  # fmt: skip


def failing(text: str = HOSTILE) -> list[Outcome]:
    """The same and failures: internal and public, blocked and not, an error, no number, no operation; `text` in all."""
    weights = case("tiling/weights-closed", "tile_weights", ("TILE-4", "TILE-5"))
    hard = case("tiling/weights-hard", "tile_weights", tolerance=Exact("ones"))
    return [
        *passing(),
        Outcome(weights, "fail", f"weight is off {text}", "float64", off(3e-9), "y", 0.25),
        Outcome(hard, "fail", text, "float64", off(3, 0), "y"),
        Outcome(case("tiling/seam", "tiled_denoise", ("TILE-6",)), "fail", text, "float64", off(float("inf")), "y"),
        Outcome(case("tiling/crash", "denoise_tiled", ("TILE-7",)), "error", f"the port raised {text}", "float64"),
        Outcome(case("cost/tiles", "multiply_adds", ("TILE-10",)), "unsupported", text, "float64"),
        Outcome(case("tiling/lacking", "tile_geometry", ("TILE-1",)), "unsupported", text, "float64"),
        Outcome(law("tiling/law-linear", "tiled_denoise", ("TILE-6",)), "fail", f"differ; with x = {text}", "float64"),
    ]


def hostile() -> dict[str, Any]:
    """A failing run of a port whose every string means harm, with a result.json that somebody has touched as well."""
    data = run_of(failing(), HOSTILE)
    data["adapter"]["version"] = HOSTILE
    data["adapter"]["ops"].append(HOSTILE)
    data["profiles"][HOSTILE] = {"expected": 0, "passed": 0, "failed": 0, "unsupported": 0, "conforms": False}
    data["port"] = ["--cmd", HOSTILE]
    entry = dict(data["cases"][5], id=f"{HOSTILE}/x", op=HOSTILE, meaning=HOSTILE, tolerance=HOSTILE, dtype=HOSTILE)
    entry["class"], entry["requirements"], entry["blocked_by"] = HOSTILE, [HOSTILE], None
    entry["measured"] = entry["measured"] | {"unit": HOSTILE}
    data["cases"].append(entry)
    return data
