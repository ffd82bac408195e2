"""Results as a sweep would make them, from known accuracies: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusewright.bench.results import Cell, Results
from fusewright.tasks.outcomes import Outcomes

TASKS = {"mnist": 400, "eurosat": 300, "dtd": 200}
UNSEEN = {"stl10": 150}
QUALITY = {
    "base": 0.45, "own expert": 0.93, "average": 0.60, "ties": 0.74, "task_arithmetic": 0.735,
    "ties, tuned": 0.80, "wemoe": 0.90, "ensemble, simple": 0.75,
}  # fmt: skip
CLASS = {"base": "reference", "own expert": "reference", "ensemble, simple": "reference",
         "ties, tuned": "labelled", "wemoe": "routed"}  # fmt: skip


def answers(rate: float, task: str, items: int, seed: int, own: int) -> Outcomes:
    """Outcomes of a model that is right at ``rate``; hard items are hard for everybody."""
    hard = np.random.default_rng([1, len(task), items]).random(items)
    luck = np.random.default_rng([2, len(task), seed, own]).random(items)
    score = (0.7 * hard + 0.3 * luck < rate).astype(float)
    label = np.random.default_rng([3, items]).integers(0, 10, items)
    sure = np.clip(0.5 + 0.5 * rate * luck, 0, 1)
    return Outcomes("accuracy", score, np.ones(items), {"label": label, "confidence": sure})


def cell(
    row: str, rate: float, seed: int = 0, *, experts: Sequence[str] = tuple(TASKS),
    axes: Mapping[str, str] | None = None, requirement: str | None = None, corrupted: bool = True,
    **facts: Any,
) -> Cell:  # fmt: skip
    number = sum(map(ord, row))
    outcomes = {}
    for task, items in {**TASKS, **UNSEEN}.items():
        here = rate if task in TASKS else 0.55 - 0.1 * rate
        outcomes[task] = {"clean": answers(here, task, items, seed, number)}
        if corrupted and task in TASKS:
            outcomes[task]["contrast"] = answers(here - 0.1, task, items, seed, number + 1)
            outcomes[task]["jpeg"] = answers(here - 0.2, task, items, seed, number + 2)
    return Cell(
        row=row, title=row.title(), requirement=requirement or CLASS.get(row, "none"),
        suite="toy", seed=seed, experts=tuple(experts), outcomes=outcomes, axes=axes or {},
        **facts,
    )  # fmt: skip


def results(
    quality: Mapping[str, float] = QUALITY, seeds: Sequence[int] = (0, 1, 2),
    more: Sequence[Cell] = (), **changed: Any,
) -> Results:  # fmt: skip
    cells = [
        cell(row, rate, seed, method=row, costs={"seconds": 1 + 3 * rate, "slowdown": 1.0})
        for seed in seeds for row, rate in quality.items()
    ]  # fmt: skip
    settings = {
        "suite": "toy", "title": "Three toy tasks", "merged": tuple(TASKS),
        "tasks": {task: f"which {task}?" for task in {**TASKS, **UNSEEN}},
        "unseen": tuple(UNSEEN), "cells": (*cells, *more),
        "facts": {"command": "fusewright bench toy", "versions": {"fusewright": "0"}},
    }  # fmt: skip
    return Results(**{**settings, **changed})
