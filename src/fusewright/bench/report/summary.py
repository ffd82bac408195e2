"""What a report says of each row: numbers with intervals, ranks, spreads; no layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from fusewright.bench.comparison import (
    OWN,
    Difference,
    Experts,
    Samples,
    adjusted,
    difference,
    metric_of,
    pool,
    references_of,
    seen,
    shares,
)
from fusewright.bench.report.rates import Rates, rates
from fusewright.bench.results import CLEAN, MIXED, REQUIREMENTS, UNRANKED, Cell, Results
from fusewright.bench.statistics import (
    RESAMPLES,
    Array,
    Interval,
    calibration_error,
    effective,
    percentiles,
    with_successes,
)
from fusewright.tasks.units import Unit, unit_of

PERCENT = 100.0
BASELINES = ("average", "base")
"""What every row is compared with: the first of these that was measured."""


@dataclass(frozen=True)
class PoolValue:
    """A row on one pool: seed and experts merged, scores as people read them."""

    seed: int
    experts: tuple[str, ...]
    mean: float | None
    normalised: float | None


@dataclass(frozen=True)
class Line:
    """One row, means over its pools. Scores are as people read them: percent, perplexity, errors.

    ``normalised`` is percent of each task's own expert, the mean over merged tasks; ``worst`` the
    merged task with the least of it; ``unseen`` the mean score over tasks left out of the merge;
    ``stream`` the mean score over merged tasks whose rows came mixed, one by one, and
    ``stream_clean`` that of the same rows in batches of one task; ``corruptions`` mean scores over
    merged tasks; ``calibration`` the expected calibration error
    in points; ``versus`` the paired difference from the baseline. ``rank`` is 1 + the number of
    rows of its class that are told to be better; ``level_with`` are those it is not told apart
    from. ``bounded``: the mean is percent; otherwise smaller is better. ``rates``: by task, percent
    of items truncated and unparsed, where outcomes say it.
    """

    row: str
    title: str
    requirement: str
    tasks: Mapping[str, Interval]
    mean: Interval | None
    normalised: Interval | None
    shares: Mapping[str, float]
    worst: tuple[str, float] | None
    unseen: Interval | None
    corruptions: Mapping[str, Interval]
    calibration: float | None
    pools: tuple[PoolValue, ...]
    costs: Mapping[str, float] = field(default_factory=dict)
    method: Any = None
    note: str = ""
    rank: int | None = None
    level_with: tuple[str, ...] = ()
    versus: Difference | None = None
    bounded: bool = True
    rates: Rates = field(default_factory=dict)
    stream: Interval | None = None
    stream_clean: float | None = None

    @property
    def quality(self) -> float:
        """What rows are ordered by: larger is better."""
        if self.normalised or not self.mean:
            return self.normalised.value if self.normalised else float("-inf")
        return self.mean.value if self.bounded else -self.mean.value


@dataclass(frozen=True)
class Section:
    """The rows that merged all experts, of one setting of the axes."""

    axes: Mapping[str, str]
    lines: tuple[Line, ...]
    baseline: str | None

    def classes(self) -> dict[str, list[Line]]:
        """Lines by requirement class, best first; references and experts as they were run."""
        found = {}
        for name in REQUIREMENTS:
            lines = [line for line in self.lines if line.requirement == name]
            if lines and name not in ("reference", "expert"):
                lines.sort(key=lambda line: (line.rank or 0, -line.quality))
            if lines:
                found[name] = lines
        return found

    def line(self, row: str) -> Line | None:
        return next((line for line in self.lines if line.row == row), None)


@dataclass(frozen=True)
class Subset:
    """A row that merged so many of the experts: one value for each draw and seed."""

    axes: Mapping[str, str]
    row: str
    requirement: str
    merged: int
    pools: tuple[PoolValue, ...]


@dataclass(frozen=True)
class Summary:
    """All that a report says."""

    results: Results
    sections: tuple[Section, ...]
    subsets: tuple[Subset, ...]
    conditions: tuple[str, ...]
    metrics: Mapping[str, str]
    items: Mapping[str, int]
    level: float


def summarise(
    results: Results, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Summary:
    """Every number of a report, from the outcomes of single items.

    Raises FusewrightError if cells of one task answered different items, or fewer than two.
    """
    tools = _Tools(results, Samples(results, resamples=resamples, seed=seed),
                   Experts(results), level)  # fmt: skip
    axes = list(dict.fromkeys(tuple(sorted(cell.axes.items())) for cell in results.cells))
    sections = tuple(section for one in axes if (section := _section(tools, one)).lines)
    conditions = dict.fromkeys(condition for cell in results.cells for task in results.merged
                               for condition in cell.outcomes.get(task, {}))  # fmt: skip
    first = {t: cell.outcomes[t][CLEAN] for cell in results.cells for t in cell.outcomes}
    order = [task for task in results.tasks if task in first]
    return Summary(
        results, sections, tuple(_subsets(tools)),
        tuple(c for c in conditions if c not in (CLEAN, MIXED)),
        {t: first[t].metric for t in order}, {t: len(first[t]) for t in order}, level,
    )  # fmt: skip


@dataclass(frozen=True)
class _Tools:
    results: Results
    samples: Samples
    experts: Experts
    level: float

    def interval(self, samples: Array) -> Interval:
        return percentiles(samples, self.level)


def _section(tools: _Tools, axes: tuple[tuple[str, str], ...]) -> Section:
    rows: dict[str, list[Cell]] = {}
    for cell in tools.results.cells:
        where = pool(cell, tools.results)
        if where[1] == axes and not where[2]:
            rows.setdefault(cell.row, []).append(cell)
    baseline = next((row for row in BASELINES if row in rows), None)
    lines = [_line(tools, cells) for cells in rows.values()]
    return Section(dict(axes), tuple(_ranked(tools, _versus(tools, lines, rows, baseline), rows)),
                   baseline)  # fmt: skip


def _line(tools: _Tools, cells: Sequence[Cell]) -> Line:
    results, first = tools.results, cells[0]
    tasks = [t for t in results.tasks if all(t in cell.outcomes for cell in cells)]
    merged = [task for task in results.merged if task in tasks]
    unseen = [task for task in results.unseen if task in tasks]
    parts = _shares(tools, cells, merged)
    known = {} if parts is None else {t: PERCENT * float(part[0])
                                      for t, part in zip(merged, parts, strict=True)}  # fmt: skip
    return Line(
        first.row, first.title, first.requirement,
        tasks={t: i for t in tasks if (i := _mean(tools, cells, [t])) is not None},
        mean=_mean(tools, cells, merged), shares=known,
        normalised=tools.interval(parts.mean(axis=0)).scaled(PERCENT)
        if parts is not None and np.isfinite(parts).all() else None,
        worst=_worst(tools, cells, merged, known), unseen=_mean(tools, cells, unseen),
        corruptions=_corruptions(tools, cells, merged), calibration=_calibration(cells, merged),
        pools=tuple(_pool_value(tools, cell, merged) for cell in cells),
        costs=_costs(cells), method=_common([cell.method for cell in cells], cells),
        note=_note(cells),
        bounded=(unit := _unit(first, merged)) is None or unit.bounded, rates=rates(cells, tasks),
        **_stream(tools, cells, merged),
    )  # fmt: skip


def _common(said: Sequence[Any], cells: Sequence[Cell]) -> Any:
    """What all cells say; by seed, if they do not say the same (what was tuned on each)."""
    alike = all(one == said[0] for one in said)
    return said[0] if alike else {f"seed {c.seed}": one for c, one in zip(cells, said, strict=True)}


def _note(cells: Sequence[Cell]) -> str:
    found = _common([cell.note for cell in cells], cells)
    return found if isinstance(found, str) else "; ".join(f"{k}: {v}" for k, v in found.items())


def _stream(tools: _Tools, cells: Sequence[Cell], merged: Sequence[str]) -> dict[str, Any]:
    """The score of the mixed stream, and of its rows (the first of each split) when they are asked
    task by task; nothing where it was not measured."""
    if not merged or not all(MIXED in cell.outcomes[task] for cell in cells for task in merged):
        return {}
    unit = _unit(cells[0], merged)
    if unit is None:
        return {}
    pairs = [(cell.outcomes[task][CLEAN], len(cell.outcomes[task][MIXED]))
             for cell in cells for task in merged]  # fmt: skip
    clean = [np.average(o.score[:rows], weights=o.weight[:rows]) for o, rows in pairs]
    return {"stream": _mean(tools, cells, merged, MIXED),
            "stream_clean": unit.shown(float(np.mean(clean)))}  # fmt: skip


def _mean(
    tools: _Tools, cells: Sequence[Cell], tasks: Sequence[str], condition: str = CLEAN
) -> Interval | None:
    """The mean score over tasks and cells as people read it; None where units differ."""
    unit = _unit(cells[0], tasks)
    if unit is None:
        return None
    found = np.stack([np.mean([tools.samples(c, t, condition) for c in cells], 0) for t in tasks])
    if not unit.bounded:  # what is shown is smaller for better scores
        inner = tools.interval(found.mean(axis=0))
        return Interval(*(unit.shown(x) for x in (inner.value, inner.high, inner.low)))
    items = [effective(cells[0].outcomes[task][condition].weight) for task in tasks]
    more = with_successes(found, items, tools.samples.seed)
    return tools.interval(more.mean(axis=0)).scaled(PERCENT)


def _unit(cell: Cell, tasks: Sequence[str]) -> Unit | None:
    """What all these tasks are measured in, if that is one unit."""
    units = {unit_of(metric_of(cell, task)) for task in tasks}
    return units.pop() if len(units) == 1 else None


def _shares(tools: _Tools, cells: Sequence[Cell], tasks: Sequence[str]) -> Array | None:
    """Shares of each task's own expert, the mean over cells: (tasks, 1 + R)."""
    pools = [pool(cell, tools.results) for cell in cells]
    if not tasks or not tools.experts.know(pools, tasks):
        return None
    each = []
    for cell, where in zip(cells, pools, strict=True):
        own = {t: found for t in tasks if (found := tools.experts.of(where, t))}
        each.append(shares(cell, own, tasks, tools.samples))
    return np.mean(each, axis=0)


