"""Byte-level BPE tokenizers (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"), learnt the same way every time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fusewright.extras import needs


def byte_pairs(
    texts: Iterable[str], vocabulary: int, special: Sequence[str], *, words: bool = False
) -> Any:
    """A ``tokenizers.Tokenizer`` of at most ``vocabulary`` tokens, the ``special`` first.

    ``words``: texts are lower-cased, and a word at the beginning is as inside. The same texts give
    the same tokens; WordPiece would not, as its trainer follows the order of a hash table.
    """
    tokenizers = needs("tokenizers", "demo")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    if words:
        model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=words)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(texts, trainer)
    return model
