"""The training loop of all joint baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle, relative, seeded
from fusewright.bench.joint.combine import Combination, combination
from fusewright.errors import FusewrightError, NumericError, RecipeError
from fusewright.modules.tensors import device_of
from fusewright.tasks.placement import moved
from fusewright.tasks.task import Batch, Progress, Split, Task

COMBINATION_RATE = 1e-2
"""Of what a combination learns (log-variances start at 0 and move by units, which fine-tuning's
rates would not let them)."""

Augment = Callable[[Batch, torch.Generator], Batch]
"""Another version of a batch, drawn with the generator."""
Loss = Callable[[Task, nn.Module, Batch], Tensor]
"""What a step minimises on a batch of a task."""


def train_joint(
    base_module: nn.Module,
    tasks: Sequence[Task],
    splits: Mapping[str, Split],
    *,
    how: str = "sum",
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    by_size: bool = False,
    autocast: torch.dtype | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of the base, fine-tuned on all tasks at once; the base is not changed.

    ``splits``: each task's training rows, by its name. ``how``: a key of ``COMBINATIONS``.
    ``steps`` of ``batch_size`` items, which the tasks share equally: with the steps of all experts
    together and their batch size, as many steps are made and items seen as all experts' training
    took. ``lr``: the peak, AdamW under a one-cycle schedule with a tenth of warm-up, gradients
    clipped at norm 1, as the experts are trained. ``betas``: AdamW's, torch's by default.
    ``by_size``: ``lr`` is relative to each tensor's size (:func:`.descent.relative`). ``autocast``:
    the dtype of the losses' forward passes, None for the model's own; not to be wrapped around this
    function, because torch keeps cast weights until such a region ends. ``augment``: what the
    experts' training does to a batch (shifts of pictures …), if anything. Only parameters that
    require gradients are trained. Everything follows from ``seed``; the global random state is
    given back untouched. ``progress`` is called with (steps done, steps in all).

    Raises RecipeError for an unknown ``how``, fewer items than tasks in a batch, or nothing to
    train; FusewrightError for a missing or empty split; NumericError when a loss is no longer
    finite.
    """
    _check(tasks, splits, steps, batch_size)
    model = deepcopy(base_module).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise RecipeError("the model has no parameter that requires gradients")
    plan, share = combination(how, len(tasks)), batch_size // len(tasks)
    with seeded(seed, parameters[0].device):
        streams = [task_stream(task, splits[task.name], share, seed, augment) for task in tasks]
        descent = _descent(parameters, plan, steps, lr, weight_decay, betas, by_size)

        def losses(step: int) -> list[Tensor]:
            given = zip(tasks, streams, strict=True)
            return [task_loss(task, model, next(stream), step, autocast) for task, stream in given]

        epoch = min(ceil(sum(len(splits[t.name]) for t in tasks) / batch_size), max(1, steps // 5))
        for step in _steps(steps, epoch, plan, progress):
            descent.begin()
            plan.backward(losses(step), parameters)
            descent.step()
    return model.eval()


def _steps(
    count: int, epoch: int, plan: Combination, progress: Progress | None
) -> Iterator[int]:
    """Steps from 1; after each the plan hears of an epoch's end, and the caller of the step."""
    for step in range(1, count + 1):
        yield step
        if step % epoch == 0:
            plan.end_epoch()
        if progress:
            progress(step, count)


def _descent(
    parameters: list[nn.Parameter], plan: Combination, steps: int, lr: float, decay: float,
    betas: tuple[float, float], by_size: bool,
) -> OneCycle:  # fmt: skip
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": decay}]
    if by_size:
        groups = relative(parameters, lr, decay)
    if learned := plan.parameters():
        groups.append({"params": learned, "weight_decay": 0.0, "lr": COMBINATION_RATE})
    return OneCycle(groups, steps, lr, clipped=parameters, betas=betas)


def task_stream(
    task: Task, split: Split, size: int, seed: int, augment: Augment | None
) -> Iterator[Batch]:
    """Batches without end, every epoch in an order of its own; an epoch's rest is left out, so
    that every step weighs the tasks alike."""
    size, epoch = min(size, len(split)), 0
    while True:
        digest = sha256(f"{seed} joint {task.name} {epoch}".encode()).digest()
        order, any_full = int.from_bytes(digest[:4], "little"), False
        draw = torch.Generator().manual_seed(order)
        for batch in task.batches(split, size, seed=order):
            if len(batch["items"]) == size:
                any_full = True
                yield augment(batch, draw) if augment else batch
        if not any_full:
            raise FusewrightError("a task gives no full batch", where=task.name,
                                  expected=f"batches of {size} items")  # fmt: skip
        epoch += 1


def _check(tasks: Sequence[Task], splits: Mapping[str, Split], steps: int, batch_size: int) -> None:
    if not tasks or batch_size < len(tasks) or steps < 1:
        raise RecipeError(
            "joint training needs a task, a step, and an item of every task in each batch",
            expected=f"batch_size ≥ {len(tasks)} and steps ≥ 1",
            found=f"{len(tasks)} tasks, batch_size {batch_size}, {steps} steps",
        )
    for task in tasks:
        if not splits.get(task.name):
            raise FusewrightError("a task has no training rows", where=task.name,
                                  expected="a split with rows under the task's name",
                                  found=f"splits of {', '.join(splits) or 'no task'}")  # fmt: skip


def task_loss(
    task: Task, model: nn.Module, batch: Batch, step: int, autocast: torch.dtype | None,
    own: Loss | None = None,
) -> Tensor:  # fmt: skip
    """One task's loss, or another in its place; a region of its own, so that no two losses share a
    cast weight."""
    device = device_of(model)
    batch = moved(batch, device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss = own(task, model, batch) if own else task.loss(model, batch)
    if not isfinite(loss.item()):
        raise NumericError("a loss is not finite", where=f"{task.name}, step {step}",
                           found=loss.item(), fix="lower the learning rate")  # fmt: skip
    return loss
