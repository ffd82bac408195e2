"""CLIP's heads: class names in templates, read by the text encoder, which nobody fine-tuned."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.opening import open_model
from fusewright.bench.suite_file import Opens
from fusewright.engine.libraries import OPEN_CLIP, tokenizer_of
from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

    from fusewright.bench.suite import Suite


def text_heads(suite: Suite, path: Path) -> dict[str, Tensor]:
    """A head (classes, width) for each task: its classes (underscores are spaces) in its own
    ``options: {templates: [...]}``, else in the suite's."""
    from fusewright.bench.suite_tasks import classes_of
    from fusewright.tasks.heads import clip_head

    opens = suite.spec.opens
    model, tokenizer = _clip(path, opens), _tokenizer(path, opens)
    assert suite.spec.zero_shot is not None
    heads = {}
    for name, spec in suite.spec.tasks.items():
        names = [text.replace("_", " ") for text in classes_of(suite, name)]
        templates = spec.options.get("templates", suite.spec.zero_shot.templates)
        heads[name] = clip_head(model, tokenizer, names, templates)
    return heads


def reading(path: Path, opens: Opens) -> dict[str, Any]:
    """How features meet these heads: projected (OpenCLIP's are), normalised, and scaled by CLIP's
    own scale."""
    model = _clip(path, opens)
    projection = getattr(model, "visual_projection", None)
    return {
        "projection": None if projection is None else projection.weight.detach(),
        "normalise": True, "scale": model.logit_scale.detach().exp().item(),
    }  # fmt: skip


def _clip(path: Path, opens: Opens) -> Any:
    """The whole CLIP model, by OpenCLIP if that opens the suite's models."""
    return _opened(path, opens.model_dump_json() if opens.library == OPEN_CLIP else None)


@lru_cache(maxsize=1)
def _opened(path: Path, opens: str | None) -> Any:
    if opens is None:
        return needs("transformers", "demo").CLIPModel.from_pretrained(path).eval()
    return open_model(path, Opens.model_validate_json(opens))


def _tokenizer(path: Path, opens: Opens) -> Any:
    if opens.library == OPEN_CLIP:
        return tokenizer_of(path, opens.named)
    return needs("transformers", "demo").AutoTokenizer.from_pretrained(path)
