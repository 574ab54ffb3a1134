"""A progress bar on stderr; a line a tenth of the way where stderr is not a terminal."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields update(done, note=""): how many of `total` are done, and a short text beside the bar."""
    if sys.stderr.isatty():
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        console = rich.console.Console(stderr=True)
        with rich.progress.Progress(*columns, console=console) as display:
            task = display.add_task(title, total=total, note="")
            yield lambda done, note="": display.update(task, completed=done, note=note)
        return
    start, printed = time.monotonic(), 0

    def update(done, note=""):
        nonlocal printed
        tenth = done * 10 // max(total, 1)
        if tenth > printed:
            printed = tenth
            seconds = time.monotonic() - start
            print(f"{title}: {done}/{total}, {seconds:.0f} s {note}".rstrip(), file=sys.stderr)

    yield update
