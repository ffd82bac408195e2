"""Whether two tensors of one input hold the same values."""

from __future__ import annotations

from .spec import Weights

_PIECE = 1 << 22  # bytes compared at once


def same_values(weights: Weights, one: str, other: str) -> bool:
    """Compare bit by bit, in pieces, stopping at the first difference; no read if the names are
    known to share storage (``weights.tied``) or differ in dtype or shape."""
    a, b = weights[one], weights[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if any(one in group and other in group for group in getattr(weights, "tied", ())):
        return True
    step = _PIECE // a.dtype.itemsize
    for start in range(0, a.numel, step):
        stop = min(a.numel, start + step)
        left, right = (bytearray((stop - start) * a.dtype.itemsize) for _ in range(2))
        weights.read(one, start, stop, memoryview(left))
        weights.read(other, start, stop, memoryview(right))
        if left != right:
            return False
    return True
