"""A model on a task: an outcome for every item."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from warnings import warn
from weakref import WeakSet

from fusewright.errors import FusewrightError, FusewrightWarning
from fusewright.tasks.batching import Prepared
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.placement import moved
from fusewright.tasks.task import Batch, Progress, Split, Task

if TYPE_CHECKING:
    import torch
    from torch import nn


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """What the model does on every item of a split (of its first ``limit`` items), in their order.

    Batches stream: no logits and no decoded inputs are kept; ``task.prepared(split)`` in place of
    the split saves decoding for models that follow. ``dtype`` computes under autocast in that
    type, the weights stay as they are; None computes in the weights' own. ``progress`` is called
    with (items done, items in all) after every batch.

    The model is in evaluation mode meanwhile and on ``device``; its modes and its device are
    restored afterwards, also after an error. Warns once of what the task says must be known of its
    scores.

    Raises DataError if the data do not fit the task, FusewrightError for a ``dtype`` that autocast
    does not know.
    """
    import torch

    _warn_of(task, model)
    split = task.ready(split)
    total = len(split) if limit is None else min(limit, len(split))
    with ExitStack() as stack:
        stack.enter_context(_placed(model, torch.device(device)))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        own = _floating(model)
        if dtype not in (None, own):
            stack.enter_context(_cast(device, dtype))
            own = None
        batches = task.batches(split, batch_size, limit=limit)
        if not isinstance(split, Prepared):
            batches = _ahead(batches)
        return task.outcomes(model, _fed(batches, torch.device(device), own, total, progress))


_WARNED: WeakSet[nn.Module] = WeakSet()
"""Models of whose scores a caveat was told."""


def _warn_of(task: Task, model: nn.Module) -> None:
    if (said := task.caveat(model)) and model not in _WARNED:
        _WARNED.add(model)
        warn(f"{task.name}: {said}", FusewrightWarning, stacklevel=3)


def _cast(device: str | torch.device, dtype: torch.dtype | None) -> torch.autocast:
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        raise FusewrightError(
            "autocast computes in 16 bits only", expected="bfloat16, float16, or nothing",
            found=dtype, fix=f"model.to({dtype}) before it is evaluated",
        )  # fmt: skip
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    first = next(model.parameters(), None)
    home = None if first is None else first.device
    moves = home is not None and home != device
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(home)


def _floating(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made in another thread while the model is busy with the last."""
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(next, batches, None)
        while (batch := later.result()) is not None:
            later = pool.submit(next, batches, None)
            yield batch
            del batch


def _fed(
    batches: Iterator[Batch],
    device: torch.device,
    own: torch.dtype | None,
    total: int,
    progress: Progress | None,
) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        done += len(batch["items"])
        yield {  # what is true keeps its precision, whatever the weights'
            name: moved(value, device, None if name == "labels" else own)
            for name, value in batch.items()
        }
        del batch  # before the next is made, which then finds warm memory
        if progress is not None:
            progress(done, total)
