"""An output in the making: written in place beside OUT by many threads, resumed if killed, then
published as a whole.

The folder ``.<OUT>.fusewright`` next to OUT holds a lock, the journal and ``new/``, whose files
have their final names and sizes from the start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import OutputError
from . import _fs
from .digest import Leaves, content_digest, hash_range
from .journal import JSON, Entries, Journal, Output, Record, read_journal
from .lock import FolderLock
from .publish import (
    JOURNAL,
    OLD,
    clear_published,
    clear_staging,
    publish_folder,
    recover_locked,
    seal_manifest,
    sync_folders,
)
from .shards import Shard, index_json, index_name
from .sink import check_range
from .spec import TensorInfo
from .target import (
    MANIFEST,
    NEW,
    check_absent,
    check_output,
    is_safe_name,
    resolve_target,
    staging_folder,
)

_COPY = 8 << 20
_WRITEBACK = 16 << 20


class Staging:
    """The staged files of one output. A context manager: leaving it keeps finished work for a
    later run to resume, and releases the lock. ``write``, ``commit`` and ``note`` may be called by
    many threads at once.

    ``resumed`` says that an earlier run's work was found; ``durable=False`` leaves out every fsync
    (memory file systems, benchmarks) and with it the promise to survive a power cut.
    """

    def __init__(
        self, out: Path, shards: Sequence[Shard], lock: FolderLock, overwrite: bool, durable: bool
    ) -> None:
        self.out, self.folder, self.durable = out, staging_folder(out), durable
        self.resumed = False
        self._shards, self._lock, self._overwrite = tuple(shards), lock, overwrite
        self._places = {n: (s.file, i, at) for s in shards for n, (i, at) in s.tensors.items()}
        self._leaves = Leaves(info for _, info, _ in self._places.values())
        self._mutex = threading.Lock()
        self._fds: dict[str, int] = {}
        self._dirty: dict[str, int] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._entries = Entries(plan="")
        self._journal: Journal | None = None
        self._closed = False

    @classmethod
    def open(
        cls,
        out: Path,
        plan_digest: str,
        shards: Sequence[Shard],
        *,
        overwrite: bool,
        inputs: Sequence[Path],
        durable: bool = True,
    ) -> Staging:
        """Check, lock, recover, and start or resume. Raises OutputError, with nothing written,
        where OUT exists, touches an input, does not fit on its disk, is in use by another run, or
        has the staged work of another plan beside it."""
        out = resolve_target(out)
        folder = staging_folder(out)
        size = sum(shard.size for shard in shards)
        check_output(out, size, overwrite=overwrite, inputs=inputs)
        staging = cls(out, shards, FolderLock.acquire(folder), overwrite, durable)
        try:
            with staging._explained("Preparing the output"):
                recover_locked(out, folder)
                if not overwrite:
                    check_absent(out)
                staging._begin(_bind(plan_digest, shards))
        except BaseException:
            staging.close()
            raise
        return staging

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def how_to_resume(self) -> str:
        """What to tell somebody whose run has stopped."""
        kept = "" if self._worthless else f"; finished work is kept in {self.folder}"
        return f"run the same command again{kept}"

    # -- what a run does ---------------------------------------------------------------------

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Put bytes at ``start_byte`` of a tensor, in its file. Raises OutputError where the disk
        is full or fails (staged work is kept), ValueError outside the tensor."""
        file, info, at = self._places[name]
        data = data.cast("B")
        check_range(info, start_byte, len(data))
        with self._explained(f"Writing {name}", self.folder / NEW / file):
            _fs.write_all(self._fds[file], data, at + start_byte)
        if self.durable:
            self._pace(file, len(data))

    def commit(self, task: str, outputs: Sequence[Output], extra: JSON = None) -> None:
        """Journal a task whose outputs are all written, each with the leaf digests of its range
        (whole canonical blocks, see :func:`block_digests`). ``extra`` is kept with it. No fsync:
        a resume hashes the blocks again."""
        for output in outputs:
            self._leaves.check(*output)
        with self._explained(f"Recording {task}", self.folder / JOURNAL):
            self._running.task(Record(task, tuple(outputs), extra))
        self._take(Record(task, tuple(outputs)))  # extra is for a resume, which reads it again

    def finished(self, threads: int = 1) -> dict[str, Record]:
        """The tasks of earlier runs whose journal line is intact and whose blocks hash to what it
        says. The others are forgotten, and have to be done again."""
        with self._explained("Reading staged work"), ThreadPoolExecutor(threads) as pool:
            records = list(self._entries.tasks.values())
            intact = list(pool.map(self._intact, records))
        kept = {r.task: r for r, good in zip(records, intact, strict=True) if good}
        self._entries.tasks = {}
        for record in kept.values():
            self._take(record)
        return kept

    def note(self, key: str, value: JSON) -> None:
        """Journal a solved statistic (anything JSON holds; floats come back exactly)."""
        with self._explained(f"Recording {key}", self.folder / JOURNAL):
            self._running.note(key, value)
        with self._mutex:
            self._entries.notes[key] = value

    def noted(self) -> dict[str, JSON]:
        with self._mutex:
            return dict(self._entries.notes)

    def add_file(self, name: str, data: bytes | Path) -> None:
        """Add a small file (config, tokenizer …) from bytes, or copied from a path. Raises
        OutputError for a name that leaves the folder or is taken."""
        taken = {MANIFEST, index_name(self._shards), *(shard.file for shard in self._shards)}
        if not is_safe_name(name) or name in taken:
            raise OutputError(
                "A file of this name cannot be added to the output.",
                where=name,
                expected="a relative name inside the folder, and none of the weights' own",
            )
        self._put_file(name, data)

    def publish(self, manifest: Mapping[str, Any]) -> Path:
        """Sync everything, write the manifest last, and put the folder in OUT's place; returns
        OUT. ``manifest`` gains ``output`` (files, tensors and content digests) and a checksum.
        Raises OutputError where a tensor is not finished, or the disk fails."""
        self._require_complete()
        with self._explained("Publishing the output"):
            index = index_json(self._shards)
            if index is not None:
                self._put_file(index_name(self._shards), index)
            self._sweep()
            self._sync_data()
            sealed = seal_manifest({**manifest, "output": self._contents()})
            self._write_file(MANIFEST, sealed)
            if self.durable:
                _fs.sync_file(self.folder / NEW / MANIFEST)
                sync_folders(self.folder / NEW)
            publish_folder(self.out, self._running, overwrite=self._overwrite, durable=self.durable)
        self._close_files()
        clear_published(self.folder)
        self.close()
        return self.out

    def close(self) -> None:
        """Release everything. Finished work stays for a resume; staging without any goes."""
        if self._closed:
            return
        self._closed = True
        try:
            self._close_files()
            if self._journal is not None and self._worthless:
                clear_staging(self.folder)
        finally:
            self._lock.release()

    abandon = close

    # -- how -----------------------------------------------------------------------------------

    @property
    def _running(self) -> Journal:
        if self._journal is None or self._closed:
            raise ValueError("this staging is closed")
        return self._journal

    @property
    def _worthless(self) -> bool:
        aside = os.path.lexists(self.folder / OLD)
        return not (self._entries.tasks or self._entries.notes or aside)

    @contextmanager
    def _explained(self, doing: str, where: Path | None = None) -> Iterator[None]:
        with _fs.explained(doing, where or self.folder, self.how_to_resume):
            yield

    def _begin(self, plan: str) -> None:
        entries = read_journal(self.folder / JOURNAL)
        if entries is not None and entries.plan != plan:
            if not self._overwrite:
                raise _other_plan(self.folder, entries.plan, plan)
            entries = None
        if entries is not None and (self.folder / NEW).is_dir():
            self._entries, self.resumed = entries, bool(entries.tasks or entries.notes)
        else:
            clear_staging(self.folder)
            _fs.fs.mkdir(self.folder / NEW)
        self._journal = Journal(self.folder / JOURNAL, plan, create=entries is None)
        for shard in self._shards:
            self._fds[shard.file] = self._prepare(shard)

    def _prepare(self, shard: Shard) -> int:
        """Open a shard at its final size, with its header written."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        fd = _fs.fs.open(self.folder / NEW / shard.file, flags)
        try:
            if os.fstat(fd).st_size != shard.size:
                _fs.fs.resize(fd, shard.size)
            if self.durable:
                _fs.fs.reserve(fd, shard.size)
            _fs.write_all(fd, memoryview(shard.header), 0)
        except BaseException:
            _fs.fs.close(fd)
            raise
        return fd

    def _pace(self, file: str, written: int) -> None:
        """Keep the disk busy during the run, so that the syncs at its end are short."""
        with self._mutex:
            dirty = self._dirty[file] = self._dirty.get(file, 0) + written
            if dirty >= _WRITEBACK:
                self._dirty[file] = 0
        if dirty >= _WRITEBACK:
            _fs.fs.begin_writeback(self._fds[file])

    def _take(self, record: Record) -> None:
        with self._mutex:
            for output in record.outputs:
                self._leaves.put(*output)
            self._entries.tasks[record.task] = record

    def _intact(self, record: Record) -> bool:
        """Whether the files hold what a journal line says of them."""
        for name, start, stop, leaves in record.outputs:
            if name not in self._places:
                return False
            file, info, at = self._places[name]
            try:
                self._leaves.check(name, start, stop, leaves)
            except ValueError:
                return False
            size = info.dtype.itemsize
            if hash_range(self._fds[file], at + start, stop - start, size) != leaves:
                return False
        return True

    def _put_file(self, name: str, data: bytes | Path) -> None:
        with self._explained(f"Adding {name}", self.folder / NEW / name):
            self._files[name] = self._write_file(name, data)

    def _write_file(self, name: str, data: bytes | Path) -> dict[str, Any]:
        path, hasher, at = self.folder / NEW / name, sha256(), 0
        for parent in reversed(path.relative_to(self.folder / NEW).parents[:-1]):
            if not (self.folder / NEW / parent).is_dir():
                _fs.fs.mkdir(self.folder / NEW / parent)
        fd = _fs.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            _fs.fs.resize(fd, 0)
            for chunk in _chunks(data):
                hasher.update(chunk)
                _fs.write_all(fd, memoryview(chunk), at)
                at += len(chunk)
        finally:
            _fs.fs.close(fd)
        return {"size": at, "sha256": hasher.hexdigest()}

    def _require_complete(self) -> None:
        if missing := self._leaves.missing():
            raise OutputError(
                "The output is not finished, and is not published.",
                where=missing[0],
                expected=f"{len(self._places)} whole tensors",
                found=f"{len(missing)} with blocks that no task has written",
                fix=self.how_to_resume,
            )

    def _sweep(self) -> None:
        """Remove what an earlier run added and this one did not."""
        wanted = {*self._fds, *self._files}
        for folder, _, names in os.walk(self.folder / NEW):
            for path in (Path(folder) / name for name in names):
                if path.relative_to(self.folder / NEW).as_posix() not in wanted:
                    _fs.fs.unlink(path)

    def _sync_data(self) -> None:
        if not self.durable:
            return
        try:
            for fd in self._fds.values():
                _fs.fs.fsync(fd)
        except OSError:
            # The system may now show from memory what never reached the disk, and a second fsync
            # would not say so: a resume must write all of it again, not trust what it reads.
            self._running.void()
            self._entries.tasks.clear()
            raise
        for name in self._files:
            _fs.sync_file(self.folder / NEW / name)

    def _contents(self) -> dict[str, Any]:
        digests = self._leaves.digests()
        shards = {
            shard.file: {"size": shard.size, "header": sha256(shard.header).hexdigest()}
            for shard in self._shards
        }
        return {
            "content_digest": content_digest(digests),
            "files": dict(sorted({**shards, **self._files}.items())),
            "tensors": {
                name: _entry(file, info, digests[name])
                for name, (file, info, _) in self._places.items()
            },
        }

    def _close_files(self) -> None:
        if self._journal is not None:
            self._journal.close()
        while self._fds:
            _fs.fs.close(self._fds.popitem()[1])


def _entry(file: str, info: TensorInfo, digest: str) -> dict[str, Any]:
    return {
        "file": file,
        "dtype": info.dtype.code,
        "shape": list(info.shape),
        "digest": digest,
    }


def _chunks(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with open(data, "rb") as file:
        while chunk := file.read(_COPY):
            yield chunk


def _bind(plan_digest: str, shards: Sequence[Shard]) -> str:
    """What a journal is bound to: the plan, and where it puts every tensor."""
    layout = sha256()
    for shard in shards:
        layout.update(f"{shard.file}\0{shard.size}\0".encode() + shard.header)
    return f"{plan_digest} {layout.hexdigest()}"


def _other_plan(folder: Path, found: str, expected: str) -> OutputError:
    return OutputError(
        "Beside the output lies unfinished work of another recipe, of other inputs or settings.",
        where=folder,
        expected=f"plan {expected.split()[0]}",
        found=f"plan {found.split()[0]}",
        fix="run that command again to finish it, or add --overwrite to discard it",
    )
