"""What a killed fit needs to go on to the same end: draws by number, and what they were of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Numbered(Generic[Item]):
    """Items of an endless iterator by number; numbers ascend, some may be left out, and the last
    may be asked for again."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._next = items, 0

    def __getitem__(self, number: int) -> Item:
        assert number >= self._next - 1, "a fit that goes on would draw other items"
        for _ in range(self._next, number + 1):
            self._last = next(self._items)
        self._next = number + 1
        return self._last


def digest(value: Any) -> str:
    """Of tensors, and of mappings and lists of them; of anything else its text."""
    found = sha256()
    _digest(value, found)
    return found.hexdigest()


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            into.update(repr(key).encode())
            _digest(part, into)
    elif isinstance(value, list | tuple):
        for part in value:
            _digest(part, into)
    elif isinstance(value, Tensor):
        into.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        into.update(repr(value).encode())
