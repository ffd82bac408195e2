"""Iso-C: isotropic merging in the common subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At, Card, Merger, Unit
from fusewright.methods.settings import PerTensor, Range
from fusewright.methods.static._fields import Number
from fusewright.methods.static._matrices import Where, each_matrix, is_treated
from fusewright.methods.static._weighted import times, weighted_sum

_FLAT = 1e-6  # σ/σmax below which float32 task vectors hold only rounding


class IsoC(Merger):
    """Flatten the spectrum of the summed task vectors (*No Task Left Behind: Isotropic Model
    Merging with Common and Task-Specific Subspaces*, arXiv 2502.04959).

    Per matrix: M = Σ τ_t = U Σ Vᵀ; τ* = λ·mean(σ)·U Vᵀ. Other tensors: λ times ``otherwise``.

    ``scale``: λ, 1; it multiplies everything, the other tensors too (the paper validates it:
    1.3 for eight ViT-B/32 experts, less for more). ``where``: "matrices", no embeddings, heads or
    text_projection (the official code leaves out text_projection); "all_2d" (FusionBench).
    ``otherwise``: "mean" as in the paper, "sum", or "base" (unchanged). Word embeddings have the
    mean, too, which leaves out most of what experts learned of texts: text-mini gained 2 points by
    their sum, ``scale=[{"filter": "word_embeddings", "value": 5}, 1]`` for 5 experts. ``split``:
    treat packed matrices (QKV in one) one by one; false as in the official code.

    mean(σ) counts all min(m, n) singular values. Directions with σ ≤ 1e-6 σmax (float64 inputs:
    max(m, n)·ε) stay empty, where an SVD would fill them with arbitrary vectors: for LoRA sums
    the output keeps the rank of M. Float32 goes through the float64 Gram matrix of the shorter
    side, float64 through an SVD.
    """

    name: ClassVar[str] = "iso_c"
    card: ClassVar[Card] = Card(
        "Iso-C", "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific "
        "Subspaces", "2502.04959", cost="one pass; an eigendecomposition for each matrix",
        exempt={
            "one_expert": "the spectrum is flattened",
            "identical_experts": "the spectrum is flattened, of the sum",
        },
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fusionbench": {"where": "all_2d"}}

    scale: Annotated[PerTensor[Number], Range(0.05, 8.0, log=True)] = 1.0
    where: Where = "matrices"
    otherwise: Literal["mean", "sum", "base"] = "mean"
    split: bool = False

    def unit(self, shape: tuple[int, ...], layout: TensorLayout) -> Unit:
        return Unit.TENSOR if is_treated(self.where, shape, layout) else Unit.CHUNK

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        scale, count = at.params.scale, len(vectors)
        if is_treated(self.where, at.shape, at.layout):
            total = weighted_sum([v.reshape(at.shape) for v in vectors], [1.0] * count)
            return times(each_matrix(total, at.layout, self.split, isotropic), scale)
        share = {"mean": scale / count, "sum": scale, "base": 0.0}[self.otherwise]
        return weighted_sum(vectors, [share] * count)


def isotropic(matrix: Tensor) -> Tensor:
    """mean(σ)·U Vᵀ of a matrix, over the directions that it has."""
    if matrix.numel() == 0:
        return matrix
    if matrix.shape[0] > matrix.shape[1]:
        return isotropic(matrix.T).T
    wide = matrix.to(torch.float64)
    if matrix.dtype == torch.float64:
        left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
        real = sigma > sigma[0] * max(matrix.shape) * torch.finfo(torch.float64).eps
        polar = left[:, real] @ right[real]
    else:
        squares, left = torch.linalg.eigh(wide @ wide.T)
        sigma = squares.clamp(min=0).sqrt()
        real = sigma > sigma[-1] * _FLAT
        left = left[:, real]
        polar = left @ ((left.T @ wide) / sigma[real, None])
    return (polar * sigma.mean()).to(matrix.dtype)
