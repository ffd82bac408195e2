"""Ranges of bytes from files, and whether a file is still the one that was opened."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from ..errors import WeightsError
from .spec import FileIdentity, IOCount, TensorInfo

COUNT = IOCount()
"""What all readers of this process have read so far."""

_COUNT_LOCK = threading.Lock()
_MOST_BYTES_A_CALL = 1 << 30  # Linux stops at 2 GiB - 4 KiB; macOS fails above 2 GiB - 1


def open_regular(path: Path) -> int:
    """A descriptor for reading. Raises WeightsError if it is absent or not a plain file."""
    try:
        # A FIFO would block in open() for ever, so look before opening as well as after.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise WeightsError("not a regular file", where=path, expected="a file of weights")
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise WeightsError(
            f"cannot open the file: {error.strerror}", where=path, fix=f"ls -l '{path}'"
        ) from error


def identity_of(fd: int, path: Path) -> FileIdentity:
    """Size, time of change and inode of an open file."""
    seen = os.fstat(fd)
    return FileIdentity(path, seen.st_size, seen.st_mtime_ns, seen.st_ino)


def read_exactly(fd: int, offset: int, out: memoryview, where: object) -> None:
    """Fill ``out`` from ``offset``, however short the single reads are.

    Uses positioned reads only, so any number of threads may share ``fd``. Raises WeightsError,
    naming ``where``, at the end of the file or if the read fails.
    """
    view = out if out.format == "B" and out.ndim == 1 else out.cast("B")
    done, wanted = 0, len(view)
    while done < wanted:
        part = view[done : done + _MOST_BYTES_A_CALL]
        try:
            got = _read_some(fd, part, offset + done)
        except OSError as error:
            raise WeightsError(f"reading failed: {error.strerror}", where=where) from error
        if got == 0:
            raise WeightsError(
                "the file ends too early (was it changed while open?)",
                where=where,
                expected=f"{wanted} bytes at offset {offset}",
                found=f"{done} bytes",
                fix="copy or download the file again, and let nothing write to it",
            )
        done += got
        _count(got)


def _read_some(fd: int, part: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [part], offset)
    data = os.pread(fd, len(part), offset)
    part[: len(data)] = data
    return len(data)


def _count(got: int) -> None:
    with _COUNT_LOCK:
        COUNT.bytes_read += got
        COUNT.largest_read = max(COUNT.largest_read, got)


def check_range(info: TensorInfo, start: int, stop: int, out: memoryview, label: object) -> None:
    """Refuse a range outside the tensor, or a buffer that is read-only or of another size."""
    where = f"{label}: {info.name}"
    if not 0 <= start <= stop <= info.numel:
        raise WeightsError(
            "range outside the tensor",
            where=where,
            expected=f"0 <= start <= stop <= {info.numel}",
            found=f"[{start}, {stop})",
        )
    wanted = (stop - start) * info.dtype.itemsize
    if out.readonly or out.nbytes != wanted:
        kind = "read-only, " if out.readonly else ""
        raise WeightsError(
            "the buffer does not fit the range",
            where=where,
            expected=f"{wanted} writable bytes",
            found=f"{kind}{out.nbytes} bytes",
        )
