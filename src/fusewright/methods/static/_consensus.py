"""Consensus of TALL masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fusewright.methods.contract import At, Card, Merger
from fusewright.methods.settings import PerTensor
from fusewright.methods.static._fields import Number
from fusewright.methods.static._weighted import times, weighted_sum


class Consensus(Merger):
    """Add the task vectors where several tasks need the sum, drop what one alone needs
    (*Localizing Task Information for Improved Model Merging and Compression*, arXiv 2405.07813).

    τ = Σ_t τ_t; m_t = 1[|τ_t| ≥ λ |τ - τ_t|]; τ* = α τ where Σ_t m_t ≥ k, else 0.

    ``strictness``: λ, 0.4, the middle of the values that the paper chooses from by validation (0.2
    to 0.6). ``least``: k, 2 tasks, the paper's; 0 is task arithmetic. ``scale``: α, 0.3, task
    arithmetic's without validation data. Some implementations compare |θ_0 - τ_t| instead of |τ_t|,
    which measures the base.
    """

    name: ClassVar[str] = "consensus"
    card: ClassVar[Card] = Card(
        "Consensus of TALL masks",
        "Localizing Task Information for Improved Model Merging and Compression", "2405.07813",
        exempt={"one_expert": "what one task alone needs is dropped",
                "identical_experts": "the sum of n is n times as large, and is scaled"},
    )  # fmt: skip

    strictness: PerTensor[Number] = 0.4
    least: int = Field(2, ge=0)
    scale: PerTensor[Number] = 0.3

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        total = weighted_sum(vectors, [1.0] * len(vectors))
        needed = torch.zeros(total.shape, dtype=torch.int32, device=total.device)
        for vector in vectors:
            needed += vector.abs() >= (total - vector).abs() * at.params.strictness
        return times(torch.where(needed >= at.params.least, total, 0.0), at.params.scale)
