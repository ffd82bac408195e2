"""Sweeps: every method on every pool and task, cell by cell.

``cells`` says what a sweep consists of and what each cell depends on (``identity``); ``execute``
gives groups of cells to ``worker``s, which merge in memory (``merges``), tune (``space``,
``tuning``), train on all tasks at once (``joint``), evaluate, and keep each finished cell, with
what it cost (``costs``, ``slowdown``), in the ``store``. ``layers`` says how the task vectors
differ, ``stream`` asks all tasks mixed, row by row. ``run.bench`` is the door.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.bench.sweep.run import bench as bench
    from fusewright.bench.sweep.store import load_results as load_results

_HOMES = {"bench": "run", "load_results": "store"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"fusewright.bench.sweep has no {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fusewright.bench.sweep.{_HOMES[name]}"), name)
