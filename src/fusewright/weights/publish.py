"""The step from staged to published: all of it or nothing, and what a crash in between leaves.

A staging folder holds ``lock``, ``journal``, ``new`` (what becomes the output) and, for a moment
and only where two folders cannot be exchanged in one step, ``old`` (what was the output).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import FusewrightWarning, OutputError
from . import _fs
from .journal import Journal, read_journal
from .lock import FolderLock
from .target import NEW, check_absent, resolve_target, staging_folder

JOURNAL, OLD = "journal", "old"


def seal_manifest(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is stored, with a checksum over its own canonical JSON."""
    body = {**manifest, "checksum": manifest_checksum(manifest)}
    return (json.dumps(body, indent=1) + "\n").encode()


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum, as canonical JSON."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync_folders(folder: Path) -> None:
    """fsync a folder and every folder below it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            sync_folders(entry)
    _fs.fs.fsync_folder(folder)


def publish_folder(out: Path, journal: Journal, *, overwrite: bool, durable: bool) -> None:
    """Put the complete and synced ``new`` in ``out``'s place, and sync what names it.

    The journal says so first: whoever finds the staging folder after a crash can tell by the
    inode whether the rename happened. Raises OutputError, and OSError from the system.
    """
    folder = staging_folder(out)
    identity = _fs.fs.identity(folder / NEW)
    assert identity is not None
    journal.publishing(identity)
    if durable:
        journal.sync()
        _fs.fs.fsync_folder(folder)
    if not overwrite:
        check_absent(out)
    if os.path.lexists(out):
        _replace(folder, out)
    else:
        _fs.fs.rename(folder / NEW, out)
    if durable:
        _fs.fs.fsync_folder(out.parent)
        _fs.fs.fsync_folder(folder)


def _replace(folder: Path, out: Path) -> None:
    if _fs.fs.exchange(folder / NEW, out):
        return
    _fs.fs.rename(out, folder / OLD)
    try:
        _fs.fs.rename(folder / NEW, out)
    except OSError:
        _fs.fs.rename(folder / OLD, out)
        raise


def clear_staging(folder: Path) -> None:
    """Remove what a staging folder holds, the journal last: it is what explains the rest."""
    for name in (OLD, NEW, JOURNAL):
        _fs.remove_tree(folder / name)


def clear_published(folder: Path) -> None:
    """Remove what is left after publication; failing to is worth a warning, not the run."""
    try:
        clear_staging(folder)
    except OSError as error:
        warnings.warn(
            f"The output is complete, but {folder} could not be removed ({error}); remove it.",
            FusewrightWarning,
            stacklevel=2,
        )


def recover(out: Path) -> None:
    """Finish or undo the publication of ``out`` that a crash interrupted, if one did.

    Afterwards ``out`` is what it was before the run, or the run's complete output. Staged work
    that was not yet being published is left to be resumed. Raises OutputError where another run
    is at work, and where somebody has put something else in the output's place meanwhile.
    """
    out = resolve_target(out)
    folder = staging_folder(out)
    if folder.is_dir():
        lock = FolderLock.acquire(folder)
        try:
            with _fs.explained("Recovering the output", folder):
                recover_locked(out, folder)
        finally:
            lock.release()


def recover_locked(out: Path, folder: Path) -> None:
    """:func:`recover` for who holds the lock."""
    entries = read_journal(folder / JOURNAL)
    complete = entries.publishing if entries else None
    staged, published = _fs.fs.identity(folder / NEW), _fs.fs.identity(out)
    if complete is not None and published == complete:
        clear_published(folder)
    elif os.path.lexists(folder / OLD):
        if published is not None:
            raise _two_outputs(out, folder)
        finish = complete is not None and staged == complete
        _fs.fs.rename(folder / (NEW if finish else OLD), out)
        _fs.fs.fsync_folder(out.parent)
        if finish:
            clear_published(folder)
    elif complete is not None and staged != complete:
        clear_staging(folder)  # ``new`` is what was replaced, no place to write; OUT went since


def _two_outputs(out: Path, folder: Path) -> OutputError:
    return OutputError(
        "An interrupted --overwrite left the earlier output aside, and there is a new one since.",
        where=out,
        found=folder / OLD,
        fix=f"move {folder / OLD} to where you want it, or remove it; then run again",
    )
