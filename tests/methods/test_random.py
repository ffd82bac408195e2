"""Philox: known answers, and the same word for an element wherever it is asked."""

from __future__ import annotations

import pytest
import torch
from references import philox, words

from fusewright.methods.random import Stream, philox4x32, threshold

ONES = 0xFFFFFFFF
# Known answers of Random123, philox4x32-10: counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    given = tuple(torch.tensor([c]) for c in counter)
    assert [int(w) for w in philox4x32(given, (key[0], key[1]))] == expected
    assert philox(counter, key) == expected


def test_words_are_those_of_a_philox_in_plain_integers() -> None:
    found = Stream.of(3, "math", "layers.0.weight").words(0, 101)
    assert found.tolist() == words(3, "math", "layers.0.weight", 101).tolist()


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 7, 64])
def test_an_element_keeps_its_word_in_any_chunk(start: int) -> None:
    stream = Stream.of(0, "a", "w")
    assert torch.equal(stream.words(start, 99), stream.words(0, 99)[start:])


def test_counters_beyond_32_bits_go_on() -> None:
    far = 2**34 + 4
    word = philox([1, 1, *Stream.of(0, "a", "w").counter_high], [*Stream.of(0, "a", "w").key])
    assert Stream.of(0, "a", "w").words(far, far + 4).tolist() == word


def test_seed_expert_and_tensor_each_give_another_stream() -> None:
    streams = [(0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v"), (0, "aw", "")]
    drawn = {tuple(Stream.of(*s).words(0, 8).tolist()) for s in streams}
    assert len(drawn) == len(streams)


def test_threshold_counts_words() -> None:
    assert threshold(1.0) == 2**32
    assert threshold(0.5) == 2**31
    kept = (Stream.of(0, "a", "w").words(0, 100_000) < threshold(0.3)).double().mean()
    assert abs(float(kept) - 0.3) < 0.01
