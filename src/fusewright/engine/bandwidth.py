"""How fast this machine reads the inputs and writes beside the output: the yardstick of reports."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROBE = 64 * 2**20
_STEP = 4 * 2**20


def read_speed(files: Sequence[Path]) -> float | None:
    """Bytes a second of plain reads of up to 64 MB of the first file, or None if there is none."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            buffer, done, start = bytearray(_STEP), 0, time.perf_counter()
            while done < PROBE and (count := file.readinto(buffer)):
                done += count
            return done / max(time.perf_counter() - start, 1e-9)
    return None


def write_speed(folder: Path, sync: bool = True) -> float | None:
    """Bytes a second of writing (and syncing) 64 MB to a file that is removed again."""
    try:
        fd, name = tempfile.mkstemp(prefix=".fusewright-probe", dir=folder)
    except OSError:
        return None
    try:
        data, start = memoryview(bytearray(_STEP)), time.perf_counter()
        for _ in range(PROBE // _STEP):
            os.write(fd, data)
        if sync:
            os.fsync(fd)
        return PROBE / (time.perf_counter() - start)
    finally:
        os.close(fd)
        os.unlink(name)
