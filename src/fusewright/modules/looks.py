"""Tensors that may be looked at, and not computed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from fusewright.errors import PlanError

_SHAPE = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
_LIKE = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor}
_OTHERS = {Tensor.to, Tensor.type_as}
"""What casts another tensor to look like it."""


class Looks(Tensor):
    """A tensor of a layer that was replaced: dtype, device and shape are told.

    Torch's fast paths, ``nn.MultiheadAttention`` and the like multiply with their children's
    weights and never call them. Seeing one of these the fast paths step aside; all others get a
    PlanError, instead of the answers of the layer as it was.
    """

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        told = function in _SHAPE or function in _LIKE
        told |= function in _OTHERS and not isinstance(args[0], cls)
        told |= getattr(function, "__name__", "") == "__get__"
        if told:
            with DisableTorchFunctionSubclass():
                found = function(*args, **kwargs or {})
            if function in _LIKE or function in _OTHERS or not isinstance(found, Tensor):
                return found
        raise PlanError("a routed layer's weights are read, which would leave its experts out",
                        found=getattr(function, "__name__", str(function)),
                        expected="the layer to be called",
                        fix="a method that leaves the layer alone")  # fmt: skip
