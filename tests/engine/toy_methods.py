"""A program and a fold, as small as they can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fusewright.methods.contract import Card, Context, Fitted, Fold, Program
from fusewright.methods.static import Sum, TaskArithmetic


class Search(Program):
    """Takes the scale of the largest score."""

    name: ClassVar[str] = "toy_search"
    card: ClassVar[Card] = Card("Search", "")

    scales: tuple[float, ...] = (0.25, 0.5, 1.0)

    def fit(self, context: Context) -> Fitted:
        scores = {s: context.evaluate(context.merge(TaskArithmetic(scale=s))) for s in self.scales}
        best = max(scores, key=lambda s: scores[s])
        return Fitted(TaskArithmetic(scale=best), report={"scores": list(scores.values())})


class Soup(Program):
    """Adds experts as long as the score does not fall."""

    name: ClassVar[str] = "toy_soup"
    card: ClassVar[Card] = Card("Greedy soup", "")

    def fit(self, context: Context) -> Fitted:
        kept: list[str] = []
        best = float("-inf")
        for name in context.experts:
            score = context.evaluate(context.merge(TaskArithmetic(scale=1.0), [*kept, name]))
            if score >= best:
                best, kept = score, [*kept, name]
        return Fitted(TaskArithmetic(scale=1.0), tuple(kept))


class Stream(Fold):
    """Adds each arrival's task vector, halved once more at each arrival."""

    name: ClassVar[str] = "toy_stream"
    card: ClassVar[Card] = Card("Stream", "")

    def arrive(self, index: int, memory: Mapping[str, Any]) -> Sum:
        share = 0.5 ** memory.get("arrivals", 0)
        return Sum(weight={"newcomer": share})

    def remember(self, memory: Mapping[str, Any], solved: Mapping[str, Any]) -> dict[str, Any]:
        return {"arrivals": memory.get("arrivals", 0) + 1}
