"""Which methods a comparison runs, and why the others are not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusewright.errors import RecipeError
from fusewright.methods.contract import (
    Composite,
    Finish,
    Merger,
    Method,
    Program,
    Routed,
    Transform,
)
from fusewright.methods.registry import parse_method, registry

STANDS_FOR = {
    "agree": "task_arithmetic of what agrees, for adamerging", "elect": "part of ties",
    "linear": "with equal weights it is average",
    "mean": "with equal weights it is average", "sum": "task_arithmetic with another default",
}  # fmt: skip
"""Building blocks that would only repeat the row of a named method."""


@dataclass(frozen=True)
class Entry:
    """A method under the name of its row and folder."""

    key: str
    title: str
    method: Method

    @property
    def scale(self) -> float | None:
        """Its λ on the merged vector, if it has one that is a plain number."""
        scale = getattr(self.method, "scale", None)
        return float(scale) if isinstance(scale, int | float) else None

    def scaled(self, scale: float) -> Entry:
        """The same with another λ, as a row of its own."""
        method = type(self.method)(**{**dict(self.method), "scale": scale})
        return Entry(f"{self.key}-tuned", self.title, method)


def entry(spec: Any) -> Entry:
    """The entry of a method as it is written in recipes."""
    method = parse_method(spec)
    stages = method.spec()
    if isinstance(stages, Mapping):
        return Entry(method.name, method.card.title, method)
    names = [name for stage in stages for name in stage]
    titles = [registry()[name].card.title for name in names]
    return Entry("-".join(names), " >> ".join(titles), method)


def entries(
    experts: int, methods: Sequence[Any] | None = None
) -> tuple[list[Entry], dict[str, str]]:
    """The methods to run (by default all that are registered), and {method: why it is not run}.

    Raises RecipeError for a method that is not known, or two that would share a row.
    """
    if methods is not None:
        return _distinct(entry(spec) for spec in methods), {}
    kept, left_out = [], {}
    for name, method in registry().items():
        spec: Any = ["task_arithmetic", name] if issubclass(method, Finish) else name
        reason = STANDS_FOR.get(name) or _unfit(method, experts)
        if reason:
            left_out[name] = reason
        else:
            kept.append(entry(spec))
    return _distinct(kept), left_out


def _unfit(method: type[Method], experts: int) -> str | None:
    """Why a method cannot run here by itself, without data, with its defaults."""
    card, required = method.card, [k for k, f in method.model_fields.items() if f.is_required()]
    low, high = card.experts
    if issubclass(method, Transform):
        return "a transform of task vectors, part of other methods"
    if not low <= experts <= (high or experts):
        return f"merges {high} at most, and there are {experts} experts"
    if required:
        return f"has no default for {', '.join(required)}"
    if card.data != "none" or issubclass(method, Program):
        return f"asks for {card.data} data" if card.data != "none" else "runs models"
    if issubclass(method, Merger | Composite | Finish | Routed):
        return None
    return "is no merge by itself"


def _distinct(found: Iterable[Entry]) -> list[Entry]:
    kept: dict[str, Entry] = {}
    for one in found:
        if one.key in kept:
            raise RecipeError(f"two methods would share the row {one.key!r}",
                              found=f"{kept[one.key].method!r} and {one.method!r}",
                              fix="compare different parameters in separate runs")  # fmt: skip
        kept[one.key] = one
    return list(kept.values())
