"""How likely a text is to a causal model; shown as perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fusewright.tasks.batching import BatchedTask, Prepared, where
from fusewright.tasks.errors import DataError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.prompts import predicted, prompted
from fusewright.tasks.task import Batch, Split
from fusewright.tasks.tokens import pad_id, padded, texts_in

if TYPE_CHECKING:
    from torch import Tensor, nn

READ_AT_ONCE = 1024


@dataclass(frozen=True)
class LanguageModelling(BatchedTask):
    """Mean log-likelihood of each window of ``length`` tokens, in nats a token.

    All rows' texts ("text") are joined into one stream of tokens, which is cut into windows that
    overlap by one token: every token but the first is predicted exactly once, with at least those
    before it in its window as context. ``documents=True`` ends every row with the end-of-text
    token (for rows that are documents rather than lines). Windows weigh as many as they have
    predicted tokens, so that ``Outcomes.shown`` is the corpus' perplexity.

    ``prompt=N``: the first N tokens of every window are given, and only those after them are
    predicted; the N are run by themselves, the rest goes on from their key-value cache. A plain
    model answers the same either way; one whose layers are mixed by all of a text (``WEMoE``,
    ``Twin``) then mixes by the prompt, as it does when it writes. With 0 it sees the tokens that
    it is scored on, and its score is no likelihood (:meth:`caveat`). A last window without a
    token after its prompt is left out. Methods that learn are shown the same answers; training
    (:meth:`loss`) is on whole windows.

    Batches: input_ids, attention_mask (n, length + 1), items (n,). Column "tokens": how many are
    predicted; "loss": the negated score; "entropy": the mean entropy of the predicted
    distributions, in nats a token.
    Raises DataError for a prompt that is longer than ``length``, if no window has a token to
    predict, or if a model that is given a prompt keeps no cache.
    """

    kind: ClassVar[str] = "language-modelling"

    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    length: int = field(default=256, kw_only=True)
    documents: bool = field(default=False, kw_only=True)
    prompt: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.prompt <= self.length:
            raise DataError(
                "a prompt leaves no token of a window to predict", where=f"task {self.name}",
                expected=f"a prompt of 0 to {self.length} tokens, the length", found=self.prompt,
                fix="options: {length: L, prompt: N}, N at most L",
            )  # fmt: skip

    @property
    def given(self) -> int:
        """How many tokens of a window come before those that are predicted."""
        return max(1, self.prompt)

    def ready(self, split: Split) -> Split:
        """The windows of a split's text: tokenised here, once; give ``evaluate`` what this
        returns, to evaluate several models."""
        if isinstance(split, Prepared):
            return split
        stream = np.concatenate([*self._tokens(split), np.empty(0, np.int32)])
        if len(stream) <= self.given:
            least = "two" if self.given == 1 else self.given + 1
            raise DataError(
                "there is no token to predict", where=where(split),
                expected=f"at least {least} tokens", found=len(stream),
            )  # fmt: skip
        starts = range(0, len(stream) - self.given, self.length)
        windows = [stream[at : at + self.length + 1] for at in starts]
        return Prepared(windows, self.name, where(split))

    def _tokens(self, split: Split) -> Iterator[Any]:
        end = getattr(self.tokenizer, "eos_token_id", None)
        for at in range(0, len(split), READ_AT_ONCE):
            numbers = range(at, min(at + READ_AT_ONCE, len(split)))
            texts = texts_in(split.rows(numbers), "text", where(split), numbers)
            joined = texts if self.documents else ["".join(texts)]
            for ids in self.tokenizer(joined, add_special_tokens=False)["input_ids"]:
                ended = [*ids, end] if self.documents and end is not None else ids
                yield np.asarray(ended, dtype=np.int32)

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        raise NotImplementedError("windows are cut from all rows: see ready")

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        shortest = min(map(len, examples))
        if shortest <= self.given:
            raise DataError(
                "a window has no token after its prompt", where=f"task {self.name}",
                expected=f"at least {self.given + 1} tokens", found=shortest,
                fix="windows that this task cut: see ready",
            )  # fmt: skip
        ids, mask = padded(examples, pad_id(self.tokenizer))
        return {"input_ids": ids, "attention_mask": mask}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of every token that is predicted, given those before it:
        (n, tokens - max(1, prompt), vocabulary)."""
        ids, mask = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
        if self.prompt:
            own, rest = slice(self.prompt), slice(self.prompt, None)
            begun = prompted(model, ids[:, own], mask[:, own])
            return begun.going_on(ids[:, rest], mask[:, rest])
        found = model(input_ids=ids, attention_mask=mask)
        return getattr(found, "logits", found)

    def caveat(self, model: nn.Module) -> str:
        from fusewright.modules.mixture import looks_ahead

        if self.prompt or not looks_ahead(model):
            return ""
        return (
            "layers are mixed by the whole of each text, also by the tokens that are predicted: "
            "scores are no likelihoods without a prompt (options: {prompt: N})"
        )

    def answered(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch)[self._predicted(batch)]

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch["input_ids"][:, self.given :][self._predicted(batch)]
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of all tokens of the windows but the first, in nats."""
        import torch
        import torch.nn.functional as F

        answers = replace(self, prompt=0)._windows(model, batch)
        sums, counts = zip(
            *((F.cross_entropy(logits, ids, reduction="sum"), len(ids)) for logits, ids in answers),
            strict=True,
        )
        return torch.stack(sums).sum() / sum(counts)

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        import torch

        windows = (window for batch in batches for window in self._windows(model, batch))
        tokens, losses, entropies = zip(*(_summed(*window) for window in windows), strict=True)
        counts = np.asarray(tokens)
        loss, entropy = (
            torch.stack(sums).double().cpu().numpy() / counts for sums in (losses, entropies)
        )
        columns = {"tokens": counts, "loss": loss, "entropy": entropy}
        return Outcomes("log_likelihood", -loss, counts.astype(np.float64), columns)

    def _windows(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Each window's logits (tokens, vocabulary) float32 and targets (tokens,): one at a time,
        since a batch of float32 logits would double the peak."""
        logits, targets = self.logits(model, batch), batch["input_ids"][:, self.given :]
        for row, target, real in zip(logits, targets, self._predicted(batch), strict=True):
            yield row[real].float(), target[real]

    def _predicted(self, batch: Batch) -> Tensor:
        """Which places after those given hold a token: (n, tokens - given) bool."""
        return predicted(batch["attention_mask"], self.given)


def _summed(logits: Tensor, targets: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of one window: predicted tokens, their summed cross-entropy, their summed entropy."""
    import torch.nn.functional as F

    from fusewright.modules.answers import entropies

    logs = logits.log_softmax(dim=1)
    return len(targets), F.nll_loss(logs, targets, reduction="sum"), entropies(logs).sum()
