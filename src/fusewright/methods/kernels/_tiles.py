"""Numba loops over tiles that stay in the nearest cache.

Every operation is the definition's, in its order: no fast-math, no fused multiply-add, so that the
results are bit-equal to torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint32, uint64

TILE = 2048
ONE = np.uint32(0x00800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
_jit = njit(nogil=True, cache=True)


@_jit
def widen(source: Any, shift: int, target: Any) -> int:
    """Raw bfloat16 (shift 16) or float32 (shift 0) as float32 bits; nonzero if not all finite.

    Adding one to the exponent carries into the sign bit just where all its bits are set.
    """
    seen = uint32(0)
    if shift:
        for i in range(len(target)):
            target[i] = uint32(source[i]) << uint32(16)
    else:
        for i in range(len(target)):
            target[i] = source[i]
    for i in range(len(target)):
        seen = uint32(seen | uint32(uint32(target[i] & MAGNITUDE) + ONE))
    return seen >> uint32(31)


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
        for i in range(n):
            value = total[i]
            if normalize:
                value = value / (share[i] if share[i] != zero else one)
            total[i] = low[i] + value * scale
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
def histograms(base: Any, vectors: Any, shift: int, digit: int, prefixes: Any, counts: Any) -> int:
    """Add to each row of ``counts`` the digit (16 bits from bit ``digit``) of each |vector - base|
    whose higher bits are its prefix (any, if that is negative); nonzero if not finite."""
    count = len(base)
    low, x = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    found, bits, bad = np.empty(TILE, np.uint32), x.view(np.uint32), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(len(vectors)):
            bad |= widen(vectors[t][at : at + n], shift, bits[:n])
            for i in range(n):
                x[i] = abs(x[i] - low[i])
            row = counts[t]
            if prefixes[t] < 0:
                for i in range(n):
                    row[np.int64(bits[i] >> uint32(16))] += 1
            else:
                _count_matching(bits[:n], uint32(prefixes[t]), found, row)
    return bad


@_jit
def bracket(base: Any, vectors: Any, shift: int, bins: Any, above: Any, inside: Any) -> int:
    """For each vector's bins (ascending) of the higher 16 bits of |vector - base|: add to
    ``above`` how many lie beyond, to ``inside`` the lower bits of those within; nonzero if not
    finite."""
    count = len(base)
    low, x = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    found, bits, bad = np.empty(TILE, np.uint32), x.view(np.uint32), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(len(vectors)):
            bad |= widen(vectors[t][at : at + n], shift, bits[:n])
            for i in range(n):
                x[i] = abs(x[i] - low[i])
            for place in range(len(bins[t])):
                start, more = uint32((bins[t, place] + 1) << 16), uint32(0)
                for i in range(n):
                    more = uint32(more + uint32(bits[i] >= start))
                above[t, place] += more
            _count_inside(bits[:n], bins[t], found, inside[t])
    return bad


@_jit
def _count_inside(bits: Any, bins: Any, found: Any, counts: Any) -> None:
    # Collected without a branch first: few lie inside, at places that no processor can foresee.
    many: Any = 0
    lowest, highest = uint32(bins[0] << 16), uint32((bins[-1] + 1) << 16)
    for i in range(len(bits)):
        found[many] = bits[i]
        many += np.int64((bits[i] >= lowest) & (bits[i] < highest))
    for i in range(many):
        digit = np.int64(found[i] >> uint32(16))
        for place in range(len(bins)):
            if digit == bins[place]:
                counts[place, np.int64(found[i] & uint32(0xFFFF))] += 1


@_jit
def _count_matching(bits: Any, wanted: int, found: Any, counts: Any) -> None:
    # Collected without a branch first: few match, at places that no processor can foresee.
    many: Any = 0
    for i in range(len(bits)):
        found[many] = bits[i]
        many += np.int64((bits[i] >> uint32(16)) == wanted)
    for i in range(many):
        counts[np.int64(found[i] & uint32(0xFFFF))] += 1


HALF = 32_768


@_jit
def gram(base: Any, vectors: Any, has_base: bool, shift: int, sums: Any) -> int:
    """Sums of v_s·v_t, s <= t, over each canonical block, v = vector [- base]: (pairs, blocks).

    Products and sums are float64, in the halving tree of ``partials.block_sums``.
    """
    count, many, bad = len(vectors[0]), len(vectors), 0
    low, x = np.empty(2 * HALF, np.float32), np.zeros((many, 2 * HALF), np.float32)
    tree = np.empty(HALF, np.float64)
    for block in range(sums.shape[1]):
        at = block * 2 * HALF
        n = min(2 * HALF, count - at)
        if has_base:
            bad |= widen(base[at : at + n], shift, low[:n].view(np.uint32))
        for t in range(many):
            row = x[t]
            bad |= widen(vectors[t][at : at + n], shift, row[:n].view(np.uint32))
            if has_base:
                for i in range(n):
                    row[i] = row[i] - low[i]
            row[n:] = np.float32(0.0)
        pair = 0
        for s in range(many):
            for t in range(s, many):
                sums[pair, block] = _dot(x[s], x[t], tree)
                pair += 1
    return bad


@_jit
def _dot(a: Any, b: Any, tree: Any) -> float:
    for i in range(HALF):
        first = np.float64(a[i]) * np.float64(b[i])
        tree[i] = first + np.float64(a[i + HALF]) * np.float64(b[i + HALF])
    half = HALF // 2
    while half:
        for i in range(half):
            tree[i] = tree[i] + tree[i + half]
        half //= 2
    return tree[0]
