"""CLIP's heads: class names in templates, read by the text encoder, which nobody fine-tuned."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

    from fusewright.bench.suite import Suite


def text_heads(suite: Suite, path: Path) -> dict[str, Tensor]:
    """A head (classes, width) for each task: its classes (underscores are spaces) in its own
    ``options: {templates: [...]}``, else in the suite's."""
    from fusewright.bench.suite_tasks import classes_of
    from fusewright.tasks.heads import clip_head

    model = _clip(path)
    tokenizer = needs("transformers", "demo").AutoTokenizer.from_pretrained(path)
    assert suite.spec.zero_shot is not None
    heads = {}
    for name, spec in suite.spec.tasks.items():
        names = [text.replace("_", " ") for text in classes_of(suite, name)]
        templates = spec.options.get("templates", suite.spec.zero_shot.templates)
        heads[name] = clip_head(model, tokenizer, names, templates)
    return heads


def reading(path: Path) -> dict[str, Any]:
    """How features meet these heads: projected, normalised, and scaled by CLIP's own scale."""
    model = _clip(path)
    return {
        "projection": model.visual_projection.weight.detach(), "normalise": True,
        "scale": model.logit_scale.detach().exp().item(),
    }  # fmt: skip


@lru_cache(maxsize=1)
def _clip(path: Path) -> Any:
    return needs("transformers", "demo").CLIPModel.from_pretrained(path).eval()
