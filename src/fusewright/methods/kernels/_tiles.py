"""Numba loops over tiles that stay in the nearest cache.

Every operation is the definition's, in its order: no fast-math, no fused multiply-add, so that the
results are bit-equal to torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint32, uint64

from fusewright.methods.partials import BLOCK

TILE = 2048
ONE = np.uint32(0x00800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
_jit = njit(nogil=True, cache=True)


@_jit
def widen(source: Any, shift: int, target: Any) -> int:
    """Raw bfloat16 (shift 16) or float32 (shift 0) as float32 bits; nonzero if not all finite.

    Adding one to the exponent carries into the sign bit just where all its bits are set.
    """
    seen = np.uint32(0)
    if shift:
        for i in range(len(target)):
            bits = np.uint32(np.uint32(source[i]) << np.uint32(16))
            target[i] = bits
            seen = np.uint32(seen | np.uint32(np.uint32(bits & MAGNITUDE) + ONE))
    else:
        for i in range(len(target)):
            bits = np.uint32(source[i])
            target[i] = bits
            seen = np.uint32(seen | np.uint32(np.uint32(bits & MAGNITUDE) + ONE))
    return int(seen >> np.uint32(31))


@_jit
def narrow(source: Any, shift: int, target: Any) -> int:
    """Float32 bits to bfloat16, to nearest even (shift 16), or as they are; nonzero if not all
    finite, before or after."""
    seen = uint32(0)
    if shift:
        for i in range(len(target)):
            bits = source[i]
            odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
            source[i] = uint32(bits + uint32(0x7FFF) + odd)
            seen = uint32(seen | uint32(uint32(bits & MAGNITUDE) + ONE))
        for i in range(len(target)):
            seen = uint32(seen | uint32(uint32(source[i] & MAGNITUDE) + ONE))
            target[i] = source[i] >> uint32(16)
    else:
        for i in range(len(target)):
            target[i] = source[i]
            seen = uint32(seen | uint32(uint32(source[i] & MAGNITUDE) + ONE))
    return seen >> uint32(31)


@_jit
def philox(first: int, count: int, key: Any, lanes: Any, words: Any) -> None:
    """Words of ``count`` groups of four elements from group ``first`` on; see methods.random."""
    mask = uint64(0xFFFFFFFF)
    for i in range(count):
        group = uint64(first + i)
        a, b = group & mask, group >> uint64(32)
        c, d = uint64(key[2]), uint64(key[3])
        k0, k1 = uint64(key[0]), uint64(key[1])
        for _ in range(10):
            p0, p1 = a * uint64(0xD2511F53), c * uint64(0xCD9E8D57)
            a, c = (p1 >> uint64(32)) ^ b ^ k0, (p0 >> uint64(32)) ^ d ^ k1
            b, d = p1 & mask, p0 & mask
            k0, k1 = (k0 + uint64(0x9E3779B9)) & mask, (k1 + uint64(0xBB67AE85)) & mask
        lanes[0, i], lanes[1, i], lanes[2, i], lanes[3, i] = a, b, c, d
    for i in range(count):
        for j in range(4):
            words[4 * i + j] = lanes[j, i]


@_jit
def weighted_sum(
    base: Any, vectors: Any, has_base: bool, numbers: Any, drop: bool, keys: Any, limits: Any,
    factors: Any, start: int, shift: int, out: Any, out_shift: int,
) -> int:  # fmt: skip
    """out = [base +] Σ number·(vector [- base]), each vector's entries dropped where its random
    word is not below its limit and then multiplied by its factor; nonzero if not finite."""
    count = len(out)
    tiles = np.empty((3, TILE), np.float32)
    low, x, total = tiles[0], tiles[1], tiles[2]
    lanes, words = np.empty((4, TILE // 4), np.uint32), np.empty(TILE, np.uint32)
    bad = uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        if has_base:
            bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(len(vectors)):
            bad |= widen(vectors[t][at : at + n], shift, x[:n].view(np.uint32))
            if has_base:
                for i in range(n):
                    x[i] = x[i] - low[i]
            if drop:
                philox((start + at) // 4, (n + 3) // 4, keys[t], lanes, words)
                limit, factor = limits[t], factors[t]
                for i in range(n):
                    kept = x[i] if uint64(words[i]) < limit else np.float32(0.0)
                    x[i] = kept * factor
            number = numbers[t]
            if t == 0:
                for i in range(n):
                    total[i] = x[i] * number
            else:
                for i in range(n):
                    total[i] = total[i] + x[i] * number
        if has_base:
            for i in range(n):
                total[i] = low[i] + total[i]
        bad |= narrow(total[:n].view(np.uint32), out_shift, out[at : at + n])
    return bad


@_jit
def _trimmed(
    base: Any, vectors: Any, limits: Any, weights: Any, shift: int, low: Any, x: Any, total: Any
) -> int:
    """Rows of x: weight·τ where |τ| >= limit, else 0; total: their sum; nonzero if not finite."""
    n, zero = len(low), np.float32(0.0)
    bad = widen(base, shift, low.view(np.uint32))
    for t in range(len(vectors)):
        row, limit, weight = x[t], limits[t], weights[t]
        bad |= widen(vectors[t], shift, row[:n].view(np.uint32))
        if t == 0:
            for i in range(n):
                tau = row[i] - low[i]
                row[i] = (tau if abs(tau) >= limit else zero) * weight
                total[i] = row[i]
        else:
            for i in range(n):
                tau = row[i] - low[i]
                row[i] = (tau if abs(tau) >= limit else zero) * weight
                total[i] = total[i] + row[i]
    return bad


@_jit
def net_sign(base: Any, vectors: Any, limits: Any, weights: Any, shift: int, net: Any) -> int:
    """Put into net[0] how many more of the summed vectors' entries are positive than negative."""
    count, zero = len(base), np.float32(0.0)
    tiles, x = np.empty((2, TILE), np.float32), np.empty((len(vectors), TILE), np.float32)
    bad, more = 0, 0
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        low, total = tiles[0, :n], tiles[1, :n]
        parts = _part(vectors, at, n)
        bad |= _trimmed(base[at : at + n], parts, limits, weights, shift, low, x, total)
        for i in range(n):
            more += int(total[i] > zero) - int(total[i] < zero)
    net[0] = more
    return bad


