"""Joint multi-task training: the reference that merging tries to reach without everybody's data.

One loop (:func:`train_joint`); how the tasks' losses become one step is a plug-in from
``COMBINATIONS``: weighings of losses and aggregations of gradients through TorchJD, GradNorm of
our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.bench.joint.combine import COMBINATIONS, Combination, combination
    from fusewright.bench.joint.train import train_joint

_ROOMS = {
    "COMBINATIONS": "combine", "Combination": "combine", "combination": "combine",
    "train_joint": "train",
}  # fmt: skip

__all__ = ["COMBINATIONS", "Combination", "combination", "train_joint"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
