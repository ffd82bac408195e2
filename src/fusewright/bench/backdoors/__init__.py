"""Backdoors in merged models: how they get in, what they do, and how to look for them.

A poisoned expert answers clean pictures as it should and pictures with a trigger as its maker
wants; a merge may inherit that. ``triggers`` put a sign on a picture; ``poisoning`` fine-tunes a
suite's expert with one, ``interpolating`` so that it survives merging, and ``optimising`` finds a
trigger that does: attacks are here only to measure defences with.
``measuring`` answers with accuracy and attack success, for the poisoned task (succession) and the
others (transfer); ``looking`` estimates, without knowing any trigger, how easily one perturbation
leads a model to each class. It can raise a suspicion. It cannot show that a model is clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.bench.backdoors.interpolating import Interpolating
    from fusewright.bench.backdoors.looking import Look, look
    from fusewright.bench.backdoors.measuring import Rates, rates
    from fusewright.bench.backdoors.optimising import surviving_trigger
    from fusewright.bench.backdoors.poisoning import Poisoning, poisoned_expert
    from fusewright.bench.backdoors.triggers import Blend, Patch, Trigger, Universal

_ROOMS = {
    "Blend": "triggers", "Patch": "triggers", "Trigger": "triggers", "Universal": "triggers",
    "Interpolating": "interpolating", "Poisoning": "poisoning", "poisoned_expert": "poisoning",
    "Rates": "measuring", "rates": "measuring", "surviving_trigger": "optimising",
    "Look": "looking", "look": "looking",
}  # fmt: skip

__all__ = [
    "Blend", "Interpolating", "Look", "Patch", "Poisoning", "Rates", "Trigger", "Universal", "look",
    "poisoned_expert", "rates", "surviving_trigger",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
