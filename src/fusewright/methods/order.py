"""The exact k-th largest magnitude of a tensor or of a whole model, without sorting or joining it.

The bits of |x| order as |x| does. A sample of blocks says about where the k-th lies; one round over
everything counts what is larger than a few bins around it, and every value inside: that decides
it. Where the sample misled, it is found digit by digit: a histogram of the highest 16 bits,
then of the next 16 within the bin that holds it. float64 has two more digits. Counts are integers,
so the answer is exact, and the same for any sample, chunks and threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.methods.contract import At, Round, Seen
from fusewright.methods.partials import BLOCK, Partial

DIGIT = 16
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}

Ranks = Callable[[At, int], Sequence[int]]
"""From (at, number of elements) to k for each vector: 1 asks for the largest."""


BRACKET = 6
"""Bins of the first digit that are looked into at most, beside three at the likeliest place: each
is 1/128 of an octave wide."""

SAMPLE = 8
"""One block in so many is sampled: a rank is then off by a bin at most, as a rule."""


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
    sample, bracket = f"{name}, sample", f"{name}, bracket"
    rounds = [
        Round(
            sample, scope, partial(measure_sample, shift=shifts[0]),
            partial(_solve_sample, ranks=ranks), uniform, every=SAMPLE,
        ),
        Round(
            bracket, scope, partial(measure_bracket, sample=sample, shift=shifts[1]),
            partial(_solve_bracket, sample=sample, ranks=ranks), uniform,
        ),
    ]  # fmt: skip
    for i, shift in enumerate(shifts):
        previous = names[i - 1] if i else None
        measure = partial(measure_digit, shift=shift, previous=previous)
        solve = partial(_solve, shift=shift, previous=previous, ranks=ranks, dtype=dtype)
        if i < 2:  # the digits that the bracket has found already, if it could
            solve = partial(_unless_found, solve=solve, bracket=bracket, last=shift == 0,
                            dtype=dtype)  # fmt: skip
            missed = partial(_missed, bracket=bracket)
            rounds.append(Round(names[i], scope, measure, solve, uniform, 1, missed, True))
        else:
            rounds.append(Round(names[i], scope, measure, solve, uniform))
    return tuple(rounds)


def measure_sample(seen: Seen, at: At, *, shift: int) -> Partial:
    """Histograms of the first digit of sampled blocks."""
    histograms = [digit_histogram(magnitude_bits(v), shift, None) for v in seen.vectors]
    return Partial(counts={"histogram": torch.stack(histograms) * stands_for(at)})


def stands_for(at: At) -> int:
    """How many blocks of its tensor a sampled one stands for: short tensors have fewer others."""
    blocks = -(-at.numel // BLOCK)
    return blocks // -(-blocks // SAMPLE) if at.stop - at.start <= BLOCK else 1


def _solve_sample(measured: Partial | None, at: At, *, ranks: Ranks) -> Any:
    assert measured is not None
    shares = [k / at.numel for k in ranks(at, at.numel)]
    found = [_around(h, s) for h, s in zip(measured["histogram"], shares, strict=True)]
    many = max(map(len, found))
    return {"bins": [bins + [bins[-1] + 1 + i for i in range(many - len(bins))] for bins in found]}


def _around(histogram: NDArray[Any], share: float) -> list[int]:
    """The bins that may hold the value below which all but a share lie: those within three standard
    errors of its rank, and the nearest that hold anything. Differences of coarse numbers lie on a
    few values, far apart."""
    total = int(histogram.sum())
    error = 3 * math.sqrt(share * (1 - share) * total * SAMPLE)
    above = np.cumsum(histogram[::-1])
    ranks = (share * total, share * total + error, share * total - error)
    place, low, high = (_digit(above, min(max(1, round(rank)), total)) for rank in ranks)
    held = np.flatnonzero(histogram)
    around = [*held[held < low][-1:], *held[(held >= low) & (held <= high)], *held[held > high][:1]]
    nearest = sorted(map(int, around), key=lambda one: abs(one - place))[:BRACKET]
    return sorted({*nearest, place - 1 if place else 1, place, place + 1})


def measure_bracket(seen: Seen, at: At, *, sample: str, shift: int) -> Partial:
    """How many lie above each of a vector's bins, and a histogram of the second digit in each:
    (vectors, bins) and (vectors, bins, 65536)."""
    every = at.solved[sample]["bins"]
    above = torch.zeros(len(every), len(every[0]), dtype=torch.int64)
    inside = torch.zeros(*above.shape, 2**DIGIT, dtype=torch.int64)
    for t, (vector, bins) in enumerate(zip(seen.vectors, every, strict=True)):
        digits = magnitude_bits(vector) >> shift
        first = digits >> DIGIT
        for i, place in enumerate(bins):
            above[t, i] = (first > place).sum()
            second = digits[first == place] & (2**DIGIT - 1)
            inside[t, i] = torch.bincount(second, minlength=2**DIGIT)
    return Partial(counts={"above": above, "inside": inside})


def _solve_bracket(measured: Partial | None, at: At, *, sample: str, ranks: Ranks) -> Any:
    assert measured is not None
    prefixes: list[int | None] = []
    left: list[int | None] = []
    for t, (bins, k) in enumerate(zip(at.solved[sample]["bins"], ranks(at, at.numel), strict=True)):
        above, inside = measured["above"][t], measured["inside"][t]
        hit = [i for i in range(len(bins)) if above[i] < k <= above[i] + inside[i].sum()]
        digit, rank = _descend(inside[hit[0]], k - int(above[hit[0]])) if hit else (0, 0)
        prefixes.append((bins[hit[0]] << DIGIT) + digit if hit else None)
        left.append(rank if hit else None)
    return {"prefix": prefixes, "rank": left}


def _missed(at: At, *, bracket: str) -> bool:
    return None in at.solved[bracket]["prefix"]


def _unless_found(
    measured: Partial | None, at: At, *, solve: Any, bracket: str, last: bool, dtype: torch.dtype
) -> Any:
    if measured is not None:
        return solve(measured, at)
    found = at.solved[bracket]
    return [_value(bits, dtype) for bits in found["prefix"]] if last else found


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of |x| as integers that order as |x| does: (n,) int32 or int64."""
    return x.reshape(-1).abs().view(_INTEGER[x.dtype])