def _worst(
    tools: _Tools, cells: Sequence[Cell], tasks: Sequence[str], known: Mapping[str, float]
) -> tuple[str, float] | None:
    """The merged task that lost most; by share of its expert, or by score."""
    if not known and len({metric_of(cells[0], task) for task in tasks}) == 1:
        known = {t: PERCENT * float(np.mean([tools.samples(c, t)[0] for c in cells]))
                 for t in tasks if unit_of(metric_of(cells[0], t)).bounded}  # fmt: skip
    finite = [(value, task) for task, value in known.items() if np.isfinite(value)]
    if not finite:
        return None
    value, task = min(finite)
    return task, value


def _corruptions(
    tools: _Tools, cells: Sequence[Cell], merged: Sequence[str]
) -> dict[str, Interval]:
    """Mean score of each condition over the merged tasks that were measured under it."""
    names = dict.fromkeys(c for task in merged for c in cells[0].outcomes[task] if c != MIXED)
    found = {}
    for name in names:
        tasks = [t for t in merged if all(name in cell.outcomes[t] for cell in cells)]
        value = _mean(tools, cells, tasks, name) if tasks and len(names) > 1 else None
        if value is not None:
            found[name] = value
    return found


def _calibration(cells: Sequence[Cell], merged: Sequence[str]) -> float | None:
    """Mean expected calibration error over merged tasks and cells, in points."""
    errors = []
    for cell in cells:
        for task in merged:
            outcomes = cell.outcomes[task][CLEAN]
            if outcomes.metric != "accuracy" or "confidence" not in outcomes.columns:
                return None
            errors.append(calibration_error(outcomes.columns["confidence"], outcomes.score))
    return PERCENT * float(np.mean(errors)) if errors else None


