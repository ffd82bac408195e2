"""What a method's card and fields say, as rows for tables, as JSON and as Markdown."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fusewright.methods.contract import (
    Composite,
    Finish,
    Fold,
    Merger,
    Method,
    Program,
    Routed,
    Transform,
)
from fusewright.methods.settings import Reach, plain, reach_of

COLUMNS = ("method", "kind", "base", "experts", "cost", "paper")
_KINDS = {
    Transform: "transform", Merger: "merger", Finish: "finish", Composite: "pipeline",
    Fold: "fold", Program: "program", Routed: "routed",
}  # fmt: skip
_BOUNDS = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}


def kind_of(method: type[Method]) -> str:
    """Transform (of each task vector), merger, finish (of the merged vector), pipeline …"""
    return next((kind for base, kind in _KINDS.items() if issubclass(method, base)), "method")


def row(method: type[Method]) -> tuple[str, ...]:
    """A method's line in a table with :data:`COLUMNS`."""
    card = method.card
    paper = f"arXiv:{card.arxiv}" if card.arxiv else card.paper
    return method.name, kind_of(method), card.base, _bounds(*card.experts), card.cost, paper


def markdown(methods: Mapping[str, type[Method]]) -> str:
    """The table of methods as Markdown, papers linked."""
    lines = ["| method | | kind | base | experts | cost |", "|---|---|---|---|---|---|"]
    for name, method in methods.items():
        card, (_, kind, base, experts, cost, _) = method.card, row(method)
        title = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
        lines.append(f"| `{name}` | {title} | {kind} | {base} | {experts} | {cost} |")
    return "\n".join(lines)


def parameters(method: type[Method]) -> list[dict[str, Any]]:
    """Each parameter's name, default, type in words, and over what it may vary."""
    properties = method.model_json_schema()["properties"] if method.model_fields else {}
    return [
        {
            "name": name,
            "default": plain(field.get_default(call_default_factory=True)),
            "type": _type(properties[name], reach_of(field.metadata)),
            "reach": str(reach_of(field.metadata)),
            "doc": field.description or "",
        }
        for name, field in method.model_fields.items()
    ]


def to_json(method: type[Method]) -> dict[str, Any]:
    """The whole card."""
    card = method.card
    return {
        "name": method.name,
        "title": card.title,
        "kind": kind_of(method),
        "paper": card.paper,
        "arxiv": card.arxiv,
        "base": card.base,
        "experts": list(card.experts),
        "data": card.data,
        "output": card.output,
        "cost": card.cost,
        "parameters": parameters(method),
        "profiles": {name: dict(values) for name, values in method.profiles.items()},
        "doc": doc(method),
        "not_claimed": dict(card.exempt),
    }


def doc(method: type[Method]) -> str:
    """The docstring, without reStructuredText marks."""
    text = inspect.cleandoc(method.__doc__ or "")
    for mark in ("``", ":class:", ":func:", "`"):
        text = text.replace(mark, "")
    return text


def _bounds(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _type(schema: Mapping[str, Any], reach: Reach = Reach.GLOBAL) -> str:
    """A JSON schema's type in words; of a setting that may vary, its scalar form."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        varying = () if reach is Reach.GLOBAL else ("object", "array")
        forms = [form for form in schema["anyOf"] if form.get("type") not in varying]
        return " | ".join(dict.fromkeys(map(_type, forms)))
    bounds = [f"{sign}{schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    kind = schema.get("type", "any")
    return " ".join([" | ".join(kind) if isinstance(kind, list) else str(kind), *bounds])
