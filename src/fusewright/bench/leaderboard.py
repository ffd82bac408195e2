"""What was measured: one row for each model or merge, in the order in which it may be ranked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusewright.bench.statistics import (
    Interval,
    mean_interval,
    normalised,
    normalised_interval,
    paired_normalised_difference,
)

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
PERCENT = 100.0

CLASSES = {
    "reference": "References",
    "expert": "Experts, each alone",
    "none": "Merged without data",
    "labelled": "Merged, scale validated",
}
"""What a row asks for, in the order of the table. Rows are ranked within their class only."""


@dataclass(frozen=True)
class Row:
    """A model or merge. Accuracies are percent of test images, means over seeds.

    ``normalised`` is the mean over tasks of accuracy / that task's expert's accuracy;
    ``gain`` that of this row minus that of the plain average, paired; ``seeds`` the normalised
    accuracy of each seed; ``chosen`` what was chosen for each seed; ``also`` the other rows whose
    every answer was the same; ``seconds`` the median time of one merge.
    """

    key: str
    title: str
    requirement: str
    accuracy: dict[str, Interval]
    mean: Interval
    normalised: Interval
    seeds: tuple[float, ...]
    gain: Interval | None = None
    method: Any = None
    chosen: dict[str, list[float]] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    path: str | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Leaderboard:
    """All rows of a run, and what is needed to repeat it."""

    title: str
    tasks: dict[str, str]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    items: int
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Row:
        for row in self.rows:
            if key == row.key or key in row.also:
                return row
        raise KeyError(key)

    def classes(self) -> dict[str, list[Row]]:
        """The rows of each requirement class, best first (experts and references as they are)."""
        found = {name: [r for r in self.rows if r.requirement == name] for name in CLASSES}
        for name in ("none", "labelled"):
            found[name].sort(key=lambda row: -row.normalised.value)
        return {name: rows for name, rows in found.items() if rows}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the schema's version."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    def save(self, path: Path) -> None:
        """Write leaderboard.json."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def tables(self, width: int) -> list[Table]:
        """For a terminal of so many columns: one table, or accuracies apart from the summary."""
        from fusewright.bench.tables import tables

        return tables(self, width)


def measured(
    key: str,
    title: str,
    requirement: str,
    correct: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    tasks: Sequence[str],
    versus: NDArray[np.bool_] | None = None,
    **facts: Any,
) -> Row:
    """The row of outcomes (seeds, tasks, items), normalised by the experts' outcomes."""
    by_seed = [normalised(c.mean(-1, keepdims=True), r.mean(-1, keepdims=True))
               for c, r in zip(correct, reference, strict=True)]  # fmt: skip
    gain = None if versus is None else paired_normalised_difference(correct, versus, reference)
    return Row(
        key, title, requirement,
        accuracy={t: mean_interval(correct[:, i]).scaled(PERCENT) for i, t in enumerate(tasks)},
        mean=mean_interval(correct).scaled(PERCENT),
        normalised=normalised_interval(correct, reference).scaled(PERCENT),
        seeds=tuple(float(value.item()) * PERCENT for value in by_seed),
        gain=gain.scaled(PERCENT) if gain else None, **facts,
    )  # fmt: skip


def without_repeats(
    rows: Iterable[Row], outcomes: Mapping[str, NDArray[np.bool_]]
) -> tuple[Row, ...]:
    """Rows of one class that agree in every single answer, as one row that names the others."""
    kept: list[Row] = []
    for row in rows:
        twin = next((i for i, k in enumerate(kept) if k.requirement == row.requirement
                     and np.array_equal(outcomes[k.key], outcomes[row.key])), None)  # fmt: skip
        if twin is None:
            kept.append(row)
        else:
            kept[twin] = replace(kept[twin], also=(*kept[twin].also, row.key))
    return tuple(kept)
