"""Tables and numbers on stdout: drawn for a terminal, plain aligned text for a file or a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fusewright.plain import finite

if TYPE_CHECKING:
    from fusewright.engine.tables import Table


def print_json(value: Any) -> None:
    """One JSON value; NaN and infinity become null, which JSON has no word for."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str))


def print_tables(tables: Iterable[Table]) -> None:
    """Tables with an empty line between them; those without rows are left out."""
    for number, table in enumerate(table for table in tables if table.rows):
        if number:
            print()
        if sys.stdout.isatty():
            _draw(table)
        else:
            print(table.text())


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 2.11 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
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


def _draw(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    from fusewright.engine.tables import cell

    drawn = Drawn(
        title=Text(table.title, style="bold"), title_justify="left",
        box=box.SIMPLE_HEAD, show_header=any(table.columns), pad_edge=False,
    )  # fmt: skip
    for number, name in enumerate(table.columns):
        numeric = _is_numeric([row[number] for row in table.rows])
        drawn.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell(value)) for value in row))
    Console().print(drawn)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)
