"""Parts of a pool on disk: each complete or not at all, each with the facts of its making."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusewright.errors import OutputError

FACTS = "training.json"
PROVENANCE = "provenance.json"
SOURCES = "sources.json"
_LOCK, _PARTIAL = ".building", ".partial"


@contextmanager
def pool(root: Path, recipe: Mapping[str, Any]) -> Iterator[None]:
    """One builder at a time in a folder that belongs to one recipe; what a killed one left
    half-done is cleared.

    Raises OutputError if another recipe's models are there, another process builds, or there can
    be no such folder.
    """
    from fusewright.weights.folders import make_folder
    from fusewright.weights.lock import FolderLock

    make_folder(root, "choose another --pool")
    lock = FolderLock.acquire(root / _LOCK)
    try:
        for left in root.rglob(f"*{_PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        claim(root / "recipe.json", recipe, "another recipe")
        yield
    finally:
        lock.release()


def claim(path: Path, wanted: Mapping[str, Any], other: str) -> None:
    """What a folder belongs to, kept at ``path`` by who comes first. Raises OutputError, saying
    that there are models of something ``other``, if it is not what is wanted."""
    if not path.exists():
        write_json(path, wanted)
        return
    found, wanted = json.loads(path.read_text("utf-8")), json.loads(json.dumps(wanted))
    if found != wanted:
        keys = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise OutputError(
            f"this folder holds models of {other}", where=path,
            expected={k: wanted.get(k) for k in keys}, found={k: found.get(k) for k in keys},
            fix=f"choose another --pool, or remove '{path.parent}'",
        )  # fmt: skip


def make_part(path: Path, make: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The facts of a folder that ``make`` fills, now or in an earlier run."""
    if not path.exists():
        partial = path.with_name(path.name + _PARTIAL)
        partial.mkdir(parents=True)
        write_json(partial / FACTS, make(partial))
        _synced(partial)
        partial.rename(path)
        _sync(path.parent)
    facts: Mapping[str, Any] = json.loads((path / FACTS).read_text("utf-8"))
    return facts


def make_file(path: Path, make: Callable[[Path], None]) -> None:
    """A file that ``make`` writes, unless it is there."""
    if path.exists():
        return
    partial = path.with_name(path.name + _PARTIAL)
    make(partial)
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, replaced at once."""
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    _sync(partial)
    partial.replace(path)


def _synced(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
