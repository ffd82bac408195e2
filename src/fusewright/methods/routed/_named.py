"""Features whose task is known, and what they must be to be learned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusewright.errors import NumericError

_HELD_OUT = 10
"""Every tenth input is kept from the router's training, to choose its best state."""


def check_finite(task: str, features: Tensor) -> None:
    """Raises NumericError, naming the task, for features that nothing can be learned from."""
    odd = (~features.isfinite()).any(dim=1).nonzero()[:, 0].tolist()
    if odd:
        raise NumericError("what the model sees in inputs is not finite", where=f"task {task}",
                           found=f"{len(odd)} of {len(features)}, first number {odd[0]}",
                           fix="look at these inputs, or at the models' weights")  # fmt: skip


class Named:
    """Features (n, width) and the number of the task that each is of (n,)."""

    def __init__(self, features: Tensor, tasks: Tensor) -> None:
        self.features, self.tasks = features, tasks

    @classmethod
    def split(cls, seen: Sequence[Tensor]) -> tuple[Named, Named]:
        """What is learned from, and every tenth (one at least) to judge by."""
        last = [torch.arange(len(f)) % _HELD_OUT == min(_HELD_OUT, len(f)) - 1 for f in seen]
        return tuple(  # type: ignore[return-value]
            cls(torch.cat([f[m == held] for f, m in zip(seen, last, strict=True)]),
                torch.cat([torch.full((int((m == held).sum()),), t) for t, m in enumerate(last)]))
            for held in (False, True)
        )  # fmt: skip

    def count(self, size: int) -> int:
        """Batches of an epoch: of a size as equal as can be, none of one alone, of which
        normalisation makes nothing: of an odd number in twos, three are taken together."""
        return max(1, min(-(-len(self.tasks) // size), len(self.tasks) // 2))

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, each epoch in another order."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.tasks), generator=draw)
            for part in order.tensor_split(self.count(size)):
                yield self.features[part], self.tasks[part]
