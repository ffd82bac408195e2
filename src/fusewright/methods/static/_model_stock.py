"""Model Stock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fusewright.methods.contract import At, Card, Round, Seen
from fusewright.methods.partials import Partial
from fusewright.methods.static._gram import cosines, gram_matrix, gram_partial
from fusewright.methods.static._weighted import Weighted

_OPPOSED = 1e-9  # 1 + (T-1) cos at which the unit task vectors cancel


class ModelStock(Weighted):
    """Move from the base towards the average as far as the experts agree in direction (*Model
    Stock: All we need is just a few fine-tuned models*, arXiv 2403.19522).

    Per tensor: θ = θ0 + t·mean(τ), t = T cos θ / (1 + (T-1) cos θ), cos θ the mean cosine of all
    pairs of task vectors (0 where one is zero). Meant for fine-tunes of one task.

    ``clamp``: t ≥ 0 (true): the paper's geometry has acute angles, and beyond them t overshoots
    away from the experts; false leaves t as the formula gives it (mergekit), 0 where it has a pole.

    FusionBench averages angles instead of cosines; the two differ little for similar angles.
    """

    name: ClassVar[str] = "model_stock"
    card: ClassVar[Card] = Card(
        "Model Stock", "Model Stock: All we need is just a few fine-tuned models", "2403.19522",
        experts=(2, None), cost="two passes; inner products of all pairs",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"clamp": False},
        "mergekit": {"clamp": False},
    }

    clamp: bool = True

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        return (Round("ratio", "tensor", _measure, self._ratio),)

    def _ratio(self, partial: Partial, at: At) -> dict[str, float]:
        matrix = cosines(gram_matrix(partial))
        count = len(matrix)
        cosine = float(matrix[np.triu_indices(count, 1)].mean())
        pole = 1 + (count - 1) * cosine
        t = count * cosine / pole if pole > _OPPOSED else 0.0
        return {"cosine": cosine, "t": max(t, 0.0) if self.clamp else t}

    def coefficients(self, at: At) -> Sequence[float]:
        count = len(at.experts)
        return [at.solved["ratio"]["t"] / count] * count


def _measure(seen: Seen, at: At) -> Partial:
    return gram_partial(seen.vectors)
