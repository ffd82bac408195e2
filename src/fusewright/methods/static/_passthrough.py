"""One model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from fusewright.methods.contract import At, Card, Merger
from fusewright.methods.settings import PerTensor
from fusewright.methods.static._fields import Number
from fusewright.methods.static._weighted import times


class Passthrough(Merger):
    """Copy one model's tensors: for stacking slices of layers and for converting (no paper;
    mergekit's ``passthrough``).

    θ = λ θ_1. ``scale``: λ, 1, an exact copy.

    Raises PlanError unless there is exactly one expert.
    """

    name: ClassVar[str] = "passthrough"
    card: ClassVar[Card] = Card(
        "Passthrough", "none; as in mergekit", base="optional", experts=(1, 1)
    )
    frame: ClassVar[Literal["deltas", "weights"]] = "weights"

    scale: PerTensor[Number] = 1.0

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return times(vectors[0], at.params.scale)
