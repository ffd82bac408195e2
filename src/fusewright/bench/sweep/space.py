"""What of a method is worth tuning, and between which bounds."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusewright.methods.contract import Composite, Merger, Method
from fusewright.methods.pipeline import Pipeline
from fusewright.methods.settings import Range

USUAL = {
    "scale": Range(0.05, 2.0, log=True),
    "density": Range(0.02, 1.0, log=True),
    "t": Range(0.0, 1.0),
    "alpha": Range(0.0, 1.0),
    "beta": Range(0.0, 1.0),
    "strictness": Range(0.1, 1.0),
}
"""The house's words and where their values lie in the literature; a field's own :class:`Range`
stands in their place, and its bounds narrow either."""


def space(method: Method) -> dict[str, Range]:
    """The numbers of a method that are tuned: those with a range of their own or a usual one, and
    those whose fields have both bounds. For a pipeline they are called "STAGE.FIELD" (its number
    where two stages are one kind). Values that differ by expert or tensor are the user's and
    stay."""
    if isinstance(method, Pipeline):
        names = [stage.name for stage in method.chain]
        return {
            f"{_label(names, i)}.{key}": found
            for i, stage in enumerate(method.chain)
            for key, found in space(stage).items()
        }
    found = {name: _range(method, name) for name in type(method).model_fields}
    return {name: r for name, r in found.items() if r is not None}


def with_values(method: Method, values: Mapping[str, float]) -> Method:
    """The same method with other values of what :func:`space` names."""
    if not isinstance(method, Pipeline):
        own = {name: getattr(method, name) for name in type(method).model_fields}
        return type(method)(**{**own, **values})
    names = [stage.name for stage in method.chain]
    chain = []
    for i, stage in enumerate(method.chain):
        label = f"{_label(names, i)}."
        mine = {k.removeprefix(label): v for k, v in values.items() if k.startswith(label)}
        chain.append(with_values(stage, mine))
    return Pipeline(chain=tuple(chain))


def current(method: Method) -> dict[str, float]:
    """The values that the method has now, as far as they are single numbers in the space."""
    return {name: _value(method, name) for name in space(method)}


def linear(method: Method) -> str | None:
    """The name, in the space, of the λ that multiplies the whole merged vector, if there is one:
    θ = θ0 + λ·v, v without λ. A finish after the merger may undo it, so then there is none."""
    if isinstance(method, Pipeline):
        last = method.chain[-1]
        key = f"{_label([s.name for s in method.chain], len(method.chain) - 1)}.scale"
        return key if isinstance(last, Merger) and key in space(method) else None
    if not isinstance(method, Merger | Composite) or "scale" not in space(method):
        return None
    last = method.stages()[-1]
    return "scale" if isinstance(last, Merger) and last.frame == "deltas" else None


def _label(names: list[str], index: int) -> str:
    name = names[index]
    return name if names.count(name) == 1 else f"{name}{index + 1}"


def _value(method: Method, name: str) -> Any:
    if not isinstance(method, Pipeline):
        return getattr(method, name)
    label, _, key = name.rpartition(".")
    names = [stage.name for stage in method.chain]
    index = next(i for i in range(len(names)) if _label(names, i) == label)
    return getattr(method.chain[index], key)


def _range(method: Method, name: str) -> Range | None:
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or name == "seed":
        return None
    field = type(method).model_fields[name]
    low, high, whole = _bounds(field)
    own = next((m for m in field.metadata if isinstance(m, Range)), None)
    usual = own or (None if whole else USUAL.get(name))
    if usual is not None:
        low, high = max(usual.low, _or(low, usual.low)), min(usual.high, _or(high, usual.high))
        return replace(usual, low=low, high=high, whole=whole)
    if low is None or high is None:
        return None
    return Range(low, high, whole=whole)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _bounds(field: Any) -> tuple[float | None, float | None, bool]:
    """(least, most, whole number) of a pydantic field, also of the scalar of a PerTensor."""
    scalars = [m.scalar for m in field.metadata if hasattr(m, "scalar")]
    kind = scalars[0] if scalars else field.annotation
    metadata = [*field.metadata, *_metadata(kind)]
    low, high = (
        next((getattr(m, key) for m in metadata for key in keys if hasattr(m, key)), None)
        for keys in (("ge", "gt"), ("le", "lt"))
    )
    return low, high, _plain(kind) is int


def _metadata(kind: Any) -> list[Any]:
    found: list[Any] = []
    for meta in getattr(kind, "__metadata__", ()):
        found += [meta, *getattr(meta, "metadata", ())]
    return found


def _plain(kind: Any) -> Any:
    kind = typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next((k for k in typing.get_args(kind) if k is not type(None)), None)
    return kind
