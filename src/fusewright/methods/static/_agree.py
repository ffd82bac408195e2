"""Add what agrees with the elected signs, each task vector with its own weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Merger, Round, Seen
from fusewright.methods.partials import Partial
from fusewright.methods.settings import PerExpert, PerTensor
from fusewright.methods.static._elect import majority
from fusewright.methods.static._fields import Number, Scope
from fusewright.methods.static._weighted import times, weighted_sum


class Agree(Merger):
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

    weight: PerExpert[Number] = 1.0
    zero_sign: Literal["majority", "positive", "zero"] = "majority"
    scope: Scope = "model"
    scale: PerTensor[Number] = 1.0

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        if self.zero_sign != "majority":
            return ()
        return (Round("majority", self.scope, _count, majority),)

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        kept = self.elected(vectors, at)
        return times(weighted_sum(kept, at.params.weight), at.params.scale)

    def elected(self, vectors: Sequence[Tensor], at: At) -> list[Tensor]:
        """Each task vector without the entries that disagree."""
        sign = torch.sign(weighted_sum(vectors, [1.0] * len(vectors)))
        if self.zero_sign != "zero":
            instead = 1.0 if self.zero_sign == "positive" else float(at.solved["majority"])
            sign = torch.where(sign == 0, instead, sign)
        return [torch.where(torch.sign(v) == sign, v, 0.0) for v in vectors]


def _count(seen: Seen, at: At) -> Partial:
    signs = torch.sign(weighted_sum(seen.vectors, [1.0] * len(seen.vectors)))
    return Partial(counts={"net": signs.sum(dtype=torch.float64).to(torch.int64)})
