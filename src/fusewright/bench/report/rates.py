"""What scores of written answers leave unsaid: how many items were cut, how many not understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusewright.bench.results import CLEAN, Cell

if TYPE_CHECKING:
    from fusewright.bench.report.summary import Section

RATES = {
    "truncated": "items that a limit cut: a prompt longer than the model's window, or "
                 "an answer that did not end within its length",
    "unparsed": "answers in which nothing could be read",
}  # fmt: skip
"""Columns of outcomes, 1 where it happened, and what reports call their means."""

Rates = Mapping[str, Mapping[str, float]]
"""By task, then by column; percent. Tasks whose outcomes do not say are absent."""


def rates(cells: Sequence[Cell], tasks: Sequence[str]) -> Rates:
    """Means over the items of each task, and over cells."""
    found = {}
    for task in tasks:
        outcomes = [cell.outcomes[task][CLEAN] for cell in cells]
        own = {
            name: 100 * float(np.mean([np.mean(o.columns[name].astype(float)) for o in outcomes]))
            for name in RATES if all(name in o.columns for o in outcomes)
        }  # fmt: skip
        if own:
            found[task] = own
    return found


def rated(section: Section) -> dict[str, list[str]]:
    """Which rates a section has of which task, but for those that are zero in every line."""
    found: dict[str, list[str]] = {}
    for line in section.lines:
        for task, own in line.rates.items():
            known = found.setdefault(task, [])
            known += [name for name, rate in own.items() if rate > 0 and name not in known]
    return {task: [n for n in RATES if n in known] for task, known in found.items() if known}


def explained(sections: Sequence[Section]) -> str:
    """What the rates mean that a report has, and which are zero; nothing where it has none."""
    shown = {name for one in sections for names in rated(one).values() for name in names}
    known = {name for one in sections for line in one.lines for own in line.rates.values()
             for name in own}  # fmt: skip
    said = [f"{name}: percent of {RATES[name]}" if name in shown else f"nothing was {name}"
            for name in RATES if name in known]  # fmt: skip
    return "; ".join(said) + ("; tasks without such a column: none" if shown else "")
