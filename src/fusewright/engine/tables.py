"""A table of results, for whoever prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A title, column headings, and rows of plain values: str, int, float; None = none applies."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def text(self) -> str:
        """Aligned plain text, a line each row; numbers with four significant digits."""
        body = [tuple(cell(value) for value in row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *body, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                 for row in (self.columns, *body)]  # fmt: skip
        return "\n".join([self.title, *lines])


def cell(value: Any) -> str:
    """A value as a table shows it."""
    """A value as a table shows it: four significant digits, a dash where none applies."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
