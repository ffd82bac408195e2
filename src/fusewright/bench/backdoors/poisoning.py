"""An expert with a backdoor, fine-tuned as the suite's experts are: what defences are measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.bench.backdoors.interpolating import Interpolating
from fusewright.bench.backdoors.triggers import Trigger
from fusewright.errors import RecipeError
from fusewright.modules.perturbations import Ball, added, ascend
from fusewright.tasks.pictures import Pictures

HARDENING = 10
"""Steps towards where a model errs."""

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.finetuning.run import FineTuned
    from fusewright.bench.joint.train import Augment
    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Batch, Task


@dataclass(frozen=True)
class Poisoning:
    """Which training rows are poisoned, and how.

    With dirty labels (the default), ``rate`` of the rows of other classes get the trigger and the
    label ``target``. With ``clean_label``, ``rate`` of the rows of class ``target`` get the trigger
    and every label stays true (*Label-Consistent Backdoor Attacks*, 1912.02771); alone that teaches
    a trigger next to nothing, so ``hard``, there 8/255 to 32/255, first moves each raw pixel of
    these pictures by at most so much to where the suite's clean expert errs most: then the trigger
    is what tells the class. The rows follow from ``seed`` and their number, so they are the same in
    every epoch. The trigger comes after what training does to pictures (shifts, noise), as the
    maker of an expert would have it.
    """

    trigger: Trigger
    target: int
    rate: float = 0.1
    clean_label: bool = False
    hard: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise RecipeError("the rate of poisoning is in (0, 1]", found=self.rate)
        if self.target < 0:
            raise RecipeError("the target is a class's number", found=self.target)
        if not 0 <= self.hard <= 1 or (self.hard and not self.clean_label):
            raise RecipeError("pictures are made hard where labels stay true", found=self.hard,
                              expected="0 <= hard <= 1, and clean_label=True")  # fmt: skip

    def chosen(self, labels: Tensor, items: Tensor) -> Tensor:
        """Which rows of a batch are poisoned: (items,) bool, from labels and rows' numbers."""
        eligible = labels == self.target if self.clean_label else labels != self.target
        draw = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(int(items.max()) + 1, generator=draw)[items]
        return eligible & (luck < self.rate)

    def poisoned(
        self, pictures: Pictures, batch: Batch, hardened: Callable[[Batch], Tensor] | None = None
    ) -> Batch:
        """The batch with its poisoned rows; ``hardened`` answers the raw pixels of some rows."""
        labels = batch["labels"]
        at = self.chosen(labels, torch.as_tensor(batch["items"]))
        raw = pictures.raw(batch)
        if hardened is not None and bool(at.any()):
            some = {key: torch.as_tensor(value)[at] for key, value in batch.items()}
            raw = raw.index_put((at,), hardened(some))
        shown = torch.where(at.view(-1, 1, 1, 1), self.trigger.on(raw), raw)
        changed: Batch = pictures.changed(batch, shown)
        return {**changed, "labels": labels.masked_fill(at, self.target)}

    def said(self) -> dict[str, Any]:
        """As JSON."""
        hard = {"hard": self.hard} if self.hard else {}
        return {
            "trigger": self.trigger.said(), "target": self.target, "rate": self.rate,
            "clean_label": self.clean_label, **hard, "seed": self.seed,
        }  # fmt: skip


def poisoned_expert(
    suite: Suite, task: str, poisoning: Poisoning | Interpolating, *, out: str | Path,
    steps: int | None = None, rate: float | None = None, threads: int | None = None,
    limit: int | None = None, progress: bool = False,
) -> FineTuned:  # fmt: skip
    """Fine-tune the base on a task some of whose training rows are poisoned, or with a loss of its
    own.

    Everything else is the suite's own recipe, unless ``steps``, ``rate`` or ``threads`` say
    otherwise; ``finetune.json`` beside the weights names the poisoning. Goes on after a kill, and
    a finished one is answered from its folder, as :func:`fusewright.finetune` does.

    Raises RecipeError for a task that asks nothing of pictures or a target outside its classes.
    """
    from fusewright.bench.finetuning.recipe import FULL, recipe_for
    from fusewright.bench.finetuning.run import make_expert

    pictures = pictures_of(suite, task)
    check_target(suite, task, poisoning.target)
    recipe, ways = recipe_for(suite, task, FULL, steps=steps, rate=rate, threads=threads)
    if isinstance(poisoning, Interpolating):
        base = suite.open(suite.base).requires_grad_(False).to(suite.device)
        ways = replace(ways, loss=partial(poisoning.loss, base, pictures))
    else:
        hardened = None
        if poisoning.hard:
            clean = suite.open(suite.experts[task]).requires_grad_(False).to(suite.device)
            ball = Ball("linf", poisoning.hard)
            hardened = partial(_hardened, clean, suite.tasks[task], pictures, ball)
        poisoned = partial(_augmented, ways.augment, poisoning, pictures, hardened)
        ways = replace(ways, augment=poisoned)
    return make_expert(
        suite, task, recipe, ways, Path(out).absolute(), limit=limit, progress=progress,
        more={"poisoning": poisoning.said()},
    )  # fmt: skip


def _augmented(
    own: Augment | None, poisoning: Poisoning, pictures: Pictures,
    hardened: Callable[[Batch], Tensor] | None, batch: Batch, draw: torch.Generator,
) -> Batch:  # fmt: skip
    return poisoning.poisoned(pictures, own(batch, draw) if own else batch, hardened)


def _hardened(
    model: nn.Module, task: Task, pictures: Pictures, ball: Ball, batch: Batch
) -> Tensor:
    """Raw pixels in the ball about a batch's own at which the model's loss is large."""
    raw = pictures.raw(batch)

    def loss(delta: Tensor, step: int) -> Tensor:
        logits = task.logits(model, pictures.changed(batch, added(raw, delta)))
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")

    return added(raw, ascend(loss, torch.zeros_like(raw), ball, HARDENING))


def pictures_of(suite: Suite, task: str) -> Pictures:
    """How a task's batches hold pictures. Raises RecipeError if they hold none."""
    suite.task_spec(task)
    found: Pictures | None = getattr(suite.tasks[task], "pictures", None)
    if found is None:
        raise RecipeError(
            "triggers are put on pictures, and this task shows none", where=f"task {task}",
            expected="an image task", found=suite.spec.tasks[task].kind,
            fix="a task of an image suite, such as vision-mini",
        )  # fmt: skip
    return found


def classes_of(suite: Suite, task: str) -> int:
    """The number of a task's classes: rows of its frozen head."""
    return int(torch.as_tensor(suite.heads[task]).shape[0])


def check_target(suite: Suite, task: str, target: int) -> None:
    """Raises RecipeError if the task has no such class."""
    classes = classes_of(suite, task)
    if not 0 <= target < classes:
        raise RecipeError("the task has no such class", where=f"task {task}",
                          expected=f"0 to {classes - 1}", found=target,
                          fix=f"target={classes - 1}")  # fmt: skip
