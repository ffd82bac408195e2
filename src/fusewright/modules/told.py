"""Models that must be told the task of their inputs: how they are told, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusewright.errors import PlanError, nearest

if TYPE_CHECKING:
    from torch import nn


def tell(module: nn.Module, task: str) -> bool:
    """Tell a module that asks for it the task of what follows; False if it does not know it."""
    asks: Any = module
    if not hasattr(module, "set_task"):
        return True
    known = task in asks.tasks
    if known:
        asks.set_task(task)
    return known


def check_told(module: nn.Module, tasks: Sequence[str]) -> None:
    """Raises PlanError, before anything is asked, for a module that asks for the task and does not
    know one of these."""
    unknown = [task for task in tasks if not tell(module, task)]
    if unknown:
        asks: Any = module
        raise PlanError(
            "the model must be told the task of its inputs, and does not know these",
            where=", ".join(unknown), expected=f"among {', '.join(asks.tasks)}",
            fix="merge it with experts named as the suite's tasks, or tasks=[those that it knows]",
        )  # fmt: skip


def place_of(task: str, tasks: Sequence[str]) -> int:
    """Which of the tasks it is. Raises PlanError if it is none."""
    if task not in tasks:
        close = nearest(task, list(tasks))
        raise PlanError("the model does not know this task", found=repr(task),
                        expected=", ".join(tasks),
                        fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    return list(tasks).index(task)


def not_told(tasks: Sequence[str]) -> PlanError:
    """For a model that is called before it is told."""
    return PlanError("the model must be told the task of its inputs",
                     expected=f"one of {', '.join(tasks)}",
                     fix=f"model.set_task({tasks[0]!r})")  # fmt: skip
