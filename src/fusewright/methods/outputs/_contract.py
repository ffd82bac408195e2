"""The contract of output ensembles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusewright.errors import PlanError, RecipeError
from fusewright.methods.contract import Card

Of = Literal["probabilities", "logits"]
"""What is averaged. Probabilities give every model the same say. Logits have no common scale
between models that were trained apart: the surest (often the most over-trained) one decides."""


@dataclass(frozen=True)
class OutputEnsemble(ABC):
    """Combines what several models answer; a frozen value, its fields are its parameters."""

    name: ClassVar[str] = ""
    card: ClassVar[Card]

    @abstractmethod
    def combine(self, logits: Tensor) -> Tensor:
        """From (models, …, classes) to (…, classes), logits to logits."""

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """The ensemble's logits from each model's, all (…, classes) of one shape.

        Half precision is computed and returned as float32.

        Raises PlanError if there are none, or their shapes differ.
        """
        shapes = sorted({tuple(each.shape) for each in logits})
        if len(shapes) != 1:
            raise PlanError("an ensemble needs answers of one shape from one model or more",
                            expected="the same (items, …, classes) from every model",
                            found=", ".join(map(str, shapes)) or "no answers")  # fmt: skip
        stacked = torch.stack(tuple(logits))
        return self.combine(stacked if stacked.dtype == torch.float64 else stacked.float())


def check_of(of: str) -> None:
    """Refuse anything but what can be averaged. Raises RecipeError."""
    if of not in ("probabilities", "logits"):
        raise RecipeError("an ensemble averages probabilities or logits", where="of",
                          expected="'probabilities' or 'logits'", found=repr(of))  # fmt: skip


def mean(logits: Tensor, weights: Tensor, of: Of) -> Tensor:
    """Weighted sums over the first axis: of logits, or of probabilities (returned as their logs);
    ``weights`` (models,)."""
    shape = (-1, *(1,) * (logits.ndim - 1))
    if of == "logits":
        return (weights.reshape(shape) * logits).sum(dim=0)
    return (logits.log_softmax(dim=-1) + weights.log().reshape(shape)).logsumexp(dim=0)
