"""What a sweep measured: cells, each one model (or merge) of one pool on every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusewright.tasks.outcomes import Outcomes

CLEAN = "clean"
MIXED = "mixed stream"
"""The condition of rows that were asked one by one, all merged tasks mixed."""

REQUIREMENTS = {
    "reference": "References",
    "expert": "Experts, each alone",
    "none": "Merged without data",
    "unlabelled": "Merged with unlabelled data",
    "labelled": "Merged, tuned or trained with labels",
    "task id": "Told the task of every input",
    "routed": "Routed by the input",
    "transductive": "Adapted on the test inputs themselves; not ranked",
}
"""What a cell asks for, in the order of tables; cells are ranked only inside one of these."""
UNRANKED = ("reference", "expert", "transductive")
"""Classes that nothing is ranked in."""


@dataclass(frozen=True)
class Cell:
    """One model on all tasks.

    ``row`` is the same for every seed and subset ("ties", "ties, tuned", "base", "expert mnist",
    "own expert", "ensemble, simple", "joint training, sum"). ``pool`` says which models were used:
    ``seed`` of the pool's training, ``experts`` merged, ``axes`` such as {"size": "small",
    "tuning": "lora"}. ``method`` is as in recipes, with the parameters used. ``costs`` hold
    "seconds" to merge (or train), "peak_memory" and "bytes_read" in bytes, "extra_parameters";
    "trained" numbers, those "stored" and those that one input's answer depends on ("active"), and
    the "bytes" of what is stored; "slowdown" of inference (1 = none); what was not measured is
    absent. ``outcomes`` are by task, then by condition ("clean", "mixed stream", or a corruption's
    name).
    """

    row: str
    title: str
    requirement: str
    suite: str
    seed: int
    experts: tuple[str, ...]
    outcomes: Mapping[str, Mapping[str, Outcomes]]
    axes: Mapping[str, str] = field(default_factory=dict)
    method: Any = None
    costs: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Results:
    """All cells of a sweep, and what is needed to repeat it.

    ``tasks`` maps each task to its question; ``merged`` and ``unseen`` say which are which.
    ``facts`` hold the command, versions, machine, suite file's digest, date.
    """

    suite: str
    title: str
    tasks: Mapping[str, str]
    merged: tuple[str, ...]
    unseen: tuple[str, ...]
    cells: tuple[Cell, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def rows(self) -> dict[str, list[Cell]]:
        """Cells by row, in the order in which rows first appear."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.row, []).append(cell)
        return found

    def of(self, row: str) -> Iterator[Cell]:
        """The cells of one row: one for each seed and subset."""
        return (cell for cell in self.cells if cell.row == row)

    def to_html(self, path: str | Path, against: str | None = None) -> Path:
        """Write the report's page; ``against`` adds a cited column ("published", or a table's
        name). Needs the extra ``bench``."""
        from fusewright.bench.report import to_html

        return to_html(self, path, against)
