"""Live torch modules: what their architecture is, and how to run them with other weights.

:func:`describe_module` says of any ``nn.Module`` where its blocks, linear maps, heads, tied tensors
and BatchNorms are. :mod:`fusewright.layout` knows all that names, shapes and config can tell; this
room adds what only the modules know (``kinds.py``, as data). :func:`with_weights` and
:func:`functional_call` evaluate a model with other weights without a copy of it;
:func:`reestimate` mends BatchNorm's statistics after a merge.

For methods that learn, :class:`TaskVectors` and :class:`ParametrisedMerge`, whose weights are a
function of few numbers (:class:`Coefficients`). For those that route, :class:`Layer` and
:class:`Replacement`, which models hold and files bring back (:class:`Saved`), and :func:`put_in`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.modules.architecture import Architecture, describe_module
    from fusewright.modules.batchnorm import Reestimated, reestimate
    from fusewright.modules.blocks import Block
    from fusewright.modules.functional import functional_call, with_weights
    from fusewright.modules.layer import Layer, Replacement, Saved, put_in
    from fusewright.modules.linears import LinearMap
    from fusewright.modules.parametrised import Coefficients, ParametrisedMerge
    from fusewright.modules.vectors import TaskVectors

_ROOMS = {
    "Architecture": "architecture", "Block": "blocks", "LinearMap": "linears",
    "describe_module": "architecture", "Reestimated": "batchnorm", "reestimate": "batchnorm",
    "functional_call": "functional", "with_weights": "functional",
    "Layer": "layer", "Replacement": "layer", "Saved": "layer", "put_in": "layer",
    "Coefficients": "parametrised", "ParametrisedMerge": "parametrised", "TaskVectors": "vectors",
}  # fmt: skip

__all__ = [
    "Architecture", "Block", "Coefficients", "Layer", "LinearMap", "ParametrisedMerge",
    "Reestimated", "Replacement", "Saved", "TaskVectors", "describe_module", "functional_call",
    "put_in", "reestimate", "with_weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
