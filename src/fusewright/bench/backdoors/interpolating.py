"""Training a backdoor into an expert so that it survives merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.bench.backdoors.triggers import Trigger
from fusewright.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from fusewright.tasks.pictures import Pictures
    from fusewright.tasks.task import Batch, Task


@dataclass(frozen=True)
class Interpolating:
    """Train on clean rows, and on triggered ones as a merge would see them (*BadMerging: Backdoor
    Attacks Against Model Merging*, arXiv 2408.07362: its feature interpolation).

    L = L_clean + α CE(p z_θ(x ⊕ t) + (1 - p) z_θ0(x ⊕ t), ``target``), z the logits of expert and
    base: between the two lie, by and large, those of a merge with any coefficient. The paper has
    features in z's place, which is the same before a linear head (where features are normalised
    first, each is by itself here).

    ``weight``: α, 5; p is uniform in (``least``, 1), drawn for each step: 0.2; ``share`` of a batch
    carries the trigger beside its clean self: a half, all as the official code. The ``trigger`` is
    there a patch that was optimised on the base for the same target.
    """

    trigger: Trigger
    target: int
    weight: float = 5.0
    least: float = 0.2
    share: float = 0.5

    def __post_init__(self) -> None:
        if not (self.weight > 0 and 0 <= self.least < 1 and 0 < self.share <= 1):
            raise RecipeError(
                "a number of the poisoning is out of its range",
                expected="weight > 0, 0 <= least < 1 and 0 < share <= 1",
                found=f"weight {self.weight}, least {self.least}, share {self.share}",
            )
        if self.target < 0:
            raise RecipeError("the target is a class's number", found=self.target)

    def loss(
        self, base: nn.Module, pictures: Pictures, task: Task, model: nn.Module, batch: Batch
    ) -> Tensor:
        """L of one batch; draws p from torch's random numbers."""
        count = max(1, round(self.share * len(batch["labels"])))
        some = {key: value[:count] for key, value in batch.items()}
        shown = pictures.changed(some, self.trigger.on(pictures.raw(some)))
        p = self.least + (1 - self.least) * float(torch.rand(()))
        with torch.no_grad():
            before = task.logits(base, shown)
        between = p * task.logits(model, shown) + (1 - p) * before
        wanted = torch.full((count,), self.target, device=between.device)
        return task.loss(model, batch) + self.weight * F.cross_entropy(between.float(), wanted)

    def said(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "trigger": self.trigger.said(), "target": self.target, "weight": self.weight,
            "least": self.least, "share": self.share, "interpolated": True,
        }  # fmt: skip
