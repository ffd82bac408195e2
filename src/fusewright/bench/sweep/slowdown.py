"""How much longer answers take than the base's: measured in one process, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fusewright.bench.sweep.ensembles import answers

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite
    from fusewright.tasks.task import Batch, Task

ITEMS = 32
"""Of each merged task's test rows: one batch, the same for everything that is measured."""
TURNS = 7

PLAIN = {"slowdown": 1.0}
"""Of one model with the base's architecture: it does the base's work, whatever its weights are."""

Questions = Sequence[tuple["Task", "Batch"]]


def questions(suite: Suite, tasks: Sequence[str], limit: int | None) -> Questions:
    """The fixed batch of each task that is answered by logits."""
    import torch

    from fusewright.tasks.placement import moved

    size = min(ITEMS, limit or ITEMS)
    found = []
    for name in (name for name in tasks if suite.tasks[name].has_logits):
        asked, ready = suite.tasks[name], suite.ready(name, "test", limit)
        first = next(asked.batches(asked.ready(ready), size, limit=size))
        found.append((asked, moved(first, torch.device(suite.device))))
    return found


def of_ensemble(
    asked: Questions, base: nn.Module, models: Sequence[nn.Module], how: str,
    weights: Sequence[float] | None,
) -> float:  # fmt: skip
    """Of answers that are combined from all models'."""
    return slowdown(
        lambda: [answers(task, models, batch, how, weights) for task, batch in asked],
        lambda: [task.logits(base, batch) for task, batch in asked],
    )


def of_model(asked: Questions, base: nn.Module, model: nn.Module) -> float:
    """Of one model of another architecture than the base's."""
    return slowdown(
        lambda: [task.logits(model, batch) for task, batch in asked],
        lambda: [task.logits(base, batch) for task, batch in asked],
    )


def of_experts(asked: Questions, base: nn.Module, experts: Mapping[str, nn.Module]) -> float:
    """Of each task's own expert: one model answers each item, but all are kept at hand."""
    return slowdown(
        lambda: [task.logits(experts[task.name], batch) for task, batch in asked],
        lambda: [task.logits(base, batch) for task, batch in asked],
    )


def slowdown(ours: Callable[[], Any], base: Callable[[], Any], turns: int = TURNS) -> float:
    """The median, over turns, of our seconds for each second of the base's.

    Both run once before (what is made at first use is no cost), then one after the other, so that
    whatever else the machine does weighs on both.
    """
    import torch

    with torch.inference_mode():
        ours(), base()
        return median(_seconds(ours) / _seconds(base) for _ in range(turns))


def _seconds(act: Callable[[], Any]) -> float:
    import torch

    began = perf_counter()
    act()
    if torch.accelerator.is_available():  # it answers later than it is asked
        torch.accelerator.synchronize()
    return perf_counter() - began
