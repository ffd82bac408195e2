"""One fit on several processes: each asks about some of the tasks, and gradients are summed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from fusewright.extras import needs

Found = TypeVar("Found")


@dataclass(frozen=True)
class Processes:
    """Which of ``count`` processes this is. They were started together, by ``accelerate launch``
    (or torchrun), and do the same but for the tasks that they ask about.

    Sums of gradients depend on how many there are in their last bits, as they do on threads.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def started(cls) -> Processes:
        """As the launcher said; one alone without it. Needs the extra ``accelerate``, if several.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        needs("accelerate", "accelerate").PartialState(cpu=True)
        return cls(int(os.environ["RANK"]), count)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def mine(self, tasks: Iterable[str]) -> list[str]:
        """The tasks that this one asks about."""
        return [task for at, task in enumerate(tasks) if at % self.count == self.index]

    def gathered(self, found: Mapping[str, Found], tasks: Iterable[str]) -> dict[str, Found]:
        """What each found of its own tasks, of all ``tasks`` in their order."""
        if self.count > 1:
            parts = _utils().gather_object([dict(found)])
            found = {task: value for part in parts for task, value in part.items()}
        return {task: found[task] for task in tasks}

    def summed(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in each of them."""
        if self.count == 1:
            return
        for parameter in parameters:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = _utils().reduce(own, "sum")

    def same_draws(self) -> None:
        """Give torch's generator the first one's state in all of them."""
        if self.count > 1:
            (state,) = _utils().broadcast_object_list([torch.get_rng_state()])
            torch.set_rng_state(state)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            _utils().wait_for_everyone()


def _utils():  # type: ignore[no-untyped-def]
    from importlib import import_module

    return import_module("accelerate.utils")
