"""Frozen heads: features to logits, and how features are found in what a backbone returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusewright.errors import FusewrightError

if TYPE_CHECKING:
    from torch import Tensor, nn


def backbone(model: nn.Module) -> Any:
    """The part of a model below its own head, else the model itself.

    ``transformers`` names every model that has a head "…For…" or, older ones, "…LMHeadModel", and
    what is below it base_model.
    """
    named = type(model).__name__
    headed = "For" in named or "Head" in named
    return getattr(model, "base_model", model) if headed else model


def image_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """One feature vector an image: (n, channels, height, width) -> (n, width).

    The rule, in this order: the projected embedding of a CLIP tower (``image_embeds``); the pooled
    output, flattened (ResNet and ConvNeXt: mean over space; DINOv2 and CLIP's tower: the
    normalised class token; ViT built with its pooling layer: that layer); the class token, first of
    the last hidden state (ViT without it). A model with a head of its own is asked below it:
    OpenCLIP's ``encode_image``, timm's ``forward_head(..., pre_logits=True)``. Plain modules return
    features themselves, (n, width), or maps (n, width, h, w), averaged over space.

    Raises FusewrightError if the model returns none of these.
    """
    found = _seen(model, pixels)
    for name in ("image_embeds", "pooler_output"):
        value = getattr(found, name, None)
        if value is not None:
            return _flat(value)
    hidden = getattr(found, "last_hidden_state", found)
    if not hasattr(hidden, "dim") or hidden.dim() not in (2, 3, 4):
        raise FusewrightError(
            "no features are found in what the model returns", where=type(model).__name__,
            expected="image_embeds, pooler_output, last_hidden_state, or a tensor (n, width)",
            found=type(found).__name__,
        )  # fmt: skip
    return hidden[:, 0] if hidden.dim() == 3 else _flat(hidden)


def _seen(model: Any, pixels: Tensor) -> Any:
    if hasattr(model, "get_image_features"):  # a whole CLIP: its projected embedding
        return model.get_image_features(pixel_values=pixels)
    if hasattr(model, "encode_image"):
        return model.encode_image(pixels)
    if hasattr(model, "forward_head"):  # timm: pooled as its own head would see it
        return model.forward_head(model.forward_features(pixels), pre_logits=True)
    # Images are the first argument of every vision model, in ``transformers`` and outside it.
    return backbone(model)(pixels)


def _flat(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.dim() == 4 else features


def linear(
    features: Tensor,
    head: Tensor,
    *,
    scale: float = 1.0,
    normalise: bool = False,
    projection: Tensor | None = None,
) -> Tensor:
    """Logits scale · f headᵀ: (n, width), (classes, width) -> (n, classes).

    ``projection`` (width, features) is applied first; ``normalise`` divides f by its length. The
    head is computed in float32 (float64 for float64 features), also under autocast: it is small,
    and differences of logits are what is measured.

    Raises FusewrightError if the head is of another width.
    """
    import torch
    import torch.nn.functional as F

    with torch.autocast(features.device.type, enabled=False):
        f = features if features.dtype == torch.float64 else features.float()
        if projection is not None:
            f = f @ _like(projection, f, "projection").T
        if normalise:
            f = F.normalize(f, dim=-1)
        return scale * (f @ _like(head, f, "head").T)


def _like(weights: Tensor, features: Tensor, name: str) -> Tensor:
    if weights.dim() != 2 or weights.shape[1] != features.shape[-1]:
        raise FusewrightError(
            f"the {name} does not fit the model's features", where=name,
            expected=f"(…, {features.shape[-1]})", found=tuple(weights.shape),
        )  # fmt: skip
    return weights.to(features)


def clip_head(
    model: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """CLIP's zero-shot head (classes, width) float32 (Radford et al. 2021, arXiv:2103.00020).

    Each template ("a photo of a {}.") is filled with each class name and embedded; embeddings are
    normalised, averaged over templates, normalised again. ``model`` is a ``CLIPModel`` or
    ``CLIPTextModelWithProjection`` with its tokenizer, or OpenCLIP's with its own. Use it
    with ``normalise=True`` and the model's logit scale.

    Raises FusewrightError if there is no class or template, or a template has no place for one.
    """
    import torch
    import torch.nn.functional as F

    if not classes or not templates or any("{}" not in t for t in templates):
        raise FusewrightError(
            "a head needs class names and templates", expected='templates like "a photo of a {}."',
            found=f"{len(classes)} classes, templates {list(templates)}",
        )  # fmt: skip
    device = next(model.parameters()).device
    training = model.training
    rows = []
    model.eval()
    with torch.inference_mode():
        for name in classes:
            texts = [template.replace("{}", name) for template in templates]
            embedded = F.normalize(_text_features(model, tokenizer, texts, device).float(), dim=-1)
            rows.append(F.normalize(embedded.mean(dim=0), dim=-1))
    model.train(training)
    return torch.stack(rows).cpu().clone()


def _text_features(model: Any, tokenizer: Any, texts: list[str], device: Any) -> Tensor:
    if hasattr(model, "encode_text"):
        return model.encode_text(tokenizer(texts).to(device))
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    if not hasattr(model, "get_text_features"):
        return model(**tokens).text_embeds
    found = model.get_text_features(**tokens)
    return getattr(found, "pooler_output", found)  # a tensor before transformers 5
