"""Embeddings from co-occurrence: tokens of the same contexts are alike."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("scipy")

from fusewright.bench.pools.cooccurrence import embeddings

CATS, DOGS, AROUND_CATS, AROUND_DOGS, ALONE = (3, 4), (5, 6), (7, 8, 9), (10, 11, 12), 2
TOKENS = 13


def texts():
    """Words of a pair never meet each other, and share what stands around them."""
    draw = random.Random(0)
    found = [[ALONE]]
    for words, around in ((CATS, AROUND_CATS), (DOGS, AROUND_DOGS)) * 100:
        found.append([draw.choice(around), draw.choice(words), draw.choice(around)])
    return found


def cosines(vectors):
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return directions @ directions.T


def test_tokens_of_the_same_contexts_are_alike():
    alike = cosines(embeddings(texts(), TOKENS, 4, window=2))
    assert alike[CATS] > 0.9 and alike[DOGS] > 0.9
    assert abs(alike[CATS[0], DOGS[0]]) < 0.1


def test_they_have_a_spread_of_one_and_tokens_that_stand_alone_none():
    found = embeddings(texts(), TOKENS, 4, window=2)
    assert found.shape == (TOKENS, 4) and found.dtype == np.float32
    assert found.std() == pytest.approx(1, abs=1e-3)
    assert not found[[0, 1, ALONE]].any() and found[3:].any(axis=1).all()


def test_a_window_ends_with_the_text():
    """Neighbours of different texts have not met."""
    joined = [[token for text in texts() for token in text]]
    near, wide, together = (
        cosines(embeddings(given, TOKENS, 4, window))
        for given, window in ((texts(), 2), (texts(), 9), (joined, 9))
    )
    assert np.allclose(near, wide, atol=1e-4)
    assert not np.allclose(near, together, atol=0.1)


def test_the_same_texts_give_the_same_vectors():
    first, again = (embeddings(texts(), TOKENS, 4, window=2) for _ in range(2))
    assert np.array_equal(first, again)
