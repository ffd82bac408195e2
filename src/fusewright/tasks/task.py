"""The contract of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusewright.tasks.outcomes import Outcomes

Batch = Mapping[str, Any]
"""What a model is called with and what is asked of it; tensors share their first axis, "items"
holds the rows' numbers in their split."""

Progress = Callable[[int, int], None]
"""Called with (items done, items in all)."""


class Split(ABC):
    """One part of a data set: rows that never change their numbers."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        """Columns of the rows asked for, in that order (images as PIL images)."""


@dataclass(frozen=True)
class Task(ABC):
    """A question about a data set. A frozen value; one subclass for each kind of question."""

    kind: ClassVar[str] = ""
    """How suites name it: "image-classification", "text-classification", …"""
    has_logits: ClassVar[bool] = True
    """Whether ``outcomes`` follow from ``logits``, so that outputs of models can be combined."""
    in_numbers: ClassVar[bool] = False
    """Whether what ``logits`` answers with are numbers, such as depths, and not of classes."""
    compared: ClassVar[tuple[str, ...]] = ("label", "labels")
    """What a batch holds that answers are compared with: not for methods without labels."""
    conditions: ClassVar[tuple[str, ...]] = ()
    """How its inputs can be corrupted, by name."""

    name: str

    def ready(self, split: Split) -> Split:
        """A split whose rows are this task's items: itself, unless items are cut from rows."""
        return split

    def under(self, condition: str) -> Self:
        """The same question about corrupted inputs: one of ``conditions``."""
        raise NotImplementedError

    @abstractmethod
    def batches(
        self, split: Split, size: int, *, seed: int | None = None, limit: int | None = None
    ) -> Iterator[Batch]:
        """Batches in row order, or shuffled by ``seed``; of the first ``limit`` rows."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model answers: (items, classes), or (items, tokens, vocabulary)."""

    def answered(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of every single answer that a batch asks for, padding left out: (answers,
        classes). What methods that learn look at."""
        return self.logits(model, batch).flatten(0, -2)

    def targets(self, batch: Batch) -> Tensor:
        """The class that is right for each of these answers: (answers,)."""
        found: Tensor = batch["labels"]
        return found

    def caveat(self, model: nn.Module) -> str:
        """What must be known of a model's scores to read them rightly; "" if nothing."""
        return ""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch: what an expert of this task is trained by."""

    @abstractmethod
    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        """Every item's score."""