@_jit
def elect(
    base: Any, vectors: Any, limits: Any, weights: Any, normalize: bool, instead: float,
    scale: float, shift: int, out: Any, out_shift: int,
) -> int:  # fmt: skip
    """TIES: keep |τ| >= limit, elect signs (``instead`` for zero), merge those that agree."""
    count, zero, one = len(out), np.float32(0.0), np.float32(1.0)
    other = np.float32(instead)  # a double would widen the loops
    tiles, x = np.empty((4, TILE), np.float32), np.empty((len(vectors), TILE), np.float32)
    bad = 0
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        low, total, share, sign = tiles[0, :n], tiles[1, :n], tiles[2, :n], tiles[3, :n]
        parts = _part(vectors, at, n)
        bad |= _trimmed(base[at : at + n], parts, limits, weights, shift, low, x, total)
        for i in range(n):
            value = total[i]
            sign[i] = one if value > zero else (-one if value < zero else other)
        _agreeing(x, weights, sign, n, total, share)
        if normalize:
            for i in range(n):
                total[i] = total[i] / (share[i] if share[i] != zero else one)
        for i in range(n):
            total[i] = low[i] + total[i] * scale
        bad |= narrow(total.view(np.uint32), out_shift, out[at : at + n])
    return bad


@_jit
def _part(vectors: Any, at: int, n: int) -> Any:
    return [v[at : at + n] for v in vectors]


