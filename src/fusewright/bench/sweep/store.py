"""Finished cells on disk: each complete or absent, whatever happens to the run.

A cell is ``cells/KEY.parquet`` (a row for each task, condition and item) and ``cells/KEY.json``,
which is written last, holds the parquet's digest and so makes it finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusewright.bench.results import Cell, Results
from fusewright.bench.sweep.identity import files_digest
from fusewright.errors import FusewrightError
from fusewright.extras import needs
from fusewright.tasks.outcomes import Outcomes
from fusewright.weights.folders import make_folder
from fusewright.weights.lock import FolderLock

CELLS, RESULTS = "cells", "results.json"
FORMAT = 1


class Store:
    """The cells of a sweep's folder. Reading needs no lock; a sweep holds one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def lock(self) -> FolderLock:
        """Raises OutputError, with its process id, if another sweep writes here, or if there can be
        no such folder."""
        make_folder(self.folder / CELLS)
        return FolderLock.acquire(self.folder)

    def is_finished(self, key: str) -> bool:
        """Whether a cell is there, whole."""
        json_path, data = self._paths(key)
        try:
            said = json.loads(json_path.read_text("utf-8"))
            return bool(said["data"] == files_digest(data))
        except (OSError, ValueError, KeyError):
            return False

    def save(self, key: str, cell: Cell, trials: Any = None) -> None:
        """Keep a cell; it appears at once."""
        json_path, data = self._paths(key)
        partial = data.with_suffix(f".parquet.{os.getpid()}")
        needs("pyarrow.parquet", "bench").write_table(_table(cell.outcomes), partial)
        plain = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
        said = plain | {
            "format": FORMAT, "outcomes": _described(cell.outcomes), "trials": trials,
            "data": files_digest(partial),
        }  # fmt: skip
        _sync(partial)
        partial.replace(data)
        write_json(json_path, said)

    def load(self, key: str) -> Cell:
        """Raises FusewrightError if the cell is missing or damaged."""
        json_path, data = self._paths(key)
        if not self.is_finished(key):
            raise FusewrightError(
                "a cell is missing or damaged", where=json_path,
                fix="run the same sweep again: it makes what is not there",
            )  # fmt: skip
        said = json.loads(json_path.read_text("utf-8"))
        table = needs("pyarrow.parquet", "bench").read_table(data)
        fields = {name: said[name] for name in Cell.__dataclass_fields__}
        fields["outcomes"] = _outcomes(table, said["outcomes"])
        fields["experts"] = tuple(said["experts"])
        return Cell(**fields)

    def classify(self, key: str, **told: str) -> None:
        """Say of a finished cell what it is called (``row``, ``title``) and what class it belongs
        to (``requirement``): what is measured stays as it is."""
        path, _ = self._paths(key)
        said = json.loads(path.read_text("utf-8"))
        if any(said[name] != value for name, value in told.items()):
            write_json(path, said | told)

    def trials(self, key: str) -> Any:
        """What tuning tried for a cell: [{"parameters": …, "value": …}], or None."""
        return json.loads(self._paths(key)[0].read_text("utf-8"))["trials"]

    def _paths(self, key: str) -> tuple[Path, Path]:
        stem = self.folder / CELLS / key
        return stem.with_suffix(".json"), stem.with_suffix(".parquet")


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is complete or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8")
    _sync(partial)
    partial.replace(path)


def remembered(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What ``make`` answers with, in JSON's types; kept in a file for as long as ``key`` is the
    same."""
    try:
        said = json.loads(path.read_text("utf-8"))
        if said["key"] == key:
            return said["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = make()
    write_json(path, {"key": key, "found": found})
    return found


def save_results(folder: Path, results: Results, keys: list[str]) -> None:
    """results.json: which cells make the sweep, and what is needed to repeat it."""
    said = {name: getattr(results, name) for name in Results.__dataclass_fields__}
    write_json(folder / RESULTS, {"format": FORMAT, **said, "cells": keys})


def load_results(folder: str | Path) -> Results:
    """The results of a sweep's folder, as its last run left them.

    Raises FusewrightError if there are none, or a cell is missing or damaged.
    """
    path = Path(folder) / RESULTS
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FusewrightError(
            "this folder holds no results", where=path, found=error,
            fix="fusewright bench SUITE -o DIR writes them",
        ) from error
    fields = {name: said[name] for name in Results.__dataclass_fields__}
    store = Store(Path(folder))
    for name in ("merged", "unseen"):
        fields[name] = tuple(said[name])
    return Results(**fields | {"cells": tuple(store.load(key) for key in said["cells"])})


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _columns(outcomes: Outcomes) -> dict[str, np.ndarray[Any, Any]]:
    found = {"score": outcomes.score, "weight": outcomes.weight, **outcomes.columns}
    return {n: c.astype(np.int64) if c.dtype.kind == "b" else c for n, c in found.items()}


def _described(outcomes: Mapping[str, Mapping[str, Outcomes]]) -> Any:
    return {
        task: {
            condition: {"metric": o.metric, "value": o.value, "items": len(o),
                        "dtypes": {k: str(v.dtype) for k, v in o.columns.items()}}
            for condition, o in by_condition.items()
        }
        for task, by_condition in outcomes.items()
    }  # fmt: skip


def _table(outcomes: Mapping[str, Mapping[str, Outcomes]]) -> Any:
    """One long table; columns that a task lacks are null, those of several kinds are text."""
    pa = needs("pyarrow", "bench")
    blocks = [(task, condition, o) for task, each in outcomes.items()
              for condition, o in each.items()]  # fmt: skip
    if not blocks:
        raise ValueError("a cell has outcomes")
    kinds: dict[str, set[str]] = {}
    for _, _, o in blocks:
        for name, column in _columns(o).items():
            kinds.setdefault(name, set()).add(column.dtype.kind)
    texts = {name for name, found in kinds.items() if len(found) > 1 or "U" in found}
    tables = []
    for task, condition, o in blocks:
        columns = {"task": [task] * len(o), "condition": [condition] * len(o),
                   "item": np.arange(len(o))}  # fmt: skip
        for name, column in _columns(o).items():
            columns[name] = [str(v) for v in column] if name in texts else pa.array(column)
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="permissive")


def _outcomes(table: Any, described: Any) -> dict[str, dict[str, Outcomes]]:
    found: dict[str, dict[str, Outcomes]] = {}
    start = 0
    for task, each in described.items():
        for condition, said in each.items():
            rows = table.slice(start, said["items"])
            start += said["items"]
            columns = {name: _column(rows[name], np.dtype(dtype))
                       for name, dtype in said["dtypes"].items()}  # fmt: skip
            score, weight = (rows[name].to_numpy() for name in ("score", "weight"))
            found.setdefault(task, {})[condition] = Outcomes(
                said["metric"], score, weight, columns
            )
    return found


def _column(stored: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    values = stored.to_pylist()
    return np.array(values, dtype=np.int64 if dtype.kind == "b" else dtype).astype(dtype)
