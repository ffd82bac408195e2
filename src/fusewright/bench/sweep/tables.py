"""What a sweep found, on a terminal: means over seeds and subsets; intervals are the report's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fusewright.bench.results import CLEAN, REQUIREMENTS, Cell, Results
from fusewright.engine.tables import Table
from fusewright.tasks.units import Unit, unit_of


def tables(results: Results) -> list[Table]:
    """One table for each class of requirements, rows from the best mean to the worst; in the order
    of the run, without means, where the merged tasks are measured in different units."""
    found = []
    whole = [c for c in results.cells if set(c.experts) == set(results.merged)]
    for requirement, title in REQUIREMENTS.items():
        by_row: dict[str, list[Cell]] = {}
        for cell in whole:
            if cell.requirement == requirement:
                by_row.setdefault(cell.row, []).append(cell)
        rows = [_row(results, row, cells) for row, cells in by_row.items()]
        unit = _unit(results, whole)
        if requirement != "reference" and unit is not None:
            rows.sort(key=lambda row: float(str(row[1])), reverse=unit.bounded)
        columns = ("", "mean", *results.tasks, "note")
        found.append(Table(title, columns, tuple(rows)))
    return found


def _row(results: Results, row: str, cells: Sequence[Cell]) -> tuple[object, ...]:
    shown = {task: _mean(cells, task) for task in results.tasks}
    merged = [value for task in results.merged if (value := shown[task]) is not None]
    notes = {cell.note for cell in cells if cell.note}
    note = notes.pop() if len(notes) == 1 else ""
    values = (None if v is None else round(v, 1) for v in shown.values())
    mean = None if _unit(results, cells) is None else round(fmean(merged), 1)
    return (row, mean, *values, note)


def _unit(results: Results, cells: Sequence[Cell]) -> Unit | None:
    """What all merged tasks are measured in, if that is one unit."""
    found = {unit_of(c.outcomes[task][CLEAN].metric) for c in cells for task in results.merged
             if task in c.outcomes}  # fmt: skip
    return found.pop() if len(found) == 1 else None


def _mean(cells: Sequence[Cell], task: str) -> float | None:
    found = [c.outcomes[task][CLEAN].shown for c in cells if task in c.outcomes]
    return fmean(found) if found else None