def _pool_value(tools: _Tools, cell: Cell, tasks: Sequence[str]) -> PoolValue:
    parts = _shares(tools, [cell], tasks)
    unit = _unit(cell, tasks)
    value = float(np.mean([tools.samples(cell, task)[0] for task in tasks])) if tasks else 0.0
    return PoolValue(
        cell.seed, cell.experts, None if unit is None else unit.shown(value),
        None if parts is None else PERCENT * float(parts[:, 0].mean()),
    )  # fmt: skip


def _costs(cells: Sequence[Cell]) -> dict[str, float]:
    """The median over cells of each cost that was measured."""
    names = dict.fromkeys(name for cell in cells for name in cell.costs)
    return {n: float(median(c.costs[n] for c in cells if n in c.costs)) for n in names}


def _versus(
    tools: _Tools, lines: Sequence[Line], rows: Mapping[str, list[Cell]], baseline: str | None
) -> list[Line]:
    """Lines with their difference from the baseline, corrected over all of them."""
    if baseline is None:
        return list(lines)
    others = [line for line in lines if line.row != baseline and line.requirement != "transductive"
              and not line.row.startswith("expert ")]  # fmt: skip
    found = [_difference(tools, rows[line.row], rows[baseline]) for line in others]
    known = adjusted([one for one in found if one is not None])
    by_row = {one.ours: one for one in known}
    return [replace(line, versus=by_row.get(line.row)) for line in lines]


