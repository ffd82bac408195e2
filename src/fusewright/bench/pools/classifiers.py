"""A pool of classifiers: the base learns through heads that are thrown away, experts through frozen
heads of prototypes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusewright.bench.pools import parts, training
from fusewright.bench.pools.builder import HEADS, Builder
from fusewright.bench.pools.making import BASE
from fusewright.bench.pools.training import Examples, R, generator
from fusewright.bench.progress import Step


class ClassifierBuilder(Builder[R]):
    """Adds ``heads.safetensors``: a head (classes, width) for each task."""

    data: Mapping[str, Examples[R]]

    @abstractmethod
    def examples(self, data: Path | None) -> Mapping[str, Examples[R]]:
        """The training rows of every task."""

    def load(self, data: Path | None) -> None:
        self.data = self.examples(data)

    def pretrain(self, model: Any, step: Step) -> float:
        return training.pretrain(model, self.data, self.recipe, self.seed, step)

    def fine_tune(
        self, model: Any, task: str, rate: float, draw: torch.Generator, step: Step
    ) -> float:
        from safetensors.torch import load_file

        head: Tensor = load_file(self.out / HEADS)[task]
        return training.fine_tune(model, self.data[task], head, self.recipe, rate, draw, step)

    def heads(self) -> None:
        parts.make_file(self.out / HEADS, self._prototypes)

    def _prototypes(self, at: Path) -> None:
        from safetensors.torch import save_file

        model = self.open_model(self.out / BASE)
        save_file({
            task: training.prototypes(
                model, examples, self.recipe, generator(self.seed, f"head {task}")
            )
            for task, examples in self.data.items()
        }, at)  # fmt: skip
