"""Tables and numbers on stdout: drawn for a terminal, plain aligned text for a file or a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Table(Protocol):
    """What the engine gives to be printed."""

    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Sequence[Any]]: ...


def print_json(value: Any) -> None:
    """One JSON value; NaN and infinity become null, which JSON has no word for."""
    print(json.dumps(_plain_json(value), indent=2, ensure_ascii=False, default=str))


def print_tables(tables: Iterable[Table]) -> None:
    for number, table in enumerate(tables):
        if number:
            print()
        print_table(table)


def print_table(table: Table) -> None:
    cells = [[cell(value) for value in row] for row in table.rows]
    right = [_is_numeric(row[i] for row in table.rows) for i in range(len(table.columns))]
    if sys.stdout.isatty():
        _draw(table.title, table.columns, cells, right)
    else:
        print("\n".join(aligned(table.title, table.columns, cells, right)))


def aligned(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]
) -> list[str]:
    """Lines of plain text: the title, the heads, the rows; two blanks between columns."""
    rows = [list(columns), *cells] if any(columns) else list(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, right, strict=True)
        )  # fmt: skip
        return "  ".join(padded).rstrip()

    return [title, *map(line, rows)] if title else [*map(line, rows)]


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value)


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 2.11 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as 3.2 s, 4 min 10 s or 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _draw(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(title, style="bold"), title_justify="left",
        box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False,
    )  # fmt: skip
    for name, number in zip(columns, right, strict=True):
        drawn.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def _is_numeric(values: Iterable[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    )


def _plain_json(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item) for item in value]
    return value
