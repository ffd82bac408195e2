"""Recipe to plan to run: the only room where files and methods meet.

``recipe`` says what to merge, ``plan`` decides everything that headers can decide, ``schedule``
and ``work`` carry it out on threads under a memory budget, ``run`` publishes the result. ``merge``
is the Python door; ``inspect`` and ``check`` look at models without merging them.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "merge": "front", "run": "front", "plan": "front", "Expert": "front", "Merged": "front",
    "make_options": "front", "load": "state", "Options": "options", "parse_size": "options",
    "Recipe": "recipe", "load_recipe": "recipe", "make_recipe": "recipe",
    "recipe_schema": "recipe", "Plan": "planner", "Progress": "progress", "Table": "tables",
    "inspect_models": "inspect", "check_models": "check",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "verify":
        from fusewright.weights.verify import verify

        return verify
    if name in _HOMES:
        return getattr(import_module(f"fusewright.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"fusewright.engine has no {name!r}")


__all__ = [*sorted(_HOMES), "verify"]
