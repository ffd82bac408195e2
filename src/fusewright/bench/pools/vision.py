"""The pool of ``vision-mini``: a small vision transformer, experts, heads of class prototypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusewright.bench.pools import parts
from fusewright.bench.pools.classifiers import ClassifierBuilder
from fusewright.bench.pools.images import Images, VisionRecipe, load_images
from fusewright.bench.pools.making import read_parameters
from fusewright.bench.suite_file import SuiteSpec
from fusewright.extras import needs
from fusewright.tasks.images import RESAMPLING

ATTENTION = "eager"
"""In training: on CPUs the fused kernel's backward pass takes more than half of all time."""


def build_vision(
    spec: SuiteSpec, out: Path, data: Path | None, seed: int = 0, progress: bool = True,
    device: str = "cpu",
) -> None:  # fmt: skip
    """The folders that :class:`ClassifierBuilder` names. Raises what
    :func:`fusewright.bench.pools.build` says."""
    for module in ("transformers", "pyarrow", "PIL"):
        needs(module, "demo")
    _VisionBuilder(spec, out, read_recipe(spec), seed, device).run(data, progress)


def read_recipe(spec: SuiteSpec) -> VisionRecipe:
    """The suite's ``build.parameters``. Raises SuiteError for one that is not known."""
    return read_parameters(spec, VisionRecipe)


class _VisionBuilder(ClassifierBuilder[VisionRecipe]):
    images: dict[str, Images]

    def examples(self, data: Path | None) -> dict[str, Images]:
        self.images = load_images(self.spec.tasks, data, self.recipe.prepared)
        return self.images

    def read(self) -> dict[str, dict[str, Any]]:
        return {n: {"count": len(i), "sha256": i.digest()} for n, i in self.images.items()}

    def new_model(self) -> Any:
        return new_model(self.recipe, self.seed)

    def open_model(self, path: Path) -> Any:
        return open_model(path)

    def save(self, model: Any, at: Path) -> None:
        needs("transformers", "demo").utils.logging.disable_progress_bar()
        model.save_pretrained(at)
        prepared = self.recipe.prepared
        parts.write_json(at / "preprocessor_config.json", {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
            "do_normalize": True, "size": {"height": prepared.size, "width": prepared.size},
            "image_mean": prepared.mean, "image_std": prepared.std,
            "resample": RESAMPLING.index(prepared.resample),
        })  # fmt: skip


def new_model(recipe: VisionRecipe, seed: int) -> Any:
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
