"""What a run tells while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """Output bytes that passes have gone over, of all passes together; or the steps of a fit, with
    the latest loss."""

    done: int
    total: int
    phase: str
    tensor: str
    resumed: bool = False
    unit: Literal["bytes", "steps"] = "bytes"
    loss: float | None = None


Listener = Callable[[Progress], None]


def fit_told(listener: Listener) -> Callable[[int, int, float], None]:
    """What a fit tells of its steps, told to a listener."""
    first: list[int] = []

    def tell(done: int, total: int, loss: float) -> None:
        if not first or done < first[0]:  # a program may fit several times
            first[:] = [done]
        listener(Progress(done, total, "fit", "", first[0] > 1, "steps", loss))

    return tell


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
