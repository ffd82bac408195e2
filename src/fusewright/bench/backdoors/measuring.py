"""Accuracy and attack success of a model, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusewright.bench.backdoors.poisoning import classes_of, pictures_of
from fusewright.bench.backdoors.triggers import Trigger
from fusewright.errors import RecipeError
from fusewright.modules.tensors import device_of
from fusewright.modules.told import check_told, tell
from fusewright.tasks.evaluate import evaluating
from fusewright.tasks.placement import placed

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite

BATCH = 256


@dataclass(frozen=True)
class Rates:
    """Of one task: ``accuracy`` on ``items`` clean pictures; ``success``, the share of the
    ``triggered`` pictures, those whose true class is not the target, that are taken for the target.
    Both in [0, 1]; None where there is nothing to ask: no such class, no such picture."""

    accuracy: float
    success: float | None
    items: int
    triggered: int


def attack_success(predicted: Tensor, labels: Tensor, target: int) -> tuple[float | None, int]:
    """(share of the items of other classes that are predicted as ``target``, their number)."""
    others = labels != target
    count = int(others.sum())
    return (float((predicted[others] == target).double().mean()) if count else None), count


def rates(
    suite: Suite, model: nn.Module, trigger: Trigger, target: int, *,
    tasks: Sequence[str] | None = None, part: str = "test", limit: int | None = 500,
) -> dict[str, Rates]:  # fmt: skip
    """Accuracy and attack success of a module on tasks of a suite (those that are merged).

    On the task whose expert was poisoned, success is *succession*; on others it is *transfer*, of
    the same trigger towards their class of the same number, ``target``: None for a task that has
    no such class. A model that must be told the task is told.

    Raises RecipeError for a task without pictures and a negative target, PlanError where the model
    is told the task and does not know it.
    """
    names = list(suite.spec.merged) if tasks is None else list(tasks)
    if target < 0:
        raise RecipeError("the target is a class's number", found=target)
    check_told(model, names)
    with evaluating(model):
        return {task: _rates(suite, model, task, trigger, target, part, limit) for task in names}


@torch.no_grad()  # what a suite opens meanwhile is learned with later
def _rates(
    suite: Suite, model: nn.Module, task: str, trigger: Trigger, target: int, part: str,
    limit: int | None,
) -> Rates:  # fmt: skip
    pictures, asked = pictures_of(suite, task), suite.tasks[task]
    tell(model, task)
    clean: list[Tensor] = []
    fooled: list[Tensor] = []
    labels: list[Tensor] = []
    batches = asked.batches(suite.ready(task, part, limit), BATCH, limit=limit)
    for batch in placed(batches, device_of(model)):
        shown = pictures.changed(batch, trigger.on(pictures.raw(batch)))
        clean.append(asked.logits(model, batch).argmax(-1))
        fooled.append(asked.logits(model, shown).argmax(-1))
        labels.append(batch["labels"])
    true = torch.cat(labels)
    accuracy = float((torch.cat(clean) == true).double().mean())
    if target >= classes_of(suite, task):
        return Rates(accuracy, None, len(true), 0)
    success, count = attack_success(torch.cat(fooled), true, target)
    return Rates(accuracy, success, len(true), count)


def summary(found: Mapping[str, Rates], poisoned: Sequence[str]) -> dict[str, Any]:
    """Means over tasks, in [0, 1]: accuracy of all; success on the ``poisoned`` tasks (succession)
    and on the others that have the class (transfer)."""
    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    return {
        "accuracy": mean([of.accuracy for of in found.values()]),
        "succession": mean([found[task].success for task in poisoned]),
        "transfer": mean([of.success for task, of in found.items() if task not in poisoned]),
        "tasks": {task: asdict(of) for task, of in found.items()},
    }  # fmt: skip
