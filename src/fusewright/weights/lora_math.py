"""The arithmetic of LoRA and DoRA on rows of a stored weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import WeightsError
from .spec import LowRank, TensorInfo, Weights

if TYPE_CHECKING:
    import torch

GROUP = 65536  # elements: rows are computed in groups of ceil(GROUP / columns), from row 0


def load(weights: Weights, name: str) -> torch.Tensor:
    """A whole tensor, in its storage dtype."""
    return load_range(weights, name, 0, weights[name].numel).view(weights[name].shape)


def load_range(weights: Weights, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) as a 1-d tensor of the storage dtype."""
    import torch

    out = torch.empty(stop - start, dtype=weights[name].dtype.torch)
    if out.numel():
        weights.read(name, start, stop, out.view(torch.uint8).numpy().data)
    return out


def columns(info: TensorInfo) -> int:
    """The row length of the tensor seen as a matrix of ``shape[0]`` rows."""
    return info.numel // info.shape[0]


def rows_per_group(info: TensorInfo) -> int:
    """How many rows are computed at once, so that a row's bits do not depend on what is read."""
    return -(-GROUP // columns(info))


def fold(
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    info: TensorInfo,
    transposed: bool,
    where: object,
) -> LowRank:
    """A (r x in, or r x in x kernel) and B (out x r) as factors in the stored orientation.

    ``transposed``: the weight is stored in x out (Conv1D, embeddings): then up = A^T, down = B^T.
    """
    rank = down.shape[0]
    a, b = down.reshape(rank, -1), up.reshape(up.shape[0], -1)
    first, second = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)
    fits = first.shape == (info.shape[0], rank) and second.shape == (rank, columns(info))
    if not fits:
        raise WeightsError(
            "the adapter's factors do not fit the base tensor",
            where=where, expected=f"B @ A of shape {list(info.shape)}",
            found=f"A {list(down.shape)}, B {list(up.shape)}",
            fix="give the base that adapter_config.json names (and check fan_in_fan_out)",
        )  # fmt: skip
    return LowRank(first, second, scale)


def is_transposed(info: TensorInfo, down: TensorInfo, up: TensorInfo) -> bool | None:
    """Whether a 2-d weight is stored in x out, as the factors' shapes tell; None if square."""
    if len(info.shape) != 2:
        return False
    straight = info.shape == (up.shape[0], down.shape[1])
    turned = info.shape == (down.shape[1], up.shape[0])
    return None if straight and turned else turned


def add(rows: torch.Tensor, low: LowRank, first: int) -> torch.Tensor:
    """W0 + scale * up @ down for the rows from ``first`` on; ``rows`` is (n, columns)."""
    up = low.up[first : first + rows.shape[0]].to(rows.dtype)
    return rows + low.scale * (up @ low.down.to(rows.dtype))
