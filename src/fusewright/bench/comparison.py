"""Paired comparison of rows: on the same items, of the same pools.

What is compared is a model against another on every item both answered, conditional on the pools
(seeds, subsets of experts) both were measured on: outcomes are averaged over pools item by item,
and only items are resampled. How much pools differ is shown elsewhere, pool by pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fusewright.bench.results import CLEAN, Cell, Results
from fusewright.bench.statistics import (
    RESAMPLES,
    Array,
    Interval,
    McNemar,
    effective,
    holm,
    mcnemar,
    normal_interval,
    resampled,
    with_disagreements,
)
from fusewright.errors import FusewrightError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.units import unit_of

LOG_LIKELIHOOD = "log_likelihood"
OWN = "own expert"
POINTS = 100.0

Axes = tuple[tuple[str, str], ...]
Pool = tuple[int, Axes, tuple[str, ...]]
"""Seed, axes, and the experts if they are not all."""


def pool(cell: Cell, results: Results) -> Pool:
    """Which models a cell was made from; the same for all rows that may be compared."""
    alone = cell.requirement == "expert" and len(cell.experts) == 1
    whole = alone or not cell.experts or set(cell.experts) >= set(results.merged)
    experts = () if whole else tuple(sorted(cell.experts))
    return cell.seed, tuple(sorted(cell.axes.items())), experts


def seen(cell: Cell, results: Results) -> tuple[str, ...]:
    """The tasks measured whose experts took part, in the order of the suite."""
    chosen = pool(cell, results)[2]
    return tuple(task for task in results.merged
                 if task in cell.outcomes and (not chosen or task in chosen))  # fmt: skip


class Samples:
    """Scores of cells with their resamples, drawn once for each task: paired by construction.

    ``facts["items"]`` of the results may map tasks that ask about the same items to one name; they
    are then resampled together.
    """

    def __init__(
        self, *many: Results, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.results, self.resamples, self.seed = many, resamples, seed
        self._found: dict[tuple[str, str], dict[int, Array]] = {}

    def __call__(self, cell: Cell, task: str, condition: str = CLEAN) -> Array:
        """The weighted mean score of a cell, then of its resamples: (1 + R,)."""
        key = (task, condition)
        if key not in self._found:
            self._found[key] = self._draw(task, condition)
        return self._found[key][id(cell)]

    def _draw(self, task: str, condition: str) -> dict[int, Array]:
        cells = [c for r in self.results for c in r.cells if condition in c.outcomes.get(task, {})]
        outcomes = [cell.outcomes[task][condition] for cell in cells]
        for cell, one in zip(cells, outcomes, strict=True):
            same_items(outcomes[0], one, task, cells[0], cell)
        if len(outcomes[0]) < 2:
            raise FusewrightError("too few items for an interval", where=f"task {task!r}",
                                  expected="at least two", found=len(outcomes[0]),
                                  fix="evaluate more items: raise or drop --limit")  # fmt: skip
        stratum = self.results[0].facts.get("items", {}).get(task, task)
        drawn = resampled(
            np.stack([one.score for one in outcomes]), outcomes[0].weight,
            stratum=stratum, resamples=self.resamples, seed=self.seed,
        )  # fmt: skip
        return {id(cell): row for cell, row in zip(cells, drawn, strict=True)}


def same_items(ours: Outcomes, theirs: Outcomes, task: str, a: Cell, b: Cell) -> None:
    """Nothing, if both answered the same items.

    Raises FusewrightError if their metric, number, weights or labels differ.
    """
    fix = "compare results of the same suite, split and --limit; measure one of them again"
    for what, expected, found in (("metrics", ours.metric, theirs.metric),
                                  ("numbers of items", len(ours), len(theirs))):  # fmt: skip
        if expected != found:
            raise FusewrightError(f"{what} differ", where=f"task {task!r}",
                                  expected=f"{expected} (row {a.row!r} of {a.suite})",
                                  found=f"{found} (row {b.row!r} of {b.suite})",
                                  fix=fix)  # fmt: skip
    for name in ("weight", "label", "item"):
        x, y = (o.weight if name == "weight" else o.columns.get(name) for o in (ours, theirs))
        if x is not None and y is not None and not np.array_equal(x, y):
            differ = int((np.asarray(x) != np.asarray(y)).sum())
            raise FusewrightError(f"items differ: {name}s are not the same", where=f"task {task!r}",
                                  expected=f"those of row {a.row!r} of {a.suite}",
                                  found=f"row {b.row!r} of {b.suite} has {differ} others",
                                  fix=fix)  # fmt: skip


def metric_of(cell: Cell, task: str) -> str:
    """What a cell was measured by on a task."""
    return cell.outcomes[task][CLEAN].metric


def share(metric: str, ours: Array, reference: Array) -> Array:
    """Score as a share of the reference's, 1 = as good: a ratio of accuracies, or of perplexities
    or errors (the reference's over ours). What has no ratio, as to an accuracy of 0, is NaN."""
    return unit_of(metric).share(ours, reference)


class Experts:
    """Each task's own expert, pool by pool: what scores are normalised by."""

    def __init__(self, results: Results) -> None:
        self._cells: dict[tuple[Pool, str], Cell] = {}
        for cell in results.cells:
            for task in cell.outcomes:
                if cell.row in (OWN, f"expert {task}"):
                    key = (pool(cell, results), task)
                    if key not in self._cells or cell.row == OWN:
                        self._cells[key] = cell

    def of(self, where: Pool, task: str) -> Cell | None:
        """The cell that holds what the task's expert does on it, if it was measured: in this
        pool, else among all experts of the same seed and axes."""
        whole = (where[0], where[1], ())
        return self._cells.get((where, task)) or self._cells.get((whole, task))

    def know(self, pools: Iterable[Pool], tasks: Sequence[str]) -> bool:
        """Whether every task's expert was measured, and can something: of a score of 0 there are
        no shares."""
        cells = [(self.of(where, task), task) for where in pools for task in tasks]
        return all(cell is not None and cell.outcomes[t][CLEAN].value != 0 for cell, t in cells)


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, above 0 where ours is better. ``measure`` says in what: "normalised"
    (points of each task's expert), "mean" (points of the mean score; of tasks that all have errors,
    how much smaller ours is) or "log-likelihood" (nats); ``value`` and ``tasks`` are in points, a
    log-likelihood's in nats, an error's in its unit.

    ``p`` is two-sided and agrees with ``value``'s interval; ``adjusted`` is Holm's over all that
    were compared with it; ``items`` is McNemar's exact test, task by task and over all of them;
    ``axes`` are those of its pools, where they were told apart by them.
    """

    ours: str
    theirs: str
    measure: str
    value: Interval
    p: float
    tasks: Mapping[str, Interval]
    items: Mapping[str, McNemar]
    all_items: McNemar
    pools: int
    adjusted: float = 1.0
    axes: Mapping[str, str] = field(default_factory=dict)

    def told_apart(self, level: float = 0.95) -> bool:
        """Whether the difference stands after correction."""
        return self.adjusted < 1 - level


def adjusted(found: Sequence[Difference]) -> list[Difference]:
    """The same with Holm's correction over all of them."""
    return [replace(d, adjusted=p) for d, p in zip(found, holm([d.p for d in found]), strict=True)]


def difference(
    pairs: Sequence[tuple[Cell, Cell]],
    tasks: Sequence[str],
    samples: Samples,
    references: Sequence[Mapping[str, Cell]] | None = None,
    level: float = 0.95,
) -> Difference:
    """The paired difference of two rows; ``pairs`` are their cells, pool by pool.

    With ``references`` (for each pair, each task's expert) the value is in shares of them.
    """
    moved, gains = [], []
    for number, (ours, theirs) in enumerate(pairs):
        gain = _gains(ours, dict.fromkeys(tasks, theirs), tasks, samples)
        own = references[number] if references else None
        gains.append(gain)
        moved.append(gain if own is None
                     else _difference_of_shares(ours, theirs, own, tasks, samples))  # fmt: skip
    value, p = normal_interval(np.mean(moved, axis=(0, 1)), level)
    by_task = [normal_interval(row, level)[0] for row in np.mean(gains, axis=0)]
    signs = {task: _item_gains(pairs, task) for task in tasks}
    first, second = pairs[0]
    metrics = {metric_of(first, task) for task in tasks}
    logs = metrics == {LOG_LIKELIHOOD}
    measure = "normalised" if references else "log-likelihood" if logs else "mean"
    units = {task: unit_of(metric_of(first, task)).scale for task in tasks}
    scale = units[tasks[0]] if measure != "normalised" and len(metrics) == 1 else POINTS
    return Difference(
        first.row, second.row, measure,
        value.scaled(scale), p,
        {t: one.scaled(units[t]) for t, one in zip(tasks, by_task, strict=True)},
        {t: mcnemar(gain) for t, gain in signs.items()},
        mcnemar(np.concatenate(list(signs.values()))), len(pairs),
    )  # fmt: skip


def _gains(
    ours: Cell, theirs: Mapping[str, Cell], tasks: Sequence[str], samples: Samples
) -> Array:
    """Differences of scores (tasks, 1 + R), with the disagreements that a few items more add."""
    found = np.stack([samples(ours, task) - samples(theirs[task], task) for task in tasks])
    outcomes = [ours.outcomes[task][CLEAN] for task in tasks]
    bounded = np.array([unit_of(one.metric).bounded for one in outcomes])
    items = [effective(one.weight) for one in outcomes]
    more = with_disagreements(found, items, samples.seed)
    return np.where(bounded[:, None], more, found)


def shares(
    cell: Cell, own: Mapping[str, Cell], tasks: Sequence[str], samples: Samples
) -> Array:
    """A cell's scores as shares of each task's own expert, resampled with it: (tasks, 1 + R)."""
    gains = _gains(cell, own, tasks, samples)
    rows = []
    for gain, task in zip(gains, tasks, strict=True):
        expert = samples(own[task], task)
        if own[task] is cell:
            rows.append(np.ones_like(gain))
        elif not unit_of(metric := metric_of(cell, task)).bounded:
            rows.append(share(metric, samples(cell, task), expert))
        else:
            rows.append(1 + share("accuracy", gain, expert))
    return np.stack(rows)


def _difference_of_shares(
    ours: Cell, theirs: Cell, own: Mapping[str, Cell], tasks: Sequence[str], samples: Samples
) -> Array:
    gains = _gains(ours, dict.fromkeys(tasks, theirs), tasks, samples)
    rows = []
    for gain, task in zip(gains, tasks, strict=True):
        metric, expert = metric_of(ours, task), samples(own[task], task)
        if not unit_of(metric).bounded:
            a, b = (share(metric, samples(cell, task), expert) for cell in (ours, theirs))
            rows.append(a - b)
        else:
            rows.append(share(metric, gain, expert))
    return np.stack(rows)


def _item_gains(pairs: Sequence[tuple[Cell, Cell]], task: str) -> Array:
    """For each item ours minus theirs, the mean over pools: (items,)."""
    each = [a.outcomes[task][CLEAN].score - b.outcomes[task][CLEAN].score for a, b in pairs]
    return np.mean(each, axis=0)


def compare(
    ours: Results, theirs: Results, *, level: float = 0.95, resamples: int = RESAMPLES
) -> list[Difference]:
    """Every row that both results have, ours minus theirs, Holm-corrected over all of them; for
    each setting of the axes, and each set of merged tasks, a difference of its own.

    Scores are normalised by our experts where every pool has them measured; the tasks are those
    that both results merged and measured.

    Raises FusewrightError if suite, items, or all rows differ.
    """
    if ours.suite != theirs.suite:
        raise FusewrightError("results of different suites cannot be compared",
                              expected=ours.suite, found=theirs.suite,
                              fix="compare two runs of one suite")  # fmt: skip
    samples, experts = Samples(ours, theirs, resamples=resamples), Experts(ours)
    others = {(c.row, pool(c, theirs)): c for c in theirs.cells}
    found = []
    for row, cells in ours.rows().items():
        groups: dict[tuple[tuple[str, ...], Axes], list[tuple[Cell, Cell]]] = {}
        for cell in cells:
            other = others.get((row, pool(cell, ours)))
            if other is not None:
                both = tuple(task for task in seen(cell, ours) if task in other.outcomes)
                groups.setdefault((both, pool(cell, ours)[1]), []).append((cell, other))
        for (tasks, axes), pairs in groups.items():
            if tasks:
                references = references_of(pairs, tasks, ours, experts)
                one = difference(pairs, tasks, samples, references, level)
                found.append(replace(one, axes=dict(axes)))
    if not found:
        raise FusewrightError("nothing to compare: no row was measured on the same pools in both",
                              expected=", ".join(ours.rows()), found=", ".join(theirs.rows()),
                              fix="run both with the same methods, seeds and axes")  # fmt: skip
    return adjusted(found)


def references_of(
    pairs: Sequence[tuple[Cell, Cell]], tasks: Sequence[str], results: Results, experts: Experts
) -> list[Mapping[str, Cell]] | None:
    """Each task's expert for each pair; None if any was not measured."""
    pools = [pool(cell, results) for cell, _ in pairs]
    if not experts.know(pools, tasks):
        return None
    return [{t: own for t in tasks if (own := experts.of(where, t))} for where in pools]
