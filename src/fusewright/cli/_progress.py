"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere; always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from fusewright.cli._print import duration, size

if TYPE_CHECKING:
    from fusewright.engine.progress import Listener, Progress

EVERY = 10.0  # seconds between lines where there is no terminal


@contextmanager
def shown(quiet: bool) -> Iterator[Listener | None]:
    """A function that shows each progress report, or None if nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield Lines().report


class Lines:
    """A line of text every :data:`EVERY` seconds. The rate counts from the first report: what an
    earlier run had done does not make this one look faster."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.first: tuple[float, int] | None = None
        self.last = clock()

    def report(self, now: Progress) -> None:
        time = self.clock()
        began, skipped = self.first = self.first or (time, now.done_bytes)
        if time - self.last >= EVERY:
            self.last = time
            rate = (now.done_bytes - skipped) / max(time - began, 1e-9)
            print(line(now, rate), file=sys.stderr, flush=True)


def line(now: Progress, rate: float) -> str:
    """How far, how fast (bytes a second), how long yet."""
    left = f"{duration((now.total_bytes - now.done_bytes) / rate)} left" if rate > 0 else "starting"
    again = "resumed, " if now.resumed else ""
    done, total = size(now.done_bytes), size(now.total_bytes)
    return f"{now.phase}: {again}{done} of {total}, {size(rate)}/s, {left}"


@contextmanager
def _bar() -> Iterator[Listener]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
        progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def report(now: Progress) -> None:
            if bar.tasks[0].total is None:  # the clock starts with the first report
                bar.reset(task, total=now.total_bytes, completed=now.done_bytes)
            label = f"{now.phase} (resumed)" if now.resumed else now.phase
            bar.update(task, description=label, completed=now.done_bytes)

        yield report
