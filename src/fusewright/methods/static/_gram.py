"""Inner products of all pairs of vectors over a tensor: what spherical methods measure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusewright.methods.partials import Partial, block_sums


def gram_partial(vectors: Sequence[Tensor]) -> Partial:
    """Float64 sums of v_s·v_t for s ≤ t."""
    wide = [v.reshape(-1).to(torch.float64) for v in vectors]
    pairs = combinations_with_replacement(wide, 2)
    return Partial({"gram": torch.cat([block_sums(a * b)[None] for a, b in pairs])})


def gram_matrix(partial: Partial) -> NDArray[np.float64]:
    """The symmetric T x T matrix of inner products."""
    upper = partial["gram"]
    count = int((np.sqrt(8 * len(upper) + 1) - 1) / 2)
    gram = np.zeros((count, count))
    gram[np.triu_indices(count)] = upper
    return gram + np.triu(gram, 1).T


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of all pairs, clamped to [-1, 1]; 0 where a vector is zero."""
    norms = np.sqrt(np.diag(gram))
    product = np.outer(norms, norms)
    return np.clip(np.divide(gram, product, out=np.zeros_like(gram), where=product > 0), -1, 1)