def _difference(
    tools: _Tools, ours: Sequence[Cell], theirs: Sequence[Cell]
) -> Difference | None:
    """Paired over the pools that both have; None if there is none, or no common task."""
    others = {pool(cell, tools.results): cell for cell in theirs}
    pairs = [(cell, other) for cell in ours if (other := others.get(pool(cell, tools.results)))]
    tasks = [t for t in tools.results.merged if all(t in a.outcomes and t in b.outcomes
                                                    for a, b in pairs)]  # fmt: skip
    if not pairs or not tasks:
        return None
    references = references_of(pairs, tasks, tools.results, tools.experts)
    if references is None and _unit(pairs[0][0], tasks) is None:
        return None
    return difference(pairs, tasks, tools.samples, references, tools.level)


def _ranked(
    tools: _Tools, lines: Sequence[Line], rows: Mapping[str, list[Cell]]
) -> list[Line]:
    """Lines with ranks: inside a class, Holm-corrected over all pairs of the class."""
    found = {line.row: line for line in lines}
    for name in REQUIREMENTS:
        members = [line.row for line in lines if line.requirement == name]
        if name in UNRANKED or not members:
            continue
        pairs = [_difference(tools, rows[a], rows[b]) for a, b in combinations(members, 2)]
        tests = adjusted([one for one in pairs if one is not None])
        for row in members:
            better = [d for d in tests if d.told_apart(tools.level) and row in (d.ours, d.theirs)
                      and (d.value.value < 0) == (d.ours == row)]  # fmt: skip
            level = [d.theirs if d.ours == row else d.ours for d in tests
                     if not d.told_apart(tools.level) and row in (d.ours, d.theirs)]  # fmt: skip
            found[row] = replace(found[row], rank=1 + len(better), level_with=tuple(level))
    return [found[line.row] for line in lines]


def _subsets(tools: _Tools) -> list[Subset]:
    """Rows that merged some of the experts only, by how many."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in tools.results.cells:
        where = pool(cell, tools.results)
        if where[2] and cell.requirement != "expert" and cell.row != OWN:
            groups.setdefault((where[1], cell.row, len(where[2])), []).append(cell)
    found = [
        Subset(dict(axes), row, cells[0].requirement, count,
               tuple(_pool_value(tools, c, seen(c, tools.results)) for c in cells))
        for (axes, row, count), cells in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda one: (one.row, one.merged))
