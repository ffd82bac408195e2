"""Data sets of short texts, held in memory as tokens, and the tokenizer learnt from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewright.bench.pools.byte_pairs import byte_pairs
from fusewright.bench.pools.cooccurrence import embeddings
from fusewright.bench.pools.training import Examples, Recipe
from fusewright.extras import needs
from fusewright.tasks.text_classification import mean_state
from fusewright.tasks.tokens import pad_id, tokenised

if TYPE_CHECKING:
    from fusewright.bench.suite_file import TaskSpec

PAD, START, SEPARATOR = SPECIAL = "[PAD]", "[CLS]", "[SEP]"
SORTED = 8
"""Batches among which texts are sorted by length, so that little padding is computed."""


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """A pool of text models: an ``architecture`` ("bert", "gpt2", "t5"), a vocabulary of bytes and
    their pairs, texts cut at ``length`` tokens (T5: as each task says), ``dropout`` of hidden
    states, and ``thinning``: the share of tokens that training leaves out, others each time, so
    that a few thousand texts are not learnt by heart (Iyyer et al. 2015, "Deep Unordered
    Composition Rivals Syntactic Methods for Text Classification"). With a ``window``, word
    embeddings start from which tokens stand so near in the training texts of all tasks
    (:mod:`.cooccurrence`); with 0, the default, at random. ``pooling``: what heads see of the last
    hidden states, as the suite's tasks say: "mean", or a decoder's "last"."""

    vocabulary: int = 8000
    window: int = 0
    length: int = 32
    dropout: float = 0.1
    thinning: float = 0.0
    architecture: str = "bert"
    pooling: str = "mean"

    @property
    def relative(self) -> bool:
        """Whether rates are relative to each tensor's size; ``lora_rate`` is not."""
        return self.architecture == "t5"


@dataclass(frozen=True)
class Corpus:
    """The training rows of a task as they are: texts, perhaps their pairs, and labels (n,)."""

    texts: list[str]
    pairs: list[str] | None
    labels: Tensor

    @property
    def everything(self) -> Iterator[str]:
        """Texts and pairs."""
        yield from self.texts
        yield from self.pairs or ()

    def digest(self) -> str:
        """SHA-256 of texts and labels, in order: the same rows from any source."""
        said = [self.texts, self.pairs, self.labels.tolist()]
        return sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Texts(Examples[TextRecipe]):
    """Token ids and segments (n, length) int64, how many of them are real (n,), labels (n,)."""

    ids: Tensor
    segments: Tensor
    lengths: Tensor
    labels: Tensor

    def __getitem__(self, at: Tensor | slice) -> Texts:
        return Texts(self.ids[at], self.segments[at], self.lengths[at], self.labels[at])

    @classmethod
    def joined(cls, parts: Sequence[Texts], labels: Tensor) -> Texts:
        ids, segments, lengths = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("ids", "segments", "lengths")
        )
        return cls(ids, segments, lengths, labels)

    def features(self, model: nn.Module, recipe: TextRecipe) -> Tensor:
        longest = int(self.lengths.max())
        mask = (torch.arange(longest, device=self.ids.device) < self.lengths[:, None]).long()
        given = {"input_ids": self.ids[:, :longest], "attention_mask": mask}
        if recipe.architecture != "gpt2":
            given["token_type_ids"] = self.segments[:, :longest]
        # Of few tokens in bfloat16, the fused kernel's gradient takes as long as all else together.
        with sdpa_kernel(SDPBackend.MATH):
            hidden = model(**given).last_hidden_state.float()
        if recipe.pooling == "last":
            return hidden[torch.arange(len(self)), self.lengths - 1]
        return mean_state(hidden, mask)

    def batches(self, size: int, recipe: TextRecipe, draw: torch.Generator) -> Iterator[Texts]:
        order = torch.randperm(len(self), generator=draw)
        full = order[: len(self) // size * size]
        for group in full.split(size * SORTED):
            alike = group[self.lengths[group].argsort(stable=True)].split(size)
            for at in torch.randperm(len(alike), generator=draw).tolist():
                yield self[alike[at]].thinned(recipe.thinning, draw)

    def thinned(self, share: float, draw: torch.Generator) -> Texts:
        """The same texts without a share of their tokens."""
        stay, lengths = staying(self.lengths, self.ids.shape[1], share, draw)
        return Texts(self.ids.gather(1, stay), self.segments.gather(1, stay), lengths, self.labels)


def staying(
    lengths: Tensor, width: int, share: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which tokens stay when each is left out with probability ``share``, but for the first and
    the last, which may mark the ends: their places (n, width), in order, whatever follows; and how
    many they are (n,)."""
    place, last = torch.arange(width), lengths[:, None] - 1
    drawn = torch.rand(len(lengths), width, generator=draw) >= share
    stay = (place <= last) & (drawn | (place == 0) | (place == last))
    return (~stay).long().argsort(dim=1, stable=True), stay.sum(1)


def load_corpora(tasks: Mapping[str, TaskSpec], data: Path | None) -> dict[str, Corpus]:
    """The ``train`` split of each task.

    Raises SuiteError if a task has none, DataError if it cannot be read.
    """
    from fusewright.bench.suite_tasks import open_split

    found = {}
    for name, spec in tasks.items():
        split = open_split(name, spec, "train", data)
        rows = split.rows(range(len(split)))
        labels = torch.as_tensor(np.asarray(rows["label"], dtype=np.int64))
        pairs = list(rows["text2"]) if "text2" in rows else None
        found[name] = Corpus(list(rows["text"]), pairs, labels)
    return found


def train_tokenizer(corpora: Mapping[str, Corpus], recipe: TextRecipe) -> Any:
    """A lower-casing tokenizer of all training texts, as ``transformers`` opens it.

    For BERT: [CLS] text [SEP], and the second text of a pair as another segment. For the others
    there are no segments, nothing comes first, and [SEP] is the end of text.
    """
    learnt = (text for corpus in corpora.values() for text in corpus.everything)
    model = byte_pairs(learnt, recipe.vocabulary, SPECIAL, words=True)
    processors = needs("tokenizers.processors", "demo")
    start, end = ((token, model.token_to_id(token)) for token in (START, SEPARATOR))
    if recipe.architecture == "bert":
        model.post_processor = processors.BertProcessing(end, start)
        more, inputs = {"cls_token": START, "sep_token": SEPARATOR}, ["token_type_ids"]
    else:
        model.post_processor = processors.TemplateProcessing(
            f"$A {SEPARATOR}", f"$A {SEPARATOR} $B {SEPARATOR}", [end]
        )
        more, inputs = {"eos_token": SEPARATOR}, []
    return needs("transformers", "demo").PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=PAD, **more, model_max_length=recipe.length,
        model_input_names=["input_ids", *inputs, "attention_mask"],
    )  # fmt: skip


def start_from_cooccurrence(
    model: Any, corpora: Mapping[str, Corpus], tokenizer: Any, window: int
) -> None:
    """Set the embeddings of a fresh model's tokens, at the spread that they have; tokens that
    stand beside none, as the special ones, keep theirs."""
    texts = [text for corpus in corpora.values() for text in corpus.everything]
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    weight = model.get_input_embeddings().weight
    tokens, width = weight.shape
    start = torch.from_numpy(embeddings(found, tokens, width, window))
    met = start.any(dim=1)
    with torch.no_grad():
        weight[met] = start[met] * weight.std()


def encoded(corpus: Corpus, tokenizer: Any, recipe: TextRecipe, name: str) -> Texts:
    """Tokens of a task's rows, as evaluation sees them.

    Raises DataError if a text gives no token.
    """
    count = len(corpus.labels)
    found = tokenised(tokenizer, corpus.texts, corpus.pairs, recipe.length, name, range(count))
    lengths = torch.tensor([len(ids) for ids in found["input_ids"]])
    ids = _table(found["input_ids"], recipe.length, pad_id(tokenizer))
    segments = (_table(found["token_type_ids"], recipe.length, 0) if "token_type_ids" in found
                else torch.zeros_like(ids))  # fmt: skip
    return Texts(ids, segments, lengths, corpus.labels)


def _table(lists: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*tokens, *[fill] * (length - len(tokens))] for tokens in lists])
