"""Libraries that only some of the house needs, imported when used."""

from __future__ import annotations

from typing import Any

from fusewright.tasks.errors import library


def needs(module: str, extra: str = "demo") -> Any:
    """The module, or an error that names the extra which brings it.

    Raises FusewrightError if it is not installed.
    """
    return library(module, extra)
