"""One run an output: an advisory lock in the staging folder, let go when its process dies."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ..errors import OutputError
from . import _fs

_NAME = "lock"


class FolderLock:
    """Holds a folder, made if it is not there, until :meth:`release`."""

    def __init__(self, folder: Path, fd: int) -> None:
        self.folder, self._fd = folder, fd

    @classmethod
    def acquire(cls, folder: Path) -> FolderLock:
        """Raises OutputError, with the other's process id, where another run holds it."""
        with _fs.explained("Preparing the output", folder, "choose another -o"):
            while True:
                _fs.make_folders(folder.parent)
                _make(folder)  # outside the attempt: some file systems answer with ENOENT for ever
                try:
                    lock = cls._try(folder)
                except FileNotFoundError:  # its last holder has just removed the folder
                    continue
                if lock is not None:
                    return lock

    @classmethod
    def _try(cls, folder: Path) -> FolderLock | None:
        path = folder / _NAME
        fd = _fs.fs.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return cls(folder, fd)
        except OSError as error:
            _fs.fs.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(folder) from error
            raise
        _fs.fs.close(fd)  # a file that its last holder has unlinked: look again
        return None

    def release(self) -> None:
        """Let go; a folder that holds nothing but the lock goes too."""
        try:
            if os.listdir(self.folder) == [_NAME]:
                _fs.fs.unlink(self.folder / _NAME)
                _fs.fs.rmdir(self.folder)
        except OSError:
            pass  # an empty folder left behind harms nobody
        finally:
            _fs.fs.close(self._fd)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        try:
            _fs.fs.mkdir(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise


def _in_use(folder: Path) -> OutputError:
    try:
        holder = (folder / _NAME).read_text() or "unknown"
    except OSError:
        holder = "unknown"
    return OutputError(
        "Another run is writing this output.",
        where=folder,
        found=f"process {holder}",
        fix="wait for it, or choose another -o",
    )
