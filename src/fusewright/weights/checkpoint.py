"""What a killed run goes on from: a file of torch's that is whole, or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from zipfile import ZipFile

from ..errors import OutputError
from . import _fs

if TYPE_CHECKING:
    import torch

_AGAIN = "run the same command again: it goes on from the last checkpoint"


def write_checkpoint(path: Path, held: Mapping[str, Any]) -> None:
    """Put ``held`` in the file's place at once; until then the earlier one stays as it was.

    Raises OutputError where the disk is full, may not be written or fails.
    """
    partial = path.with_name(f"{path.name}.partial")
    with _fs.explained("Writing the checkpoint", path, _AGAIN):
        _fs.make_folders(path.parent)
        try:
            _write(partial, held)
            _fs.fs.rename(partial, path)
        except Exception:
            with suppress(OSError):  # a full disk gets its room back
                _fs.fs.unlink(partial)
            raise


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What was written there. Raises OutputError for a file that cannot be read, or is not whole:
    each part's checksum is compared."""
    import pickle

    import torch

    with _fs.explained("Reading the checkpoint", path, _without(path)):
        if not _is_whole(path):
            raise _damaged(path, "a file that is cut or changed")
        try:
            found: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _damaged(path, "no checkpoint of fusewright") from error
    return found


def _write(path: Path, held: Mapping[str, Any]) -> None:
    import torch

    file = _File(_fs.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    try:
        torch.save(held, cast("IO[bytes]", file))
        _fs.fs.fsync(file.fd)
    except RuntimeError:
        if file.failed is not None:
            raise file.failed from None
        raise
    finally:
        _fs.fs.close(file.fd)


class _File:
    """Takes what torch writes, and remembers why it could not: torch's own error does not say."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.failed: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        whole = memoryview(data).cast("B")
        try:
            _fs.append_all(self.fd, whole)
        except OSError as error:
            self.failed = error
            raise
        return len(whole)

    def flush(self) -> None:
        """Nothing is held back."""


def _is_whole(path: Path) -> bool:
    try:
        with ZipFile(path) as parts:
            return parts.testzip() is None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the file's start
            raise
        return False
    except Exception:  # zipfile raises many kinds for a broken file
        return False


def _damaged(path: Path, found: str) -> OutputError:
    return OutputError("The checkpoint that this run would go on from is damaged.", where=path,
                       expected="the file as it was written", found=found,
                       fix=_without(path))  # fmt: skip


def _without(path: Path) -> str:
    return f"rm '{path}', then run the same command again"