def digit_histogram(bits: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Counts of the digit at ``shift`` among those whose higher digits are ``prefix``: (65536,)."""
    if prefix is not None:
        bits = bits[(bits >> (shift + DIGIT)) == prefix]
    return torch.bincount((bits >> shift) & (2**DIGIT - 1), minlength=2**DIGIT)


def measure_digit(seen: Seen, at: At, *, shift: int, previous: str | None) -> Partial:
    """Histograms of one digit among those whose higher digits were found before."""
    prefixes = at.solved[previous]["prefix"] if previous else [None] * len(seen.vectors)
    bits = [magnitude_bits(v) for v in seen.vectors]
    histograms = [digit_histogram(b, shift, p) for b, p in zip(bits, prefixes, strict=True)]
    return Partial(counts={"histogram": torch.stack(histograms)})


def _solve(
    measured: Partial | None, at: At, *, shift: int, previous: str | None, ranks: Ranks,
    dtype: torch.dtype,
) -> Any:  # fmt: skip
    assert measured is not None
    histograms = measured["histogram"]
    if previous:
        prefixes, wanted = at.solved[previous]["prefix"], at.solved[previous]["rank"]
    else:
        prefixes, wanted = [0] * len(histograms), ranks(at, at.numel)
    found = [_descend(h, k) for h, k in zip(histograms, wanted, strict=True)]
    prefixes = [(p << DIGIT) + digit for p, (digit, _) in zip(prefixes, found, strict=True)]
    if shift == 0:
        return [_value(bits, dtype) for bits in prefixes]
    return {"prefix": prefixes, "rank": [rank for _, rank in found]}


def _descend(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The digit of the ``rank``-th largest, and its rank among those with this digit."""
    above = np.cumsum(histogram[::-1])
    digit = _digit(above, rank)
    return digit, rank - int(above[len(histogram) - 1 - digit] - histogram[digit])


def _digit(above: NDArray[Any], rank: int) -> int:
    """The digit of the ``rank``-th largest, given how many have each digit or a higher one."""
    return len(above) - 1 - int(np.searchsorted(above, rank))


def _value(bits: int, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return float(np.array(bits, np.int64).view(np.float64))
    return float(np.array(bits, np.int32).view(np.float32))
