"""A mutant is a wrong port: the reference with one deliberate fault, in place for the duration of a call.

A fault is a list of patches, each with an owner (a module or a class), a name there, and the replacement. Most
replacements are edits, a piece of the function's source and the wrong piece, so that the fault can be read and shown as
an author would have written it. A patch acts wherever the object is bound: a function that other modules import by name
is replaced there too.
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

__all__ = [
    "Edit",
    "Mutant",
    "MutantPort",
    "Patch",
    "Place",
    "Traced",
    "chapter",
    "edit",
    "in_ranks",
    "place",
    "replaced_code",
    "shows_in",
]


@dataclass(frozen=True)
class Edit:
    """Pieces of a function's source, each present once, and their replacements: right, wrong, right, wrong, ..."""

    pieces: tuple[str, ...]

    def apply(self, owner: ModuleType | type, name: str) -> Any:
        """Return the function with its pieces exchanged. Raises ValueError for a piece that is not there just once."""
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        for right, wrong in zip(self.pieces[::2], self.pieces[1::2], strict=True):
            if source.count(right) != 1:
                raise ValueError(f"{owner.__name__}.{name} has {right!r} {source.count(right)} times, wanted once")
            source = source.replace(right, wrong)
        defined: dict[str, Any] = {}
        module = sys.modules[inspect.unwrap(function).__module__]
        exec(compile(source, f"<{name} of a mutant>", "exec"), vars(module), defined)
        return defined[name]


def edit(*pieces: str) -> Edit:
    """Make an edit of its pieces: right, wrong, right, wrong, ..."""
    return Edit(pieces)


Place = tuple[str, int, str]  # where code stands: file, line, qualified name
Patch = tuple[ModuleType | type, str, Any]  # owner, name, and an Edit or the replacement itself


@dataclass(frozen=True)
class Mutant:
    """One wrong port."""

    name: str  # snake_case, unique, never changed
    fault: str  # the mistake, as one would tell the author
    chapter: str
    requirements: tuple[str, ...]  # the requirements that it breaks
    patches: tuple[Patch, ...]
    equivalent: str = ""  # the reason why no test can tell it from the reference, where none can


def _bindings(owner: ModuleType | type, name: str) -> list[tuple[Any, str]]:
    """Return every namespace and name that the object is bound to: classes themselves, modules' dictionaries."""
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
    """The reference under a mutant's name, with the mutant's patches in place while an operation runs."""

    def __init__(self, name: str, patches: Sequence[Patch]) -> None:
        self.name = name
        self._places: list[tuple[Any, str, Any, Any]] = []  # namespace, name, right, wrong
        for owner, attribute, wrong in patches:
            new = wrong.apply(owner, attribute) if isinstance(wrong, Edit) else wrong
            for space, key in _bindings(owner, attribute):
                right = vars(space)[key] if isinstance(space, type) else space[key]
                self._places.append((space, key, right, new))

    def describe(self) -> Info:
        """Return the reference's claims under the mutant's name."""
        return replace(Reference().describe(), name=self.name)

    def run(
        self, op: str, inputs: dict[str, Array], params: dict[str, Any], probes: Sequence[str]
    ) -> Mapping[str, Array]:
        """Run one operation with the fault in place, also in the ranks of a mesh, which are forked from here."""
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
    """The reference, recording the code that runs in `seen`."""

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
    """Return where a piece of code stands, which is the same for a function and its checked double."""
    return code.co_filename, code.co_firstlineno, code.co_qualname


def replaced_code(patches: Sequence[Patch]) -> frozenset[Place] | None:
    """Return where the code stands that the patches replace; None where one replaces something else, say a constant."""
    places = set()
    for owner, name, _ in patches:
        right = inspect.unwrap(getattr(owner, name))
        code = getattr(vars(right).get("__init__") if isinstance(right, type) else right, "__code__", None)
        if code is None:
            return None
        places.add(place(code))
    return frozenset(places)


def in_ranks(patches: Sequence[Patch]) -> bool:
    """Tell whether all that the patches replace runs in ranks, where a trace of this process does not see it."""
    modules = {owner.__module__ if isinstance(owner, type) else owner.__name__ for owner, _, _ in patches}
    return bool(modules) and all(
        name.startswith("storm_ref.parallel.") or name == parallel.__name__ for name in modules
    )


def shows_in(patches: Sequence[Patch], tested: str, reached: frozenset[Place]) -> bool:
    """Tell whether a case or law may tell the patched reference from the reference itself.

    tested: the chapter of the case or law. All of chapter 9 may show patches that act in ranks, and no other chapter
    does. reached: the code that the case or law runs on the reference. One that runs none of the replaced code shows
    nothing.
    """
    if in_ranks(patches):
        return tested == "parallel"
    places = replaced_code(patches)
    return places is None or bool(places & reached)


def chapter(name: str, *rows: tuple[Any, ...]) -> tuple[Mutant, ...]:
    """Make the mutants of a chapter from rows of name, fault, requirements in one string, and patches."""
    return tuple(
        Mutant(row_name, fault, name, tuple(requirements.split()), tuple(patches))
        for row_name, fault, requirements, *patches in rows
    )
