"""Merges of a few tensors in which every element of every task vector has its own coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fusewright.modules.masks import mask_shape
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors

Granularity = Literal["element", "row", "tensor"]


class ElementWise(nn.Module):
    """θ(Λ) = θ_0 + Σ_t Λ_t ∘ τ_t of all tensors of ``vectors``, Λ its parameters, which begin at
    its ``starts``.

    A tensor's Λ is (experts, …) with … the tensor's shape ("element"), (rows, 1, …) of tensors of
    two axes or more ("row"), or (1, …) ("tensor"), in the dtype of the task vectors, float32 at
    least. All these task vectors are held.
    """

    def __init__(
        self, vectors: TaskVectors, granularity: Granularity, starts: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.names = vectors.names
        self._base = dict(vectors.base)
        self._changes = {n: torch.stack([d.dense() for d in vectors.at(n)]) for n in self.names}
        self.values = nn.ParameterList(
            nn.Parameter(torch.full(
                (len(each), *_shape(each[0].shape, granularity)), starts[name],
                dtype=wide_dtype(each), device=each.device,
            )) for name, each in self._changes.items()
        )  # fmt: skip

    def tensors(self, wide: bool = False) -> dict[str, Tensor]:
        """The merged tensors in the base's dtypes, or as they were summed if ``wide``; gradients
        flow to Λ."""
        found = {}
        for name, values in zip(self.names, self.values, strict=True):
            base, total = self._base[name], (values * self._changes[name]).sum(0)
            merged = base.to(total.dtype) + total
            found[name] = merged if wide else merged.to(base.dtype)
        return found


def _shape(shape: torch.Size, granularity: Granularity) -> torch.Size:
    if granularity == "tensor":
        return torch.Size([1] * len(shape))
    return mask_shape(shape, granularity)
