"""Texts of a language pool: training splits, their tokenizer, and crops of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusewright.bench.pools.byte_pairs import byte_pairs
from fusewright.extras import needs
from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from fusewright.bench.suite_file import SuiteSpec
    from fusewright.tasks.task import Split

END = "<|end|>"
"""Ends a document; the only special token."""
PIECE = 1 << 16
"""Characters that a tokenizer is given at once."""


def load_texts(spec: SuiteSpec, data: Path | None) -> dict[str, str]:
    """The training text of each task that has one.

    Raises DataError if it cannot be read.
    """
    from fusewright.bench.suite_tasks import open_split

    found = {}
    for name, task in spec.tasks.items():
        if "train" in task.splits:
            found[name] = text_of(open_split(name, task, "train", data))
    return found


def text_of(split: Split) -> str:
    """All rows' texts, one after the other."""
    return "".join(split.rows(range(len(split)))["text"])


def shares_of(sizes: Mapping[str, int], exponent: float) -> dict[str, float]:
    """How much of a mixture each text is: its size to the power ``exponent``, the sum being 1.

    0 mixes them equally, 1 as they are; between, small texts count more than they are long
    (Conneau et al. 2020, arXiv:1911.02116).
    """
    parts = {name: float(size) ** exponent for name, size in sizes.items()}
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()}


def train_tokenizer(texts: Mapping[str, str], vocabulary: int, exponent: float) -> Any:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens, as ``transformers`` opens it.

    It learns from the mixture's share of each text, from the text's beginning, as much as leaves
    the scarcest whole.
    """
    shares = shares_of({name: len(text) for name, text in texts.items()}, exponent)
    whole = min(len(text) / shares[name] for name, text in texts.items())
    learnt = (text[: round(whole * shares[name])] for name, text in texts.items())
    model = byte_pairs(learnt, vocabulary, [END])
    return needs("transformers", "demo").PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END
    )


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """The token ids (n,) int64 of a text. It is cut between lines, since BPE over megabytes at
    once takes long."""
    pieces, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + PIECE) + 1 or len(text)
        pieces.append(text[start:stop])
        start = stop
    ids = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return torch.from_numpy(np.concatenate([np.asarray(i, np.int64) for i in ids]))


def all_crops(stream: Tensor, length: int) -> Tensor:
    """Every place of a stream (n,) with what follows, as a view: (n - length, length + 1).

    Raises DataError if it is not that long.
    """
    if len(stream) <= length:
        raise DataError("a training text is too short", expected=f"over {length} tokens",
                        found=len(stream))  # fmt: skip
    return stream.unfold(0, length + 1, 1)


def crops(stream: Tensor, count: int, length: int, draw: torch.Generator) -> Tensor:
    """``count`` of :func:`all_crops`, drawn: (count, length + 1)."""
    found = all_crops(stream, length)
    return found[torch.randint(0, len(found), (count,), generator=draw)]


def mixed(
    streams: Mapping[str, Tensor], shares: Mapping[str, float], count: int, length: int,
    draw: torch.Generator,
) -> Tensor:  # fmt: skip
    """Crops of all streams, each as often as its share says: (count, length + 1)."""
    names = list(streams)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    chosen = torch.multinomial(weights, count, replacement=True, generator=draw)
    return torch.cat([crops(streams[names[i]], 1, length, draw) for i in chosen.tolist()])
