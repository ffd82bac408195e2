"""What an act costs: seconds, and the most private memory that it added."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

_EVERY = 0.005
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """``peak_memory`` in bytes above the start's; None where the system does not tell."""

    seconds: float = 0.0
    peak_memory: float | None = None

    def plain(self) -> dict[str, float]:
        found = {"seconds": self.seconds, "peak_memory": self.peak_memory}
        return {name: value for name, value in found.items() if value is not None}


@contextmanager
def measured() -> Iterator[Cost]:
    """Fills in a Cost when the block ends; memory is looked at every 5 ms.

    What the process holds without using it goes back to the system first: else the act takes of
    that, and seems to need nothing.
    """
    _give_back()
    cost, before, done = Cost(), private_memory(), threading.Event()
    peaks = [before or 0]

    def watch() -> None:
        while not done.wait(_EVERY):
            peaks.append(max(peaks.pop(), private_memory() or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    if before is not None:
        watcher.start()
    began = perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = perf_counter() - began
        done.set()
        if before is not None:
            watcher.join()
            cost.peak_memory = max(peaks[0], private_memory() or 0) - before


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def private_memory() -> int | None:
    """Bytes that are this process' own (RssAnon), or None where there is no /proc."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    kib = next(found, None)
    return None if kib is None else int(kib) * 1024
