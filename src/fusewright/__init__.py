"""Fusewright makes one model that knows what many know.

The front door: ``fw.merge``, ``fw.plan``, ``fw.load``, ``fw.inspect``, ``fw.check`` and
``fw.verify``; ``fw.suite`` and ``fw.bench``, which measure what a merge gained, and
``fw.finetune``, which makes experts; the values :class:`Expert` and :class:`Merged`; and every
method by its class name (``fw.Ties(density=0.2)``), those of other packages too. Nothing is
imported until it is used: ``import fusewright`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusewright.bench.finetuning import finetune as finetune
    from fusewright.bench.suite import suite as suite
    from fusewright.bench.sweep.run import bench as bench
    from fusewright.engine import Expert as Expert
    from fusewright.engine import Merged as Merged
    from fusewright.engine import check_models, inspect_models
    from fusewright.engine import load as load
    from fusewright.engine import merge as merge
    from fusewright.engine import plan as plan
    from fusewright.engine import verify as verify
    from fusewright.errors import FusewrightError as FusewrightError
    from fusewright.methods.static import *  # noqa: F403

    check, inspect = check_models, inspect_models

_DOORS = {
    "Expert": ("fusewright.engine", "Expert"),
    "FusewrightError": ("fusewright.errors", "FusewrightError"),
    "Merged": ("fusewright.engine", "Merged"),
    "bench": ("fusewright.bench", ""),  # the package itself: it can be called
    "check": ("fusewright.engine", "check_models"),
    "finetune": ("fusewright.bench.finetuning", "finetune"),
    "inspect": ("fusewright.engine", "inspect_models"),
    "load": ("fusewright.engine", "load"),
    "merge": ("fusewright.engine", "merge"),
    "plan": ("fusewright.engine", "plan"),
    "suite": ("fusewright.bench.suite", "suite"),
    "verify": ("fusewright.engine", "verify"),
}


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        module, attribute = _DOORS[name]
        found = getattr(import_module(module), attribute) if attribute else import_module(module)
    elif name[:1].isupper():
        found = _method_classes().get(name)
    else:
        found = None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({"__version__", "__doc__", *_DOORS, *_method_classes()})


def _method_classes() -> dict[str, Any]:
    from fusewright.methods.registry import registry

    return {cls.__name__: cls for cls in registry().values()}


def _hint(name: str) -> str:
    if not name[:1].isupper():
        return ""
    from fusewright.errors import nearest

    close = nearest(name, [*_DOORS, *_method_classes()])
    return f"; did you mean {close!r}?" if close else ""
