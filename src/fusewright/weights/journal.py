"""What a run has finished, one checksummed line each: a killed process loses nothing it wrote here.

A line is ``CHECKSUM JSON``. The first names the plan; the checksums of the others are keyed with
it, so that a line of another run never counts. A torn or damaged line is left out, and the work it
spoke of is done again.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from . import _fs

JSON = Any
Output = tuple[str, int, int, bytes]
"""A tensor's name, the byte range [start, stop) written of it, and that range's leaf digests."""

_HEADER_KEY = sha256(b"fusewright journal 1").digest()


@dataclass(frozen=True)
class Record:
    """A finished task: what it wrote, and what it said."""

    task: str
    outputs: tuple[Output, ...]
    extra: JSON = None


@dataclass
class Entries:
    """All intact lines of a journal, the later ones standing for the earlier."""

    plan: str
    tasks: dict[str, Record] = field(default_factory=dict)
    notes: dict[str, JSON] = field(default_factory=dict)
    publishing: int | None = None
    damaged: int = 0


class Journal:
    """Appends lines; safe to call from many threads."""

    def __init__(self, path: Path, plan: str, *, create: bool) -> None:
        self._key = _key(plan)
        self._lock = threading.Lock()
        self.closed = False
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._fd = _fs.fs.open(path, flags)
        if create:
            self._write(_line(_HEADER_KEY, {"kind": "plan", "plan": plan}))
        elif not _ends_with_newline(self._fd):
            self._write(b"\n")

    def task(self, record: Record) -> None:
        outputs = [[name, start, stop, h.hex()] for name, start, stop, h in record.outputs]
        body = {"kind": "task", "task": record.task, "outputs": outputs, "extra": record.extra}
        self._write(_line(self._key, body))

    def note(self, key: str, value: JSON) -> None:
        self._write(_line(self._key, {"kind": "note", "key": key, "value": value}))

    def publishing(self, identity: int) -> None:
        """The staged folder, known by this inode, is complete and about to be renamed."""
        self._write(_line(self._key, {"kind": "publishing", "identity": identity}))

    def void(self) -> None:
        """No task recorded so far counts any more."""
        self._write(_line(self._key, {"kind": "void"}))

    def sync(self) -> None:
        _fs.fs.fsync(self._fd)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            _fs.fs.close(self._fd)

    def _write(self, line: bytes) -> None:
        with self._lock:
            _fs.append_all(self._fd, memoryview(line))


def read_journal(path: Path) -> Entries | None:
    """The intact lines of a journal; None if there is none, or if its first line is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    header = _open_line(_HEADER_KEY, lines[0])
    if header is None:
        return None
    entries = Entries(plan=header["plan"])
    key = _key(entries.plan)
    for line in lines[1:]:
        body = _open_line(key, line)
        if body is None:
            entries.damaged += bool(line)
        else:
            _enter(entries, body)
    return entries


def _enter(entries: Entries, body: dict[str, JSON]) -> None:
    match body["kind"]:
        case "task":
            outputs = tuple((n, a, b, bytes.fromhex(h)) for n, a, b, h in body["outputs"])
            entries.tasks[body["task"]] = Record(body["task"], outputs, body["extra"])
        case "note":
            entries.notes[body["key"]] = body["value"]
        case "publishing":
            entries.publishing = body["identity"]
        case "void":
            entries.tasks.clear()


def _key(plan: str) -> bytes:
    return sha256(plan.encode()).digest()


def _line(key: bytes, body: dict[str, JSON]) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()
    return _checksum(key, text) + b" " + text + b"\n"


def _checksum(key: bytes, text: bytes) -> bytes:
    return blake2b(text, key=key, digest_size=8).hexdigest().encode()


def _open_line(key: bytes, line: bytes) -> dict[str, JSON] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != _checksum(key, text):
        return None
    body: dict[str, JSON] = json.loads(text)
    return body


def _ends_with_newline(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) == b"\n"
