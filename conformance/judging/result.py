"""result.json holds the outcome of a run, and every report is made from it. Its form is schemas/result.schema.json."""

import json
import math
from pathlib import Path
from typing import Any

from conformance import SPEC, VECTORS, WIRE
from conformance.judging.law import Law
from conformance.judging.runner import Outcome, Run, exit_code
from conformance.judging.tolerance import MustReject
from conformance.protocol.operations import LEVEL, OPERATIONS
from conformance.protocol.safe_files import write_atomically

__all__ = ["read_result", "result", "write_result"]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _measured(outcome: Outcome) -> dict[str, Any] | None:
    measured = outcome.measured
    if measured is None:
        return None
    return {
        "output": outcome.output,
        "error": _number(measured.error),
        "limit": _number(measured.limit),
        "unit": measured.unit,
        "where": list(measured.where),
    }


def _entry(outcome: Outcome) -> dict[str, Any]:
    subject = outcome.subject
    entry = {
        "id": subject.id,
        "op": subject.op,
        "level": LEVEL[subject.public],
        "profiles": list(subject.profiles),
        "requirements": list(subject.requirements),
        "dtype": outcome.dtype,
        "verdict": outcome.verdict,
        "detail": outcome.detail,
        "meaning": subject.meaning,
        "blocked_by": outcome.blocked_by,
        "seconds": round(outcome.seconds, 4),
    }
    if isinstance(subject, Law):
        return entry | {"examples": subject.examples}
    tolerance = subject.tolerance
    measured = None if isinstance(tolerance, MustReject) else _measured(outcome)
    return entry | {"class": tolerance.kind, "tolerance": tolerance.why, "measured": measured}


def result(run: Run) -> dict[str, Any]:
    """A run as JSON data, from which every report is made."""
    entries = [(isinstance(o.subject, Law), _entry(o)) for o in run.outcomes]
    info = run.info
    return {
        "spec": SPEC,
        "vectors": VECTORS,
        "wire": WIRE,
        "adapter": {
            "name": info.name,
            "version": info.version,
            "ops": [op for op in OPERATIONS if op in info.ops] + sorted(info.ops - set(OPERATIONS)),
            "dtypes": list(info.dtypes),
            "profiles": list(info.profiles),
        },
        "dtype": run.dtype,
        "seed": run.seed,
        "exit": exit_code(run),
        "profiles": {
            name: {
                "expected": p.expected,
                "passed": p.passed,
                "failed": p.failed,
                "unsupported": p.unsupported,
                "conforms": p.conforms,
            }
            for name, p in run.profiles.items()
        },
        "cases": [entry for is_law, entry in entries if not is_law],
        "laws": [entry for is_law, entry in entries if is_law],
    }


def write_result(path: Path, data: dict[str, Any]) -> None:
    """Replace the file atomically."""
    write_atomically(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.json. Raises ValueError, which says how to make one, when there is none or it is damaged."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; python -m conformance run makes one") from error
    if not {"spec", "adapter", "profiles", "cases", "laws"} <= set(data):
        raise ValueError(f"{path} is not the result of a run; python -m conformance run makes one")
    return data
