"""A pool of text-to-text models: base and experts learn to answer tasks with their verbalisers, by
the loss that the tasks themselves have, at rates relative to each tensor's size, without decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle, relative
from fusewright.bench.pools.builder import Builder
from fusewright.bench.pools.texts import TextRecipe, staying
from fusewright.bench.pools.training import decayed, descend, generator
from fusewright.bench.progress import Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.bench.suite_tasks import of_class, open_split, taken
from fusewright.modules.tensors import device_of
from fusewright.tasks.batching import Prepared
from fusewright.tasks.placement import moved
from fusewright.tasks.task import Batch
from fusewright.tasks.verbalisers import VerbaliserClassification

Item = tuple[VerbaliserClassification, Batch]


class TextToText(Builder[TextRecipe]):
    """Each step is on a batch of one task; in pre-training tasks come in random order."""

    tokenizer: Any

    def prepare(self, data: Path | None) -> None:
        """Every task and its training rows as tokens."""
        self.tasks = {name: text_task(self.spec, name, self.tokenizer) for name in self.spec.tasks}
        self.prompts: Mapping[str, Prepared] = {
            name: task.prepared(open_split(name, self.spec.tasks[name], "train", data))
            for name, task in self.tasks.items()
        }

    def pretrain(self, model: Any, step: Step) -> float:
        recipe, limit = self.recipe, self.recipe.base_rows
        examples = {n: Prepared(p.examples[:limit], n, "") for n, p in self.prompts.items()}
        draw = generator(self.seed, "base")
        return self._descend(model, examples, recipe.base_rate, recipe.base_epochs, draw, step)

    def fine_tune(
        self, model: Any, task: str, rate: float, draw: torch.Generator, step: Step
    ) -> float:
        limit = self.recipe.expert_rows
        examples = {task: Prepared(self.prompts[task].examples[:limit], task, "")}
        return self._descend(model, examples, rate, self.recipe.expert_epochs, draw, step)

    def _descend(
        self, model: nn.Module, examples: Mapping[str, Prepared], rate: float, epochs: int,
        draw: torch.Generator, step: Step,
    ) -> float:  # fmt: skip
        device = device_of(model)

        def loss(item: Item) -> Tensor:
            task, batch = item
            with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
                return task.loss(model, moved(batch, device))

        def epoch() -> Iterator[Item]:
            return self._epoch(examples, draw)

        steps = sum(len(p) // self._size(p) for p in examples.values())
        descent = OneCycle(groups(model, rate), epochs * steps, rate)
        return descend(model, descent, epoch, loss, epochs, draw, step)

    def _epoch(self, examples: Mapping[str, Prepared], draw: torch.Generator) -> Iterator[Item]:
        """Every row at most once, in full batches."""
        streams: dict[str, Iterator[Batch]] = {}
        turns: list[str] = []
        for name, rows in examples.items():
            seed = int(torch.randint(2**31, (), generator=draw))
            streams[name] = self.tasks[name].batches(rows, self._size(rows), seed=seed)
            turns += [name] * (len(rows) // self._size(rows))
        for turn in torch.randperm(len(turns), generator=draw).tolist():
            name = turns[turn]
            yield self.tasks[name], self._thinned(next(streams[name]), draw)

    def _thinned(self, batch: Batch, draw: torch.Generator) -> Batch:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        stay, lengths = staying(mask.sum(1), ids.shape[1], self.recipe.thinning, draw)
        left = torch.arange(ids.shape[1]) < lengths[:, None]
        return {**batch, "input_ids": ids.gather(1, stay), "attention_mask": left.to(mask.dtype)}

    def _size(self, rows: Prepared) -> int:
        return min(self.recipe.batch, len(rows))


def groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """What can be trained of a model, at relative rates. Adapters, of which one half begins at
    zero, have no scale of their own: theirs is the rate itself."""
    if all(p.requires_grad for p in model.parameters()):
        return relative(model.parameters(), rate)
    return decayed(model, 0.0)


def text_task(spec: SuiteSpec, name: str, tokenizer: Any) -> VerbaliserClassification:
    """A task as evaluation makes it. Raises SuiteError for one of another kind, or options that
    it does not take."""
    said = spec.tasks[name]
    if said.kind != VerbaliserClassification.kind or said.named is None:
        raise SuiteError("a T5 learns tasks that are answered in words", where=f"tasks.{name}",
                         expected=f"kind: {VerbaliserClassification.kind}, classes: [...]",
                         found=f"kind: {said.kind}, classes: {said.classes}")  # fmt: skip
    given = {**taken(said.options), "classes": tuple(said.named), "tokenizer": tokenizer}
    task: VerbaliserClassification = of_class(VerbaliserClassification, name, given)
    return task
