"""Numbers from the literature, to stand beside ours: cited, never mixed in, never ranked.

Each file of ``published/`` is one table of one source about one family of models. A row has the
name that a sweep gives it, so that ``--against published`` finds its neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fusewright.errors import RecipeError, nearest

_FOLDER = Path(__file__).with_name("published")
PUBLISHED = "published"
_DEFAULT = "clip-vit-b32-fusionbench"


@dataclass(frozen=True)
class Published:
    """One table: percent by row, task by task or as a mean; ``same`` if it is about the suite."""

    name: str
    title: str
    source: str
    models: str
    tasks: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...] | float]
    suites: tuple[str, ...]
    notes: str = ""
    same: bool = True

    def of(self, row: str) -> float | None:
        """The published mean for one of our rows, tuned or not; None if there is none."""
        found = self._find(row)
        return None if found is None else _mean(found)

    def normalised(self, row: str) -> float | None:
        """Percent of the individual models: the mean over tasks of ratios where tasks are
        published, else the ratio of means."""
        found, own = self._find(row), self.rows["own expert"]
        if found is None:
            return None
        if isinstance(found, tuple) and isinstance(own, tuple):
            return 100 * _mean(tuple(a / b for a, b in zip(found, own, strict=True)))
        return 100 * _mean(found) / _mean(own)

    def _find(self, row: str) -> tuple[float, ...] | float | None:
        return self.rows.get(row, self.rows.get(row.removesuffix(", tuned")))


@cache
def tables() -> tuple[str, ...]:
    """The names of all tables."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def published(against: str, suite: str) -> Published:
    """The table of a name; for "published" the one about the suite, else the most cited one.

    Raises RecipeError if there is no such table.
    """
    if against != PUBLISHED and against not in tables():
        close = nearest(against, tables())
        raise RecipeError(f"no published table is called {against!r}",
                          expected=", ".join((PUBLISHED, *tables())),
                          fix=f"--against {close or PUBLISHED}")  # fmt: skip
    names = [name for name in tables() if suite in _read(name).suites]
    preferred = sorted(names, key=lambda name: not name.endswith("fusionbench"))
    chosen = against if against != PUBLISHED else next(iter(preferred), _DEFAULT)
    return _read(chosen, suite)


def _read(name: str, suite: str | None = None) -> Published:
    import yaml

    read: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))
    rows = {row: tuple(found) if isinstance(found, list) else float(found)
            for row, found in read["rows"].items()}  # fmt: skip
    return Published(
        name, read["title"], read["source"], read["models"], tuple(read["tasks"]), rows,
        tuple(read["suites"]), read.get("notes", ""), same=suite in read["suites"],
    )  # fmt: skip


def _mean(found: tuple[float, ...] | float) -> float:
    return sum(found) / len(found) if isinstance(found, tuple) else found
