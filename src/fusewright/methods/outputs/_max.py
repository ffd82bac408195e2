"""The largest answer of any model, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fusewright.methods.contract import Card
from fusewright.methods.outputs._contract import OutputEnsemble


@dataclass(frozen=True)
class MaxEnsemble(OutputEnsemble):
    """The element-wise maximum of the models' logits, as in FusionBench's MaxModelPredictor.

    z = max_t z_t. The model that is surest of a class speaks for it.
    """

    name: ClassVar[str] = "max"
    card: ClassVar[Card] = Card(
        "Ensemble, maximum", "FusionBench: a comprehensive benchmark of deep model fusion",
        "2406.03280", base="unused", output="answers", cost="every model runs on every input",
    )  # fmt: skip

    def combine(self, logits: Tensor) -> Tensor:
        return logits.amax(dim=0)
