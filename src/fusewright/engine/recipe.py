"""What to merge, as a value: read from YAML or built by the Python door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fusewright.errors import RecipeError, nearest
from fusewright.strict_yaml import StrictYAML

VERSION = 1
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class ExpertEntry(BaseModel):
    """An expert: where it is, and its own values of the method's per-expert parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: Any = Field(description="a path, a Hub id (org/name@revision), or an adapter")

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AdaptationData(BaseModel):
    """What a method learns from: the rows of a suite's tasks; experts are named as its tasks are.

    ``suite``: a name or a file. ``pool``, ``data``: the folders of its models (heads are kept
    there) and data sets. ``split``: "validation", so that what is tested on is not learned from.
    ``seed``, ``variant``: which of the pool's models. ``limit``: rows of each task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    pool: str | None = None
    data: str | None = None
    split: str = "validation"
    seed: int | None = None
    variant: str | None = None
    limit: int | None = Field(None, ge=1)


class Recipe(BaseModel):
    """A merge. ``dtype`` is that of the result, and of the arithmetic where it is wider than
    float32; ``out_dtype`` stores the result in another one. Both default to the base's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fusewright: int = Field(VERSION, description="the recipe's schema version")
    method: Any = Field(description="a method's name, {name: parameters}, or a list: a pipeline")
    parameters: dict[str, Any] = Field({}, description="the method's parameters")
    base: Any = Field(None, description="the model that the experts were fine-tuned from")
    experts: dict[str, ExpertEntry] = Field(description="name: path, or name: {model: path, ...}")
    dtype: str | None = Field(None, description="dtype of the result")
    out_dtype: str | None = Field(None, description="dtype in which it is stored, if another")
    seed: int = Field(0, description="for methods that draw at random")
    optional: list[str] = Field([], description="patterns of tensors that an expert may lack")
    data: AdaptationData | None = Field(None, description="for methods that learn")
    output: str = Field("model", description='"model", or "adapter" for merged LoRA factors')

    @field_validator("experts", mode="before")
    @classmethod
    def _entries(cls, experts: Any) -> Any:
        if isinstance(experts, Mapping):
            return {
                str(k): v if isinstance(v, ExpertEntry | Mapping) and _is_entry(v) else {"model": v}
                for k, v in experts.items()
            }
        if isinstance(experts, str | bytes) or not isinstance(experts, Sequence):
            raise ValueError("experts are written as a mapping: name: path")
        found = [e if isinstance(e, Mapping) and _is_entry(e) else {"model": e} for e in experts]
        return dict(zip(_names([e["model"] for e in found]), found, strict=True))

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _float(cls, value: str | None) -> str | None:
        from fusewright.weights.spec import DType

        if value is None:
            return None
        try:
            dtype = DType.of(value)
        except KeyError:
            raise ValueError(f"expected one of {', '.join(FLOATS)}") from None
        if not dtype.is_float:
            raise ValueError("a floating-point dtype is expected")
        return dtype.torch_name

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if value not in ("model", "adapter"):
            raise ValueError('expected "model" or "adapter"')
        return value

    def plain(self) -> dict[str, Any]:
        """As it would be written; models in memory by their type's name."""
        from fusewright.methods.contract import Method

        written = self.model_dump(exclude_defaults=True)
        written["fusewright"] = VERSION
        if isinstance(self.method, Method):
            written["method"] = self.method.spec()
        written["base"] = _written(self.base)
        written["experts"] = {
            k: {"model": _written(e.model), **e.params} for k, e in self.experts.items()
        }
        return {k: v for k, v in written.items() if v not in (None, [], {})}


def _is_entry(value: Any) -> bool:
    return isinstance(value, ExpertEntry) or set(value) == {"model"} or (
        "model" in value and not hasattr(value["model"], "shape")
    )


def _written(ref: Any) -> Any:
    if ref is None or isinstance(ref, str | Path):
        return None if ref is None else str(ref)
    return f"<{type(ref).__name__} in memory>"


