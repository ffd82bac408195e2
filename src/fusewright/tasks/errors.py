"""What can be wrong with a task: its data, its labels."""

from __future__ import annotations

from fusewright.errors import FusewrightError


class DataError(FusewrightError):
    """A data set cannot be read, or does not fit the task that asks about it."""

    exit_code = 3
