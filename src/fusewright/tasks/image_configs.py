"""Image preparations in the words of timm and OpenCLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor
from typing import Any, Literal

from fusewright.tasks.errors import DataError
from fusewright.tasks.images import RESAMPLING, ImagePreparation

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation where a config of timm, or of OpenCLIP, says none."""
_FITS: dict[str, Literal["crop", "stretch"]] = {
    "center": "crop", "shortest": "crop", "squash": "stretch",
}  # fmt: skip


def from_timm(config: Mapping[str, Any], size: int | None = None) -> ImagePreparation:
    """timm's evaluation transform, from a ``config.json``: the shorter edge to
    ⌊size / crop_pct⌋, the centre cut, by ``pretrained_cfg``'s ``interpolation``, ``mean``, ``std``.

    ``size`` replaces ``input_size``, as ``img_size`` does. What is not said is timm's own default
    (224, bicubic, 0.875, ImageNet's mean). Raises DataError for what is not done here.
    """
    said = {k: v for k, v in config.get("pretrained_cfg", config).items() if v is not None}
    channels, *edges = said.get("input_size", (3, 224, 224))
    size, crop = size or _square(edges), said.get("crop_pct", 0.875)
    fit = _fit(said.get("crop_mode", "center"))
    if fit == "stretch" and crop != 1:
        raise DataError("pictures are not stretched and cut", where="pretrained_cfg",
                        expected="crop_mode: center, or crop_pct: 1", found=f"squash, {crop}",
                        fix="tasks: {NAME: {options: {preparation: {...}}}}")  # fmt: skip
    return ImagePreparation(
        size, *_statistics(said, IMAGENET), channels=1 if channels == 1 else 3,
        resample=_filter(said.get("interpolation", "bicubic")), fit=fit,
        resize=floor(size / crop) if fit == "crop" else None, centre="even",
    )  # fmt: skip


def from_open_clip(config: Mapping[str, Any], size: int | None = None) -> ImagePreparation:
    """OpenCLIP's evaluation transform, from an ``open_clip_config.json``: ``preprocess_cfg``, and
    the ``image_size`` of ``model_cfg.vision_cfg`` unless ``size`` replaces it.

    What is not said is OpenCLIP's own default (bicubic, shortest edge, OpenAI's mean). Raises
    DataError for what is not done here.
    """
    said = {k: v for k, v in config.get("preprocess_cfg", {}).items() if v is not None}
    stated = said.get("size") or config["model_cfg"]["vision_cfg"].get("image_size", 224)
    return ImagePreparation(
        size or _square(stated), *_statistics(said, OPENAI),
        resample=_filter(said.get("interpolation", "bicubic")),
        fit=_fit(said.get("resize_mode", "shortest")), centre="even",
    )  # fmt: skip


def _statistics(
    said: Mapping[str, Any], default: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (said.get(key, value) for key, value in zip(("mean", "std"), default, strict=True))
    return tuple(mean), tuple(std)


def _square(size: int | Sequence[int]) -> int:
    edges = {size} if isinstance(size, int) else set(size)
    if len(edges) != 1:
        raise DataError("only square sizes are known", where="the model's config", found=size)
    return edges.pop()


def _fit(mode: str) -> Literal["crop", "stretch"]:
    if mode not in _FITS:
        raise DataError("pictures are not fitted in this way", where="the model's config",
                        expected=", ".join(_FITS), found=mode,
                        fix="tasks: {NAME: {options: {preparation: {...}}}}")  # fmt: skip
    return _FITS[mode]


def _filter(name: str) -> str:
    if name not in RESAMPLING:
        raise DataError("no such way to resize pictures", where="the model's config",
                        expected=", ".join(RESAMPLING), found=name)  # fmt: skip
    return name
