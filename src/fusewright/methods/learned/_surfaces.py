"""Where a perturbation meets a task: in its pictures, or in the embeddings of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules.embeddings import embedded, embedding_size, input_embeddings
from fusewright.modules.perturbations import added

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question


class Surface(ABC):
    """One task's."""

    def __init__(self, question: Question) -> None:
        self.question = question

    @abstractmethod
    def start(self, model: nn.Module, batch: Any) -> Tensor:
        """No perturbation of each of a batch's items: (items, …), zeros."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any, delta: Tensor) -> Tensor:
        """What the model says of the batch under δ, of one item for all or of each its own."""


class PictureSurface(Surface):
    """δ (items, channels, height, width) is added to raw pixels in [0, 1], and clamped there."""

    def start(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.zeros_like(self._raw(batch))

    def logits(self, model: nn.Module, batch: Any, delta: Tensor) -> Tensor:
        pictures = self.question.pictures
        assert pictures is not None
        changed = pictures.changed(batch, added(self._raw(batch), delta))
        return self.question.logits(model, changed)

    def _raw(self, batch: Any) -> Tensor:
        assert self.question.pictures is not None
        return self.question.pictures.raw(batch)


class TokenSurface(Surface):
    """δ (items, 1, width) is added to the embedding of every token, in units of the root mean
    square of the base's embeddings: texts differ in length, and models in scale. Raises PlanError
    where a task shows the model no tokens, or other rows than its items."""

    def __init__(self, task: str, question: Question, embeddings: nn.Embedding) -> None:
        super().__init__(question)
        self.task, self.unit = task, embedding_size(embeddings)

    def start(self, model: nn.Module, batch: Any) -> Tensor:
        seen: list[Tensor] = []

        def watch(vectors: Tensor) -> Tensor:
            seen.append(vectors.detach())
            return vectors

        with torch.no_grad(), embedded(model, watch):
            self.question.logits(model, batch)
        if not seen:
            raise _neither(self.task)
        count, _, width = seen[0].shape
        return seen[0].new_zeros(count, 1, width)

    def logits(self, model: nn.Module, batch: Any, delta: Tensor) -> Tensor:
        def moved(vectors: Tensor) -> Tensor:
            if len(delta) not in (1, len(vectors)):
                raise PlanError(
                    "a task shows the model other rows than those that are perturbed",
                    where=f"task {self.task}", expected=len(delta), found=len(vectors),
                    fix="a task that shows each item once, in one batch",
                )  # fmt: skip
            return vectors + self.unit * delta

        with embedded(model, moved):
            return self.question.logits(model, batch)


def surface_of(task: str, question: Question, model: nn.Module) -> Surface:
    """A task's. Raises PlanError for one of neither pictures nor tokens."""
    if question.pictures is not None:
        return PictureSurface(question)
    embeddings = input_embeddings(model)
    if embeddings is None:
        raise _neither(task)
    return TokenSurface(task, question, embeddings)


def _neither(task: str) -> PlanError:
    return PlanError(
        "the defence perturbs pictures or embeddings of tokens, and none are known of this task",
        where=f"task {task}",
        expected="an image task, or tokens and a model of transformers that embeds them",
        found="batches without a description of pictures, and a model that embeds no tokens",
        fix='data=suite.unlabelled() of an image suite, or adaptation(batches, '
            'pictures=Pictures("pixel_values", mean=..., std=...))',
    )  # fmt: skip
