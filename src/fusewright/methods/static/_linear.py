"""Weighted averages of the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from fusewright.methods.contract import At, Card
from fusewright.methods.settings import PerExpert
from fusewright.methods.static._fields import Number
from fusewright.methods.static._weighted import Weighted, normalised

if TYPE_CHECKING:
    from fusewright.weights.spec import LowRank


class Linear(Weighted):
    """The weighted average of the experts' weights (*Model soups*, arXiv 2203.05482).

    θ = Σ w_t θ_t / Σ w_t. It needs no base; to interpolate with one (WiSE-FT, arXiv 2109.01903),
    list the base among the experts.

    ``weight``: w_t, 1 for each: the uniform soup. ``normalize``: divide by Σ w_t (true, as an
    average is); false gives Σ w_t θ_t.

    Raises PlanError if the weights sum to zero and are to be normalised.
    """

    name: ClassVar[str] = "linear"
    card: ClassVar[Card] = Card(
        "Weighted average", "Model soups: averaging weights of multiple fine-tuned models improves "
        "accuracy without increasing inference time", "2203.05482", base="optional",
    )  # fmt: skip
    frame: ClassVar[Literal["deltas", "weights"]] = "weights"

    weight: PerExpert[Number] = 1.0
    normalize: bool = True

    def coefficients(self, at: At) -> Sequence[float]:
        return normalised(at.params.weight, at.tensor) if self.normalize else at.params.weight

    def merge_factors(self, factors: Sequence[LowRank | None], at: At) -> LowRank | None:
        # Σ w_t (θ0 + Δ_t) = θ0 + Σ w_t Δ_t only if the weights sum to one.
        return super().merge_factors(factors, at) if self.normalize else NotImplemented


class Average(Weighted):
    """The plain average of the experts' weights (*Model soups*, arXiv 2203.05482).

    θ = Σ θ_t / T. It has no parameters and needs no base.
    """

    name: ClassVar[str] = "average"
    card: ClassVar[Card] = Card("Average", Linear.card.paper, "2203.05482", base="optional")
    frame: ClassVar[Literal["deltas", "weights"]] = "weights"

    def coefficients(self, at: At) -> Sequence[float]:
        return [1 / len(at.experts)] * len(at.experts)
