"""How far long work is: told by whatever does it, shown on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

__all__ = ["Progress", "plain_console", "shown"]

# What is being done, how much of it is done, how much there is, and a few words such as the loss.
Progress = Callable[[str, int, int, str], None]


def plain_console() -> Console:
    """Paths and units are printed as they are: brackets are no markup."""
    return Console(markup=False, highlight=False)


@contextmanager
def shown(console: Console, remaining: bool = False, lines: bool = False) -> Iterator[Progress]:
    """A bar for each kind of work, on a terminal; elsewhere silence, or with `lines` one line when a kind is done.

    remaining: the time left, and a percentage, in place of the time taken and of how many there are.
    """
    text, note = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[note]}")
    counts = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    left = (bars.TaskProgressColumn(), bars.TimeRemainingColumn(True, True))
    columns = (text, bars.BarColumn(), *(left if remaining else counts), note)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        known: dict[str, bars.TaskID] = {}

        def advance(label: str, done: int, total: int, note: str) -> None:
            if label not in known:
                known[label] = bar.add_task(label, total=total, note=note)
            bar.update(known[label], completed=done, note=note)
            if lines and done == total and not console.is_terminal:
                console.print(f"{label}: done {note}".rstrip())

        yield advance
