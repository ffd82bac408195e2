"""Whether a merge still answers as the experts do, measured without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusewright.modules.functional import with_weights
from fusewright.modules.vectors import TaskVectors

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question


class Agreement:
    """The share of items on which a model predicts what each task's own expert predicts.

    Experts are good at their own tasks, so it follows accuracy where entropy need not: a model that
    is confidently wrong agrees with nobody. Each expert is asked once, about the first ``rows``
    items of its task in an order of their own.
    """

    def __init__(
        self, model: nn.Module, vectors: TaskVectors, questions: Mapping[str, Question],
        size: int, rows: int, seed: int,
    ) -> None:  # fmt: skip
        self.questions = questions
        self.asked: dict[str, list[tuple[Any, Tensor]]] = {}
        for task, question in questions.items():
            expert = {n: vectors.base[n] + vectors.read(task, n).dense().to(vectors.base[n])
                      for n in vectors.names}  # fmt: skip
            batches = islice(question.stream(size, seed), -(-rows // size))
            with with_weights(model, expert), torch.no_grad():
                self.asked[task] = [(b, question.logits(model, b).argmax(-1)) for b in batches]

    def of(self, model: nn.Module) -> dict[str, float]:
        """The share by task, in [0, 1]."""
        with torch.no_grad():
            return {task: self._share(model, task, asked) for task, asked in self.asked.items()}

    def _share(self, model: nn.Module, task: str, asked: Sequence[tuple[Any, Tensor]]) -> float:
        same = [self.questions[task].logits(model, b).argmax(-1) == said for b, said in asked]
        return float(torch.cat([each.reshape(-1) for each in same]).double().mean())
