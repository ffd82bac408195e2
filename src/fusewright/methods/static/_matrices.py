"""Which tensors a matrix method treats, and the matrices that lie in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fusewright.layout.spec import Role, TensorLayout

Where = Literal["matrices", "all_2d"]
"""``matrices``: linear maps and convolutions, but no embedding, position, head or projection
between towers; ``all_2d``: every tensor of two dimensions, whatever it does."""

_NOT_MAPS = {Role.EMBEDDING, Role.POSITION, Role.HEAD, Role.PROJECTION}


def is_treated(where: Where, shape: tuple[int, ...], layout: TensorLayout) -> bool:
    """Whether a tensor holds matrices that the method should treat."""
    if where == "all_2d":
        return len(shape) == 2
    return len(shape) >= 2 and layout.matrix and layout.role not in _NOT_MAPS


def held_matrices(shape: tuple[int, ...], layout: TensorLayout) -> int:
    """How many matrices a tensor holds; 0 if it is no linear map or convolution."""
    if not is_treated("matrices", shape, layout) or 0 in shape:
        return 0
    return shape[0] if layout.experts_first and len(shape) == 3 else 1


def each_matrix(
    tensor: Tensor, layout: TensorLayout, split: bool, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """``act`` on every matrix of a tensor: a 2-D tensor, its packed parts if they are to be
    split, each slice of a tensor that counts experts first, a convolution as (out, -1)."""
    if layout.experts_first and tensor.dim() == 3:
        return torch.stack([act(matrix) for matrix in tensor])
    if split and layout.packed and tensor.dim() == 2:
        parts = torch.split(tensor, list(layout.packed), dim=layout.packed_axis)
        return torch.cat([act(part) for part in parts], dim=layout.packed_axis)
    return act(tensor.reshape(tensor.shape[0], -1)).reshape(tensor.shape)
