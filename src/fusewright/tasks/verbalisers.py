"""Which class a text belongs to, asked of a text-to-text model (T5): the likeliest label word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fusewright.tasks.classification import Classification
from fusewright.tasks.errors import DataError
from fusewright.tasks.task import Batch
from fusewright.tasks.text_corruptions import TEXT_CORRUPTIONS, TextCorruption
from fusewright.tasks.tokens import IGNORED, filled, pad_id, padded, tokenised, with_end

if TYPE_CHECKING:
    from torch import Tensor, nn

AT_ONCE = 8
"""Labels that pass through the decoder together."""


@dataclass(frozen=True)
class VerbaliserClassification(Classification):
    """logit of class c = log p(verbaliser c, end of text | prompt), of an encoder-decoder.

    ``template`` makes the prompt of a row's columns ("{text}", "{text2}"); ``verbalisers`` are the
    words of the classes, in their order (None: the class names). ``score="sum"`` is the
    log-probability that the model answers exactly that; "mean" divides by its tokens, for
    verbalisers of unequal length. The encoder runs once for all labels. Decoding starts with
    ``start``, or the model's own ``decoder_start_token_id``. ``corruption`` disturbs a row's texts,
    not the words of the template.

    Batches: input_ids, attention_mask (n, tokens), labels, items (n,). Training (:meth:`loss`)
    is on the tokens of the true label.
    Raises DataError if there is not one verbaliser for each class, or two are the same.
    """

    kind: ClassVar[str] = "text-to-text-classification"
    conditions: ClassVar[tuple[str, ...]] = TEXT_CORRUPTIONS

    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    template: str = field(default="{text}", kw_only=True)
    verbalisers: tuple[str, ...] | None = field(default=None, kw_only=True)
    length: int = field(default=128, kw_only=True)
    score: Literal["sum", "mean"] = field(default="sum", kw_only=True)
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
        prompts = filled(self.template, rows, where)
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

        targets = self._targets(batch["input_ids"].device)
        return torch.cat(list(self._scores(model, batch, targets)), dim=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the true label's tokens, in nats a token."""
        import torch.nn.functional as F

        targets = self._targets(batch["input_ids"].device)[batch["labels"]]
        found = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted(targets, self._start(model), pad_id(self.tokenizer)),
        )  # fmt: skip
        return F.cross_entropy(found.logits.flatten(0, 1).float(), targets.flatten())

    def _targets(self, device: Any) -> Tensor:
        """Tokens of every label, (classes, longest), IGNORED after its end."""
        return padded(with_end(self.tokenizer, self.words), IGNORED)[0].to(device)

    def _start(self, model: Any) -> int:
        return self.start if self.start is not None else decoder_start(model)

    def _scores(self, model: Any, batch: Batch, targets: Tensor) -> Iterator[Tensor]:
        """Log-probabilities (n, labels) of some labels at a time; the encoder runs once."""
        ids, mask, start = batch["input_ids"], batch["attention_mask"], self._start(model)
        hidden: Tensor | None = None
        for chosen in (targets[:1], *targets[1:].split(AT_ONCE)):
            count, given = len(chosen), shifted(chosen, start, pad_id(self.tokenizer))
            source: dict[str, Any] = (
                {"input_ids": ids} if hidden is None
                else {"encoder_outputs": (hidden.repeat_interleave(count, dim=0),)}
            )  # fmt: skip
            found = model(
                **source, attention_mask=mask.repeat_interleave(count, dim=0), use_cache=False,
                decoder_input_ids=given.repeat(len(ids), 1),
            )  # fmt: skip
            hidden = found.encoder_last_hidden_state if hidden is None else hidden
            yield self._summed(found.logits, chosen.repeat(len(ids), 1)).view(len(ids), count)

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        real = targets != IGNORED
        logs = (logits if logits.element_size() == 8 else logits.float()).log_softmax(dim=-1)
        each = logs.gather(2, targets.masked_fill(~real, 0)[..., None])[..., 0]
        total = each.masked_fill(~real, 0).sum(dim=1)
        return total / real.sum(dim=1) if self.score == "mean" else total


def shifted(targets: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder is given so that it answers the targets: start, then all but the last."""
    import torch

    first = torch.full_like(targets[:, :1], start)
    rest = targets[:, :-1]
    return torch.cat([first, rest.masked_fill(rest == IGNORED, pad)], dim=1)


def decoder_start(model: Any) -> int:
    """The token with which a model starts to decode. Raises DataError if its config has none."""
    found = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if found is None:
        raise DataError(
            "the model does not say with which token decoding starts", where=type(model).__name__,
            expected="config.decoder_start_token_id", fix="give the task start=TOKEN_ID",
        )  # fmt: skip
    return int(found)
