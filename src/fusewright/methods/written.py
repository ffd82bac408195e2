"""Methods in one line of text: ``drop >> ties(density=0.3, scale=[0.5, 1])``."""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml

from fusewright.errors import RecipeError
from fusewright.strict_yaml import StrictYAML

_CALL = re.compile(r"(?P<name>[^()]*)(?:\((?P<inside>.*)\))?", re.DOTALL)
_TOKEN = re.compile(r"'[^']*'|\"[^\"]*\"|>>|.", re.DOTALL)
_DEPTH = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)


def listed(text: str, separator: Literal[",", ">>"] = ",") -> list[str]:
    """The parts of a text between separators outside brackets and quotes, without empty ones.

    Raises RecipeError for brackets that do not match.
    """
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += _DEPTH.get(token, 0)
        if depth < 0:
            break
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    if depth:
        raise RecipeError("brackets do not match", found=repr(text))
    return [part.strip() for part in parts if part.strip()]


def called(text: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of ``name`` or ``name(key=value, ...)``; values are YAML.

    Raises RecipeError for anything else.
    """
    found = _CALL.fullmatch(text.strip())
    if found is None:
        raise RecipeError("a method with parameters is written name(key=value, ...)",
                          found=repr(text))  # fmt: skip
    parameters: dict[str, Any] = {}
    for part in listed(found["inside"] or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or key in parameters:
            raise RecipeError(f"a parameter of {found['name']!r} is written key=value, once",
                              found=repr(part))  # fmt: skip
        try:
            parameters[key] = yaml.load(value, Loader=StrictYAML)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: the value is not plain YAML", found=repr(value)) from error
    return found["name"].strip(), parameters


def call(name: str, parameters: dict[str, Any]) -> str:
    """The inverse of :func:`called`."""
    if not parameters:
        return name
    said = (f"{key}={_flow(value)}" for key, value in parameters.items())
    return f"{name}({', '.join(said)})"


def _flow(value: Any) -> str:
    """As YAML writes it inside a list, where text with a comma is quoted."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.strip()[1:-1]
