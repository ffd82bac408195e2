"""Which methods a comparison runs, and why the others are not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
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
from fusewright.methods.pipeline import Pipeline
from fusewright.methods.registry import parse_method, registry
from fusewright.methods.settings import plain
from fusewright.methods.written import call

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
    parts = _parts(method)
    return Entry("-".join(p.name for p in parts), " >> ".join(p.card.title for p in parts), method)


def _in_full(one: Entry) -> Entry:
    """The same under a name that says which parameters are not the defaults."""
    changed = [(part, _changed(part)) for part in _parts(one.method)]
    key = "-".join(call(part.name, said) for part, said in changed)
    title = " >> ".join(call(part.card.title, said) for part, said in changed)
    return Entry(key, title, one.method)


def _parts(method: Method) -> tuple[Method, ...]:
    return method.chain if isinstance(method, Pipeline) else (method,)


def _changed(method: Method) -> dict[str, Any]:
    default = {key: field.get_default(call_default_factory=True)
               for key, field in type(method).model_fields.items()}  # fmt: skip
    return {key: plain(value) for key, value in method if value != default[key]}


def entries(
    experts: int, methods: Sequence[Any] | None = None, routed: bool = True
) -> tuple[list[Entry], dict[str, str]]:
    """The methods to run (by default all that are registered), and {method: why it is not run}.
    ``routed``: also those whose result is no plain model.

    Raises RecipeError for a method that is not known, or given twice, or routed where none is
    wanted.
    """
    if methods is not None:
        given = _distinct(entry(spec) for spec in methods)
        odd = [one.key for one in given if isinstance(one.method, Routed)]
        if odd and not routed:
            raise RecipeError("the result is no plain model", found=", ".join(odd),
                              fix=f"fusewright bench digits --methods {','.join(odd)}")  # fmt: skip
        return given, {}
    kept, left_out = [], {}
    for name, method in registry().items():
        spec: Any = ["task_arithmetic", name] if issubclass(method, Finish) else name
        reason = STANDS_FOR.get(name) or _unfit(method, experts)
        if not (reason or routed) and issubclass(method, Routed):
            reason = "its result is no plain model: fusewright bench digits"
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
    """Settings of one method that would share a row are told apart by their parameters."""
    found = list(found)
    often = Counter(one.key for one in found)
    kept: dict[str, Entry] = {}
    for one in (one if often[one.key] == 1 else _in_full(one) for one in found):
        if one.key in kept:
            raise RecipeError(f"{one.key!r} is given twice", fix="leave one of them out")
        kept[one.key] = one
    return list(kept.values())
