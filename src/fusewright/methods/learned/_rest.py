"""Task arithmetic, for tensors that a method does not learn about."""

from __future__ import annotations

import torch
from torch import Tensor

from fusewright.layout.spec import Role
from fusewright.methods.contract import Context
from fusewright.methods.settings import PerTensor, resolve
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors


def is_statistic(context: Context, name: str) -> bool:
    """Whether a tensor is a running statistic, of which merges take the experts' mean."""
    return context.layout(name).role is Role.STATISTIC


@torch.no_grad()
def summed(
    context: Context, vectors: TaskVectors, scale: PerTensor[float], wide: bool = False
) -> dict[str, Tensor]:
    """θ_0 + λ Σ_t τ_t, λ = ``scale`` of the tensor; of running statistics λ = 1/T, the experts'
    mean. In the base's dtypes, or float32 at least if ``wide``."""
    count, found = len(vectors.experts), {}
    for name, base in vectors.base.items():
        place = context.layout(name)
        share = 1 / count if is_statistic(context, name) else resolve(scale, place)
        shares = torch.full((count,), share, dtype=torch.float64)
        total = base.to(wide_dtype(base)) + vectors.combined(name, shares)
        found[name] = total if wide else total.to(base.dtype)
    return found
