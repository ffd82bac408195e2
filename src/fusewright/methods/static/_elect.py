"""Elect a sign for each entry and merge those that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Merger, Round, Seen
from fusewright.methods.partials import Partial
from fusewright.methods.settings import PerExpert, PerTensor
from fusewright.methods.static._fields import Number, Scope
from fusewright.methods.static._trim import TIES_PAPER
from fusewright.methods.static._weighted import times, weighted_sum


class Election(Merger):
    """A merger of what has the elected sign: that of the vectors' total, entry by entry."""

    weight: PerExpert[Number] = 1.0
    zero_sign: Literal["majority", "positive", "zero"] = "majority"
    scope: Scope = "model"
    scale: PerTensor[Number] = 1.0

    def votes(self, seen: Seen, at: At) -> Sequence[float]:
        """Each expert's weight in the election."""
        return [1.0] * len(seen.vectors)

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        if self.zero_sign != "majority":
            return ()
        return (Round("majority", self.scope, self._count, _majority),)

    def elected(self, voting: Sequence[Tensor], at: At) -> Tensor:
        """The sign of Σ of vectors that have their votes' weights already; never 0, unless
        ``zero_sign`` says so or the model has no majority."""
        sign = torch.sign(weighted_sum(voting, [1.0] * len(voting)))
        if self.zero_sign == "zero":
            return sign
        instead = 1.0 if self.zero_sign == "positive" else float(at.solved["majority"])
        return torch.where(sign == 0, instead, sign)

    def _count(self, seen: Seen, at: At) -> Partial:
        signs = torch.sign(weighted_sum(seen.vectors, self.votes(seen, at)))
        return Partial(counts={"net": signs.sum(dtype=torch.float64).to(torch.int64)})


class Elect(Election):
    """Elect each entry's sign by the total, merge the entries that have it (*TIES-Merging*,
    arXiv 2306.01708).

    γ = sign(Σ w_t τ_t); τ* = λ Σ_A w_t τ_t / Σ_A |w_t|, A = {t: sign(w_t τ_t) = γ}.

    ``weight``: w_t, 1 for each. ``normalize``: divide by Σ_A |w_t|, the disjoint mean of the
    paper (true); false gives the disjoint sum. ``zero_sign``: what γ = 0 becomes: the "majority"
    of all elected signs, as in the official code; "positive" (mergekit, PEFT); or "zero", nothing
    is kept. ``scope``: the majority is that of the whole "model", as in the official code, or of
    each "tensor". ``scale``: λ, 1.

    An entry's sign is that of the rounded sum in the experts' order: where the vectors cancel to
    within rounding, another order may elect another sign.
    """

    name: ClassVar[str] = "elect"
    card: ClassVar[Card] = Card(
        "Elect signs and merge", TIES_PAPER, "2306.01708", cost="two passes; one with a fixed "
        "sign for zeros",
    )  # fmt: skip

    normalize: bool = True

    def votes(self, seen: Seen, at: At) -> Sequence[float]:
        weights: Sequence[float] = at.params.weight
        return weights

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        weighted = [times(v, w) for v, w in zip(vectors, at.params.weight, strict=True)]
        sign = self.elected(weighted, at)
        agree = [torch.sign(v) == sign for v in weighted]
        kept = [torch.where(a, v, 0.0) for a, v in zip(agree, weighted, strict=True)]
        total = weighted_sum(kept, [1.0] * len(kept))
        if self.normalize:
            total = total / _shares(agree, at.params.weight, total)
        return times(total, at.params.scale)


def _majority(partial: Partial, at: At) -> int:
    """The sign that most elected entries have, 0 if as many have each."""
    return int(partial["net"] > 0) - int(partial["net"] < 0)


def _shares(agree: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """Σ |w_t| over the vectors that agree, 1 where none does."""
    shares = torch.zeros_like(like)
    for a, w in zip(agree, weights, strict=True):
        shares = shares + a.to(like.dtype) * abs(w)
    return torch.where(shares == 0, 1.0, shares)
