"""Keep the largest entries of each task vector."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Round, Transform
from fusewright.methods.order import kth_rounds
from fusewright.methods.settings import PerExpert
from fusewright.methods.static._fields import Density, Scope

TIES_PAPER = "TIES-Merging: Resolving Interference When Merging Models"


class Trim(Transform):
    """Keep the largest entries of each task vector, zero the rest (*TIES-Merging*, 2306.01708).

    τ_t ← τ_t where |τ_t| ≥ the k-th largest |τ_t|, k = max(1, ⌊density·n⌋); all entries equal to
    the k-th are kept.

    ``density``: the kept fraction, 0.2 as in the paper. ``scope``: n counts the whole "model", as
    in the paper, or each "tensor" (mergekit, PEFT); over the model, density cannot vary by tensor.
    The official code keeps one entry more (its k-th counts from the smallest).
    """

    name: ClassVar[str] = "trim"
    card: ClassVar[Card] = Card(
        "Trim by magnitude", TIES_PAPER, "2306.01708", cost="two passes and a sample"
    )

    density: PerExpert[Density] = 0.2
    scope: Scope = "model"

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        if self.density == 1.0:
            return ()
        return kth_rounds("threshold", self.scope, dtype, _ranks, uniform=("density",))

    def apply(self, vector: Tensor, expert: int, at: At) -> Tensor:
        if "threshold" not in at.solved:
            return vector
        return torch.where(vector.abs() >= at.solved["threshold"][expert], vector, 0.0)


def _ranks(at: At, elements: int) -> list[int]:
    return [max(1, int(density * elements)) for density in at.params.density]
