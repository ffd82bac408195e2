"""How far a long run is: bars on a terminal, a line at the end of each part elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str], None]
"""Called once for each thing that is done, with its name."""


class Stages:
    """Parts of a run, each of a known number of steps; always on stderr."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Step]:
        """One part; yields what is to be called after each of its ``total`` steps."""
        if not self.shown or not total:
            yield lambda name: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[name]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, name="")
            yield lambda name: bar.update(task, advance=1, name=name)
            bar.update(task, name="")
