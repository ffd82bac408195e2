"""Corruptions of texts: what each does to words, and that an item always gets the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewright.errors import RecipeError
from fusewright.tasks import TEXT_CORRUPTIONS, TextCorruption
from fusewright.tasks.text_corruptions import _NEAR, SHARES

TEXT = "the quick brown fox jumps over a lazy dog while nobody watches it from the hill"
MANY = " ".join(f"word{i}abc" for i in range(4000))
LETTERS = ("swapped_letters", "keyboard_typos", "lost_letters")


def struck(name: str, severity: int) -> list[tuple[str, str]]:
    found = TextCorruption(name, severity)(MANY, 0).split()
    return [(a, b) for a, b in zip(MANY.split(), found, strict=True) if a != b]


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
@given(text=st.text(), item=st.integers(0, 2**40), severity=st.integers(1, 5))
def test_any_text_keeps_a_word_and_gets_no_new_one(name, text, item, severity) -> None:
    found = TextCorruption(name, severity)(text, item)
    before, after = text.split(), found.split()
    if not before:
        assert found == text
        return
    assert after and len(after) <= len(before)
    assert (len(after) == len(before)) or name == "lost_words"


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_an_item_always_gets_the_same(name) -> None:
    corrupt = TextCorruption(name, 5)
    first = corrupt(TEXT, 7)
    np.random.seed(1)  # nothing hangs on the shared generator
    assert corrupt(TEXT, 7) == first != TEXT
    others = [corrupt(TEXT, 8), corrupt(TEXT, 7, 1), replace(corrupt, seed=1)(TEXT, 7)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", LETTERS)
def test_the_share_of_words_is_the_severitys(name, severity) -> None:
    # A mistyped digit stays: five of eight places are letters.
    share = SHARES[severity - 1] * (7.5 / 11 if name == "keyboard_typos" else 1)
    assert len(struck(name, severity)) / 4000 == pytest.approx(share, rel=0.2, abs=0.01)


def test_letters_are_swapped_mistyped_or_lost_one_in_a_word() -> None:
    for a, b in struck("swapped_letters", 5):
        places = [i for i in range(len(a)) if a[i] != b[i]]
        assert Counter(a) == Counter(b) and len(places) == 2 and places[1] == places[0] + 1
    for a, b in struck("keyboard_typos", 5):
        places = [i for i in range(len(a)) if a[i] != b[i]]
        assert len(a) == len(b) and len(places) == 1 and b[places[0]] in _NEAR[a[places[0]]]
    for a, b in struck("lost_letters", 5):
        assert any(a[:i] + a[i + 1 :] == b for i in range(len(a)))


def test_neighbours_on_the_keyboard_are_mutual() -> None:
    assert set(_NEAR["s"]) == set("adwezx") and set(_NEAR["q"]) == set("wa")
    assert set(_NEAR["m"]) == set("njk") and set(_NEAR["p"]) == set("ol")
    assert all(a in _NEAR[b] for a, near in _NEAR.items() for b in near)
    assert TextCorruption("keyboard_typos", 5)("A A A A A A A A A A", 0).isupper()


def test_words_are_lost_or_moved() -> None:
    words = MANY.split()
    left = TextCorruption("lost_words", 4)(MANY, 0).split()
    assert len(left) == pytest.approx(0.7 * 4000, rel=0.05)
    kept = iter(words)
    assert all(word in kept for word in left)  # in their order
    moved = TextCorruption("moved_words", 4)(MANY, 0).split()
    assert Counter(moved) == Counter(words)
    changed = sum(a != b for a, b in zip(words, moved, strict=True))
    assert changed == pytest.approx(0.3 * 4000, rel=0.1)


def test_columns_of_texts_alone_are_corrupted_each_in_its_own_way() -> None:
    rows = {"text": [TEXT, TEXT], "text2": [TEXT, TEXT], "label": [0, 1]}
    found = TextCorruption("lost_words", 5).columns(rows, [3, 4])
    assert found["label"] == [0, 1] and rows["text"] == [TEXT, TEXT]
    assert len({*found["text"], *found["text2"]}) == 4
    assert found["text"][1] == TextCorruption("lost_words", 5)(TEXT, 4)


def test_a_text_is_corrupted_the_same_whatever_stands_beside_it() -> None:
    corrupt = TextCorruption("lost_words", 5)
    whole = corrupt.columns({"text": [TEXT, TEXT], "text2": [TEXT, None]}, [3, 4])
    parts = [corrupt.columns({"text": [TEXT], "text2": [second]}, [number])
             for second, number in ((TEXT, 3), (None, 4))]  # fmt: skip
    for name in ("text", "text2"):
        assert [*whole[name]] == [part[name][0] for part in parts]
    assert corrupt.columns({"text": [TEXT], "target": [TEXT]}, [0])["target"] == [TEXT]


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="write lost_words"):
        TextCorruption("lost_word")
    for severity in (0, 6):
        with pytest.raises(RecipeError, match="1 to 5"):
            TextCorruption("lost_words", severity)
