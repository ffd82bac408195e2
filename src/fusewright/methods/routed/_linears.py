"""Which linear maps can be routed, and their task vectors as matrices."""

from __future__ import annotations

import torch
from torch import nn

from fusewright.modules.deltas import Delta, Dense, Factors
from fusewright.modules.linears import LinearMap


def is_routable(linear: LinearMap, model: nn.Module) -> bool:
    """A whole matrix which its module multiplies with by itself, and does nothing else."""
    owner = type(model.get_submodule(linear.module)).__name__
    return not linear.kernel and linear.groups == 1 and owner in ("Linear", "Conv1D")


def turned(delta: Delta, in_first: bool) -> Delta:
    """A matrix (out, in)."""
    if not in_first:
        return delta
    if isinstance(delta, Factors):
        return Factors(delta.down.T, delta.up.T, torch.Size(reversed(delta.shape)))
    return Dense(delta.dense().T)
