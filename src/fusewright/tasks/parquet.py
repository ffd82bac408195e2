"""Parquet files as splits: read by row groups, only the columns in use, in bounded memory."""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from fusewright.extras import needs
from fusewright.tasks.errors import DataError
from fusewright.tasks.rows import ROLES, DataSplit, Labels, as_labels, missing

KEPT = 256 << 20
"""Bytes of decoded row groups that one split keeps: enough that shuffled reading of a small data
set reads it once, while a large one stays on disk."""


class ParquetSplit(DataSplit):
    """One parquet file. Images are decoded when a row is asked for, never kept decoded.

    ``columns`` maps roles ("image", "text", "text2", "label", "target") to the file's columns; None
    takes those of these names. ``classes`` default to the names in the file's ``huggingface``
    metadata, else to a ``dataset_info.json`` beside it.

    Raises DataError if the file is damaged, empty, or lacks a column that was named.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
        kept: int = KEPT,
    ) -> None:
        self.path, self.name, self._budget = path, str(path), kept
        parquet = needs("pyarrow.parquet", "tasks")
        with _readable(path):
            self._file = parquet.ParquetFile(path)
        self._columns = _roles(self._file.schema_arrow.names, columns or {}, path)
        groups = range(self._file.metadata.num_row_groups)
        sizes = [self._file.metadata.row_group(g).num_rows for g in groups]
        self._starts = [0, *accumulate(sizes)]
        self._held: OrderedDict[int, Any] = OrderedDict()
        found = tuple(classes) if classes else _classes(self._file, path, self._columns)
        self.classes = found
        if not len(self):
            raise DataError("the split is empty", where=path, expected="at least one row")

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        found: dict[str, list[Any]] = {role: [None] * len(numbers) for role in self._columns}
        for group, at in self._by_group(numbers):
            table = self._group(group).take([row for _, row in at])
            for role, column in self._columns.items():
                values = table.column(column).to_pylist()
                for (place, _), value in zip(at, values, strict=True):
                    found[role][place] = self._value(role, value, numbers[place])
        return found

    def labels(self) -> Labels:
        if "label" not in self._columns:
            raise missing("label", self._file.schema_arrow.names, self.path)
        name = self._columns["label"]
        with _readable(self.path):
            table = self._file.read(columns=[name])
        return as_labels(table.column(name).to_pylist(), self.classes, self.name)

    def _by_group(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Each row group in use, with (place in the answer, row in the group)."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, number in enumerate(numbers):
            if not 0 <= number < len(self):
                raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, not {number}")
            group = bisect_right(self._starts, number) - 1
            wanted.setdefault(group, []).append((place, int(number) - self._starts[group]))
        return iter(sorted(wanted.items()))

    def _group(self, group: int) -> Any:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        top_level = list(dict.fromkeys(self._columns.values()))
        with _readable(self.path):
            self._held[group] = self._file.read_row_group(group, columns=top_level)
        while len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > self._budget:
            self._held.popitem(last=False)
        return self._held[group]

    def _value(self, role: str, value: Any, number: int) -> Any:
        if role != "image":
            return value
        where = f"{self.path}, row {number}"
        return decoded(value["bytes"] if isinstance(value, dict) else value, where)


def decoded(data: Any, where: str) -> Any:
    """A PIL image from an encoded file's bytes. Raises DataError if they hold none."""
    image = needs("PIL.Image", "tasks")
    try:
        found = image.open(io.BytesIO(data))
        found.load()
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise DataError(
            "an image cannot be decoded", where=where,
            expected="the bytes of a PNG or JPEG file", found=error,
        ) from error  # fmt: skip
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    arrow = needs("pyarrow", "tasks")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            "a parquet file cannot be read", where=path, expected="a whole parquet file",
            found=str(error).splitlines()[0], fix="fetch or build the data again",
        ) from error  # fmt: skip


def _roles(names: Sequence[str], columns: Mapping[str, str], path: Path) -> dict[str, str]:
    for role, column in columns.items():
        if column not in names:
            raise DataError(
                f"there is no column {column!r} for {role!r}", where=path, expected=column,
                found=", ".join(names), fix=f"columns: {{{role}: {names[0] if names else ''}}}",
            )  # fmt: skip
    return {role: role for role in ROLES if role in names} | dict(columns)


def _classes(file: Any, path: Path, columns: Mapping[str, str]) -> tuple[str, ...] | None:
    stored = (file.schema_arrow.metadata or {}).get(b"huggingface")
    info = path.with_name("dataset_info.json")
    for text in (stored, info.read_bytes() if info.is_file() else None):
        features = (_json(text).get("info") or _json(text)).get("features") or {}
        names = (features.get(columns.get("label", "label")) or {}).get("names")
        if names:
            return tuple(str(name) for name in names)
    return None


def _json(text: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(text or b"{}")
    except ValueError:  # a note that is no JSON says nothing of classes
        return {}
    return found if isinstance(found, dict) else {}
