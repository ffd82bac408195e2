"""What made a merge that is executed: the program that was asked for, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusewright.engine.recipe import Recipe
from fusewright.methods.contract import Method
from fusewright.weights import Weights


@dataclass(frozen=True)
class Origin:
    """The ``recipe`` and ``method`` that a person wrote, where what is executed is what they fitted
    or chose; ``report``: how that went. ``models``: those of the recipe, where what is executed
    does not read them."""

    recipe: Recipe
    method: Method
    report: Mapping[str, Any] = field(repr=False)
    models: Mapping[str, Weights] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        models = {
            label: {
                "label": weights.label,
                "files": [{"path": str(i.path), "bytes": i.size} for i in weights.identities()],
            }
            for label, weights in self.models.items()
        }
        return {"recipe": self.recipe.plain(), **self.report, "models": models}
