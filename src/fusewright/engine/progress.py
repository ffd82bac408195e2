"""What a run tells while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Output bytes that passes have gone over, of all passes together."""

    done_bytes: int
    total_bytes: int
    phase: str
    tensor: str
    resumed: bool = False


Listener = Callable[[Progress], None]


class Meter:
    """Adds up ticks of many threads and tells a listener."""

    def __init__(self, total: int, listener: Listener | None, resumed: bool, done: int = 0) -> None:
        self._total, self._listener, self._resumed, self._done = total, listener, resumed, done
        self._lock = threading.Lock()

    def __call__(self, phase: str, tensor: str, size: int) -> None:
        if self._listener is None:
            return
        with self._lock:
            self._done += size
            self._listener(Progress(self._done, self._total, phase, tensor, self._resumed))
