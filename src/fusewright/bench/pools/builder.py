"""Pools of a pre-trained base and fine-tuned experts: what pictures and texts share."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fusewright.bench.opening import open_model
from fusewright.bench.pools.making import BASE, TUNINGS, Maker, P
from fusewright.bench.pools.training import generator
from fusewright.bench.progress import Stages, Step
from fusewright.extras import needs

HEADS = "heads.safetensors"


class Builder(Maker[P]):
    """``base/``, ``experts/TASK/``, ``lora/TASK/``, ``provenance.json``, perhaps heads.

    The base is pre-trained on every task of the suite, each task with an expert gets one, tuned
    in the ways that the suite's experts name by their folder, and that the recipe adds. A pool
    can be given another tuning later. Kinds of pools differ in their models and data.
    """

    @abstractmethod
    def new_model(self) -> Any:
        """A base with fresh weights."""

    @abstractmethod
    def save(self, model: Any, at: Path) -> None:
        """An ordinary Hugging Face folder, with how inputs are prepared."""

    @abstractmethod
    def pretrain(self, model: Any, step: Step) -> float:
        """Train the base on all tasks; answers with the mean loss at the end."""

    @abstractmethod
    def fine_tune(
        self, model: Any, task: str, rate: float, draw: torch.Generator, step: Step
    ) -> float:
        """Train all that can be trained of a copy of the base on one task; likewise."""

    def heads(self) -> None:
        """Make what the pool has beside models, once there is a base."""

    def open_model(self, path: Path) -> Any:
        """The model of a folder, opened as the suite says."""
        return open_model(path, self.spec.opens)

    def wanted(self) -> list[str]:
        return [f"{TUNINGS[tuning]}/{task}" for tuning in self._tunings() for task in self.experts]

    def make(self, progress: bool) -> None:
        of_base, of_expert = self.recipe.reports
        with Stages(progress).stage(BASE, of_base) as step:
            self.part(BASE, of_base, step, self._base)
        self.heads()
        for tuning in self._tunings():
            folder = TUNINGS[tuning]
            with Stages(progress).stage(folder, len(self.experts) * of_expert) as step:
                for task in self.experts:
                    make = partial(self._expert, task, tuning)
                    self.part(f"{folder}/{task}", of_expert, step, make)

    def _tunings(self) -> list[str]:
        """Those of the suite's experts, known by their folders, and those of the recipe."""
        folders = {ref.split("/")[0] for ref in self.spec.experts.values()}
        return [t for t, at in TUNINGS.items() if at in folders or t in self.recipe.tunings]

    def _base(self, at: Path, step: Step) -> dict[str, Any]:
        began, model = perf_counter(), self.new_model().to(self.device)
        loss = self.pretrain(model, step)
        return self._saved(model, at, began, loss)

    def _expert(self, task: str, tuning: str, at: Path, step: Step) -> dict[str, Any]:
        recipe, began = self.recipe, perf_counter()
        model, rate = self.open_model(self.out / BASE), recipe.expert_rate
        if tuning == "lora":
            model, rate = self._with_adapter(model), recipe.lora_rate
        draw = generator(self.seed, f"{TUNINGS[tuning]} {task}")
        loss = self.fine_tune(model.to(self.device), task, rate, draw, step)
        return self._saved(model, at, began, loss)

    def _saved(self, model: Any, at: Path, began: float, loss: float) -> dict[str, Any]:
        self.save(model.cpu(), at)
        return {"seconds": perf_counter() - began, "loss": loss, "device": self.device}

    def _with_adapter(self, model: Any) -> Any:
        """LoRA (Hu et al. 2022, arXiv:2106.09685) on all linear modules below the heads."""
        peft, transformers = needs("peft", "demo"), needs("transformers", "demo")
        across = any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules())
        config = peft.LoraConfig(
            r=self.recipe.lora_rank, lora_alpha=2 * self.recipe.lora_rank,
            target_modules="all-linear", fan_in_fan_out=across,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return peft.get_peft_model(model, config)
