"""Which output folders are acceptable. Everything here is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import OutputError
from . import _fs

MANIFEST = "fusewright.json"
NEW = "new"
"""The folder in staging that becomes the output."""
_MARGIN = 1.01  # file-system metadata beside the shards


def resolve_target(out: Path) -> Path:
    """The folder that ``out`` means, links followed, so that it is compared and replaced itself."""
    return Path(os.path.realpath(out))


def staging_folder(out: Path) -> Path:
    """Where an output is in the making, beside it."""
    return out.parent / f".{out.name}.fusewright"


def check_output(
    out: Path, size: int, *, overwrite: bool, inputs: Sequence[Path]
) -> None:
    """Refuse, before anything is written, an output of ``size`` bytes that exists, touches an
    input, cannot take its place, or does not fit on its disk. Raises OutputError."""
    out = resolve_target(out)
    folder = staging_folder(out)
    with _fs.explained("Looking at the output", out, "choose another -o"):
        check_target(out, inputs, overwrite)
        if not overwrite and not folder.exists():
            check_absent(out)
        check_space(out, size, _allocated(folder / NEW))


def check_target(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that is, holds or lies inside an input, and one that is no model folder."""
    for given in inputs:
        path = resolve_target(given)
        if _inside(out, path) or _inside(path, out):
            raise OutputError(
                "The output is an input, or one lies inside the other; inputs are never changed.",
                where=out,
                expected="a folder apart from every input",
                found=given,
                fix="choose another -o",
            )
    if out.is_file() or os.path.ismount(out):
        raise OutputError(
            "The output cannot take this path's place by a rename.",
            where=out,
            expected="a folder that does not exist yet",
            found="a file" if out.is_file() else "a mount point",
            fix=f"-o {out.parent / (out.name + '-merged') if out.is_file() else out / 'merged'}",
        )
    if overwrite and out.is_dir() and not _looks_like_a_model(out):
        raise OutputError(
            "--overwrite replaces models only, and this folder does not look like one.",
            where=out,
            expected=f"{MANIFEST}, config.json or *.safetensors in it, or nothing at all",
            fix="choose another -o, or remove the folder yourself",
        )


def check_absent(out: Path) -> None:
    """Refuse an output that is already there."""
    if os.path.lexists(out):
        complete = (out / MANIFEST).exists()
        raise OutputError(
            "The output exists already.",
            where=out,
            expected="a path that does not exist",
            found="a complete output of fusewright" if complete else "another folder",
            fix="add --overwrite to replace it, or choose another -o",
        )


def check_space(out: Path, needed: int, present: int) -> None:
    """Refuse to start where ``needed`` bytes (and 1 %) do not fit; ``present`` are there already.
    Also refuse a place that may not be written."""
    place = out.parent
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise OutputError(
            "The output's parent is not a folder that may be written.",
            where=place,
            fix="choose another -o, or change the folder's permissions",
        )
    with _fs.explained("Asking for free space", place):
        free = _fs.fs.free(place)
    wanted = int(needed * _MARGIN) + 1 - present
    if wanted > free:
        raise OutputError(
            "The output does not fit on its disk; nothing has been written.",
            where=place,
            expected=f"{wanted:,} bytes free",
            found=f"{free:,} bytes free: {wanted - free:,} bytes are missing",
            fix="make room, or choose an -o on another disk",
        )


def is_safe_name(name: str) -> bool:
    """Whether a relative file name stays inside the folder it is joined to, on every system."""
    parts = name.split("/")
    return (
        not any(part in ("", ".", "..") for part in parts)
        and "\\" not in name
        and "\0" not in name
        and not PurePosixPath(name).is_absolute()
    )


def _inside(path: Path, folder: Path) -> bool:
    return any(_same(place, folder) for place in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:  # the same folder under two names: bind mounts, letter case
        return os.path.samefile(one, other)
    except OSError:
        return False


def _looks_like_a_model(folder: Path) -> bool:
    names = os.listdir(folder)
    return not names or any(
        name in (MANIFEST, "config.json") or name.endswith(".safetensors") for name in names
    )


def _allocated(folder: Path) -> int:
    """Bytes of disk that a staged output holds already."""
    try:
        return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0
