"""The exact k-th largest magnitude of a tensor or of a whole model, without sorting or joining it.

The bits of |x| order as |x| does, so the k-th largest is found digit by digit: a histogram of the
highest 16 bits, then of the next 16 within the bin that holds it. Two rounds for float32, four
for float64; counts are integers, so the answer is the same for any chunks and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.methods.contract import At, Round, Seen
from fusewright.methods.partials import Partial

DIGIT = 16
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}

Ranks = Callable[[At, int], Sequence[int]]
"""From (at, number of elements) to k for each vector: 1 asks for the largest."""


def kth_rounds(
    name: str,
    scope: Literal["tensor", "model"],
    dtype: torch.dtype,
    ranks: Ranks,
    uniform: tuple[str, ...] = (),
) -> tuple[Round, ...]:
    """Rounds after which ``at.solved[name]`` lists each vector's k-th largest magnitude.

    The numbers are exactly those of an element. NaN counts as larger than everything.
    """
    shifts = range(_INTEGER[dtype].itemsize * 8 - DIGIT, -1, -DIGIT)
    names = [f"{name}, digit {i + 1}" for i in range(len(shifts) - 1)] + [name]
    rounds = []
    for i, shift in enumerate(shifts):
        previous = names[i - 1] if i else None
        measure = partial(_measure, shift=shift, previous=previous)
        solve = partial(_solve, shift=shift, previous=previous, ranks=ranks, dtype=dtype)
        rounds.append(Round(names[i], scope, measure, solve, uniform))
    return tuple(rounds)


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of |x| as integers that order as |x| does: (n,) int32 or int64."""
    return x.reshape(-1).abs().view(_INTEGER[x.dtype])


def digit_histogram(bits: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Counts of the digit at ``shift`` among those whose higher digits are ``prefix``: (65536,)."""
    if prefix is not None:
        bits = bits[(bits >> (shift + DIGIT)) == prefix]
    return torch.bincount((bits >> shift) & (2**DIGIT - 1), minlength=2**DIGIT)


def _measure(seen: Seen, at: At, *, shift: int, previous: str | None) -> Partial:
    prefixes = at.solved[previous]["prefix"] if previous else [None] * len(seen.vectors)
    bits = [magnitude_bits(v) for v in seen.vectors]
    histograms = [digit_histogram(b, shift, p) for b, p in zip(bits, prefixes, strict=True)]
    return Partial(counts={"histogram": torch.stack(histograms)})


def _solve(
    partial: Partial, at: At, *, shift: int, previous: str | None, ranks: Ranks, dtype: torch.dtype
) -> Any:
    histograms = partial["histogram"]
    if previous:
        prefixes, wanted = at.solved[previous]["prefix"], at.solved[previous]["rank"]
    else:
        prefixes, wanted = [0] * len(histograms), ranks(at, int(histograms[0].sum()))
    found = [_descend(h, k) for h, k in zip(histograms, wanted, strict=True)]
    prefixes = [(p << DIGIT) + digit for p, (digit, _) in zip(prefixes, found, strict=True)]
    if shift == 0:
        return [_value(bits, dtype) for bits in prefixes]
    return {"prefix": prefixes, "rank": [rank for _, rank in found]}


def _descend(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The digit of the ``rank``-th largest, and its rank among those with this digit."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, rank))
    return len(histogram) - 1 - place, rank - int(above[place] - histogram[::-1][place])


def _value(bits: int, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return float(np.array(bits, np.int64).view(np.float64))
    return float(np.array(bits, np.int32).view(np.float32))
