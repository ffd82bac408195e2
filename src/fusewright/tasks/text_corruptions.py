"""Five corruptions of texts: what typing does to letters, and what is lost or moved of words.

Letters as in "Synthetic and Natural Noise Both Break Neural Machine Translation" (Belinkov & Bisk
2018, arXiv:1711.02173), words as in "EDA: Easy Data Augmentation" (Wei & Zou 2019,
arXiv:1901.11196). Libraries that offer them draw from one shared generator, so that an item would
not be the same in every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusewright.errors import RecipeError, nearest

Rng = np.random.Generator

_ANSWERS = {"label", "target"}
"""What tasks ask for."""

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the words, how many are struck at severities 1 to 5; half of them is the most in EDA."""


@dataclass(frozen=True)
class TextCorruption:
    """One corruption at one severity, the same for an item whenever and wherever it is met.

    ``name`` is one of :data:`TEXT_CORRUPTIONS`; ``severity`` 1 to 5 is how many words are struck
    (:data:`SHARES`): of letters, one in each word struck. Words are what white space separates, and
    a text keeps at least one. Randomness follows from ``seed``, the corruption, the item's number
    and its column.

    Raises RecipeError for a name or severity that does not exist.
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in TEXT_CORRUPTIONS:
            close = nearest(self.name, TEXT_CORRUPTIONS)
            raise RecipeError(f"no corruption {self.name!r} of texts",
                              expected=", ".join(TEXT_CORRUPTIONS),
                              fix=f"write {close}" if close else None)  # fmt: skip
        if self.severity not in range(1, 6):
            raise RecipeError("a corruption is not understood", where=self.name,
                              expected="a severity from 1 to 5", found=self.severity)  # fmt: skip

    def __call__(self, text: str, item: int, column: int = 0) -> str:
        """The text corrupted; one without words as it is."""
        kind = TEXT_CORRUPTIONS.index(self.name)
        rng = np.random.default_rng([self.seed, kind, item, column])
        words = text.split()
        struck = rng.random(len(words)) < SHARES[self.severity - 1]
        return " ".join(_KINDS[self.name](words, struck, rng)) if words else text

    def columns(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]
    ) -> dict[str, Sequence[Any]]:
        """The rows with every text corrupted but those that are asked for; columns are numbered by
        their names, whatever a batch holds."""
        found = dict(rows)
        for at, name in enumerate(sorted(set(rows) - _ANSWERS)):
            found[name] = [self(value, number, at) if isinstance(value, str) else value
                           for value, number in zip(rows[name], numbers, strict=True)]  # fmt: skip
        return found


def _letters(change: Callable[[str, int, Rng], str], shortest: int) -> Callable[..., list[str]]:
    """A change of one letter, at a place drawn, in each word struck that is long enough."""

    def changed(words: list[str], struck: Any, rng: Rng) -> list[str]:
        return [
            change(word, int(rng.integers(len(word))), rng) if hit and len(word) >= shortest
            else word
            for word, hit in zip(words, struck, strict=True)
        ]  # fmt: skip

    return changed


def _swapped(word: str, at: int, rng: Rng) -> str:
    at = min(at, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _mistyped(word: str, at: int, rng: Rng) -> str:
    """A letter's neighbour on the keyboard; what has none stays."""
    near = _NEAR.get(word[at].lower())
    if near is None:
        return word
    typed = near[int(rng.integers(len(near)))]
    return word[:at] + (typed.upper() if word[at].isupper() else typed) + word[at + 1 :]


def _lost(word: str, at: int, rng: Rng) -> str:
    return word[:at] + word[at + 1 :]


def _lost_words(words: list[str], struck: Any, rng: Rng) -> list[str]:
    left = [word for word, hit in zip(words, struck, strict=True) if not hit]
    return left or [words[int(rng.integers(len(words)))]]


def _moved_words(words: list[str], struck: Any, rng: Rng) -> list[str]:
    """The words struck take each other's places."""
    places, found = np.flatnonzero(struck), list(words)
    for to, of in zip(places, rng.permutation(places), strict=True):
        found[to] = words[of]
    return found


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _near() -> dict[str, str]:
    """Of each letter, those beside it, above and below, on an English keyboard."""
    found = {}
    for r, row in enumerate(_ROWS):
        for i, letter in enumerate(row):
            above = _ROWS[r - 1][i : i + 2] if r else ""
            below = _ROWS[r + 1][max(0, i - 1) : i + 1] if r < 2 else ""
            found[letter] = row[max(0, i - 1) : i] + row[i + 1 : i + 2] + above + below
    return found


_NEAR = _near()

_KINDS: dict[str, Callable[[list[str], Any, Rng], list[str]]] = {
    "swapped_letters": _letters(_swapped, 2), "keyboard_typos": _letters(_mistyped, 1),
    "lost_letters": _letters(_lost, 2), "lost_words": _lost_words, "moved_words": _moved_words,
}  # fmt: skip

TEXT_CORRUPTIONS = tuple(_KINDS)
"""The names, in the order of tables."""
