"""Word embeddings from which tokens stand near which, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusewright.extras import needs

CONTEXT_POWER = 0.75
"""Of frequencies of contexts, so that rare ones count less (Levy, Goldberg and Dagan 2015,
"Improving Distributional Similarity with Lessons Learned from Word Embeddings")."""


def embeddings(
    texts: Sequence[Sequence[int]], tokens: int, width: int, window: int
) -> NDArray[np.float32]:
    """A vector for each token: (tokens, width), of standard deviation 1 in all.

    Truncated singular vectors, times the roots of their values, of the positive pointwise mutual
    information of tokens that stand at most ``window`` apart in a text (Levy and Goldberg 2014,
    "Neural Word Embedding as Implicit Matrix Factorization"); a pair at distance d counts 1/d.
    Tokens that stand beside none have zeros. The same texts give the same vectors.
    """
    linalg = needs("scipy.sparse.linalg", "demo")
    information = _information(_counts(texts, tokens, window))
    left, values, _ = linalg.svds(information, k=width, v0=np.ones(tokens))
    found = left * np.sqrt(values)
    found[np.diff(information.indptr) == 0] = 0  # else a rounding error
    return np.asarray(found / found.std(), dtype=np.float32)


def _counts(texts: Sequence[Sequence[int]], tokens: int, window: int) -> Any:
    """How often tokens stand near each other: sparse, symmetric, (tokens, tokens)."""
    sparse = needs("scipy.sparse", "demo")
    ids = np.fromiter((token for text in texts for token in text), np.int64)
    text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    found = sparse.csr_array((tokens, tokens))
    for apart in range(1, window + 1):
        same = text[apart:] == text[:-apart]
        pairs = ids[:-apart][same], ids[apart:][same]
        share = np.full(len(pairs[0]), 1 / apart)
        found = found + sparse.csr_array((share, pairs), shape=(tokens, tokens))
    return (found + found.T).tocoo()


def _information(counts: Any) -> Any:
    """log p(a, b) / p(a) p(b), where it is positive: sparse."""
    token, context = counts.coords
    frequency = np.asarray(counts.sum(axis=1)).ravel()
    expected = frequency**CONTEXT_POWER
    expected /= expected.sum()
    found = np.log(counts.data / (frequency[token] * expected[context]))
    kept = found > 0
    sparse = needs("scipy.sparse", "demo")
    return sparse.csr_array((found[kept], (token[kept], context[kept])), shape=counts.shape)
