"""The plain mean of all models' answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusewright.methods.contract import Card
from fusewright.methods.outputs._contract import Of, OutputEnsemble, check_of, mean


@dataclass(frozen=True)
class SimpleEnsemble(OutputEnsemble):
    """Average the models' predicted distributions (*Simple and scalable predictive uncertainty
    estimation using deep ensembles*, 1612.01474).

    p = 1/N Σ softmax(z_t), returned as log p; or z = 1/N Σ z_t.

    ``of``: "probabilities", as in the paper: a mixture, in which every model has the same say;
    "logits" is what FusionBench's SimpleEnsemble averages, and lets large logits dominate.
    """

    name: ClassVar[str] = "simple"
    card: ClassVar[Card] = Card(
        "Ensemble, mean", "Simple and scalable predictive uncertainty estimation", "1612.01474",
        base="unused", output="answers", cost="every model runs on every input",
    )  # fmt: skip

    of: Of = "probabilities"

    def __post_init__(self) -> None:
        check_of(self.of)

    def combine(self, logits: Tensor) -> Tensor:
        weights = logits.new_full((len(logits),), 1 / len(logits))
        return mean(logits, weights, self.of)
