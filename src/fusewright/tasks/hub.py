"""Data sets of the Hugging Face Hub, through ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusewright.errors import FusewrightError
from fusewright.extras import needs
from fusewright.tasks.errors import DataError
from fusewright.tasks.rows import ROLES, DataSplit, Labels, as_labels, missing

if TYPE_CHECKING:
    from fusewright.tasks.data import DataSource


class HubSplit(DataSplit):
    """A data set of ``datasets``, memory-mapped: rows are read and images decoded when asked for.

    Raises DataError if a column that was named does not exist, or there is no row.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        columns: Mapping[str, str],
        classes: Sequence[str] | None = None,
    ) -> None:
        known = table.column_names
        for role, column in columns.items():
            if column not in known:
                raise missing(role, known, name)
        self._columns = {role: role for role in ROLES if role in known} | dict(columns)
        self._table, self.name = table, name
        names = getattr(table.features.get(self._columns.get("label", "label")), "names", None)
        found = classes or names
        self.classes = tuple(found) if found else None
        if not len(table):
            raise DataError("the split is empty", where=name, expected="at least one row")

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        found = self._table[list(map(int, numbers))]
        return {role: found[column] for role, column in self._columns.items()}

    def labels(self) -> Labels:
        if "label" not in self._columns:
            raise missing("label", self._table.column_names, self.name)
        values = self._table.with_format(None)[self._columns["label"]]
        return as_labels(list(values), self.classes, self.name)


def open_hub(source: DataSource, split: str) -> HubSplit:
    """One split of a data set on the Hub, at the revision that the source names.

    Raises DataError if it cannot be fetched: offline, absent, gated, or without that split.
    """
    datasets = needs("datasets", "tasks")
    identity, _, revision = str(source.hub).partition("@")
    try:
        table = datasets.load_dataset(
            identity, source.config, split=split, revision=revision or None
        )
    except FusewrightError:
        raise
    except Exception as error:  # datasets raises many kinds, some of its HTTP library
        raise _unreachable(source, split, error) from error
    columns = {str(role): column for role, column in source.columns.items()}
    return HubSplit(table, f"{source.hub}, {split}", columns, source.classes)


def _unreachable(source: DataSource, split: str, error: Exception) -> DataError:
    offline = any(os.environ.get(v) == "1" for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    folder = source.folder or "NAME"
    return DataError(
        f"{source.hub} cannot be fetched from the Hub" + (", which is offline" * offline),
        where=f"{source.hub}, split {split}", found=f"{type(error).__name__}: {error}",
        fix=f"--data DIR (or export FUSEWRIGHT_DATA=DIR) with DIR/{folder}/{split}.parquet",
    )  # fmt: skip
