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
    """Which rates a section has of which task."""
    found: dict[str, list[str]] = {}
    for line in section.lines:
        for task, own in line.rates.items():
            known = found.setdefault(task, [])
            known += [name for name in own if name not in known]
    return found


def explained(sections: Sequence[Section]) -> str:
    """What the rates mean that a report has; nothing where it has none."""
    known = {name for one in sections for names in rated(one).values() for name in names}
    return "; ".join(f"{name}: percent of {RATES[name]}" for name in RATES if name in known)
