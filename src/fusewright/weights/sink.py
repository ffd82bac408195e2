"""Where a run's results go: a face that staged files and memory share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from .digest import Leaves, content_digest
from .journal import JSON, Output, Record
from .spec import TensorInfo


class Sink(Protocol):
    """Takes tensors in any order, by many threads, and remembers what is finished."""

    def write(self, name: str, start_byte: int, data: memoryview) -> None: ...

    def commit(self, task: str, outputs: Sequence[Output], extra: JSON = None) -> None: ...

    def finished(self, threads: int = 1) -> dict[str, Record]: ...

    def note(self, key: str, value: JSON) -> None: ...

    def noted(self) -> dict[str, JSON]: ...


class MemorySink:
    """A merge in memory: one bytearray a tensor, little-endian, in its storage dtype."""

    resumed = False

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self._data = {info.name: (info, bytearray(info.nbytes)) for info in tensors}
        self._leaves = Leaves(tensors)
        self._lock = threading.Lock()
        self._tasks: dict[str, Record] = {}
        self._notes: dict[str, JSON] = {}

    def write(self, name: str, start_byte: int, data: memoryview) -> None:
        """Put bytes at ``start_byte`` of a tensor. Raises ValueError outside it."""
        info, buffer = self._data[name]
        data = data.cast("B")
        check_range(info, start_byte, len(data))
        buffer[start_byte : start_byte + len(data)] = data

    def commit(self, task: str, outputs: Sequence[Output], extra: JSON = None) -> None:
        with self._lock:
            for output in outputs:
                self._leaves.put(*output)
            self._tasks[task] = Record(task, tuple(outputs), extra)

    def finished(self, threads: int = 1) -> dict[str, Record]:
        return dict(self._tasks)

    def note(self, key: str, value: JSON) -> None:
        self._notes[key] = value

    def noted(self) -> dict[str, JSON]:
        return dict(self._notes)

    def tensors(self) -> dict[str, tuple[TensorInfo, bytearray]]:
        """Every tensor. Raises ValueError while some are not committed whole."""
        if missing := self._leaves.missing():
            raise ValueError(f"not finished: {', '.join(missing[:5])}")
        return dict(self._data)

    def content_digest(self) -> str:
        return content_digest(self._leaves.digests())


def check_range(info: TensorInfo, start_byte: int, nbytes: int) -> None:
    """Refuse bytes outside a tensor. Raises ValueError."""
    if start_byte < 0 or start_byte + nbytes > info.nbytes:
        raise ValueError(
            f"{info.name}: bytes {start_byte}:{start_byte + nbytes} of a tensor of {info.nbytes}"
        )
