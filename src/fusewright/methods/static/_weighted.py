"""Mergers that are a sum of vectors times numbers: everything but the numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusewright.errors import PlanError
from fusewright.methods.contract import At, Merger

if TYPE_CHECKING:
    from fusewright.weights.spec import LowRank


def times(vector: Tensor, number: float) -> Tensor:
    """``vector * number``, the number cast once to the vector's dtype; a factor of 1 is exact."""
    return vector if number == 1.0 else vector * number


def weighted_sum(vectors: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    """Σ vector·number in the order of the vectors; every product and every sum is rounded."""
    pairs = zip(vectors, numbers, strict=True)
    vector, number = next(pairs)
    total = times(vector, number)
    for vector, number in pairs:
        total = total + times(vector, number)
    return total


def normalised(weights: Sequence[float], where: str) -> list[float]:
    """Weights divided by their sum, in float64. Raises PlanError if they sum to zero."""
    total = sum(weights)
    if total == 0:
        raise PlanError(
            "the experts' weights sum to zero, so they cannot be normalised",
            where=where, found=list(weights),
            fix="change a weight, or set normalize: false",
        )  # fmt: skip
    return [w / total for w in weights]


class Weighted(Merger):
    """Σ c_t·v_t; a subclass says what the coefficients are."""

    @abstractmethod
    def coefficients(self, at: At) -> Sequence[float]:
        """One number for each vector, in float64."""

    def check(self, at: At) -> None:
        if not self.rounds(at.dtype):
            self.coefficients(at)

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return weighted_sum(vectors, self.coefficients(at))

    def merge_factors(self, factors: Sequence[LowRank | None], at: At) -> LowRank | None:
        """The same sum, exactly, of rank Σr: factors side by side, coefficients in ``up``."""
        pairs = zip(factors, self.coefficients(at), strict=True)
        touched = [(f, c * f.scale) for f, c in pairs if f is not None]
        if not touched:
            return None
        up = torch.cat([times(f.up, c) for f, c in touched], dim=1)
        down = torch.cat([f.down for f, _ in touched], dim=0)
        return replace(touched[0][0], up=up, down=down, scale=1.0)
