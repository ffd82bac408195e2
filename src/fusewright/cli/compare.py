"""``fusewright compare``: two results of one suite, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusewright.cli._print import print_json, print_tables
from fusewright.cli._shared import Json, add

if TYPE_CHECKING:
    from fusewright.bench.comparison import Difference
    from fusewright.engine.tables import Table


def register(app: typer.Typer) -> None:
    """Add ``compare``."""
    add(
        app,
        compare,
        "fusewright compare results/before results/after",
        "fusewright compare results/before results/after --tasks --json",
    )


Results = Annotated[Path, typer.Argument(help="A folder that fusewright bench wrote.")]


def compare(
    first: Results,
    second: Results,
    tasks: Annotated[bool, typer.Option("--tasks", help="Show every task, too.")] = False,
    level: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Of the intervals, and of what differs.")
    ] = 0.95,
    json: Json = False,
) -> None:
    """Compare two results of one suite: each row that both have, second minus first.

    Differences are paired over the same test items and the same pools of models; p values are
    corrected over all rows (Holm).
    """
    from fusewright.bench.comparison import compare as compared
    from fusewright.bench.sweep.store import load_results

    found = compared(load_results(second), load_results(first), level=level)
    if json:
        print_json({"level": level, "rows": [_json(one, level) for one in found]})
    else:
        each = [_tasks(one, _name(one, found)) for one in found] if tasks else []
        print_tables([_rows(found, level), *each])


def _json(one: Difference, level: float) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(one), "row": one.ours, "differs": one.told_apart(level)}


def _rows(found: list[Difference], level: float) -> Table:
    from fusewright.engine.tables import Table

    columns = ("row", "in", "difference", f"{100 * level:g} %", "p, Holm", "better", "worse",
               "McNemar p", "pools", "")  # fmt: skip
    rows = tuple(
        (_name(one, found), one.measure, *_interval(one.value), round(one.adjusted, 4),
         one.all_items.ours, one.all_items.theirs, round(one.all_items.p, 4), one.pools,
         "differs" if one.told_apart(level) else "not told apart")
        for one in found
    )  # fmt: skip
    return Table("Second minus first (points; log-likelihood in nats)", columns, rows)


def _name(one: Difference, found: list[Difference]) -> str:
    """The row; of which models, where there are several variants; of which tasks, if not of all
    that it was measured on elsewhere."""
    several = any(other.axes != one.axes for other in found)
    axes = [f", {name} {value}" for name, value in one.axes.items()] if several else []
    part = any(other.ours == one.ours and len(other.tasks) > len(one.tasks) for other in found)
    return "".join([one.ours, *axes]) + (f", merging {', '.join(one.tasks)}" if part else "")


def _tasks(one: Difference, name: str) -> Table:
    from fusewright.engine.tables import Table

    rows = tuple((task, *_interval(value), one.items[task].ours, one.items[task].theirs,
                  round(one.items[task].p, 4)) for task, value in one.tasks.items())  # fmt: skip
    columns = ("task", "difference", "interval", "better", "worse", "McNemar p")
    return Table(f"{name}, task by task", columns, rows)


def _interval(one: Any) -> tuple[str, str]:
    return f"{one.value:+.2f}", f"[{one.low:+.2f}, {one.high:+.2f}]"
