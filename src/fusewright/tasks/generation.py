"""Texts that a model writes, against references: exact match, extracted answers, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fusewright.errors import RecipeError
from fusewright.extras import needs
from fusewright.layout.config import is_encoder_decoder
from fusewright.tasks.batching import BatchedTask, column
from fusewright.tasks.errors import DataError
from fusewright.tasks.outcomes import Outcomes
from fusewright.tasks.prompts import taught
from fusewright.tasks.rows import as_labels
from fusewright.tasks.task import Batch
from fusewright.tasks.tokens import IGNORED, filled, pad_id, padded, tokenised, tokens_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Generation(BatchedTask):
    """What a model continues a prompt with, greedily, against a row's reference.

    ``template`` makes the prompt of a row's columns; ``reference`` is the column of the expected
    text, or of class numbers, where ``words`` say what each class is answered with. ``metric`` is
    "exact_match" (after white space and case are evened out) or "rouge_l" (the F-measure of
    ``rouge_score``, stemmed). ``extract`` is a regular expression that finds the answer in what was
    written: its first group that matched, or all of it without groups, of the last match; without
    one the item scores 0 and counts as unparsed. ``extract_reference`` does the same to references.
    Of answers that are extracted, and what they are compared with, commas in numbers and a last
    full stop are dropped. Prompts are cut at ``length`` tokens on the tokenizer's truncation side:
    on the right, long ones lose the template's end.

    Columns: prediction (text), reference (text), truncated (1: no end of text within
    ``max_new_tokens``), unparsed (1). Batches: input_ids, attention_mask (n, tokens; decoders are
    padded on the left), targets (n, tokens) with -100 after the end, references, items.
    Raises RecipeError for a metric or expression that is not understood, DataError for a reference
    without an answer, or a class without a word.
    """

    kind: ClassVar[str] = "generation"
    has_logits: ClassVar[bool] = False  # answers are written token by token, not read off logits

    compared: ClassVar[tuple[str, ...]] = ("targets", "references")

    tokenizer: Any = field(kw_only=True, repr=False, compare=False)
    template: str = field(default="{text}", kw_only=True)
    reference: str = field(default="text2", kw_only=True)
    words: tuple[str, ...] | None = field(default=None, kw_only=True)
    metric: Literal["exact_match", "rouge_l"] = field(default="exact_match", kw_only=True)
    extract: str | None = field(default=None, kw_only=True)
    extract_reference: str | None = field(default=None, kw_only=True)
    length: int = field(default=512, kw_only=True)
    max_new_tokens: int = field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        if self.metric not in ("exact_match", "rouge_l"):
            raise RecipeError(
                f"no metric {self.metric!r}", where=f"task {self.name}",
                expected="exact_match, rouge_l",
            )  # fmt: skip
        for pattern in (self.extract, self.extract_reference):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise RecipeError(
                    "a regular expression is not understood", where=f"task {self.name}",
                    found=f"{pattern}: {error}",
                ) from error  # fmt: skip

    def encode(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[Any]:
        prompts = filled(self.template, rows, where, numbers)
        references = self._references(rows, numbers, where)
        found = tokenised(self.tokenizer, prompts, None, self.length, where, numbers)
        wanted = [self._wanted(reference) for reference in references]
        if None in wanted:
            raise DataError(
                "a reference has no answer", where=f"{where}, row {numbers[wanted.index(None)]}",
                expected=self.extract_reference, found=references[wanted.index(None)][-80:],
            )  # fmt: skip
        targets = tokens_of(self.tokenizer, references)
        return list(zip(found["input_ids"], targets, wanted, strict=True))

    def _references(
        self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int], where: str
    ) -> list[str]:
        found = column(rows, self.reference, where, numbers)
        if self.words is None:
            return [str(reference) for reference in found]
        labels = as_labels(found, None, where, numbers).tolist()
        for number, label in zip(numbers, labels, strict=True):
            if not 0 <= label < len(self.words):
                raise DataError("no word for a class", where=f"{where}, row {number}",
                                expected=f"0 to {len(self.words) - 1}", found=label,
                                fix="options: {words: [...]}, one for each class")  # fmt: skip
        return [self.words[label] for label in labels]

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        prompts, targets, references = zip(*examples, strict=True)
        ids, mask = padded(prompts, pad_id(self.tokenizer), left=True)
        return {
            "input_ids": ids, "attention_mask": mask, "targets": padded(targets, IGNORED)[0],
            "references": references,
        }  # fmt: skip

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the reference's tokens, each given those before: (n, tokens, vocabulary). Without
        "targets" in the batch, of the first token alone."""
        import torch

        ids, mask = batch["input_ids"], batch["attention_mask"]
        targets = batch.get("targets", torch.full_like(ids[:, :1], IGNORED))
        return taught(model, ids, mask, targets, pad_id(self.tokenizer))

    def answered(self, model: nn.Module, batch: Batch) -> Tensor:
        found = self.logits(model, batch)
        return found[batch["targets"] != IGNORED] if "targets" in batch else found.flatten(0, 1)

    def targets(self, batch: Batch) -> Tensor:
        found: Tensor = batch["targets"]
        return found[found != IGNORED]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the references' tokens, in nats."""
        import torch.nn.functional as F

        return F.cross_entropy(self.answered(model, batch).float(), self.targets(batch))

    def outcomes(self, model: nn.Module, batches: Iterator[Batch]) -> Outcomes:
        items = [item for batch in batches for item in self._items(model, batch)]
        texts, wanted, cut = zip(*items, strict=True)
        answers = [self.extracted(text, self.extract) for text in texts]
        score = np.array(
            [0.0 if a is None else self._score(a, w) for a, w in zip(answers, wanted, strict=True)]
        )
        columns = {
            "prediction": np.array(texts), "reference": np.array(wanted),
            "truncated": np.array(cut, dtype=np.int64),
            "unparsed": np.array([a is None for a in answers], dtype=np.int64),
        }  # fmt: skip
        return Outcomes(self.metric, score, np.ones_like(score), columns)

    def extracted(self, text: str, pattern: str | None) -> str | None:
        """The answer in a text; the text where no pattern is given, None without a match, or where
        none of its groups is in it."""
        if pattern is None:
            return text.strip()
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        groups = found[-1].groups() or (found[-1][0],)
        answer = next((group for group in groups if group is not None), None)
        return None if answer is None else _bare(answer)

    def _wanted(self, reference: str) -> str | None:
        """What an answer is compared with, in the form that answers have."""
        wanted = self.extracted(reference, self.extract_reference)
        return wanted if self.extract is None or wanted is None else _bare(wanted)

    def _items(self, model: Any, batch: Batch) -> Iterator[tuple[str, str, bool]]:
        end = getattr(self.tokenizer, "eos_token_id", None)
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
            pad_token_id=pad_id(self.tokenizer), eos_token_id=end,
        )  # fmt: skip
        skipped = 1 if is_encoder_decoder(model) else batch["input_ids"].shape[1]
        for ids, wanted in zip(written[:, skipped:].tolist(), batch["references"], strict=True):
            ended = end is not None and end in ids
            kept = ids[: ids.index(end)] if ended else ids
            yield self.tokenizer.decode(kept, skip_special_tokens=True), wanted, not ended

    def _score(self, answer: str, wanted: str) -> float:
        if self.metric == "rouge_l":
            return float(_rouge().score(wanted, answer)["rougeL"].fmeasure)
        return float(_even(answer) == _even(wanted))


def _bare(answer: str) -> str:
    return re.sub(r"(?<=\d),(?=\d)", "", answer).strip().rstrip(".")


def _even(text: str) -> str:
    return " ".join(text.split()).casefold()


@cache
def _rouge() -> Any:
    return needs("rouge_score.rouge_scorer", "tasks").RougeScorer(["rougeL"], use_stemmer=True)
