"""``fusewright finetune``: experts of any suite's base on any of its tasks.

``recipe`` says how one is trained, by default as the suite's own experts are; ``models`` make of
the base what is trained (all weights, LoRA, partially linearised LoRA, the tangent space);
``descent`` trains it and goes on after a kill, ``place`` is where; ``run`` does it all and answers
with :class:`FineTuned`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.bench.finetuning.recipe import HOWS, FineTuning
    from fusewright.bench.finetuning.run import FineTuned, finetune

_ROOMS = {"HOWS": "recipe", "FineTuning": "recipe", "FineTuned": "run", "finetune": "run"}

__all__ = ["HOWS", "FineTuned", "FineTuning", "finetune"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
