"""Libraries that only some of the house needs, imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fusewright.errors import FusewrightError


def needs(module: str, extra: str) -> Any:
    """An optional module, or an error that names the extra which brings it.

    Raises FusewrightError if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise FusewrightError(
            f"{error.name} is not installed",
            where=module,
            fix=f"pip install 'fusewright[{extra}]'",
        ) from error
