"""Counter-based randomness: the same numbers for any order, chunking, thread count or device.

Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011). The key and
the upper half of the counter come from (seed, expert key, tensor name); the lower half counts
groups of four elements, so element i of a tensor always gets word i mod 4 of block i div 4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Stream:
    """The random words of one tensor of one expert."""

    key: tuple[int, int]
    counter_high: tuple[int, int]

    @classmethod
    def of(cls, seed: int, expert: str, tensor: str) -> Stream:
        text = f"{seed}\x00{expert}\x00{tensor}".encode()
        words = hashlib.blake2b(text, digest_size=16).digest()
        a, b, c, d = (int.from_bytes(words[i : i + 4], "little") for i in (0, 4, 8, 12))
        return cls((a, b), (c, d))

    def words(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Uniform 32-bit words of elements [start, stop), as int64 (n,) in [0, 2**32)."""
        first, last = start // 4, -(-stop // 4)
        block = torch.arange(first, last, dtype=torch.int64, device=device)
        high = [torch.full_like(block, word) for word in self.counter_high]
        words = philox4x32((block & _MASK, (block >> 32) & _MASK, *high), self.key)
        return torch.stack(words, dim=-1).reshape(-1)[start - 4 * first : stop - 4 * first]


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low0, high0 = _multiply(a, _MULTIPLIERS[0])
        low1, high1 = _multiply(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps in int64, but its bits are those of the unsigned product.
    product = x * factor
    return product & _MASK, (product >> 32) & _MASK


def threshold(probability: float) -> int:
    """The integer below which a word means yes: round(probability * 2**32)."""
    return round(probability * 2**32)
