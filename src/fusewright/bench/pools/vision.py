"""The pool of ``vision-mini``: a small vision transformer, experts, heads of class prototypes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.bench.pools import parts, training
from fusewright.bench.pools.images import Images, load_images
from fusewright.bench.pools.training import Recipe, generator
from fusewright.bench.progress import Stages, Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.errors import nearest
from fusewright.extras import needs
from fusewright.tasks.images import RESAMPLING

ATTENTION = "eager"
"""In training: on CPUs the fused kernel's backward pass takes more than half of all time."""
BASE, EXPERTS, LORA, HEADS = "base", "experts", "lora", "heads.safetensors"


def build_vision(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True
) -> None:
    """``base/``, ``experts/TASK/``, ``lora/TASK/``, ``heads.safetensors``, ``provenance.json``.

    The base is pre-trained on every task of the suite, each gets a head, each task with an expert
    an expert. Raises what :func:`fusewright.bench.pools.build` says.
    """
    for module in ("transformers", "pyarrow", "PIL"):
        needs(module, "demo")
    recipe = read_recipe(spec)
    experts = [name for name in spec.tasks if name in spec.experts]
    claim = {"recipe": asdict(recipe), "seed": seed, "tasks": list(spec.tasks), "experts": experts}
    with parts.pool(out, claim), _threads(recipe.threads):
        if (out / parts.PROVENANCE).exists():
            return
        images = load_images(spec.tasks, data, recipe.prepared)
        made = _Builder(out, recipe, seed, images).build(experts, progress)
        parts.write_json(out / parts.PROVENANCE, {
            **claim, "data": _sources(spec, images), "parts": made, "versions": _versions(),
        })  # fmt: skip


def read_recipe(spec: SuiteSpec) -> Recipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    given = dict(spec.build.parameters if spec.build is not None else {})
    known = [field.name for field in fields(Recipe)]
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
    return Recipe(**given)


class _Builder:
    """One pool, part after part."""

    def __init__(self, out: Path, recipe: Recipe, seed: int, images: Mapping[str, Images]) -> None:
        self.out, self.recipe, self.seed, self.images = out, recipe, seed, images

    def build(self, experts: list[str], progress: bool) -> dict[str, Any]:
        """Every part's facts, by its path."""
        recipe = self.recipe
        made: dict[str, Any] = {}
        with Stages(progress).stage(BASE, recipe.base_epochs) as step:
            made[BASE] = self._part(BASE, recipe.base_epochs, step, self._base)
        parts.make_file(self.out / HEADS, self._heads)
        steps = len(experts) * recipe.expert_epochs
        for tuning, folder in (("full", EXPERTS), ("lora", LORA)):
            if tuning in recipe.tunings:
                with Stages(progress).stage(folder, steps) as step:
                    for task in experts:
                        name = f"{folder}/{task}"
                        make = partial(self._expert, task, folder)
                        made[name] = self._part(name, recipe.expert_epochs, step, make)
        return made

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
        began, model = perf_counter(), new_model(self.recipe, self.seed)
        loss = training.pretrain(model, self.images, self.recipe, self.seed, step)
        _save(model, at, self.recipe)
        return {"seconds": perf_counter() - began, "loss": loss}

    def _heads(self, at: Path) -> None:
        from safetensors.torch import save_file

        model = open_model(self.out / BASE)
        save_file({
            task: training.prototypes(
                model, images, self.recipe, generator(self.seed, f"head {task}")
            )
            for task, images in self.images.items()
        }, at)  # fmt: skip

    def _expert(self, task: str, folder: str, at: Path, step: Step) -> dict[str, Any]:
        from safetensors.torch import load_file

        recipe, began = self.recipe, perf_counter()
        head: Tensor = load_file(self.out / HEADS)[task]
        model: Any = open_model(self.out / BASE)
        rate = recipe.expert_rate
        if folder == LORA:
            model, rate = _with_adapter(model, recipe, self.seed), recipe.lora_rate
        draw = generator(self.seed, f"{folder} {task}")
        loss = training.fine_tune(model, self.images[task], head, recipe, rate, draw, step)
        _save(model, at, recipe)
        return {"seconds": perf_counter() - began, "loss": loss}


def new_model(recipe: Recipe, seed: int) -> Any:
    """A ``transformers.SegformerModel`` with fresh weights: three stride-2 convolutions from
    32x32 pixels to 16 tokens, then transformer blocks (Xie et al. 2021, arXiv:2105.15203).

    Overlapping convolutions learn from a few thousand small pictures what square patches do not.
    """
    transformers = needs("transformers", "demo")
    width = recipe.width
    config = transformers.SegformerConfig(
        num_encoder_blocks=3, depths=[0, 0, recipe.layers], sr_ratios=[1, 1, 1],
        hidden_sizes=[width // 4, width // 2, width], patch_sizes=[3, 3, 3], strides=[2, 2, 2],
        num_attention_heads=[1, 1, max(1, width // 32)], mlp_ratios=[4, 4, 4],
        drop_path_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # 0.02 suits larger widths
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.SegformerModel._from_config(config, attn_implementation=ATTENTION)


def open_model(path: Path) -> nn.Module:
    """The model of a folder, read by ``transformers`` alone."""
    transformers = needs("transformers", "demo")
    transformers.utils.logging.disable_progress_bar()
    model: nn.Module = transformers.AutoModel.from_pretrained(path, attn_implementation=ATTENTION)
    return model


def _with_adapter(model: Any, recipe: Recipe, seed: int) -> Any:
    peft = needs("peft", "demo")
    config = peft.LoraConfig(
        r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _save(model: Any, at: Path, recipe: Recipe) -> None:
    """An ordinary Hugging Face folder, with how pictures are prepared."""
    needs("transformers", "demo").utils.logging.disable_progress_bar()
    model.save_pretrained(at)
    prepared = recipe.prepared
    parts.write_json(at / "preprocessor_config.json", {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "size": {"height": prepared.size, "width": prepared.size},
        "image_mean": prepared.mean, "image_std": prepared.std,
        "resample": RESAMPLING.index(prepared.resample),
    })  # fmt: skip


def _sources(spec: SuiteSpec, images: Mapping[str, Images]) -> dict[str, Any]:
    return {
        task: {
            "data": spec.tasks[task].data, "hub": spec.tasks[task].hub,
            "rows": spec.tasks[task].splits.get("train"), "count": len(found),
            "sha256": found.digest(), "licence": spec.tasks[task].licence,
        }
        for task, found in images.items()
    }  # fmt: skip


def _versions() -> dict[str, str]:
    import fusewright

    return {
        "fusewright": fusewright.__version__, "torch": torch.__version__,
        "transformers": needs("transformers", "demo").__version__,
        "python": platform.python_version(), "processor": platform.machine(),
    }  # fmt: skip


def _threads(count: int) -> Any:
    from fusewright.bench.digits.model import threads

    return threads(count)
