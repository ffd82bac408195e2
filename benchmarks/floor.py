"""The floor: plain reads of every input byte and plain writes of the output's size."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

STEP = 4 << 20


def floor(inputs: list[Path], out: Path, size: int, threads: int, sync: bool) -> float:
    """Seconds to ``preadv`` every byte of ``inputs`` into reused buffers, then ``pwrite`` ``size``
    bytes to ``out`` (and fsync), with ``threads`` threads."""
    start = time.perf_counter()
    spans = [(f, at) for f in inputs for at in range(0, os.path.getsize(f), STEP)]
    fds = {f: os.open(f, os.O_RDONLY) for f in inputs}
    _parallel(threads, spans, lambda buffer, s: os.preadv(fds[s[0]], [buffer], s[1]))
    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    places = list(range(0, size, STEP))
    _parallel(threads, places, lambda buffer, at: os.pwrite(fd, buffer[: min(STEP, size - at)], at))
    if sync:
        os.fsync(fd)
    for opened in (*fds.values(), fd):
        os.close(opened)
    took = time.perf_counter() - start
    os.unlink(out)
    return took


def _parallel(threads, items, act) -> None:
    def loop(first: int) -> None:
        buffer = memoryview(bytearray(STEP))
        for item in items[first::threads]:
            act(buffer, item)

    pool = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
