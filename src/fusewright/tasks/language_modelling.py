"""How likely a text is to a causal model; shown as perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fusewright.tasks.batching import BatchedTask, Prepared, column, where
from fusewright.tasks.errors import DataError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.task import Batch, Split
from fusewright.tasks.tokens import pad_id, padded

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

    Batches: input_ids, attention_mask (n, length + 1), items (n,). Column "tokens": how many are
    predicted; "loss": the negated score; "entropy": the mean entropy of the predicted
    distributions, in nats a token.
    Raises DataError if the split has fewer than two tokens.
    """

    kind: ClassVar[str] = "language-modelling"

    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    length: int = field(default=256, kw_only=True)
    documents: bool = field(default=False, kw_only=True)

    def ready(self, split: Split) -> Split:
        """The windows of a split's text: tokenised here, once; give ``evaluate`` what this
        returns, to evaluate several models."""
        if isinstance(split, Prepared):
            return split
        stream = np.concatenate([*self._tokens(split), np.empty(0, np.int32)])
        if len(stream) < 2:
            raise DataError(
                "there is no token to predict", where=where(split),
                expected="at least two tokens", found=len(stream),
            )  # fmt: skip
        starts = range(0, len(stream) - 1, self.length)
        windows = [stream[at : at + self.length + 1] for at in starts]
        return Prepared(windows, self.name, where(split))

    def _tokens(self, split: Split) -> Iterator[Any]:
        end = getattr(self.tokenizer, "eos_token_id", None)
        for at in range(0, len(split), READ_AT_ONCE):
            rows = split.rows(range(at, min(at + READ_AT_ONCE, len(split))))
            texts = list(column(rows, "text", where(split)))
            joined = texts if self.documents else ["".join(texts)]
            for ids in self.tokenizer(joined, add_special_tokens=False)["input_ids"]:
                ended = [*ids, end] if self.documents and end is not None else ids
                yield np.asarray(ended, dtype=np.int32)

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        raise NotImplementedError("windows are cut from all rows: see ready")

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        ids, mask = padded(examples, pad_id(self.tokenizer))
        return {"input_ids": ids, "attention_mask": mask}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the next token at each place but the last: (n, tokens - 1, vocabulary)."""
        found = model(
            input_ids=batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1]
        )
        return getattr(found, "logits", found)

    def answered(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch)[_predicted(batch)]

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch["input_ids"][:, 1:][_predicted(batch)]
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the predicted tokens, in nats."""
        import torch
        import torch.nn.functional as F

        answers = self._windows(model, batch)
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
        logits, targets = self.logits(model, batch), batch["input_ids"][:, 1:]
        for row, target, real in zip(logits, targets, _predicted(batch), strict=True):
            yield row[real].float(), target[real]


def _predicted(batch: Batch) -> Tensor:
    """Which places but the first hold a token: (n, tokens - 1) bool."""
    found: Tensor = batch["attention_mask"][:, 1:] == 1
    return found


def _summed(logits: Tensor, targets: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of one window: predicted tokens, their summed cross-entropy, their summed entropy."""
    import torch.nn.functional as F

    from fusewright.modules.answers import entropies

    logs = logits.log_softmax(dim=1)
    return len(targets), F.nll_loss(logs, targets, reduction="sum"), entropies(logs).sum()
