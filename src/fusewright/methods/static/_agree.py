"""Add what agrees with the elected signs, each task vector with its own weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card
from fusewright.methods.static._elect import Election
from fusewright.methods.static._weighted import times, weighted_sum


class Agree(Election):
    """Zero the entries of each task vector that disagree with the elected sign, then add the
    vectors by weights (the ++ of *AdaMerging*, arXiv 2310.02575).

    γ = sign(Σ τ_t); τ* = λ Σ w_t τ_t [sign(τ_t) = γ]. Unlike :class:`Elect`, weights have no say
    in the election, so that the result is linear in them.

    ``weight``: w_t, 1 for each. ``zero_sign``, ``scope``: see :class:`Elect`. ``scale``: λ, 1.
    """

    name: ClassVar[str] = "agree"
    card: ClassVar[Card] = Card(
        "Elect signs and add", "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "2310.02575", cost="two passes; one with a fixed sign for zeros",
        exempt={
            "identical_experts": "it adds: T copies give T times the vector",
            "zero_weight": "an expert that is not added still has a vote",
        },
    )  # fmt: skip

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return times(weighted_sum(self.kept(vectors, at), at.params.weight), at.params.scale)

    def kept(self, vectors: Sequence[Tensor], at: At) -> list[Tensor]:
        """Each task vector without the entries that disagree."""
        sign = self.elected(vectors, at)
        return [torch.where(torch.sign(v) == sign, v, 0.0) for v in vectors]
