"""MetaGPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from fusewright.methods.contract import At, Card, Round, Seen
from fusewright.methods.partials import Partial, block_sums
from fusewright.methods.static._weighted import Weighted


class MetaGPT(Weighted):
    """Weigh each task vector by its share of the squared norms (*MetaGPT: Merging Large Language
    Models Using Model Exclusive Task Arithmetic*, arXiv 2406.11385).

    θ = θ0 + Σ λ_t τ_t, λ_t = ‖τ_t‖² / Σ_k ‖τ_k‖² over the whole model; 1/T each if all are zero.
    Norms are of the vectors as they arrive, so after a transform they are the transformed ones'.
    It has no parameters: that is its point.
    """

    name: ClassVar[str] = "metagpt"
    card: ClassVar[Card] = Card(
        "MetaGPT", "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
        "2406.11385", cost="two passes; norms",
    )  # fmt: skip

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        return (Round("share", "model", _measure, _shares),)

    def coefficients(self, at: At) -> Sequence[float]:
        shares: list[float] = at.solved["share"]
        return shares


def _measure(seen: Seen, at: At) -> Partial:
    wide = torch.stack([v.reshape(-1).to(torch.float64) for v in seen.vectors])
    return Partial({"squares": block_sums(wide * wide)})


def _shares(partial: Partial, at: At) -> list[float]:
    squares = partial["squares"].tolist()
    total = sum(squares)
    return [s / total if total else 1 / len(squares) for s in squares]
