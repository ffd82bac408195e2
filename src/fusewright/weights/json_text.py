"""JSON objects from files that may be broken or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import WeightsError

LARGEST = 100_000_000  # bytes; safetensors' own bound on headers


def parse_object(data: bytes, where: object, *, unique: bool = True) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises WeightsError if it is not UTF-8, not JSON, not an object, nested too deeply, or, with
    ``unique``, if any object in it has the same key twice (readers disagree on which one counts).
    """
    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys if unique else None
        )
    except UnicodeDecodeError as error:
        raise WeightsError("not valid UTF-8", where=where, found=str(error)) from error
    except RecursionError as error:
        raise WeightsError("JSON is nested too deeply", where=where) from error
    except _DuplicateKey as error:
        raise WeightsError(
            "JSON has the same key twice", where=where, expected="unique keys", found=str(error)
        ) from error
    except ValueError as error:
        raise WeightsError("not valid JSON", where=where, found=str(error)) from error
    if not isinstance(parsed, dict):
        raise WeightsError(
            "not a JSON object", where=where, expected="{...}", found=type(parsed).__name__
        )
    return parsed


def read_object(path: Path, *, unique: bool = True) -> dict[str, Any]:
    """The JSON object in a file of at most 100 MB. Raises WeightsError as :func:`parse_object`."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise WeightsError(
                "JSON file is too large", where=path, expected=f"<= {LARGEST} bytes", found=size
            )
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read the file: {error.strerror}", where=path) from error
    return parse_object(data, path, unique=unique)


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(repr(key))
            seen.add(key)
    return found
