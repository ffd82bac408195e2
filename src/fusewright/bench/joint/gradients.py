"""The gradients of several losses over the same parameters, and a combination of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = list[tuple[Tensor | None, ...]]
"""One row a loss; None where a loss does not reach a parameter."""


def rows_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Rows:
    """The gradient of each loss, one after the other: each frees its graph, which the losses must
    not share."""
    return [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses]


def gramian(rows: Rows) -> Tensor:
    """Inner products of the gradients: (losses, losses) float64, on the gradients' device."""
    found: Tensor | None = None
    for column in zip(*rows, strict=True):
        reached = [at for at, gradient in enumerate(column) if gradient is not None]
        if not reached:
            continue
        flat = torch.stack([g.reshape(-1).double() for g in column if g is not None])
        if found is None:
            found = flat.new_zeros(len(rows), len(rows))
        index = torch.tensor(reached, device=flat.device)
        found[index[:, None], index] += flat @ flat.T
    return found if found is not None else torch.zeros(len(rows), len(rows), dtype=torch.float64)


def write(rows: Rows, weights: Tensor, parameters: Sequence[Tensor]) -> None:
    """``parameter.grad = Σ w_i g_i``; None where no loss reaches, so that nothing moves there."""
    scale = weights.tolist()
    for parameter, column in zip(parameters, zip(*rows, strict=True), strict=True):
        reached = [w * g for w, g in zip(scale, column, strict=True) if g is not None]
        parameter.grad = torch.stack(reached).sum(dim=0) if reached else None
