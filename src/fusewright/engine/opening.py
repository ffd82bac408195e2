"""How a module of transformers was opened, as plain JSON, and its architecture made again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fusewright.engine.hollow import hollow
from fusewright.engine.state import class_of
from fusewright.errors import WeightsError
from fusewright.extras import needs
from fusewright.weights.directory import read_config

OPENS = "opens"
"""What a description calls it."""
BY_MODULE = "fw.load(path, module=the base's architecture, opened as for the merge)"


def opening(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The class of a module and those keywords of its opening that decide its architecture:
    switches and numbers that the class or its config takes, no text, so that a file can name
    nothing that is fetched or run. None for a module that is not of transformers itself."""
    cls = type(module)
    if cls.__module__.partition(".")[0] != "transformers" or _known(cls.__name__) is not cls:
        return None
    taken = {key: value for key, value in arguments.items()
             if _is_plain(value) and (key in _keywords(cls) or hasattr(module.config, key))
             }  # fmt: skip
    return {"class": cls.__name__, "arguments": taken}


def empty(path: Path, said: Mapping[str, Any] | None, where: Path) -> nn.Module:
    """The architecture of a folder, without weights, opened as it is ``said`` at ``where``; where
    nothing is, of the class that its config names. Raises WeightsError if neither names one."""
    transformers: Any = needs("transformers", "transformers")
    cls, arguments = (class_of(path), {}) if said is None else _read(said, where)
    if cls is None or not (path / "config.json").is_file():
        raise WeightsError("the config does not say what module the base is", where=path,
                           expected="architectures: [a class of transformers]",
                           fix="fw.load(path, module=...)")  # fmt: skip
    read_config(path, "config.json")  # which says what is broken there
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (KeyError, OSError, ValueError) as error:
        raise _undescribed(path, cls, error) from error
    of_class = {key: value for key, value in arguments.items() if key in _keywords(cls)}
    for key in arguments.keys() - of_class:
        if key.startswith("_") or not hasattr(config, key):
            raise _refused(where, f"{key}: a keyword of {cls.__name__}", key)
        setattr(config, key, arguments[key])
    try:
        with hollow():
            model: nn.Module = cls(config, **of_class)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _undescribed(path, cls, error) from error
    return model


def _undescribed(path: Path, cls: type, error: Exception) -> WeightsError:
    return WeightsError("the config does not describe a model of this class",
                        where=f"{path}: config.json", expected=f"what {cls.__name__} is made of",
                        found=f"{type(error).__name__}: {error}", fix=BY_MODULE)  # fmt: skip


def _read(said: Any, where: Path) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(said, dict):
        raise _refused(where, "class and arguments", said)
    cls, arguments = _known(said.get("class")), said.get("arguments")
    if cls is None:
        raise _refused(where, "class: a model of transformers", said.get("class"))
    if not isinstance(arguments, dict) or not all(map(_is_plain, arguments.values())):
        raise _refused(where, "arguments: switches and numbers by name", arguments)
    return cls, arguments


def _refused(where: Path, expected: str, found: Any) -> WeightsError:
    return WeightsError("how the base was opened is not understood", where=f"{where}: {OPENS}",
                        expected=expected, found=repr(found), fix=BY_MODULE)  # fmt: skip


def _known(name: Any) -> Any:
    """The model of transformers of that name; None if there is none."""
    transformers: Any = needs("transformers", "transformers")
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    kind = transformers.PreTrainedModel
    return found if isinstance(found, type) and issubclass(found, kind) else None


def _keywords(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "config"]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float)
