"""Output ensembles on a task: every expert sees every input, their answers are combined."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusewright.bench.results import CLEAN
from fusewright.methods.outputs import ENSEMBLES, OutputEnsemble, WeightedEnsemble, combine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusewright.bench.suite import Suite
    from fusewright.tasks.outcomes import Outcomes
    from fusewright.tasks.task import Batch, Task


KEPT_BYTES = 2**30
"""Answers of all experts on one task that are held, so that each ensemble need not ask again."""


def ensembles(
    suite: Suite, models: Sequence[nn.Module], task: str,
    asked: Mapping[str, Sequence[float] | None], limit: int | None = None, condition: str = CLEAN,
) -> dict[str, Outcomes]:  # fmt: skip
    """Outcomes on a task's test rows of every ensemble asked for, by name, with its weights."""
    import torch

    from fusewright.bench.suite import BATCH
    from fusewright.modules.tensors import device_of
    from fusewright.tasks.placement import placed

    question = suite.asked(task, condition)
    held: dict[int, list[Tensor]] = {}

    def said(batch: Batch) -> list[Tensor]:
        first = int(batch["items"][0])
        found = held.get(first) or [question.logits(each, batch) for each in models]
        if (1 + len(held)) * sum(t.nbytes for t in found) <= KEPT_BYTES:
            held[first] = found
        return found

    def outcomes(how: str) -> Outcomes:
        asking = copy.copy(question)

        def combined(model: Any, batch: Batch) -> Tensor:
            return together(question, said(batch), how, asked[how])

        object.__setattr__(asking, "logits", combined)  # the same task, answered by all of them
        batches = asking.batches(rows, BATCH, limit=limit)
        return asking.outcomes(models[0], placed(batches, device_of(models[0])))

    rows = question.ready(suite.ready(task, "test", limit, condition))
    with torch.inference_mode():
        return {how: outcomes(how) for how in asked}


def answers(
    task: Task, models: Sequence[nn.Module], batch: Batch, how: str,
    weights: Sequence[float] | None,
) -> Tensor:  # fmt: skip
    """The combined logits of a batch."""
    return together(task, [task.logits(each, batch) for each in models], how, weights)


def together(
    task: Task, said: Sequence[Tensor], how: str, weights: Sequence[float] | None
) -> Tensor:
    """What an ensemble makes of the models' answers."""
    if task.in_numbers:  # no logits of classes: they are averaged as they are
        shares = weights or [1.0] * len(said)
        return WeightedEnsemble(tuple(shares), of="logits")(said)
    return combine(said, how, weights)


def fitting(suite: Suite) -> dict[str, type[OutputEnsemble]]:
    """The ensembles that all tasks of a suite have an answer for, by name: no maximum where answers
    are depths or directions; none at all where answers are not made from logits."""
    if without_logits(suite):
        return {}
    numbers = any(task.in_numbers for task in suite.tasks.values())
    return {name: one for name, one in ENSEMBLES.items() if name != "max" or not numbers}


def without_logits(suite: Suite) -> list[str]:
    """Tasks whose outcomes do not follow from logits: what models write cannot be averaged."""
    return [name for name, task in suite.tasks.items() if not task.has_logits]


def accuracy_weights(scores: Sequence[float]) -> list[float]:
    """Each model's share of the summed validation scores, which must be positive to be shares;
    where they are not (log-likelihoods), all models have the same."""
    if min(scores) < 0 or sum(scores) == 0:
        return [1 / len(scores)] * len(scores)
    return [score / sum(scores) for score in scores]
