"""Which class a text belongs to, asked of a model that writes (T5, GPT-2): the likeliest words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fusewright.tasks.classification import Classification
from fusewright.tasks.errors import DataError
from fusewright.tasks.prompts import Prompted, Unread, prompted, taught
from fusewright.tasks.task import Batch
from fusewright.tasks.text_corruptions import TEXT_CORRUPTIONS, TextCorruption
from fusewright.tasks.tokens import IGNORED, filled, pad_id, padded, tokenised, tokens_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 256
"""Prompts with a label each that pass through a model together."""


@dataclass(frozen=True)
class VerbaliserClassification(Classification):
    """logit of class c = log p(verbaliser c, end of text | prompt), of an encoder-decoder (T5) or a
    decoder (GPT-2, Llama).

    ``template`` makes the prompt of a row's columns ("{text}", "{text2}"); ``verbalisers`` are the
    words of the classes, in their order (None: the class names). What a decoder goes on with is
    taken as it is: where its tokenizer tells words apart by the space before them, give " good",
    and a template that does not end in one. ``end=False`` leaves out the end of text, for models
    that were not trained to end their answers; a verbaliser that begins with another one is then
    never the likelier. Prompts are cut at ``length`` tokens on the tokenizer's truncation side: on
    the right, long ones lose the template's end.

    ``score="sum"`` is the log-probability that the model answers exactly that; "mean" divides by
    its tokens, for verbalisers of unequal length. The prompt runs once for all labels, which go on
    from its key-value cache, so that layers that are mixed by what they read (``WEMoE``, ``Twin``)
    do not read the labels. An encoder-decoder's decoding starts with ``start``, or the model's own
    ``decoder_start_token_id``. ``corruption`` disturbs a row's texts, not the template's words.

    Batches: input_ids, attention_mask (n, tokens), labels, items (n,). Training (:meth:`loss`)
    is on the tokens of the true label, in one pass with its prompt.
    Raises DataError if there is not one verbaliser for each class, or two are the same, also as
    tokens.
    """

    kind: ClassVar[str] = "text-to-text-classification"
    conditions: ClassVar[tuple[str, ...]] = TEXT_CORRUPTIONS

    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    template: str = field(default="{text}", kw_only=True)
    verbalisers: tuple[str, ...] | None = field(default=None, kw_only=True)
    length: int = field(default=128, kw_only=True)
    score: Literal["sum", "mean"] = field(default="sum", kw_only=True)
    end: bool = field(default=True, kw_only=True)
    start: int | None = field(default=None, kw_only=True)
    corruption: TextCorruption | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        words = self.words
        if len(words) != len(self.classes) or len(set(words)) != len(words):
            raise DataError(
                "every class needs a word of its own", where=f"task {self.name}",
                expected=f"{len(self.classes)} different verbalisers", found=", ".join(words),
            )  # fmt: skip

    @property
    def words(self) -> tuple[str, ...]:
        """What the model is expected to answer for each class."""
        return self.classes if self.verbalisers is None else self.verbalisers

    def under(self, condition: str) -> Self:
        return replace(self, corruption=TextCorruption(condition))

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        labels = self.labels(rows, numbers, where)
        if self.corruption is not None:
            rows = self.corruption.columns(rows, numbers)
        prompts = filled(self.template, rows, where, numbers)
        found = tokenised(self.tokenizer, prompts, None, self.length, where, numbers)
        return list(zip(found["input_ids"], labels, strict=True))

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        import torch

        prompts, labels = zip(*examples, strict=True)
        ids, mask = padded(prompts, pad_id(self.tokenizer))
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(n, classes): log-probabilities, in float32 at least."""
        import torch

        ids, mask = batch["input_ids"], batch["attention_mask"]
        begun, targets = prompted(model, ids, mask, self.start), self._targets(ids.device)
        chosen = targets.split(max(1, ROWS // len(ids)))
        return torch.cat([self._scores(begun, each) for each in chosen], dim=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the true label's tokens, in nats a token."""
        import torch.nn.functional as F

        targets = self._targets(batch["input_ids"].device)[batch["labels"]]
        logits = taught(
            model, batch["input_ids"], batch["attention_mask"], targets, pad_id(self.tokenizer),
            self.start,
        )  # fmt: skip
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _targets(self, device: Any) -> Tensor:
        """Tokens of every label, (classes, longest), IGNORED after its end. Raises DataError where
        a label has none, or those of another."""
        lists = tokens_of(self.tokenizer, self.words, end=self.end)
        if not all(lists) or len(set(map(tuple, lists))) != len(lists):
            raise DataError(
                "every class needs tokens of its own", where=f"task {self.name}",
                expected="verbalisers that the tokenizer tells apart",
                found=", ".join(f"{w!r}: {ids}" for w, ids in zip(self.words, lists, strict=True)),
            )  # fmt: skip
        return padded(lists, IGNORED)[0].to(device)

    def _scores(self, begun: Prompted | Unread, targets: Tensor) -> Tensor:
        """Log-probabilities (n, labels) of some labels."""
        count, rows = len(targets), len(begun.mask)
        targets = targets[:, : int((targets != IGNORED).sum(dim=1).max())].repeat(rows, 1)
        before = targets[:, :-1]
        real = before != IGNORED
        logits = begun.repeated(count).going_on(
            before.masked_fill(~real, pad_id(self.tokenizer)), real
        )
        return self._summed(logits, targets).view(rows, count)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        real = targets != IGNORED
        logs = (logits if logits.element_size() == 8 else logits.float()).log_softmax(dim=-1)
        each = logs.gather(2, targets.masked_fill(~real, 0)[..., None])[..., 0]
        total = each.masked_fill(~real, 0).sum(dim=1)
        return total / real.sum(dim=1) if self.score == "mean" else total
