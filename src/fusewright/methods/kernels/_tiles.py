"""Numba loops over tiles that stay in the nearest cache.

Every operation is the definition's, in its order: no fast-math, no fused multiply-add, so that the
results are bit-equal to torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint32, uint64

TILE = 4096
EXPONENT = np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
_jit = njit(nogil=True, cache=True)


@_jit
def widen(source: Any, start: int, count: int, shift: int, target: Any) -> int:
    """Raw bfloat16 (shift 16) or float32 (shift 0) as float32 bits; 1 if any is not finite."""
    bad = uint32(0)
    for i in range(count):
        bits = uint32(source[start + i]) << uint32(shift)
        target[i] = bits
        bad |= uint32((bits & EXPONENT) == EXPONENT)
    return bad


@_jit
def narrow(source: Any, count: int, shift: int, target: Any, start: int) -> int:
    """Float32 bits to bfloat16, to nearest even (shift 16), or as they are; 1 if not finite."""
    bad = uint32(0)
    for i in range(count):
        bits = source[i]
        bad |= uint32((bits & EXPONENT) == EXPONENT)
        if shift:
            bits = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
            bad |= uint32((bits & uint32(0x7F80)) == uint32(0x7F80))
        target[start + i] = bits
    return bad


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
            bad |= widen(base, at, n, shift, low.view(np.uint32))
        for t in range(len(vectors)):
            bad |= widen(vectors[t], at, n, shift, x.view(np.uint32))
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
        bad |= narrow(total.view(np.uint32), n, out_shift, out, at)
    return bad


@_jit
def elect(
    base: Any, vectors: Any, limits: Any, weights: Any, normalize: bool, instead: float,
    scale: float, shift: int, out: Any, out_shift: int,
) -> int:  # fmt: skip
    """TIES: keep |τ| >= limit, elect signs (``instead`` for zero), merge those that agree."""
    count, many = len(out), len(vectors)
    tiles = np.empty((4, TILE), np.float32)
    low, total, share, sign = tiles[0], tiles[1], tiles[2], tiles[3]
    x = np.empty((many, TILE), np.float32)
    zero, bad = np.float32(0.0), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base, at, n, shift, low.view(np.uint32))
        for t in range(many):
            row, limit, weight = x[t], limits[t], weights[t]
            bad |= widen(vectors[t], at, n, shift, row.view(np.uint32))
            for i in range(n):
                tau = row[i] - low[i]
                row[i] = (tau if abs(tau) >= limit else zero) * weight
            if t == 0:
                for i in range(n):
                    total[i] = row[i]
            else:
                for i in range(n):
                    total[i] = total[i] + row[i]
        for i in range(n):
            value = total[i]
            sign[i] = np.float32(1.0) if value > zero else (
                np.float32(-1.0) if value < zero else instead)
        _agreeing(x, weights, sign, n, total, share)
        for i in range(n):
            value = total[i]
            if normalize:
                value = value / (share[i] if share[i] != zero else np.float32(1.0))
            total[i] = low[i] + value * scale
        bad |= narrow(total.view(np.uint32), n, out_shift, out, at)
    return bad


@_jit
def _agreeing(x: Any, weights: Any, sign: Any, n: int, total: Any, share: Any) -> None:
    zero = np.float32(0.0)
    for t in range(len(x)):
        row, weight = x[t], np.float32(abs(weights[t]))
        for i in range(n):
            value = row[i]
            own = np.float32(1.0) if value > zero else (
                np.float32(-1.0) if value < zero else zero)
            agrees = own == sign[i]
            kept, part = (value if agrees else zero), (weight if agrees else zero)
            total[i] = kept if t == 0 else total[i] + kept
            share[i] = zero + part if t == 0 else share[i] + part


@_jit
def histogram(base: Any, vector: Any, shift: int, digit: int, prefix: int, counts: Any) -> int:
    """Add to ``counts`` the digit (16 bits from bit ``digit``) of each |vector - base| whose
    higher bits are ``prefix`` (any, if it is negative); nonzero if not finite."""
    count = len(vector)
    low, x = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits, bad = x.view(np.uint32), uint32(0)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        bad |= widen(base, at, n, shift, low.view(np.uint32))
        bad |= widen(vector, at, n, shift, bits)
        for i in range(n):
            x[i] = x[i] - low[i]
        for i in range(n):
            bits[i] = bits[i] & MAGNITUDE
        if prefix < 0:
            for i in range(n):
                counts[bits[i] >> uint32(16)] += 1
        else:
            wanted = uint32(prefix)
            for i in range(n):
                if (bits[i] >> uint32(16)) == wanted:
                    counts[bits[i] & uint32(0xFFFF)] += 1
    return bad
