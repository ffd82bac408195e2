"""One safetensors file, read by ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .files import check_range, identity_of, open_regular, read_exactly
from .safetensors_header import header_length, prove_header
from .spec import FileIdentity, TensorInfo, Weights


class SafetensorsFile(Weights):
    """A safetensors file, proven when opened (see :mod:`.safetensors_header`).

    Reads are positioned reads into the caller's buffer: no mapping, no copy, any number of
    threads. ``metadata`` is the header's ``__metadata__``. Raises WeightsError.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = label or str(path)
        self._fd = open_regular(self.path)
        try:
            self._identity = identity_of(self._fd, self.path)
            size = self._identity.size
            length = header_length(self._bytes(0, min(8, size)), size, self.path)
            header = prove_header(self._bytes(8, length), size, self.path)
        except BaseException:
            self.close()
            raise
        self._entries, self.metadata = header.entries, header.metadata

    def _bytes(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        read_exactly(self._fd, offset, memoryview(data), self.path)
        return bytes(data)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._entries[name].info

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        entry = self._entries[name]
        check_range(entry.info, start, stop, out, self.path)
        if start < stop:
            offset = entry.offset + start * entry.info.dtype.itemsize
            read_exactly(self._fd, offset, out, f"{self.path}: {name}")

    def identities(self) -> tuple[FileIdentity, ...]:
        return (self._identity,)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
