"""What rounds measure: sums, counts and maxima that combine exactly, in any order.

A float sum depends on its order, so a float partial keeps one float64 number for each canonical
block and rounds once, by ``math.fsum``, when the tensor is complete. Integer counts and maxima are
exact as they are. That is why results do not depend on threads or memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 65_536
"""Elements in a canonical block, counted from the start of a tensor."""


def block_sums(x: Tensor) -> Tensor:
    """Sums of the canonical blocks of the last axis: (..., n) to (..., ceil(n / BLOCK)), float64.

    The order is the halving tree x[:h] + x[h:] of the block padded with zeros, so that any
    device, and any kernel, can repeat it bit by bit.
    """
    x = x.to(torch.float64)
    count = -(-x.shape[-1] // BLOCK)
    width = BLOCK if count > 1 else 1 << max(x.shape[-1] - 1, 0).bit_length()
    missing = count * width - x.shape[-1]
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    x = x.reshape(*x.shape[:-1], count, width)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


class Partial:
    """Named measurements of a part of a model; ``a + b`` measures both parts.

    ``sums`` are (k..., blocks) float64 tensors from :func:`block_sums`; ``counts`` integer
    tensors; ``peaks`` float tensors of which the larger counts.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, Tensor] | None = None,
        peaks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._sums = {k: [_array(v)] for k, v in (sums or {}).items()}
        self._counts = {k: _array(v) for k, v in (counts or {}).items()}
        self._peaks = {k: _array(v) for k, v in (peaks or {}).items()}

    def __add__(self, other: Partial) -> Partial:
        both = Partial()
        both._sums = {k: v + other._sums[k] for k, v in self._sums.items()}
        both._counts = {
            k: np.add(v, other._counts[k], dtype=np.int64) for k, v in self._counts.items()
        }
        both._peaks = {k: np.maximum(v, other._peaks[k]) for k, v in self._peaks.items()}
        return both

    def __iadd__(self, other: Partial) -> Self:
        """The same in place: for the accumulator that a tensor's units are added to."""
        for name, parts in self._sums.items():
            parts += other._sums[name]
        for name, count in self._counts.items():
            more = other._counts[name]
            total = count if count.ndim and _fits(count, more) else count.astype(np.int64)
            self._counts[name] = np.add(total, more, out=total)
        self._peaks = {k: np.maximum(v, other._peaks[k]) for k, v in self._peaks.items()}
        return self

    def rounded(self) -> Partial:
        """The same with every sum rounded to one float64: done when a tensor is complete."""
        closed = Partial()
        closed._sums = {k: [_fsum(v)[..., None]] for k, v in self._sums.items()}
        closed._counts, closed._peaks = self._counts, self._peaks
        return closed

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name in self._sums:
            return _fsum(self._sums[name])
        return self._counts[name] if name in self._counts else self._peaks[name]


def _fits(count: NDArray[Any], more: NDArray[Any]) -> bool:
    """Whether the sum of two counts is exact in the integers of the first."""
    if count.dtype == np.int64 or not count.size:
        return count.dtype == np.int64
    return int(count.max()) + int(more.max()) <= np.iinfo(count.dtype).max


def _array(value: Tensor) -> NDArray[Any]:
    return value.detach().cpu().numpy()


def _fsum(parts: list[NDArray[Any]]) -> NDArray[Any]:
    joined = np.concatenate(parts, axis=-1)
    flat = joined.reshape(-1, joined.shape[-1])
    return np.array([math.fsum(row) for row in flat]).reshape(joined.shape[:-1])
