"""What the contract calls a value cannot be changed after it was made."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib import import_module
from types import ModuleType

import pytest

MODULES = [
    "methods.contract", "methods.pipeline", "methods.settings", "methods.random",
    "engine.options", "engine.jobs", "engine.planner", "engine.codec", "layout.spec",
    "weights.journal", "weights.shards", "weights.safetensors_header", "weights.spec",
]  # fmt: skip
STATE = {"Entries", "IOCount"}
"""What is being filled."""


def _values(module: ModuleType) -> list[type]:
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    return [v for v in own if isinstance(v, type) and is_dataclass(v) and v.__name__ not in STATE]


@pytest.mark.parametrize("name", MODULES)
def test_values_are_frozen(name: str) -> None:
    for value in _values(import_module(f"fusewright.{name}")):
        instance = object.__new__(value)
        for field in fields(value):
            with pytest.raises((AttributeError, TypeError)):
                setattr(instance, field.name, None)


def test_recipes_are_frozen() -> None:
    from fusewright.engine.recipe import ExpertEntry, Recipe

    assert Recipe.model_config["frozen"] and ExpertEntry.model_config["frozen"]
    assert Recipe.model_config["extra"] == "forbid"
