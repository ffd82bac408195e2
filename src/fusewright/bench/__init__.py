"""Measuring what a merge gained: suites, sweeps, statistics, reports, and the demo.

A suite (``suite_file``, ``suite``) says which models and which tasks; ``sweep`` merges them with
every method and keeps each result; ``results`` hold them, ``report`` draws them. ``fw.bench(...)``
is :func:`fusewright.bench.sweep.run.bench`: this package can be called.

``demo.run_demo`` trains a small vision transformer and its experts (``digits``), merges them with
every method through the engine, and answers with a ``leaderboard.Leaderboard``, which ``tables``
and ``report`` draw. Intervals come from ``statistics``. Nothing heavy is imported before it is
used: data sets, training and plots need ``pip install 'fusewright[demo]'``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """Python makes a package an attribute of its parent, so ``fw.bench`` is this room, whoever
    imports first; being callable, it is the door too."""

    def __call__(self, *suite: Any, **options: Any) -> Any:
        from fusewright.bench.sweep.run import bench

        return bench(*suite, **options)


sys.modules[__name__].__class__ = _Room
