"""Models that must be told the task of their inputs: what is said of a task they do not know."""

from __future__ import annotations

from collections.abc import Sequence

from fusewright.errors import PlanError, nearest


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
