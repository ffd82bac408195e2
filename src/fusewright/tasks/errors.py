"""What can be wrong with a task: its data, its labels, the libraries that it needs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fusewright.errors import FusewrightError


class DataError(FusewrightError):
    """A data set cannot be read, or does not fit the task that asks about it."""

    exit_code = 3


def library(module: str, extra: str = "tasks") -> Any:
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
