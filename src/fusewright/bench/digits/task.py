"""The digits as tasks of the house: splits, batches and outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright.bench.digits import tasks
from fusewright.bench.digits.model import features
from fusewright.tasks.classification import classified
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.pictures import Pictures
from fusewright.tasks.task import Batch, Split, Task

QUESTIONS = {task.name: task for task in tasks.TASKS}


@dataclass(frozen=True)
class DigitsSplit(Split):
    """Images and their digits; every task sees the same rows."""

    content: tasks.Split

    @classmethod
    def of(cls, part: str) -> DigitsSplit:
        """``train``, ``validation`` or ``test``."""
        return cls(tasks.splits()[part])

    def __len__(self) -> int:
        return len(self.content)

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        from PIL import Image

        shades = (self.content.images[list(numbers), 0] * 255).round().to(torch.uint8).numpy()
        digits = self.content.digits[list(numbers)].tolist()
        return {"image": [Image.fromarray(image) for image in shades], "digit": digits}


@dataclass(frozen=True)
class DigitsTask(Task):
    """One question about a digit, answered through a frozen ``head`` (classes, width)."""

    kind: ClassVar[str] = "digits"

    head: Tensor = field(compare=False)

    @property
    def pictures(self) -> Pictures:
        """What a batch's images are: raw pixels."""
        return Pictures("images")

    @property
    def question(self) -> tasks.Task:
        return QUESTIONS[self.name]

    def batches(
        self, split: Split, size: int, *, seed: int | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        assert isinstance(split, DigitsSplit)
        count = len(split) if limit is None else min(limit, len(split))
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        for items in order.split(size):
            yield {
                "images": tasks.seen(split.content.images[items], self.question.view),
                "labels": self.question.labels(split.content.digits[items]),
                "items": items,
            }

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found = features(model, batch["images"])
        return found @ self.head.to(found).T

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"])

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        return classified((self.logits(model, batch), batch["labels"]) for batch in batches)
