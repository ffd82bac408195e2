"""Weights that act as linear maps, with everything needed to treat them as matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fusewright.layout import TensorLayout
from fusewright.layout.names import bias_of, module

Span = tuple[int | None, int | None]
"""From where to where, as of a slice."""
_CONVOLUTION = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A weight that is multiplied with, and the module that does it.

    ``outputs`` by ``inputs`` are those of the whole map, all ``groups`` together; ``kernel`` is a
    convolution's window (() for a matrix). ``in_first``: stored in by out, as Conv1D, transposed
    convolutions and bare parameters are. ``packed`` are the sizes of independent matrices along
    ``packed_axis``, () if it is one. ``block`` is its block's position in ``Architecture.blocks``,
    None outside. ``rows`` and ``bias_rows``: which rows of weight and bias are its own, where they
    hold other maps too.
    """

    module: str
    weight: str
    bias: str | None
    outputs: int
    inputs: int
    in_first: bool = False
    groups: int = 1
    kernel: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    packed_axis: int = 0
    block: int | None = None
    rows: Span = (None, None)
    bias_rows: Span = (None, None)


def linear_map(
    owner: nn.Module, weight: Tensor, layout: TensorLayout, known: set[str], block: int | None
) -> LinearMap:
    """The linear map of one weight; ``known`` are the names of all tensors of the model."""
    name, bias = layout.name, bias_of(layout.name)
    groups = int(getattr(owner, "groups", 1)) if isinstance(owner, _CONVOLUTION) else 1
    first, second, *kernel = weight.shape
    if layout.experts_first:
        first, second, kernel = second, kernel[0], []
    outputs, inputs = (second * groups, first) if layout.in_first else (first, second * groups)
    return LinearMap(
        module=module(name), weight=name, bias=bias if bias in known else None, outputs=outputs,
        inputs=inputs, in_first=layout.in_first, groups=groups, kernel=tuple(kernel),
        packed=layout.packed, packed_axis=layout.packed_axis, block=block,
    )  # fmt: skip
