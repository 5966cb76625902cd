"""A mutant: a wrong port that is the reference with one deliberate fault, put in for the duration of a call.

A fault is a list of patches: where (a module or a class), a name there, and what stands in its place. Most are edits, a
piece of the function's source and the wrong piece, so that the fault can be read and shown as what an author would have
written. A patch acts wherever the object is bound: a function that other modules import by name is replaced there too.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import CodeType, FrameType, ModuleType
from typing import Any

from conformance.adapter import Array, Info
from conformance.adapters import reference_operations as adapter
from conformance.adapters import reference_ranks as parallel
from conformance.adapters.reference import OPERATIONS, Reference

__all__ = ["Edit", "Mutant", "MutantPort", "Patch", "Place", "Traced", "chapter", "codes", "edit", "in_ranks", "place"]


@dataclass(frozen=True)
class Edit:
    """Pieces of a function's source, each there once, and what stands instead: right, wrong, right, wrong."""

    pieces: tuple[str, ...]

    def apply(self, owner: ModuleType | type, name: str) -> Any:
        """The function with its pieces exchanged. Raises ValueError when a piece is not there exactly once."""
        found = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(found))
        for right, wrong in zip(self.pieces[::2], self.pieces[1::2], strict=True):
            if source.count(right) != 1:
                raise ValueError(f"{owner.__name__}.{name} has {right!r} {source.count(right)} times, wanted once")
            source = source.replace(right, wrong)
        local: dict[str, Any] = {}
        module = sys.modules[inspect.unwrap(found).__module__]
        exec(compile(source, f"<{name} of a mutant>", "exec"), vars(module), local)
        return local[name]


def edit(*pieces: str) -> Edit:
    """An edit: right, wrong, right, wrong, ..."""
    return Edit(pieces)


Place = tuple[str, int, str]  # of a piece of code: file, line, name
Patch = tuple[ModuleType | type, str, Any]  # where, the name, an Edit or what stands there instead


@dataclass(frozen=True)
class Mutant:
    """One wrong port."""

    name: str  # snake_case, unique, for ever
    fault: str  # what is wrong, as one would tell the author
    chapter: str
    requirements: tuple[str, ...]  # those it breaks
    patches: tuple[Patch, ...]
    equivalent: str = ""  # why no test can tell it from the reference, for one that none can


def _bindings(owner: ModuleType | type, name: str) -> list[tuple[Any, str]]:
    """Every namespace and name that the object is bound to: classes as they are, modules by their dictionaries."""
    if isinstance(owner, type):
        return [(owner, name)]
    original = vars(owner)[name]
    modules = [m for key, m in list(sys.modules.items()) if key.startswith("storm_ref.") or m in (adapter, owner)]
    spaces = [vars(module) for module in modules if module is not None] + [OPERATIONS]
    return [(space, key) for space in spaces for key, value in list(space.items()) if value is original]


def _put(space: Any, name: str, value: Any) -> None:
    if isinstance(space, type):
        setattr(space, name, value)
    else:
        space[name] = value


class MutantPort:
    """The reference under a mutant's name, with its patches in place while an operation runs."""

    def __init__(self, name: str, patches: Sequence[Patch]) -> None:
        self.name = name
        self._places: list[tuple[Any, str, Any, Any]] = []  # namespace, name, right, wrong
        for owner, attribute, wrong in patches:
            new = wrong.apply(owner, attribute) if isinstance(wrong, Edit) else wrong
            for space, key in _bindings(owner, attribute):
                right = vars(space)[key] if isinstance(space, type) else space[key]
                self._places.append((space, key, right, new))

    def describe(self) -> Info:
        """The reference's claims under the fault's name."""
        return replace(Reference().describe(), name=self.name)

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array]:
        """One operation with the fault in place, in the ranks of a mesh too: they are forked from here."""
        with self._installed(), parallel.inherited(self) if self._places else nullcontext():
            return Reference().run(op, inputs, params, probes)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        try:
            for space, key, _, wrong in self._places:
                _put(space, key, wrong)
            yield
        finally:
            for space, key, right, _ in self._places:
                _put(space, key, right)


class Traced(Reference):
    """The reference, which notes what code runs."""

    def __init__(self) -> None:
        self.seen: set[CodeType] = set()

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes_asked: Sequence[str]
    ) -> Mapping[str, Array]:
        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                self.seen.add(frame.f_code)

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            return super().run(op, inputs, params, probes_asked)
        finally:
            sys.setprofile(before)


def place(code: CodeType) -> Place:
    """Where a piece of code stands: the same for a function and its checked double."""
    return code.co_filename, code.co_firstlineno, code.co_qualname


def codes(patches: Sequence[Patch]) -> frozenset[CodeType] | None:
    """The code that the patches replace: what never runs it cannot tell the mutant from the reference.

    None where a patch replaces something that is no code, a constant for instance.
    """
    found = set()
    for owner, name, _ in patches:
        right = inspect.unwrap(getattr(owner, name))
        code = getattr(vars(right).get("__init__") if isinstance(right, type) else right, "__code__", None)
        if code is None:
            return None
        found.add(code)
    return frozenset(found)


def in_ranks(patches: Sequence[Patch]) -> bool:
    """Whether what the patches replace runs in ranks, where no trace of this process sees it: every case of chapter 9
    counts as running it, and no other does.
    """
    modules = {owner.__module__ if isinstance(owner, type) else owner.__name__ for owner, _, _ in patches}
    return bool(modules) and all(
        name.startswith("storm_ref.parallel.") or name == parallel.__name__ for name in modules
    )


def chapter(name: str, *rows: tuple[Any, ...]) -> tuple[Mutant, ...]:
    """The mutants of a chapter from rows of name, fault, requirements in one string, and patches."""
    return tuple(
        Mutant(row_name, fault, name, tuple(requirements.split()), patches)
        for row_name, fault, requirements, *rest in rows
        for patches in [tuple(rest)]
    )
