"""The data that a recipe names for a method that learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusewright.bench.suite import suite

if TYPE_CHECKING:
    from fusewright.engine.recipe import AdaptationData
    from fusewright.tasks.adaptation import Adaptation


def data_of(said: AdaptationData, labels: bool = False) -> Adaptation:
    """A suite's tasks, opened, with labels for methods that need them.

    Raises SuiteError as :func:`~fusewright.bench.suite.suite` does.
    """
    opened = suite(said.suite, pool=said.pool, data=said.data, seed=said.seed,
                   variant=said.variant)  # fmt: skip
    rows = opened.labelled if labels else opened.unlabelled
    return rows(part=said.split, limit=said.limit)
