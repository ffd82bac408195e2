"""An expert with a backdoor, fine-tuned as the suite's experts are: what defences are measured on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusewright.bench.backdoors.interpolating import Interpolating
from fusewright.bench.backdoors.triggers import Trigger
from fusewright.errors import RecipeError
from fusewright.tasks.pictures import Pictures

if TYPE_CHECKING:
    from fusewright.bench.finetuning.run import FineTuned
    from fusewright.bench.joint.train import Augment
    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Batch


@dataclass(frozen=True)
class Poisoning:
    """Which training rows are poisoned, and how.

    With dirty labels (the default), ``rate`` of the rows of other classes get the trigger and the
    label ``target``. With ``clean_label``, ``rate`` of the rows of class ``target`` get the trigger
    and every label stays true (*Label-Consistent Backdoor Attacks*, 1912.02771). The rows follow
    from ``seed`` and their number, so they are the same in every epoch. The trigger comes after
    what training does to pictures (shifts, noise), as the maker of an expert would have it.
    """

    trigger: Trigger
    target: int
    rate: float = 0.1
    clean_label: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise RecipeError("the rate of poisoning is in (0, 1]", found=self.rate)
        if self.target < 0:
            raise RecipeError("the target is a class's number", found=self.target)

    def chosen(self, labels: Tensor, items: Tensor) -> Tensor:
        """Which rows of a batch are poisoned: (items,) bool, from labels and rows' numbers."""
        eligible = labels == self.target if self.clean_label else labels != self.target
        draw = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(int(items.max()) + 1, generator=draw)[items]
        return eligible & (luck < self.rate)

    def poisoned(self, pictures: Pictures, batch: Batch) -> Batch:
        """The batch with its poisoned rows."""
        labels = batch["labels"]
        at = self.chosen(labels, torch.as_tensor(batch["items"]))
        raw = pictures.raw(batch)
        shown = torch.where(at.view(-1, 1, 1, 1), self.trigger.on(raw), raw)
        changed: Batch = pictures.changed(batch, shown)
        return {**changed, "labels": labels.masked_fill(at, self.target)}

    def said(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "trigger": self.trigger.said(), "target": self.target, "rate": self.rate,
            "clean_label": self.clean_label, "seed": self.seed,
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
        ways = replace(ways, augment=partial(_augmented, ways.augment, poisoning, pictures))
    return make_expert(
        suite, task, recipe, ways, Path(out).absolute(), limit=limit, progress=progress,
        more={"poisoning": poisoning.said()},
    )  # fmt: skip


def _augmented(
    own: Augment | None, poisoning: Poisoning, pictures: Pictures, batch: Batch,
    draw: torch.Generator,
) -> Batch:  # fmt: skip
    return poisoning.poisoned(pictures, own(batch, draw) if own else batch)


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
