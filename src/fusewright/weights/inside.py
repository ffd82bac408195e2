"""No path leaves its root."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..errors import WeightsError


def inside(root: Path, name: str, said_by: object) -> Path:
    """The path of ``name`` within ``root``, proven to stay there.

    ``name`` must be relative, without ``..``, backslash or NUL, and may not lead out through a
    symbolic link, except in a Hub cache, where ``models--org--name/snapshots/REV/file`` links to
    ``models--org--name/blobs``. ``said_by`` is the file that mentions ``name``.
    Raises WeightsError.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or set(name) & set("\\\0:"):
        raise WeightsError(
            "a file name leaves its directory",
            where=said_by, expected="a relative path without '..'", found=repr(name),
        )  # fmt: skip
    real = (root / name).resolve()
    if not any(real.is_relative_to(place) for place in _allowed(root.resolve())):
        raise WeightsError(
            "a symbolic link leaves its directory",
            where=root / name, expected=f"a file inside {root}", found=real,
            fix=f"cp --remove-destination '{real}' '{root / name}'",
        )  # fmt: skip
    return root / name


def _allowed(root: Path) -> tuple[Path, ...]:
    """The root, and the blobs beside it if it is (in) a Hub cache's snapshot."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
            return (root, folder.parent.parent / "blobs")
    return (root,)
