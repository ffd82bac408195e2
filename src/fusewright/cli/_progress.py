"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere; always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from fusewright.cli._print import duration, size

EVERY = 10.0  # seconds between lines where there is no terminal


class Progress(Protocol):
    """What the engine reports: bytes done of all, in which phase, at which tensor."""

    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def resumed(self) -> bool: ...


Report = Callable[[Any], None]


@contextmanager
def shown(quiet: bool) -> Iterator[Report | None]:
    """A function that shows each progress report, or None if nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield Lines().report


class Lines:
    """One line of text every :data:`EVERY` seconds. Bytes that an earlier run had done do not
    count in the rate."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.began = self.last = clock()
        self.skipped = 0

    def report(self, now: Progress) -> None:
        if now.resumed:
            self.skipped = now.done_bytes
        time = self.clock()
        if time - self.last >= EVERY:
            self.last = time
            print(self.line(now, time - self.began), file=sys.stderr, flush=True)

    def line(self, now: Progress, seconds: float) -> str:
        rate = (now.done_bytes - self.skipped) / seconds
        left = duration((now.total_bytes - now.done_bytes) / rate) if rate > 0 else "unknown time"
        return (
            f"{now.phase}: {size(now.done_bytes)} of {size(now.total_bytes)}, "
            f"{size(rate)}/s, {left} left"
        )


@contextmanager
def _bar() -> Iterator[Report]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(),
        progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def report(now: Progress) -> None:
            if now.resumed:  # starts the clock anew: an earlier run's bytes have no rate
                bar.reset(task, total=now.total_bytes, completed=now.done_bytes)
            bar.update(
                task, description=now.phase, total=now.total_bytes, completed=now.done_bytes
            )

        yield report
