"""LiNeS: layer-increasing scaling of the merged vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Finish, Round, Seen
from fusewright.methods.partials import Partial, block_sums
from fusewright.methods.static._fields import Number
from fusewright.methods.static._weighted import times, weighted_sum


class LiNeS(Finish):
    """Scale the merged vector linearly with depth (*LiNeS: Post-training Layer Scaling Prevents
    Forgetting and Enhances Model Merging*, arXiv 2410.17146).

    τ* ← (α + β·l/(L-1)) τ* in block l of L; α τ* outside blocks, and if there is one block.

    ``alpha``: α, or None for the paper's multi-task choice (‖Σ τ_t‖₁ / ‖τ*‖₁) / T over the whole
    model, which also undoes any scale of the merger (0 if τ* is zero). ``beta``: β, 0.5; the paper
    searches it on validation data. For one model edited, the paper takes β = 1 - α.
    """

    name: ClassVar[str] = "lines"
    card: ClassVar[Card] = Card(
        "LiNeS", "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model "
        "Merging", "2410.17146", cost="one pass; two if alpha is found",
        exempt={
            "one_expert": "deeper blocks are scaled up",
            "identical_experts": "deeper blocks are scaled up",
        },
    )  # fmt: skip

    alpha: Number | None = None
    beta: Number = 0.5

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        return (Round("alpha", "model", _measure, _alpha),) if self.alpha is None else ()

    def finish(self, merged: Tensor, vectors: Sequence[Tensor], at: At) -> Tensor:
        alpha = at.solved["alpha"] if self.alpha is None else self.alpha
        return times(merged, alpha + self.beta * _height(at))


def _height(at: At) -> float:
    place = at.layout
    if place.layer is None or place.depth < 2:
        return 0.0
    return place.layer / (place.depth - 1)


def _measure(seen: Seen, at: At) -> Partial:
    assert seen.merged is not None
    total = weighted_sum(seen.vectors, [1.0] * len(seen.vectors))
    both = torch.stack([total.reshape(-1).abs(), seen.merged.reshape(-1).abs()])
    return Partial({"l1": block_sums(both)})


def _alpha(partial: Partial, at: At) -> float:
    summed, merged = partial["l1"].tolist()
    return summed / merged / len(at.experts) if merged else 0.0
