"""The sum and the mean of task vectors: the plainest mergers of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fusewright.methods.contract import At, Card
from fusewright.methods.settings import PerExpert, PerTensor
from fusewright.methods.static._fields import Number
from fusewright.methods.static._weighted import Weighted, normalised

_PAPER = "Editing models with task arithmetic"


class Sum(Weighted):
    """The weighted sum of the task vectors (*Editing models with task arithmetic*, 2212.04089).

    τ* = λ Σ w_t τ_t, or λ Σ w_t τ_t / Σ w_t if normalised.

    ``weight``: w_t, 1 for each. ``scale``: λ, 1, so that one expert gives that expert back.
    ``normalize``: divide by Σ w_t; false, as the paper adds.

    Raises PlanError if the weights sum to zero and are to be normalised.
    """

    name: ClassVar[str] = "sum"
    card: ClassVar[Card] = Card(
        "Sum of task vectors", _PAPER, "2212.04089",
        exempt={"identical_experts": "it adds: T copies give T times the vector"},
    )  # fmt: skip

    weight: PerExpert[Number] = 1.0
    scale: PerTensor[Number] = 1.0
    normalize: bool = False

    def coefficients(self, at: At) -> Sequence[float]:
        weights = at.params.weight
        weights = normalised(weights, at.tensor) if self.normalize else weights
        return [at.params.scale * w for w in weights]


class Mean(Sum):
    """The weighted mean of the task vectors (*Model soups*, arXiv 2203.05482, about a base).

    τ* = λ Σ w_t τ_t / Σ w_t.

    ``weight``: w_t, 1 for each. ``scale``: λ, 1: the average of the experts. ``normalize``: true,
    which makes it a mean.

    Raises PlanError if the weights sum to zero.
    """

    name: ClassVar[str] = "mean"
    card: ClassVar[Card] = Card("Mean of task vectors", "Model soups", "2203.05482")

    normalize: bool = True
