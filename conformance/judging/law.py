"""Laws: relations that hold for any input, checked live on the port with inputs that Hypothesis draws.

A law needs no expected values, only the port itself: two ways to the same result, a sum that must be one, a part of the
result that must not notice a change. Laws draw everything they send; no call takes an earlier call's output as its
input, so that the calls of a law can be exported, run elsewhere and checked (`conformance.ports.folder`).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from conformance.adapter import Array, PortFault
from conformance.judging.inputs import draw
from conformance.ports.checked import Fault, Missing, Port
from conformance.protocol.operations import OPERATIONS, PROFILES

__all__ = ["Broken", "Draw", "Law", "arrays", "check_close", "check_equal", "check_law"]

T = TypeVar("T")


class Draw(Protocol):
    """A function that takes a value from a strategy; the label names it in reports."""

    def __call__(self, strategy: st.SearchStrategy[T], label: str) -> T: ...


class Broken(Exception):
    """The law does not hold; the message says what differs from what, and by how much."""


@dataclass(frozen=True)
class Law:
    """A law of the suite. Raises ValueError for an operation or profile that the suite does not have."""

    id: str  # chapter/law-name
    requirements: tuple[str, ...]
    profiles: tuple[str, ...]
    ops: tuple[str, ...]  # operations it calls: a port without one of them does not support the law
    meaning: str  # one line: what a failure says about the port
    check: Callable[[Port, Draw], None]
    targets: tuple[str, ...] = ()
    examples: int = 12
    dtype: str | None = None  # the dtype it is always run in; None: that of the run

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]+/law-[a-z0-9-]+", self.id):
            raise ValueError(f"a law's id is chapter/law-name in lower case, got {self.id!r}")
        strange = {*self.ops} - {*OPERATIONS} | {*self.profiles} - {*PROFILES}
        if strange or not (self.ops and self.profiles and self.requirements):
            raise ValueError(f"{self.id}: operations, profiles and requirements are needed and known, got {strange}")

    @property
    def chapter(self) -> str:
        """The chapter the law belongs to, the first part of its id."""
        return self.id.split("/")[0]

    @property
    def op(self) -> str:
        """The operation that the law is about: the first it names."""
        return self.ops[0]

    @property
    def public(self) -> bool:
        """True when the law counts for a profile: it calls public operations alone."""
        return all(OPERATIONS[op].public for op in self.ops)


def arrays(*shape: int, scale: float = 1.0) -> st.SearchStrategy[Array]:
    """Standard normal arrays times `scale`, rounded to bfloat16 so that they serve every dtype."""
    return st.integers(0, 2**32 - 1).map(lambda seed: draw(np.random.default_rng(seed), *shape, scale=scale))


def check_equal(got: Array, want: Array, what: str) -> None:
    """Check that two arrays are equal bit for bit but for the sign of zero. Raises Broken."""
    if got.shape != want.shape:
        raise Broken(f"{what}: shapes {list(got.shape)} and {list(want.shape)}")
    if not np.array_equal(got, want):
        bad = np.argwhere(got != want)
        at = tuple(bad[0])
        first = f"first at {bad[0].tolist()}: {got[at]} and {want[at]}"
        raise Broken(f"{what}: {len(bad)} of {got.size} values differ, {first}")


def check_close(got: Array, want: Array, limit: float, what: str) -> None:
    """Within `limit`, an absolute error that the law derives. Raises Broken."""
    if got.shape != want.shape:
        raise Broken(f"{what}: shapes {list(got.shape)} and {list(want.shape)}")
    error = np.abs(got - want)
    if error.size and not float(error.max()) <= limit:
        at = np.unravel_index(int(np.argmax(error)), error.shape)
        raise Broken(f"{what}: differ by {error[at]:.3g} at {[int(i) for i in at]}, limit {limit:.3g}")


class _Stop(BaseException):
    """Ends Hypothesis, which looks for simpler examples after an Exception: a time limit each if a port hangs."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@contextmanager
def _same_draws() -> Iterator[None]:
    """Make examples depend on the seed alone: Hypothesis also draws constants of whatever modules are in memory."""
    name = "_get_local_constants"
    local_constants = getattr(providers, name, None)
    cache = getattr(providers, "CONSTANTS_CACHE", None)
    if local_constants is None or cache is None:  # a version without this habit
        yield
        return
    empty = type(local_constants())()
    cache.cache.clear()
    setattr(providers, name, lambda: empty)
    try:
        yield
    finally:
        setattr(providers, name, local_constants)
        cache.cache.clear()


def check_law(law: Law, port: Port, seed: int, shrink: bool = True) -> list[str]:
    """Check a law on `law.examples` drawn examples. Returns the draws of the last example in words.

    Raises Broken and the exceptions of Port; their `__notes__` have the draws of the (shrunk) example that broke it.
    """
    drawn: list[str] = []

    def body(data: st.DataObject) -> None:
        drawn.clear()

        def take(strategy: st.SearchStrategy[Any], label: str) -> Any:
            value = data.draw(strategy)
            drawn.append(f"{label} = {_short(value)}")
            return value

        try:
            law.check(port, take)
        except (Missing, Fault) as error:
            if isinstance(error, Missing) or isinstance(error.__cause__, PortFault):
                raise _Stop(error) from None
            raise

    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    settings = hypothesis.settings(
        max_examples=law.examples,
        deadline=None,
        database=None,
        phases=phases,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    test = settings(hypothesis.seed(seed)(hypothesis.given(st.data())(body)))
    try:
        with _same_draws():
            test()
    except _Stop as stop:
        stop.cause.__notes__ = list(drawn)
        raise stop.cause from None
    except hypothesis.errors.Flaky as error:
        raise Broken("the port answers the same calls differently: a failure did not come back") from error
    except Exception as error:
        error.__notes__ = list(drawn)
        raise
    return drawn


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