@_jit
def _agreeing(x: Any, weights: Any, sign: Any, n: int, total: Any, share: Any) -> None:
    zero = np.float32(0.0)
    for t in range(len(x)):
        row, weight = x[t], np.float32(abs(weights[t]))
        if t == 0:
            for i in range(n):
                agrees = _sign(row[i]) == sign[i]
                total[i] = row[i] if agrees else zero
                share[i] = zero + (weight if agrees else zero)
        else:
            for i in range(n):
                agrees = _sign(row[i]) == sign[i]
                total[i] = total[i] + (row[i] if agrees else zero)
                share[i] = share[i] + (weight if agrees else zero)


@_jit
def _sign(value: Any) -> Any:
    one, zero = np.float32(1.0), np.float32(0.0)
    return one if value > zero else (-one if value < zero else zero)


@_jit
def _magnitudes(low: Any, vector: Any, shift: int, x: Any) -> int:
    """x = |vector - low|; nonzero if the vector is not all finite."""
    bad = widen(vector, shift, x.view(np.uint32))
    for i in range(len(x)):
        x[i] = abs(x[i] - low[i])
    return bad


@_jit
def histograms(
    base: Any, vectors: Any, shift: int, digit: int, prefixes: Any, weight: int, counts: Any
) -> int:
    """Count, ``weight`` times each, in the rows of ``counts`` the digit (16 bits from bit
    ``digit``) of each |vector - base| whose higher bits are its prefix (any, if that is negative);
    nonzero if not finite."""
    count = len(base)
    low, x = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    found, bits, bad = np.empty(TILE, np.uint32), x.view(np.uint32), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(len(vectors)):
            bad |= _magnitudes(low[:n], vectors[t][at : at + n], shift, x[:n])
            row = counts[t]
            if prefixes[t] < 0:
                for i in range(n):
                    row[np.int64(bits[i] >> uint32(16))] += weight
            else:
                _count_matching(bits[:n], uint32(prefixes[t]), weight, found, row)
    return bad


@_jit
def _count_matching(bits: Any, wanted: int, weight: int, found: Any, counts: Any) -> None:
    # Collected without a branch first: few match, at places that no processor can foresee.
    many: Any = 0
    for i in range(len(bits)):
        found[many] = bits[i]
        many += np.int64((bits[i] >> uint32(16)) == wanted)
    for i in range(many):
        counts[np.int64(found[i] & uint32(0xFFFF))] += weight


@_jit
def bracket(base: Any, vectors: Any, shift: int, bins: Any, above: Any, inside: Any) -> int:
    """For each vector's bins (ascending) of the higher 16 bits of |vector - base|: add to
    ``above`` how many lie beyond, to ``inside`` the lower bits of those within; nonzero if not
    finite."""
    count, last = len(base), bins.shape[1] - 1
    low, x = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    found, bits, bad = np.empty(TILE, np.uint32), x.view(np.uint32), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(len(vectors)):
            bad |= _magnitudes(low[:n], vectors[t][at : at + n], shift, x[:n])
            bits[n:] = uint32(0xFFFFFFFF)  # in no bin
            start, beyond = uint32(bins[t, 0] << 16), uint32((bins[t, last] + 1) << 16)
            more = uint32(0)
            for i in range(n):
                more = uint32(more + uint32(bits[i] >= beyond))
            above[t] += more
            many = _between(bits, start, beyond, found)
            _place(found[:many], bins[t], above[t], inside[t])
    return bad


ROWS = 16


@_jit
def _between(bits: Any, start: Any, beyond: Any, found: Any) -> int:
    """Collect a tile's numbers in [start, beyond). They are few, at places that no processor can
    foresee: a mask says which of each column's ROWS numbers they are."""
    many, columns, width = 0, TILE // ROWS, uint32(beyond - start)
    masks = np.zeros(columns, np.uint32)
    for row in range(ROWS):
        mark = uint32(1 << row)
        for i in range(columns):
            masks[i] |= mark if uint32(bits[row * columns + i] - start) < width else uint32(0)
    for i in range(columns):
        left = np.int64(masks[i])
        while left:
            lowest = np.float32(left & -left)  # a power of two: its exponent is the row
            exponent = (np.int64(lowest.view(np.uint32)) >> 23) - 127
            found[many] = bits[exponent * columns + i]
            many += 1
            left &= left - 1
    return many


