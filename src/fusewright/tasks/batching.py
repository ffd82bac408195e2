"""From rows to batches: examples of one item each, put together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusewright.tasks.errors import DataError
from fusewright.tasks.rows import DataSplit, missing
from fusewright.tasks.task import Batch, Split, Task

if TYPE_CHECKING:
    from torch import Tensor

Example = Any
"""What one item is before it joins a batch: a small picture (uint8), a list of token ids, …"""


class Prepared(Split):
    """Rows that a task has decoded, resized or tokenised already, held in memory."""

    def __init__(self, examples: Sequence[Example], task: str, name: str) -> None:
        self.examples, self.task, self.name = examples, task, name

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        return {"example": [self.examples[n] for n in numbers]}


@dataclass(frozen=True)
class BatchedTask(Task):
    """A task that makes one example of each row, and a batch of several examples."""

    @abstractmethod
    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Example]:
        """One example for each row. Raises DataError naming ``where`` and the row."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of examples: tensors that share their first axis."""

    def check(self, split: Split) -> None:
        """Raises DataError if the split does not fit this task."""

    def prepared(self, split: Split, limit: int | None = None, at_once: int = 256) -> Prepared:
        """The first ``limit`` rows, decoded or tokenised once, for use many times.

        What is held is small (pictures as uint8 at the model's size, token ids); ``batches`` and
        ``evaluate`` take it in place of the split and give the same.
        """
        split = self.ready(split)
        if isinstance(split, Prepared):
            return split if limit is None else Prepared(split.examples[:limit], self.name, "")
        chunks = _chunks(np.arange(_count(split, limit)), at_once)
        self.check(split)
        return Prepared([e for at in chunks for e in self._examples(split, at)], self.name, "")

    def batches(
        self, split: Split, size: int, *, seed: int | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        """Batches in row order, or shuffled by ``seed``; of the first ``limit`` rows.

        Raises DataError if the split is empty or does not fit this task.
        """
        split = self.ready(split)
        self.check(split)
        order = np.arange(_count(split, limit))
        if seed is not None:
            order = np.random.default_rng(seed % 2**64).permutation(order)
        for numbers in _chunks(order, size):
            yield self._batch(split, numbers)

    def _batch(self, split: Split, numbers: list[int]) -> Batch:
        import torch

        return self.collate(self._examples(split, numbers)) | {"items": torch.tensor(numbers)}

    def _examples(self, split: Split, numbers: list[int]) -> list[Example]:
        rows = split.rows(numbers)
        if "example" in rows:
            return list(rows["example"])
        return self.encode(rows, numbers, where(split))


def _count(split: Split, limit: int | None) -> int:
    count = len(split) if limit is None else min(limit, len(split))
    if count < 1:
        raise DataError("there is no item", where=where(split), expected="at least one row")
    return count


def _chunks(order: Any, size: int) -> Iterator[list[int]]:
    return (order[at : at + size].tolist() for at in range(0, len(order), size))


def where(split: Split) -> str:
    """What to call a split in messages."""
    return str(getattr(split, "name", type(split).__name__))


def column(
    rows: Mapping[str, Sequence[Any]], role: str, place: str, numbers: Sequence[int]
) -> Sequence[Any]:
    """A column of the rows, which have these ``numbers``. Raises DataError if there is none, or a
    row has nothing there."""
    if role not in rows:
        raise missing(role, list(rows), place)
    for number, value in zip(numbers, rows[role], strict=True):
        if value is None:
            raise DataError(f"a row has no {role}", where=f"{place}, row {number}",
                            expected=f"a {role} in each row", found="null",
                            fix="leave such rows out")  # fmt: skip
    return rows[role]


def check_classes(split: Split, classes: Sequence[str]) -> None:
    """Raises DataError if the split names other classes than the task's head has."""
    named = split.classes if isinstance(split, DataSplit) else None
    if named is not None and tuple(named) != tuple(classes):
        odd = next((a for a, b in zip(named, classes, strict=False) if a != b), None)
        raise DataError(
            "the data have other classes than the head", where=where(split),
            expected=f"{len(classes)} classes: {_few(classes)}",
            found=f"{len(named)} classes: {_few(named)}" + (f"; first: {odd}" if odd else ""),
            fix="use the head of this data set, or name the classes in the data source",
        )  # fmt: skip


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
