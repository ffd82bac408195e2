"""A weighted mean of all models' answers."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from fusewright.errors import PlanError, RecipeError
from fusewright.methods.contract import Card
from fusewright.methods.outputs._contract import Of, OutputEnsemble, check_of, mean


@dataclass(frozen=True)
class WeightedEnsemble(OutputEnsemble):
    """Average the models' predicted distributions, each with its weight.

    p = Σ w_t softmax(z_t), returned as log p; or z = Σ w_t z_t.

    ``weights``: one a model, 0 or more. ``normalize``: true, divides them by their sum, as
    FusionBench's WeightedEnsemble does. ``of``: as in the simple ensemble.

    Raises RecipeError for weights that are negative, not finite, or all 0; PlanError if there is
    not one for each model.
    """

    name: ClassVar[str] = "weighted"
    card: ClassVar[Card] = Card(
        "Ensemble, weighted mean", "Simple and scalable predictive uncertainty estimation",
        "1612.01474", base="unused", output="answers", cost="every model runs on every input",
    )  # fmt: skip

    weights: tuple[float, ...] = ()
    normalize: bool = True
    of: Of = "probabilities"

    def __post_init__(self) -> None:
        check_of(self.of)
        if not all(isfinite(w) and w >= 0 for w in self.weights) or not any(self.weights):
            raise RecipeError("an ensemble's weights are 0 or more, and not all 0", where="weights",
                              found=list(self.weights))  # fmt: skip

    def combine(self, logits: Tensor) -> Tensor:
        if len(logits) != len(self.weights):
            raise PlanError("an ensemble needs one weight for each model",
                            expected=f"{len(logits)} weights", found=len(self.weights))  # fmt: skip
        total = sum(self.weights) if self.normalize else 1.0
        return mean(logits, logits.new_tensor(self.weights) / total, self.of)
