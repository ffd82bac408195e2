"""What all classifiers share: labels, cross-entropy, and what is recorded of each item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from fusewright.tasks.batching import BatchedTask, check_classes, column
from fusewright.tasks.errors import DataError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.rows import as_labels
from fusewright.tasks.task import Batch, Split

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Classification(BatchedTask):
    """Which of some classes an item belongs to.

    ``classes`` are their names, in the order of labels. A split that names other classes is
    refused, as is a label outside them.
    """

    classes: tuple[str, ...] = field(default=())

    def check(self, split: Split) -> None:
        check_classes(split, self.classes)

    def labels(self, rows: Mapping[str, Any], numbers: Sequence[int], place: str) -> list[int]:
        """The rows' labels. Raises DataError for one outside the classes."""
        given = column(rows, "label", place, numbers)
        found: list[int] = as_labels(given, self.classes, place, numbers).tolist()
        for number, label in zip(numbers, found, strict=True):
            if not 0 <= label < len(self.classes):
                raise DataError(
                    "a label is outside the head's classes", where=f"{place}, row {number}",
                    expected=f"0 to {len(self.classes) - 1}", found=label,
                    fix="use a labelled split and the head of this data set",
                )  # fmt: skip
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch, in nats."""
        import torch.nn.functional as F

        return F.cross_entropy(self.logits(model, batch), batch["labels"])

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        """Accuracy of each item; columns label, prediction, loss, confidence, entropy."""
        # map, unlike a loop, holds no batch while the next is made.
        return classified(map(lambda batch: (self.logits(model, batch), batch["labels"]), batches))


AT_ONCE = 16
"""Batches whose logits are looked at together."""
COLUMNS = ("label", "prediction", "loss", "confidence", "entropy")


def classified(answers: Iterator[tuple[Tensor, Tensor]]) -> Outcomes:
    """Outcomes from batches of logits (items, classes) and labels (items,).

    Five numbers are kept of each item; its logits wait for those of ``AT_ONCE`` batches. On an
    accelerator nothing waits for it until the end. Of equal logits the first class is predicted.
    """
    import numpy as np
    import torch

    seen = [_recorded(logits, labels) for logits, labels in _gathered(answers)]
    joined = [torch.cat(parts).cpu().numpy() for parts in zip(*seen, strict=True)]
    columns = dict(zip(COLUMNS, joined, strict=True))
    score = (columns["label"] == columns["prediction"]).astype(np.float64)
    return Outcomes("accuracy", score, np.ones_like(score), columns)


def _gathered(answers: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Several batches as one: what is recorded of few items costs as much as of many."""
    import torch

    while held := list(islice(answers, AT_ONCE)):
        yield tuple(torch.cat(parts) for parts in zip(*held, strict=True))


def _recorded(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    from fusewright.modules.answers import entropies

    logs = logits.log_softmax(dim=1)
    confidence, _ = logs.exp().max(dim=1)
    loss = -logs.gather(1, labels[:, None])[:, 0]
    return labels, logits.argmax(dim=1), loss, confidence, entropies(logs)
