"""AdaRank: which singular directions of every task vector to keep, learned by entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fusewright.methods.contract import Card, Context, Fitted, Program
from fusewright.methods.learned._adamerging import per_group
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.static._matrices import held_matrices
from fusewright.modules.directions import DirectionMasks, DirectionMerge, decomposed
from fusewright.modules.vectors import TaskVectors

_MARGIN = 0.1
"""How far logits begin from the threshold, as in the code."""


class AdaRank(Learner, Program):
    """Learn which singular directions of every task vector to keep (*AdaRank: Adaptive Rank Pruning
    for Enhanced Model Merging*, arXiv 2503.22178).

    θ^l = θ0^l + Σ_t λ_t^l U_t diag(B_t σ_t) V_tᵀ of matrices, θ0^l + Σ_t λ_t^l τ_t of other
    tensors. B in {0, 1} by the straight-through estimator
    (:class:`~fusewright.modules.directions.DirectionMasks`) and λ minimise the tasks' summed
    entropy on unlabelled inputs, by Adam.

    ``center``: θ0 is the "base", or the experts' "mean", about which task vectors are then taken
    (CART). ``scale``: what λ begins at, 0.3. ``weights``: learn λ too, as the code. ``density``:
    how many leading directions are kept at first, as a share of min(rows, columns), 1.
    ``temperature``: of the masks' gradient, 10. ``steps``: 1000, of the code's 10,000, among which
    it keeps what tests best. ``rate``, ``batch``: 1e-3, 16, as there: a mask needs 100 steps to
    turn. Profile "cart": about the mean, λ from 2.3, 16 % of the directions, as published for
    ViT-B/32.
    ``objective``, ``guard``, ``every``: see :class:`Learner`.

    Matrices are linear maps and convolutions (out, -1); embeddings, heads and projections between
    towers are other tensors.

    Memory: factors of all task vectors of matrices, about twice as large as these; SVDs are made
    once. Raises as AdaMerging.
    """

    name: ClassVar[str] = "ada_rank"
    card: ClassVar[Card] = Card(
        "AdaRank", "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging", "2503.22178",
        data="unlabelled",
        cost="an SVD of each expert's matrices; a forward and backward pass of each task a step",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cart": {"center": "mean", "scale": 2.3, "density": 0.16},
    }

    center: Literal["base", "mean"] = "base"
    scale: float = 0.3
    weights: bool = True
    density: float = Field(1.0, ge=0, le=1)
    temperature: float = Field(10.0, gt=0)
    steps: int = Field(1000, ge=0)
    rate: float = Field(1e-3, gt=0)
    batch: int = Field(16, ge=1)

    def fit(self, context: Context) -> Fitted:
        fitting = Fitting(context, self)
        vectors = fitting.vectors if self.center == "base" else about_mean(fitting.vectors)
        linear = per_group(vectors, "layer", self.scale).requires_grad_(self.weights)
        directions = decomposed(
            vectors, lambda name: held_matrices(vectors.base[name].shape, context.layout(name))
        )
        masks = DirectionMasks(linear, directions, len(vectors.experts), self.density,
                               self.temperature, _MARGIN)  # fmt: skip
        merge = DirectionMerge(fitting.model, vectors, masks, directions)
        fit = fitting.descend(
            "directions", masks, lambda number: fitting.gradients(merge, number),
            lambda: fitting.score(merge), steps=self.steps, rate=self.rate,
        )  # fmt: skip
        shares = {e: merge.share(at) for at, e in enumerate(vectors.experts)}
        report = fitting.report(merge, fit) | {"directions": shares}
        return Fitted(state={**merge.state(wide=True), **fitting.statistics}, report=report)


def about_mean(vectors: TaskVectors) -> TaskVectors:
    """θ_t - mean θ about the mean θ."""
    count = len(vectors.experts)

    def centred(name: str, each: Sequence[Tensor]) -> list[Tensor]:
        mean = torch.stack(list(each)).mean(0)
        return [vector - mean for vector in each]

    with torch.no_grad():
        share = torch.full((count,), 1 / count, dtype=torch.float64)
        base = {n: (b + vectors.combined(n, share)).to(b.dtype) for n, b in vectors.base.items()}
    moved = replace(vectors.together(centred), base=base)
    return moved.kept() if vectors.held else moved
