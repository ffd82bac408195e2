"""What a cell depends on, as digests: the files of models and data, the code of methods."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import xxhash

_CHUNK = 2**22
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja")
"""Weights, configs, and what tokenizers and chat templates are read from."""


def digest(value: Any) -> str:
    """Twenty hex digits of anything that JSON can say."""
    said = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return sha256(said.encode()).hexdigest()[:20]


def files_digest(path: Path) -> str:
    """The bytes of a model (what it and its tokenizer are read from) or of a file; the name is no
    part."""
    files = [path] if path.is_file() else [f for p in _MODEL_FILES for f in path.glob(p)]
    return digest([(f.name if f != path else "", _file_digest(f)) for f in sorted(files)])


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _bytes_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _bytes_digest(path: Path, size: int, mtime_ns: int) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def code_digest(parts: Iterable[Any]) -> str:
    """The source of classes and functions: their modules and, of the packages that these live in,
    every module that they import. So a changed file re-runs what it is part of, and nothing else.
    """
    seen: dict[str, str] = {}
    for one in parts:
        for part in getattr(one, "__mro__", (one,)):
            _visit(sys.modules.get(part.__module__), _home(one.__module__), seen)
    return digest(sorted(seen.items()))


def _visit(module: ModuleType | None, home: str, seen: dict[str, str]) -> None:
    if module is None or module.__name__ in seen or not _inside(module.__name__, home):
        return
    try:
        seen[module.__name__] = inspect.getsource(module)
    except (OSError, TypeError):  # defined in a notebook, or without source
        seen[module.__name__] = _compiled(module)
    for name in _imported(module):
        _visit(sys.modules.get(name), home, seen)


def _compiled(module: ModuleType) -> str:
    """What stands for the source of a module that has none: its version, the compiled functions and
    classes that are defined in it, and the plain values that these name."""
    own = {name: value for name, value in vars(module).items()
           if getattr(value, "__module__", None) == module.__name__}  # fmt: skip
    parts = [(name, key, value) for name, one in sorted(own.items())
             for key, value in sorted(vars(one).items() if isinstance(one, type) else [("", one)])
             if not key.startswith("__pydantic")]  # fmt: skip
    codes = {(name, key): code for name, key, value in parts if (code := _code(value))}
    named = {name for code in codes.values() for name in _names(code)}
    plain = [(name, key, value) for name, key, value in parts if not key.startswith("__")]
    plain += [("", name, vars(module)[name]) for name in sorted(named & vars(module).keys())]
    return digest([
        getattr(module, "__version__", ""), [[*key, _text(code)] for key, code in codes.items()],
        [[name, key, repr(value)] for name, key, value in plain if isinstance(value, _PLAIN)],
    ])  # fmt: skip


_PLAIN = (bool, int, float, str, bytes, tuple)


def _code(value: Any) -> CodeType | None:
    """Of a function, a method of any kind, or what a property asks."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    found = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    return found if isinstance(found, CodeType) else None


def _inner(code: CodeType) -> list[CodeType]:
    return [one for one in code.co_consts if isinstance(one, CodeType)]


def _names(code: CodeType) -> set[str]:
    """All names that the code, and code inside it, asks for."""
    return {*code.co_names}.union(*map(_names, _inner(code)))


def _text(code: CodeType) -> Any:
    """The same for the same code in every process: no line numbers, no order of a set."""
    values = [repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
              for one in code.co_consts if not isinstance(one, CodeType)]  # fmt: skip
    return [code.co_code.hex(), code.co_names, values, [_text(one) for one in _inner(code)]]


def _imported(module: ModuleType) -> Iterator[str]:
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(
            value, "__module__", None)  # fmt: skip
        if isinstance(name, str):
            yield name


def _home(module: str) -> str:
    return module.rpartition(".")[0] or module


def _inside(name: str, home: str) -> bool:
    return name == home or name.startswith(f"{home}.")
