"""Every method a second time: slow, plain NumPy in float64, written from the papers' formulas.

Nothing here imports the implementation; ``at`` only tells keys, tensor name, seed and layout.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of one counter, in Python integers."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ key[0], p1 & MASK,
                   (p0 >> 32) ^ counter[3] ^ key[1], p0 & MASK]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def words(seed: int, expert: str, tensor: str, count: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}\0{expert}\0{tensor}".encode(), digest_size=16).digest()
    k0, k1, c2, c3 = np.frombuffer(digest, "<u4").tolist()
    blocks = [philox([i & MASK, i >> 32, c2, c3], [k0, k1]) for i in range(-(-count // 4))]
    return np.array(list(itertools.chain.from_iterable(blocks))[:count], dtype=np.int64)


def mean(_: Any, vectors: list[np.ndarray]) -> np.ndarray:
    return sum(vectors) / len(vectors)


def linear(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    total = sum(m.weight * e for e in experts)
    return total / (m.weight * len(experts)) if m.normalize else total


def average(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return sum(experts) / len(experts)


def _sum(m: Any, taus: list[np.ndarray]) -> np.ndarray:
    total = sum(m.weight * t for t in taus)
    return m.scale * (total / (m.weight * len(taus)) if m.normalize else total)


def summed(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + _sum(m, [e - base for e in experts])


def _trim(tau: np.ndarray, density: float) -> np.ndarray:
    k = max(1, int(density * tau.size))
    return np.where(np.abs(tau) >= np.sort(np.abs(tau), axis=None)[-k], tau, 0)


def trim(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + mean(m, [_trim(e - base, m.density) for e in experts])


def _elect(m: Any, taus: list[np.ndarray]) -> np.ndarray:
    weighted = np.stack([m.weight * t for t in taus])
    signs = np.sign(weighted.sum(0))
    instead = {"positive": 1, "zero": 0, "majority": np.sign(signs.sum())}[m.zero_sign]
    signs[signs == 0] = instead
    agree = (np.sign(weighted) == signs) & (weighted != 0)
    total = (weighted * agree).sum(0)
    if m.normalize:
        total = total / np.maximum(agree.sum(0) * abs(m.weight), 1e-300)
    return m.scale * total


def consensus(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    taus = [e - base for e in experts]
    total = sum(taus)
    needed = sum(np.abs(t) >= m.strictness * np.abs(total - t) for t in taus)
    return base + m.scale * np.where(needed >= m.least, total, 0.0)


def elect(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + _elect(m, [e - base for e in experts])


def agreeing(taus: list[np.ndarray], zero: str = "majority") -> list[np.ndarray]:
    """Each task vector without the entries against the elected sign."""
    signs = np.sign(np.sum(taus, axis=0))
    signs[signs == 0] = {"positive": 1, "zero": 0, "majority": np.sign(signs.sum())}[zero]
    return [np.where(np.sign(tau) == signs, tau, 0) for tau in taus]


def agree(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    kept = agreeing([e - base for e in experts], m.zero_sign)
    return base + m.scale * m.weight * sum(kept)


def ties(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + _elect(m, [_trim(e - base, m.density) for e in experts])


def _drop(m: Any, base: Any, experts: Any, at: Any) -> list[np.ndarray]:
    taus = []
    seed = at.seed if m.seed is None else m.seed
    for key, expert in zip(at.experts, experts, strict=True):
        tau = expert - base
        keep = words(seed, key, at.tensor, tau.size) < round(m.density * 2**32)
        kept = tau * keep.reshape(tau.shape)
        l1 = np.abs(tau).sum() / np.abs(kept).sum()
        taus.append(kept * {"inverse": 1 / m.density, "l1": l1, "none": 1}[m.rescale])
    return taus


def drop(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + mean(m, _drop(m, base, experts, at))


def dare_linear(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + _sum(m, _drop(m, base, experts, at))


def dare_ties(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return base + _elect(m, _drop(m, base, experts, at))


def slerp(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    a, b = experts
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    if abs(cosine) > 0.9995:
        return (1 - m.t) * a + m.t * b
    angle = math.acos(cosine)
    return (math.sin((1 - m.t) * angle) * a + math.sin(m.t * angle) * b) / math.sin(angle)


def model_stock(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    taus = [(e - base).ravel() for e in experts]
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                      for a, b in itertools.combinations(taus, 2)])  # fmt: skip
    k = len(taus)
    t = k * cosine / (1 + (k - 1) * cosine)
    t = max(t, 0.0) if m.clamp else t
    return t * sum(experts) / k + (1 - t) * base


def metagpt(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    taus = [e - base for e in experts]
    squares = np.array([(t**2).sum() for t in taus])
    return base + sum(s * t for s, t in zip(squares / squares.sum(), taus, strict=True))


def lines(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    taus = [e - base for e in experts]
    merged = sum(taus) / len(taus)
    ratio = np.abs(sum(taus)).sum() / np.abs(merged).sum() / len(taus)
    alpha = ratio if m.alpha is None else m.alpha
    return base + (alpha + m.beta * at.layout.layer / (at.layout.depth - 1)) * merged


def iso_c(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    total = sum(e - base for e in experts)
    treated = total.ndim == 2 or (total.ndim > 2 and m.where == "matrices")
    if not treated:
        return base + m.scale * total * {"mean": 1 / len(experts), "sum": 1, "base": 0}[m.otherwise]
    u, s, vt = np.linalg.svd(total.reshape(len(total), -1), full_matrices=False)
    return base + m.scale * (s.mean() * (u @ vt)).reshape(total.shape)


def passthrough(m: Any, base: Any, experts: Any, at: Any) -> np.ndarray:
    return m.scale * experts[0]


REFERENCES = {
    "agree": agree, "average": average, "consensus": consensus,
    "dare_linear": dare_linear, "dare_ties": dare_ties,
    "drop": drop, "elect": elect, "iso_c": iso_c, "linear": linear, "lines": lines, "mean": summed,
    "metagpt": metagpt, "model_stock": model_stock, "passthrough": passthrough, "slerp": slerp,
    "sum": summed, "task_arithmetic": summed, "ties": ties, "trim": trim,
}  # fmt: skip
