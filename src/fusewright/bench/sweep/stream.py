"""One stream of all tasks' test rows, mixed, one row at a time: what deployment looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusewright.modules.told import tell
from fusewright.tasks.evaluate import evaluating
from fusewright.tasks.outcomes import Outcomes

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite


def mixed(
    suite: Suite, module: nn.Module, tasks: Sequence[str], rows: int, limit: int | None = None
) -> dict[str, Outcomes]:
    """Outcomes on the first ``rows`` test rows of each task (of its first ``limit``), in batches of
    one, in an order that mixes the tasks at random and follows from the pool's seed.

    An answer that depends on its own input alone is the same as in batches of one task; routing
    that is averaged over a batch is not. A module that must be told the task is told it.
    """
    import torch

    from fusewright.modules.tensors import device_of
    from fusewright.tasks.placement import placed

    asked, device = {task: suite.asked(task) for task in tasks}, device_of(module)
    splits = {task: asked[task].ready(suite.ready(task, "test", limit)) for task in tasks}
    most = rows if limit is None else min(rows, limit)
    counts = [min(most, len(splits[task])) for task in tasks]
    batches = {task: placed(asked[task].batches(splits[task], 1, limit=count), device)
               for task, count in zip(tasks, counts, strict=True)}  # fmt: skip
    parts: dict[str, list[Outcomes]] = {task: [] for task in tasks}
    order = np.random.default_rng(suite.seed).permutation(np.repeat(np.arange(len(tasks)), counts))
    with evaluating(module), torch.inference_mode():
        for task in (tasks[at] for at in order):
            tell(module, task)
            parts[task].append(asked[task].outcomes(module, iter([next(batches[task])])))
    return {task: joined(found) for task, found in parts.items()}


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several batches as one, in their order."""
    return Outcomes(
        parts[0].metric, np.concatenate([part.score for part in parts]),
        np.concatenate([part.weight for part in parts]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
    )  # fmt: skip