def _names(experts: Sequence[Any]) -> list[str]:
    names = [
        Path(str(e)).name if isinstance(e, str | Path) else str(i) for i, e in enumerate(experts)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"two experts have one name: {names}; give a mapping from name to model")
    return names


def make_recipe(**fields: Any) -> Recipe:
    """A recipe from its fields; RecipeError says what is wrong and what is nearest."""
    _check_version(fields)
    try:
        return Recipe(**fields)
    except ValidationError as error:
        # A misspelt key is also a missing one: the misspelling says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            *parents, last = map(str, first["loc"])
            known = list((AdaptationData if parents == ["data"] else Recipe).model_fields)
            close = nearest(last, known)
            raise RecipeError(
                f"the recipe has an unknown key {key!r}",
                expected=", ".join(sorted(known, key=lambda name: name != close)),
                fix=f"did you mean {'.'.join([*parents, close])!r}?" if close else None,
            ) from error
        missing = first["type"] == "missing"
        raise RecipeError(
            f"the recipe's {key!r} is {'missing' if missing else 'not valid'}",
            expected=None if missing else first["msg"].removeprefix("Value error, "),
            found=None if missing else repr(first["input"]),
        ) from error


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are "key=value" with dotted keys, as ``--set`` takes them.

    Relative model paths are taken from the current folder. Anchors, aliases, tags and repeated
    keys are refused: they hide what a recipe says.
    """
    fields = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for override in overrides:
        _override(fields, override)
    return make_recipe(**fields)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, with every method's parameters."""
    from fusewright.methods.registry import registry

    schema = Recipe.model_json_schema()
    methods = {name: cls.model_json_schema() for name, cls in registry().items()}
    schema["$defs"] = {**schema.get("$defs", {}), **methods}
    named = [
        {"type": "object", "properties": {n: {"$ref": f"#/$defs/{n}"}},
         "additionalProperties": False, "required": [n]}
        for n in methods
    ]  # fmt: skip
    name = {"type": "string", "examples": list(methods)}
    stage = {"anyOf": [name, *named]}
    schema["properties"]["method"] = {"anyOf": [stage, {"type": "array", "items": stage}]}
    text = {"type": "string"}
    entry = {"anyOf": [text, {"$ref": "#/$defs/ExpertEntry"}]}
    schema["properties"]["experts"] = {"type": "object", "additionalProperties": entry}
    schema["properties"]["base"] = text
    return schema


def _check_version(fields: Mapping[str, Any]) -> None:
    version = fields.get("fusewright", VERSION)
    if type(version) is not int or version < 1:
        raise RecipeError(
            "the recipe's schema version is not understood",
            expected=f"fusewright: {VERSION}", found=f"fusewright: {version!r}",
        )  # fmt: skip
    if version > VERSION:
        raise RecipeError(
            "the recipe is of a newer schema",
            expected=f"fusewright: {VERSION}", found=f"fusewright: {version}",
            fix="pip install --upgrade fusewright",
        )  # fmt: skip
    if "merge_method" in fields:
        raise RecipeError(
            "this is a recipe in mergekit's dialect, which is not read yet",
            fix="write method:, base: and experts: as `fusewright merge --help` shows",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe cannot be read", where=path, found=error) from error
    try:
        found = yaml.load(text, Loader=StrictYAML)
    except yaml.YAMLError as error:
        raise RecipeError("the recipe is not plain YAML", where=path, found=error) from error
    if not isinstance(found, dict):
        raise RecipeError("a recipe is a mapping", where=path, found=type(found).__name__)
    return {str(k): v for k, v in found.items()}


def _override(fields: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise RecipeError("--set takes key=value", found=repr(override),
                          fix="--set parameters.density=0.3")  # fmt: skip
    *parents, last = path.split(".")
    place = fields
    for key in parents:
        if isinstance(place.get(key), str) and parents[0] == "experts":
            place[key] = {"model": place[key]}
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {path}: {key!r} is not a mapping", found=repr(place))
    try:
        place[last] = yaml.load(text, Loader=StrictYAML)
    except yaml.YAMLError as error:
        raise RecipeError("the value after --set is not plain YAML", where=override,
                          found=error) from error  # fmt: skip
