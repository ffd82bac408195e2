"""What a sweep found, on a terminal: means over seeds and subsets; intervals are the report's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fusewright.bench.results import CLEAN, REQUIREMENTS, Cell, Results
from fusewright.engine.tables import Table
from fusewright.tasks.units import Unit, unit_of


def tables(results: Results) -> list[Table]:
    """One table for each class of requirements (and, of several variants, each setting of their
    axes), rows from the best mean to the worst; in the order of the run, without means, where the
    merged tasks are measured in different units."""
    whole = [c for c in results.cells if set(c.experts) == set(results.merged)]
    settings: dict[str, list[Cell]] = {}
    for cell in whole:
        said = ", ".join(f"{name} {value}" for name, value in sorted(cell.axes.items()))
        settings.setdefault(said, []).append(cell)
    several = len(settings) > 1
    return [table for said, cells in settings.items()
            for table in _classes(results, cells, f"{said or 'plain'}: " if several else "")]


def _classes(results: Results, whole: Sequence[Cell], of: str) -> list[Table]:
    found = []
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
        found.append(Table(of + title, columns, tuple(rows)))
    return found


def _row(results: Results, row: str, cells: Sequence[Cell]) -> tuple[object, ...]:
    scores = {task: _mean(cells, task) for task in results.tasks}
    merged = [score for task in results.merged if (score := scores[task]) is not None]
    notes = {cell.note for cell in cells if cell.note}
    note = notes.pop() if len(notes) == 1 else ""
    values = (None if score is None else _shown(cells, task, score)
              for task, score in scores.items())  # fmt: skip
    unit = _unit(results, cells)
    mean = None if unit is None else round(unit.shown(fmean(merged)), 1)
    return (row, mean, *values, note)


def _shown(cells: Sequence[Cell], task: str, score: float) -> float:
    metric = next(c.outcomes[task][CLEAN].metric for c in cells if task in c.outcomes)
    return round(unit_of(metric).shown(score), 1)


def _unit(results: Results, cells: Sequence[Cell]) -> Unit | None:
    """What all merged tasks are measured in, if that is one unit."""
    found = {unit_of(c.outcomes[task][CLEAN].metric) for c in cells for task in results.merged
             if task in c.outcomes}  # fmt: skip
    return found.pop() if len(found) == 1 else None


def _mean(cells: Sequence[Cell], task: str) -> float | None:
    """Of scores, as in the report: what is shown of their mean is no mean of what is shown."""
    found = [c.outcomes[task][CLEAN].value for c in cells if task in c.outcomes]
    return fmean(found) if found else None
