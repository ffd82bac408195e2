"""The calls that change a disk, behind one object: tests record them and make them fail."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..errors import OutputError

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_AT_FDCWD = -100
_SWAP = 2  # RENAME_EXCHANGE on Linux and RENAME_SWAP on macOS
_SYNC_FILE_RANGE_WRITE = 2


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class FileSystem:
    """The operating system's calls, one method each. Every method may raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def append(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def resize(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def reserve(self, fd: int, size: int) -> None:
        """Claim the disk's blocks now, where the system can; a full disk shows itself here."""
        try:
            os.posix_fallocate(fd, 0, size)
        except AttributeError:  # macOS
            pass
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def begin_writeback(self, fd: int) -> None:
        """Ask the system to send what was written to the disk now, without waiting: a later fsync
        finds little left to do. A hint, on Linux; failures show in that fsync."""
        if hasattr(_libc(), "sync_file_range"):
            whole = ctypes.c_int64(0)
            _libc().sync_file_range(fd, whole, whole, _SYNC_FILE_RANGE_WRITE)

    def fsync(self, fd: int) -> None:
        if sys.platform == "darwin":  # fsync stops at the drive's cache there
            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        os.fsync(fd)

    def fsync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two paths in one step; False where the system cannot."""
        libc = _libc()
        a, b = os.fsencode(one), os.fsencode(other)
        if hasattr(libc, "renameat2"):
            failed = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _SWAP)
        elif hasattr(libc, "renamex_np"):
            failed = libc.renamex_np(a, b, _SWAP)
        else:
            return False
        if failed and (code := ctypes.get_errno()) not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(other))
        return not failed

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def free(self, path: Path) -> int:
        """Bytes that an unprivileged process may still write below ``path``."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize

    def identity(self, path: Path) -> int | None:
        """The inode: what stays the same when a folder is renamed. None if there is nothing."""
        try:
            return os.lstat(path).st_ino
        except FileNotFoundError:
            return None


fs = FileSystem()


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, however few bytes the system takes at a time."""
    while len(data):
        done = fs.pwrite(fd, data, offset)
        if done <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data, offset = data[done:], offset + done


def append_all(fd: int, data: memoryview) -> None:
    """Append every byte; short writes are continued."""
    while len(data):
        done = fs.append(fd, data)
        if done <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = data[done:]


def sync_file(path: Path) -> None:
    """fsync a file by its path."""
    fd = fs.open(path, os.O_RDWR)
    try:
        fs.fsync(fd)
    finally:
        fs.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        fs.rmdir(path)
    elif os.path.lexists(path):
        fs.unlink(path)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing; their names are synced."""
    if not path.is_dir():
        make_folders(path.parent)
        with suppress(FileExistsError):
            fs.mkdir(path)
        fs.fsync_folder(path.parent)


@contextmanager
def explained(doing: str, where: Path, fix: str | None = None) -> Iterator[None]:
    """Turn what the system says into a refusal that names the path and the way on."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown")
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{doing} failed: {'the disk is full' if full else error.strerror or error}",
            where=error.filename or where,
            found=code,
            fix=f"make room, then {fix}" if full and fix else fix,
        ) from error
