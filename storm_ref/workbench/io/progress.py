"""Progress of long work: reported by whatever does the work, shown as bars on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

__all__ = ["Progress", "plain_console", "shown"]

# Called with the name of the work, how much of it is done, how much there is, and a few words such as the loss.
Progress = Callable[[str, int, int, str], None]


def plain_console(speaks: bool = True) -> Console:
    """A console that prints paths and units as they are, since brackets are not markup here; or one that is silent."""
    return Console(markup=False, highlight=False, quiet=not speaks)


@contextmanager
def shown(console: Console, remaining: bool = False, lines: bool = False) -> Iterator[Progress]:
    """Show a bar for each kind of work on a terminal; elsewhere nothing, or with `lines` a line when a kind is done.

    remaining: show a percentage and the time left in place of counts and the time taken.
    """
    text = bars.TextColumn("{task.description}")
    note_column = bars.TextColumn("{task.fields[note]}")
    counts = (bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    left = (bars.TaskProgressColumn(), bars.TimeRemainingColumn(True, True))
    columns = (text, bars.BarColumn(), *(left if remaining else counts), note_column)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def advance(label: str, done: int, total: int, note: str) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total, note=note)
            bar.update(tasks[label], completed=done, note=note)
            if lines and done == total and not console.is_terminal:
                console.print(f"{label}: done {note}".rstrip())

        yield advance
