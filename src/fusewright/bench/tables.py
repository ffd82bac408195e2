"""The leaderboard on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fusewright.bench.leaderboard import CLASSES, Leaderboard, Row

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 142
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

    table = Table(box=None, pad_edge=False, header_style="bold")
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


def _gain(row: Row) -> str:
    if row.gain is None:
        return ""
    return f"{row.gain.value:+.1f} [{row.gain.low:+.1f}, {row.gain.high:+.1f}]"


SUMMARY: list[Column] = [
    ("mean", lambda row: f"{row.mean.value:.1f}"),
    ("normalised", lambda row: f"{row.normalised.value:.1f}"),
    ("95 %", lambda row: f"[{row.normalised.low:.1f}, {row.normalised.high:.1f}]"),
    ("seeds", lambda row: f"{min(row.seeds):.1f} to {max(row.seeds):.1f}"),
    ("above average", _gain),
]
