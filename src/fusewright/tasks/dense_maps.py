"""What a dense model says of every place in a picture, with its own decoder or a frozen one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from fusewright.errors import FusewrightError
from fusewright.tasks.heads import backbone, linear

if TYPE_CHECKING:
    from torch import Tensor, nn

Head: TypeAlias = Union["Tensor", Mapping[str, "Tensor"]]
"""A linear head for every place (channels, width), or tensors of the model by name."""

OUTPUTS = ("logits", "predicted_depth", "out")


def maps(model: nn.Module, pixels: Tensor, head: Head | None = None) -> Tensor:
    """The model's answer at its own resolution: (n, 3, height, width) -> (n, channels, h, w).

    Without ``head`` it is what the model returns: ``logits``, ``predicted_depth``, the entry "out"
    (torchvision) or a tensor. A mapping holds a decoder's tensors by their names in the model: they
    take the place of the model's own for this call, whatever their shapes. A matrix
    (channels, width) is applied to the backbone's features at every place.

    Raises FusewrightError if there is no map in what the model returns, or a head does not fit.
    """
    import torch

    if head is None:
        return _map(model(pixels), model)
    if isinstance(head, Mapping):
        return _map(torch.func.functional_call(model, _placed(model, head), (pixels,)), model)
    return linear(feature_map(model, pixels).movedim(1, -1), head).movedim(-1, 1)


def feature_map(model: nn.Module, pixels: Tensor) -> Tensor:
    """A backbone's last features over space: (n, width, h, w); tokens of patches (ViT, DINOv2)
    are laid out, class and register tokens before them are left out."""
    found = backbone(model)(pixels)
    many = getattr(found, "feature_maps", None)
    hidden = many[-1] if many else getattr(found, "last_hidden_state", found)
    if getattr(hidden, "ndim", 0) == 3:
        patch = getattr(getattr(model, "config", None), "patch_size", None)
        if isinstance(patch, int):
            height, width = (side // patch for side in pixels.shape[-2:])
            tokens = hidden[:, -height * width :].movedim(1, -1)
            return tokens.unflatten(-1, (height, width))
    return _four(hidden, model)


def _map(found: Any, model: nn.Module) -> Tensor:
    for name in OUTPUTS:
        value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if value is not None:
            found = value
            break
    if getattr(found, "ndim", 0) == 3:  # depth without its channel
        found = found[:, None]
    return _four(found, model)


def _four(found: Any, model: nn.Module) -> Tensor:
    if getattr(found, "ndim", 0) != 4:
        raise FusewrightError(
            "no map over the picture is found in what the model returns",
            where=type(model).__name__, expected=f"{', '.join(OUTPUTS)}, or (n, channels, h, w)",
            found=tuple(getattr(found, "shape", ())) or type(found).__name__,
            fix="a dense model in the suite's opens: {model: AutoModelForSemanticSegmentation}",
        )  # fmt: skip
    return found


def _placed(model: nn.Module, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors where the model's own are; copies in training, in which BatchNorm writes
    its statistics: the head is frozen."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unknown = next((name for name in head if name not in own), None)
    if unknown is not None:
        raise FusewrightError(
            "the head does not fit the model", where=unknown,
            expected=f"names of tensors of {type(model).__name__}", found=unknown,
            fix="name the decoder's tensors as the model's state_dict does",
        )  # fmt: skip
    return {name: t.to(own[name], copy=model.training) for name, t in head.items()}
