"""Parameter values that may differ by expert, by layer or by tensor, and how they resolve.

A value is written as it is in recipes::

    0.2                                            everywhere
    {"layers": [0.2, 0.9]}                         a gradient from the first layer to the last
    [{"filter": "mlp", "value": 0.8}, 0.5]         the first filter found in the tensor's name
    {"math": 0.6, "*": {"layers": [0, 1]}}         by expert (PerExpert fields); * is the others
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, WithJsonSchema
from pydantic_core import core_schema

from fusewright.layout.spec import TensorLayout

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Between which values a parameter is tuned, both included; ``log`` where factors matter, not
    differences; ``whole`` numbers. Methods annotate a field with it whose literature's values are
    not the usual ones: ``rank: Annotated[int, Range(4, 64, log=True)]``."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


AnyMethod: TypeAlias = Annotated[
    Any, WithJsonSchema({"type": ["string", "array", "object"], "title": "A method"})
]
"""A parameter that is a method itself, as recipes write it."""
OTHERS = "*"
"""Stands for the experts that a mapping does not name."""


class Reach(StrEnum):
    """Over what a parameter may vary."""

    GLOBAL = "global"
    TENSOR = "tensor"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True)
class Layers:
    """A gradient: linear between equally spaced values over the depth of the model."""

    values: tuple[float, ...]

    def at(self, fraction: float) -> float:
        place = fraction * (len(self.values) - 1)
        low = min(int(place), max(len(self.values) - 2, 0))
        part = place - low
        if part == 0.0 or len(self.values) == 1:
            return self.values[low]
        return self.values[low] * (1 - part) + self.values[low + 1] * part

    def plain(self) -> Any:
        return {"layers": list(self.values)}


@dataclass(frozen=True, slots=True)
class Filters:
    """The value of the first filter that is a part of the tensor's name, else the default."""

    rules: tuple[tuple[str, Any], ...]
    default: Any

    def plain(self) -> Any:
        rules = [{"filter": text, "value": plain(value)} for text, value in self.rules]
        return [*rules, plain(self.default)]


@dataclass(frozen=True, slots=True)
class ByExpert:
    """A value for each expert named; the others have that of "*", else the field's default."""

    values: tuple[tuple[str, Any], ...]

    def plain(self) -> Any:
        return {name: plain(value) for name, value in self.values}


def plain(value: Any) -> Any:
    """A value as it is written in recipes."""
    return value.plain() if isinstance(value, Layers | Filters | ByExpert) else value


def resolve(
    value: Any, layout: TensorLayout, expert: str | None = None, default: Any = None
) -> Any:
    """The scalar that ``value`` means for one tensor (and one expert)."""
    if isinstance(value, ByExpert):
        own = dict(value.values)
        value = own.get(str(expert), own.get(OTHERS, default))
    if isinstance(value, Filters):
        found = (v for text, v in value.rules if text == "*" or text in layout.name)
        value = next(found, value.default)
    if isinstance(value, Layers):
        value = value.at(layout.fraction)
    return value


def varies(value: Any) -> bool:
    """Whether the value can differ between the tensors of one model."""
    if isinstance(value, ByExpert):
        return any(varies(v) for _, v in value.values)
    return isinstance(value, Layers | Filters)


class _Setting:
    """Reads a written value into its frozen form and checks every scalar in it."""

    def __init__(self, reach: Reach, scalar: Any) -> None:
        self.reach, self.scalar = reach, scalar
        self._adapter: TypeAdapter[Any] = TypeAdapter(scalar)

    def __call__(self, value: Any) -> Any:
        if self.reach is Reach.EXPERT and _names_experts(value):
            items = value.values if isinstance(value, ByExpert) else tuple(value.items())
            return ByExpert(tuple((str(name), self._per_tensor(v)) for name, v in items))
        return self._per_tensor(value)

    def _per_tensor(self, value: Any) -> Any:
        if isinstance(value, Filters):
            value = value.plain()
        if isinstance(value, Sequence) and not isinstance(value, str):
            return self._filters(value)
        return self._gradient_or_scalar(value)

    def _gradient_or_scalar(self, value: Any) -> Any:
        if isinstance(value, Layers):
            value = value.plain()
        if isinstance(value, Mapping):
            if set(value) != {"layers"} or not value["layers"]:
                raise ValueError(
                    f"a gradient is written {{layers: [first, ..., last]}}, found {dict(value)!r}"
                )
            return Layers(tuple(self._scalar(v) for v in value["layers"]))
        return self._scalar(value)

    def _filters(self, value: Sequence[Any]) -> Filters:
        *rules, default = value or [None]
        if any(not isinstance(r, Mapping) or set(r) != {"filter", "value"} for r in rules):
            raise ValueError("filters are written [{filter: text, value: v}, ..., default]")
        if isinstance(default, Mapping) and "filter" in default:
            raise ValueError("a list of filters ends with the default for all other tensors")
        read = tuple((str(r["filter"]), self._gradient_or_scalar(r["value"])) for r in rules)
        return Filters(read, self._gradient_or_scalar(default))

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, bool) and self._adapter.core_schema["type"] != "bool":
            raise ValueError(f"a number is expected, found {value}")
        return self._adapter.validate_python(value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self, serialization=core_schema.plain_serializer_function_ser_schema(plain)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        scalar = self._adapter.json_schema()
        layers = {
            "type": "object",
            "properties": {"layers": {"type": "array", "items": scalar, "minItems": 1}},
            "required": ["layers"],
            "additionalProperties": False,
        }
        one = {"anyOf": [scalar, layers]}
        rule = {
            "type": "object",
            "properties": {"filter": {"type": "string"}, "value": one},
            "required": ["filter", "value"],
            "additionalProperties": False,
        }
        forms = [scalar, layers, {"type": "array", "items": {"anyOf": [rule, one]}, "minItems": 1}]
        if self.reach is Reach.EXPERT:
            forms.append({"type": "object", "additionalProperties": {"anyOf": list(forms)}})
        return {"anyOf": forms}


def _names_experts(value: Any) -> bool:
    return isinstance(value, ByExpert) or (isinstance(value, Mapping) and set(value) != {"layers"})


if TYPE_CHECKING:
    PerTensor: TypeAlias = T | Mapping[str, Any] | Sequence[Any]
    PerExpert: TypeAlias = T | Mapping[str, Any] | Sequence[Any]
else:
    from typing import Annotated

    class PerTensor:
        """A parameter that filters and gradients may vary over tensors."""

        def __class_getitem__(cls, scalar):
            return Annotated[Any, _Setting(Reach.TENSOR, scalar)]

    class PerExpert:
        """A parameter that each expert may have its own value of, which may vary over tensors."""

        def __class_getitem__(cls, scalar):
            return Annotated[Any, _Setting(Reach.EXPERT, scalar)]


def reach_of(metadata: Sequence[Any]) -> Reach:
    """The reach that a pydantic field's metadata declares."""
    return next((m.reach for m in metadata if isinstance(m, _Setting)), Reach.GLOBAL)
