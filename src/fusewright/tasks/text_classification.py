"""Which class a text, or a pair of texts, belongs to: hidden states with a frozen linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fusewright.tasks.classification import Classification
from fusewright.tasks.heads import backbone, linear
from fusewright.tasks.image_classification import check_head
from fusewright.tasks.task import Batch
from fusewright.tasks.text_corruptions import TEXT_CORRUPTIONS, TextCorruption
from fusewright.tasks.tokens import on_left, pad_id, padded, positions, texts_in, tokenised

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class TextClassification(Classification):
    """What encoders and decoders share. ``head`` is (classes, width); ``tokenizer`` is one of
    ``transformers`` (its padding side is kept to); texts are cut at ``length`` tokens. A split with
    a column "text2" gives pairs. ``corruption`` disturbs every text before it is tokenised.

    Batches: input_ids, attention_mask, perhaps token_type_ids (n, tokens), labels, items (n,).
    Raises DataError if the head has not one row for each class.
    """

    conditions: ClassVar[tuple[str, ...]] = TEXT_CORRUPTIONS

    head: Tensor = field(kw_only=True, repr=False, compare=False)
    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    length: int = field(default=128, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    normalise: bool = field(default=False, kw_only=True)
    corruption: TextCorruption | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_head(self.head, self.classes, self.name)

    def under(self, condition: str) -> Self:
        return replace(self, corruption=TextCorruption(condition))

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        labels = self.labels(rows, numbers, where)
        if self.corruption is not None:
            rows = self.corruption.columns(rows, numbers)
        texts = texts_in(rows, "text", where, numbers)
        pairs = texts_in(rows, "text2", where, numbers) if "text2" in rows else None
        found = tokenised(self.tokenizer, texts, pairs, self.length, where, numbers)
        parts = [dict(zip(found, ids, strict=True)) for ids in zip(*found.values(), strict=True)]
        return list(zip(parts, labels, strict=True))

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        import torch

        parts, labels = zip(*examples, strict=True)
        left, batch = on_left(self.tokenizer), {"labels": torch.tensor(labels)}
        for key in parts[0]:
            pad = pad_id(self.tokenizer) if key == "input_ids" else 0
            batch[key], batch["attention_mask"] = padded([p[key] for p in parts], pad, left=left)
        return batch

    def hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last hidden state (n, tokens, width)."""
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        found = backbone(model)(**{k: batch[k] for k in names if k in batch})
        return getattr(found, "last_hidden_state", found)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head sees of each text: (n, width)."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(n, classes)."""
        features = self.features(model, batch)
        return linear(features, self.head, scale=self.scale, normalise=self.normalise)


@dataclass(frozen=True)
class EncoderClassification(TextClassification):
    """An encoder (BERT, RoBERTa) with a frozen head.

    ``pooling="first"`` takes the last hidden state of the first token, without BERT's pooler
    (which many checkpoints lack); "mean" averages those of all real tokens.
    """

    kind: ClassVar[str] = "text-classification"

    pooling: Literal["first", "mean"] = field(default="first", kw_only=True)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden, mask = self.hidden(model, batch), batch["attention_mask"]
        if self.pooling == "mean":
            return mean_state(hidden, mask)
        return _state(hidden, mask.argmax(dim=1))  # not 0 where padding is on the left


@dataclass(frozen=True)
class DecoderClassification(TextClassification):
    """A causal decoder (GPT-2, Llama) with a frozen head.

    ``pooling="last"`` takes the last hidden state of the last real token, as
    ``transformers.GPT2ForSequenceClassification`` does; "mean" averages those of all real tokens.
    Positions are counted from the first real token, so padding on either side gives the same.
    """

    kind: ClassVar[str] = "decoder-classification"

    pooling: Literal["last", "mean"] = field(default="last", kw_only=True)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        hidden = self.hidden(model, {**batch, "position_ids": positions(mask)})
        if self.pooling == "mean":
            return mean_state(hidden, mask)
        return _state(hidden, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1))


def mean_state(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of all real tokens' states: (n, width) of (n, length, width)."""
    shares = mask / mask.sum(dim=1, keepdim=True)
    return (hidden * shares[..., None].to(hidden.dtype)).sum(dim=1)


def _state(hidden: Tensor, at: Tensor) -> Tensor:
    """One token's state of each row: (n, width)."""
    return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
