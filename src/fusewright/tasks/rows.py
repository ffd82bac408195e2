"""Splits: rows by number, whatever they are kept in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusewright.tasks.errors import DataError
from fusewright.tasks.task import Split

ROLES = ("image", "text", "text2", "label", "target")
"""What columns are called here, however a file names them."""

Labels = NDArray[np.int64]


class DataSplit(Split):
    """A split of a data set: it has a name for people, and perhaps labels and class names."""

    name: str
    classes: tuple[str, ...] | None

    @abstractmethod
    def labels(self) -> Labels:
        """The class of every row: (n,) int64. Raises DataError if there is no label."""


class Rows(DataSplit):
    """Columns in memory; columns may have any names.

    Raises ValueError if the columns are of different lengths.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        classes: Sequence[str] | None = None,
        name: str = "rows",
    ) -> None:
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns of one length are expected, found {sorted(lengths)}")
        self.columns, self.name = dict(columns), name
        self.classes = None if classes is None else tuple(classes)
        self._length = lengths.pop() if lengths else 0

    def __len__(self) -> int:
        return self._length

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        return {k: [column[n] for n in numbers] for k, column in self.columns.items()}

    def labels(self) -> Labels:
        if "label" not in self.columns:
            raise missing("label", list(self.columns), self.name)
        return as_labels(self.columns["label"], self.classes, self.name)


class Part(DataSplit):
    """Some rows of another split, in an order of their own, numbered from 0."""

    def __init__(self, whole: DataSplit, chosen: Sequence[int] | Labels, name: str) -> None:
        self.whole, self.chosen, self.name = whole, chosen, name
        self.classes = whole.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        if len(numbers) and not (min(numbers) >= 0 and max(numbers) < len(self)):
            raise IndexError(f"{self.name} has rows 0 to {len(self) - 1}")
        return self.whole.rows([int(self.chosen[n]) for n in numbers])

    def labels(self) -> Labels:
        return self.whole.labels()[np.asarray(self.chosen, dtype=np.int64)]


class Grouped(DataSplit):
    """The same rows with coarser classes: each gathers some of the data's own, by their names.

    Raises DataError where the data name no classes, and unless each of theirs is in one group.
    """

    def __init__(self, whole: DataSplit, groups: Mapping[str, Sequence[str]]) -> None:
        self.whole, self.name, self.classes = whole, whole.name, tuple(groups)
        fine = [name for own in groups.values() for name in own]
        theirs = whole.classes
        if theirs is None or sorted(fine) != sorted(theirs):
            off = set(fine) ^ set(theirs or ()) or {n for n in fine if fine.count(n) > 1}
            raise DataError("groups do not hold each class of the data once", where=self.name,
                            expected="classes named by the data" if theirs is None
                            else f"{len(theirs)} classes, each in one group",
                            found=", ".join(sorted(off)))  # fmt: skip
        group = {name: at for at, own in enumerate(groups.values()) for name in own}
        self._group = np.array([group[name] for name in theirs], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.whole)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        found = dict(self.whole.rows(numbers))
        if "label" in found:
            fine = as_labels(found["label"], self.whole.classes, self.name)
            found["label"] = self._coarse(fine).tolist()
        return found

    def labels(self) -> Labels:
        return self._coarse(self.whole.labels())

    def _coarse(self, labels: Labels) -> Labels:
        outside = (labels < 0) | (labels >= len(self._group))
        if outside.any():
            raise DataError("a label is no class of the data", where=self.name,
                            expected=f"0 to {len(self._group) - 1}",
                            found=int(labels[outside][0]))  # fmt: skip
        return self._group[labels]


def as_labels(
    values: Sequence[Any], classes: Sequence[str] | None, where: str,
    numbers: Sequence[int] | None = None,
) -> Labels:  # fmt: skip
    """Labels as class numbers; class names are looked up in ``classes``. They are of the rows of
    these ``numbers``, by default the first.

    Raises DataError for a label that is neither a whole number nor a known class.
    """
    number = {name: i for i, name in enumerate(classes or ())}
    found = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if isinstance(value, str) and value in number:
            found[row] = number[value]
        elif isinstance(value, (bool, int, np.integer)):
            found[row] = value
        else:
            expected = f"one of {', '.join(number)}" if number else "a whole number"
            raise DataError(
                "a label is no class", expected=expected,
                where=f"{where}, row {row if numbers is None else numbers[row]}",
                found=repr(value), fix="name the classes in the data source: classes: [...]",
            )  # fmt: skip
    return found


def missing(role: str, found: Sequence[str], where: object) -> DataError:
    """The refusal of a column that is not there."""
    return DataError(
        f"there is no column {role!r}", where=where, expected=role,
        found=", ".join(found) or "no columns",
        fix=f"say which column it is in the data source: columns: {{{role}: NAME}}",
    )  # fmt: skip
