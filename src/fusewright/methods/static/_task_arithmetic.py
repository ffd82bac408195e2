"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fusewright.methods.contract import Card
from fusewright.methods.settings import PerTensor
from fusewright.methods.static._fields import Number
from fusewright.methods.static._sum import Sum


class TaskArithmetic(Sum):
    """Add scaled task vectors to the base (*Editing models with task arithmetic*, 2212.04089).

    θ = θ0 + λ Σ w_t τ_t. A negative λ or w_t forgets (negation); weights 1, 1, -1 make an analogy.

    ``scale``: λ, 0.3, which the paper found best or near it for eight tasks; 1 for one expert
    gives the expert back. ``weight``: w_t, 1 for each. ``normalize``: false, as in the paper.

    Raises PlanError if the weights sum to zero and are to be normalised.
    """

    name: ClassVar[str] = "task_arithmetic"
    card: ClassVar[Card] = Card(
        "Task arithmetic", Sum.card.paper, "2212.04089", exempt=Sum.card.exempt
    )
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"scale": 0.3},
        "mergekit": {"scale": 1.0},
    }

    scale: PerTensor[Number] = 0.3
