"""What a terminal shows of a sweep is what its report says."""

from __future__ import annotations

import numpy as np
import pytest

from bench.synthetic_results import cell, results
from fusewright.bench.report.summary import summarise
from fusewright.bench.results import Cell, Results
from fusewright.bench.sweep.tables import tables
from fusewright.tasks.outcomes import Outcomes

pytest.importorskip("scipy")


def test_perplexities_are_those_of_the_mean_score():
    def measured(row, *scores, seed=0):
        found = {task: {"clean": Outcomes("log_likelihood", score + np.linspace(-1, 1, 20),
                                          np.ones(20))}
                 for task, score in zip("ab", scores, strict=True)}  # fmt: skip
        kind = "task id" if row == "own expert" else "none"
        return Cell(row, row, kind, "toy", seed, ("a", "b"), found)

    rows = (("own expert", -2, -3), ("steady", -3.5, -3.9), ("uneven", -2, -5))
    cells = [measured(row, *(score - seed / 2 for score in scores), seed=seed)
             for row, *scores in rows for seed in (0, 1)]  # fmt: skip
    found = Results("toy", "Toy", {"a": "", "b": ""}, ("a", "b"), (), tuple(cells))
    (section,) = summarise(found, resamples=20).sections
    shown = {row[0]: row[1:4] for table in tables(found) for row in table.rows}
    for line in section.lines:
        said = line.mean, line.tasks["a"], line.tasks["b"]
        assert shown[line.row] == tuple(round(one.value, 1) for one in said)
    (merged,) = (t for t in tables(found) if t.title == "Merged without data")
    assert [row[0] for row in merged.rows] == ["uneven", "steady"]


def test_variants_are_not_averaged():
    more = [cell("ties", 0.2, axes={"tuning": "LoRA"}), cell("base", 0.1, axes={"tuning": "LoRA"})]
    found = results(seeds=(0,), more=more)
    shown = {(table.title, row[0]): row[1] for table in tables(found) for row in table.rows}
    alone = {row[0]: row[1] for table in tables(results(seeds=(0,))) for row in table.rows}
    assert shown["plain: Merged without data", "ties"] == alone["ties"]
    assert shown["tuning LoRA: Merged without data", "ties"] < alone["ties"] / 2
