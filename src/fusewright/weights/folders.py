"""Folders to write to."""

from __future__ import annotations

from pathlib import Path

from fusewright.weights._fs import explained


def make_folder(path: Path, fix: str = "choose another -o") -> None:
    """Make a folder, and those above it that are missing.

    Raises OutputError where it cannot be: a file stands there, or a link that leads nowhere, or
    writing is not allowed.
    """
    with explained("Making the folder", path, fix):
        path.mkdir(parents=True, exist_ok=True)
