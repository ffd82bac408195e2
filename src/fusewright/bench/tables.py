"""The leaderboard on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusewright.bench.leaderboard import CLASSES, Leaderboard, Row
from fusewright.bench.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 140
"""Columns from which accuracies and summary fit beside each other."""

Column = tuple[str, Callable[[Row], str]]


def tables(board: Leaderboard, width: int) -> list[Table]:
    """One table, or two where the terminal is narrow."""
    accuracies: list[Column] = [(task, _accuracy(task)) for task in board.tasks]
    parts = [accuracies + SUMMARY] if width >= WIDE else [accuracies, SUMMARY]
    return [_table(board, columns) for columns in parts]


def _table(board: Leaderboard, columns: list[Column]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for requirement, rows in board.classes().items():
        table.add_row(Text(CLASSES[requirement], style="cyan"))
        for row in rows:
            table.add_row(" " + row.key, *(Text(cell(row)) for _, cell in columns))
    return table


def _accuracy(task: str) -> Callable[[Row], str]:
    return lambda row: f"{row.accuracy[task].value:.1f}"


def _bounded(number: Interval, sign: str = "") -> str:
    value, low, high = (f"{x:{sign}.1f}" for x in (number.value, number.low, number.high))
    if low == high:
        return value
    return f"{value} [{low}, {high}]"


SUMMARY: list[Column] = [
    ("mean", lambda row: f"{row.mean.value:.1f}"),
    ("normalised, 95 %", lambda row: _bounded(row.normalised)),
    ("seeds", lambda row: f"{min(row.seeds):.1f}-{max(row.seeds):.1f}"),
    ("above average", lambda row: _bounded(row.gain, "+") if row.gain else ""),
]
