"""A pool of classifiers, part after part: what builders of pictures and of texts share."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fusewright.bench.digits.model import threads
from fusewright.bench.pools import parts, training
from fusewright.bench.pools.training import Examples, R, generator
from fusewright.bench.progress import Stages, Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.errors import nearest
from fusewright.extras import needs

BASE, EXPERTS, LORA, HEADS = "base", "experts", "lora", "heads.safetensors"
Parameters = TypeVar("Parameters")


def read_parameters(spec: SuiteSpec, recipe: type[Parameters]) -> Parameters:
    """The suite's ``build.parameters`` as a recipe. Raises SuiteError for one that is not known."""
    given = dict(spec.build.parameters if spec.build is not None else {})
    known = [field.name for field in fields(recipe)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            close = nearest(key, known)
            raise SuiteError("the recipe has an unknown parameter", where="build.parameters",
                             found=key, expected=", ".join(known),
                             fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    if "tunings" in given:
        given["tunings"] = tuple(given["tunings"])
        if odd := set(given["tunings"]) - {"full", "lora"}:
            raise SuiteError("experts are tuned in no such way", where="build.parameters.tunings",
                             found=", ".join(sorted(odd)), expected="full, lora")  # fmt: skip
    return recipe(**given)


def versions(*modules: str) -> dict[str, str]:
    """What a training's last digits may depend on."""
    import fusewright

    return {
        "fusewright": fusewright.__version__, "torch": torch.__version__,
        **{name: needs(name, "demo").__version__ for name in ("transformers", *modules)},
        "python": platform.python_version(), "processor": platform.machine(),
    }  # fmt: skip


class Builder(ABC, Generic[R]):
    """``base/``, ``experts/TASK/``, ``lora/TASK/``, ``heads.safetensors``, ``provenance.json``.

    The base is pre-trained on every task of the suite, each gets a head, each task with an expert
    an expert. Kinds of pools differ in their models and data.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    """Named in the provenance, beside torch and transformers."""

    def __init__(self, spec: SuiteSpec, out: Path, recipe: R, seed: int) -> None:
        self.spec, self.out, self.recipe, self.seed = spec, out, recipe, seed
        self.data: Mapping[str, Examples[R]] = {}
        self.made: dict[str, Any] = {}

    @abstractmethod
    def load(self, data: Path | None) -> Mapping[str, Examples[R]]:
        """The training rows of every task."""

    @abstractmethod
    def digest(self, task: str) -> str:
        """SHA-256 of a task's training rows: the same rows from any source."""

    @abstractmethod
    def new_model(self) -> Any:
        """A base with fresh weights."""

    @abstractmethod
    def open_model(self, path: Path) -> Any:
        """The model of a folder, read by ``transformers`` alone."""

    @abstractmethod
    def save(self, model: Any, at: Path) -> None:
        """An ordinary Hugging Face folder, with how inputs are prepared."""

    def run(self, data: Path | None, progress: bool) -> None:
        """All parts that are not there yet, then the provenance."""
        recipe, tasks = self.recipe, self.spec.tasks
        experts = [name for name in tasks if name in self.spec.experts]
        claim = {"recipe": asdict(recipe), "seed": self.seed, "tasks": list(tasks),
                 "experts": experts}  # fmt: skip
        with parts.pool(self.out, claim), threads(recipe.threads):
            if (self.out / parts.PROVENANCE).exists():
                return
            self.data = self.load(data)
            self._build(experts, progress)
            parts.write_json(self.out / parts.PROVENANCE, {
                **claim, "data": self._sources(), "parts": self.made,
                "versions": versions(*self.libraries),
            })  # fmt: skip

    def _build(self, experts: list[str], progress: bool) -> None:
        recipe = self.recipe
        with Stages(progress).stage(BASE, recipe.base_epochs) as step:
            self.made[BASE] = self._part(BASE, recipe.base_epochs, step, self._base)
        parts.make_file(self.out / HEADS, self._heads)
        steps = len(experts) * recipe.expert_epochs
        for tuning, folder in (("full", EXPERTS), ("lora", LORA)):
            if tuning in recipe.tunings:
                with Stages(progress).stage(folder, steps) as step:
                    for task in experts:
                        name = f"{folder}/{task}"
                        make = partial(self._expert, task, folder)
                        self.made[name] = self._part(name, recipe.expert_epochs, step, make)

    def _part(
        self, name: str, epochs: int, step: Step, make: Callable[[Path, Step], dict[str, Any]]
    ) -> Mapping[str, Any]:
        """A part of an earlier run, or made now; every epoch is a step."""

        def said(what: str) -> None:
            step(f"{name}, {what}")

        path = self.out / name
        if path.exists():
            for _ in range(epochs):
                said("kept")
        path.parent.mkdir(exist_ok=True)
        return parts.make_part(path, lambda at: make(at, said))

    def _base(self, at: Path, step: Step) -> dict[str, Any]:
        began, model = perf_counter(), self.new_model()
        loss = training.pretrain(model, self.data, self.recipe, self.seed, step)
        self.save(model, at)
        return {"seconds": perf_counter() - began, "loss": loss}

    def _heads(self, at: Path) -> None:
        from safetensors.torch import save_file

        model = self.open_model(self.out / BASE)
        save_file({
            task: training.prototypes(
                model, examples, self.recipe, generator(self.seed, f"head {task}")
            )
            for task, examples in self.data.items()
        }, at)  # fmt: skip

    def _expert(self, task: str, folder: str, at: Path, step: Step) -> dict[str, Any]:
        from safetensors.torch import load_file

        recipe, began = self.recipe, perf_counter()
        head: Tensor = load_file(self.out / HEADS)[task]
        model, rate = self.open_model(self.out / BASE), recipe.expert_rate
        if folder == LORA:
            model, rate = self._with_adapter(model), recipe.lora_rate
        draw = generator(self.seed, f"{folder} {task}")
        loss = training.fine_tune(model, self.data[task], head, recipe, rate, draw, step)
        self.save(model, at)
        return {"seconds": perf_counter() - began, "loss": loss}

    def _with_adapter(self, model: Any) -> Any:
        peft = needs("peft", "demo")
        config = peft.LoraConfig(
            r=self.recipe.lora_rank, lora_alpha=2 * self.recipe.lora_rank,
            target_modules="all-linear",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return peft.get_peft_model(model, config)

    def _sources(self) -> dict[str, Any]:
        tasks = self.spec.tasks
        return {
            name: {
                "data": tasks[name].data, "hub": tasks[name].hub,
                "rows": tasks[name].splits.get("train"), "count": len(found),
                "sha256": self.digest(name), "licence": tasks[name].licence,
            }
            for name, found in self.data.items()
        }  # fmt: skip
