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


class Pace:
    """How fast a phase goes, from its first report: what an earlier run had done does not make
    this one look faster, nor a fit the merge that follows it."""

    def __init__(self) -> None:
        self._unit = ""
        self._first = 0.0, 0
        self._last = 0

    def rate(self, now: Progress, time: float) -> float:
        """Units a second, at a ``time`` in seconds."""
        if now.unit != self._unit or now.done < self._last:
            self._unit, self._first = now.unit, (time, now.done)
        self._last = now.done
        began, skipped = self._first
        return (now.done - skipped) / max(time - began, 1e-9)


class Lines:
    """A line of text every :data:`EVERY` seconds."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock, self.pace = clock, Pace()
        self.last = clock()

    def report(self, now: Progress) -> None:
        time = self.clock()
        rate = self.pace.rate(now, time)
        if time - self.last >= EVERY:
            self.last = time
            print(line(now, rate), file=sys.stderr, flush=True)


def line(now: Progress, rate: float) -> str:
    """How far, how fast, how long yet."""
    left = f"{duration((now.total - now.done) / rate)} left" if rate > 0 else "starting"
    again = "resumed, " if now.resumed else ""
    return f"{now.phase}: {again}{amounts(now, rate)}, {left}"


def amounts(now: Progress, rate: float) -> str:
    """How far and how fast: bytes a second, or a fit's steps and its loss."""
    if now.unit == "steps":
        return f"{now.done} of {now.total} steps, loss {now.loss:.4g}"
    return f"{size(now.done)} of {size(now.total)}, {size(rate)}/s"


@contextmanager
def _bar() -> Iterator[Listener]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
        progress.TextColumn("{task.fields[amounts]}", markup=False),
        progress.TimeRemainingColumn(),
    )
    pace, unit = Pace(), ""
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None, amounts="")

        def report(now: Progress) -> None:
            nonlocal unit
            if now.unit != unit or now.done < bar.tasks[0].completed:  # the clock starts anew
                unit = now.unit
                bar.reset(task, total=now.total, completed=now.done)
            label = f"{now.phase} (resumed)" if now.resumed else now.phase
            told = amounts(now, pace.rate(now, monotonic()))
            bar.update(task, description=label, completed=now.done, amounts=told)

        yield report