@_jit
def _place(found: Any, bins: Any, above: Any, inside: Any) -> None:
    for i in range(len(found)):
        digit = np.int64(found[i] >> uint32(16))
        for place in range(len(bins)):
            above[place] += np.int64(digit > bins[place])
            if digit == bins[place]:
                inside[place, np.int64(found[i] & uint32(0xFFFF))] += 1


QUARTER = BLOCK // 4


@_jit
def gram(base: Any, vectors: Any, shift: int, sums: Any) -> bool:
    """Sums of v_s·v_t, s <= t, over each canonical block, v = vector [- base, if it is not None]:
    (pairs, blocks); true if some v is not finite, which its square shows.

    Products and sums are float64, in the halving tree of ``partials.block_sums``.
    """
    many, trees = len(vectors), np.empty((3, QUARTER), np.float64)
    for block in range(sums.shape[1]):
        for s in range(many):
            a = _whole(vectors[s], block)
            for t in range(s + 1, many):
                b = _whole(vectors[t], block)
                if base is None:  # known when this is compiled
                    _products(a, b, None, uint32(shift), trees)
                else:
                    _products(a, b, _whole(base, block), uint32(shift), trees)
                sums[_pair(s, s, many), block] = trees[0, 0]
                sums[_pair(s, t, many), block] = trees[1, 0]
                sums[_pair(t, t, many), block] = trees[2, 0]
    return not np.isfinite(sums).all()


@_jit
def _pair(s: int, t: int, many: int) -> int:
    return s * many - s * (s - 1) // 2 + t - s


@_jit
def _whole(raw: Any, block: int) -> Any:
    """A canonical block, padded with zeros."""
    part = raw[block * BLOCK : (block + 1) * BLOCK]
    if len(part) == BLOCK:
        return part
    whole = np.zeros(BLOCK, raw.dtype)
    whole[: len(part)] = part
    return whole


@_jit
def _products(a: Any, b: Any, low: Any, shift: Any, trees: Any) -> None:
    """The trees of a·a, a·b and b·b: their first two levels at once, which saves memory traffic,
    and all three together, which saves conversions."""
    one, two, three = QUARTER, 2 * QUARTER, 3 * QUARTER
    aa, ab, bb = trees[0], trees[1], trees[2]
    for i in range(QUARTER):
        a0, b0 = _number(a, low, i, shift), _number(b, low, i, shift)
        a1, b1 = _number(a, low, i + one, shift), _number(b, low, i + one, shift)
        a2, b2 = _number(a, low, i + two, shift), _number(b, low, i + two, shift)
        a3, b3 = _number(a, low, i + three, shift), _number(b, low, i + three, shift)
        aa[i] = (a0 * a0 + a2 * a2) + (a1 * a1 + a3 * a3)
        ab[i] = (a0 * b0 + a2 * b2) + (a1 * b1 + a3 * b3)
        bb[i] = (b0 * b0 + b2 * b2) + (b1 * b1 + b3 * b3)
    half = QUARTER // 2
    while half:
        for i in range(half):
            aa[i] = aa[i] + aa[i + half]
            ab[i] = ab[i] + ab[i + half]
            bb[i] = bb[i] + bb[i + half]
        half //= 2


@_jit
def _number(raw: Any, low: Any, i: int, shift: Any) -> Any:
    value = np.uint32(np.uint32(raw[i]) << shift).view(np.float32)
    if low is None:
        return np.float64(value)
    return np.float64(np.float32(value - np.uint32(np.uint32(low[i]) << shift).view(np.float32)))
