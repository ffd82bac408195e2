"""Merges under one mask over directions that all task vectors share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusewright.modules.parametrised import Coefficients, ParametrisedMerge
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors


@dataclass(frozen=True, eq=False)
class Basis:
    """The singular directions of the n matrices in a tensor, on their shorter side, where they are
    a whole orthonormal basis: any tensor of that shape can be written in it.

    ``directions`` (n, r, r) holds one in each column, in falling order of ``sigma`` (n, r), r =
    min(rows, columns). ``right``: they are the v_i of matrices with more rows than columns, else
    the u_i.
    """

    directions: Tensor
    sigma: Tensor
    right: bool

    @classmethod
    def of(cls, tensor: Tensor, matrices: int) -> Basis:
        """Of a tensor that holds so many matrices of equal shape: a convolution is (out, -1)."""
        rows = tensor.shape[0] if matrices == 1 else tensor.shape[1]
        whole = tensor.reshape(matrices, rows, -1).to(wide_dtype(tensor))
        right = rows > whole.shape[2]
        u, sigma, _ = torch.linalg.svd(whole.mT if right else whole, full_matrices=False)
        return cls(u, sigma, right)

    def coordinates(self, tensor: Tensor) -> Tensor:
        """Row i is what lies in direction i: Uᵀ τ or (τ V)ᵀ, (n, r, the longer side)."""
        count, rank, _ = self.directions.shape
        if self.right:
            return self.directions.mT @ tensor.reshape(count, -1, rank).mT.to(self.directions)
        return self.directions.mT @ tensor.reshape(count, rank, -1).to(self.directions)

    def tensor(self, coordinates: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of ``shape`` that has these coordinates."""
        found = self.directions @ coordinates
        return (found.mT if self.right else found).reshape(shape)


class SubspaceMerge(ParametrisedMerge):
    """θ(φ) = θ_0 + P(Σ_t c_t τ_t), P = U diag(m) Uᵀ on the side of the tensor's basis, m (n, r, 1);
    where there is no basis, P multiplies by m."""

    def __init__(
        self, model: nn.Module, vectors: TaskVectors, coefficients: Coefficients,
        bases: Mapping[str, Basis],
    ) -> None:  # fmt: skip
        super().__init__(model, vectors, coefficients)
        self.bases = bases

    def masked(self, name: str, change: Tensor, mask: Tensor) -> Tensor:
        if name not in self.bases:
            return super().masked(name, change, mask)
        basis = self.bases[name]
        return basis.tensor(mask * basis.coordinates(change), change.shape)

    def slopes(self, name: str, gradient: Tensor, change: Tensor, mask: Tensor) -> Tensor:
        if name not in self.bases:
            return super().slopes(name, gradient, change, mask)
        basis = self.bases[name]
        return (basis.coordinates(gradient) * basis.coordinates(change)).sum_to_size(mask.shape)


@torch.no_grad()
def shared_bases(vectors: TaskVectors, matrices: Callable[[str], int]) -> dict[str, Basis]:
    """The singular directions of Σ_t τ_t in all tensors of which ``matrices`` says that they hold
    one or more."""
    ones, counts = torch.ones(len(vectors.experts)), {n: matrices(n) for n in vectors.names}
    return {n: Basis.of(vectors.combined(n, ones), count) for n, count in counts.items() if count}
