"""Pictures to pixel values, as the model was trained to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusewright.extras import needs
from fusewright.tasks.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters by number, as ``preprocessor_config.json`` writes them."""


@dataclass(frozen=True)
class ImagePreparation:
    """What is done to a picture: mode, size, [0, 1], mean and deviation.

    ``size`` in pixels; ``fit="stretch"`` resizes to the square (ViT), ``"crop"`` resizes the
    shorter edge and cuts the centre (CLIP). A picture of the right size is not touched,
    unless ``resize`` enlarges it first.
    ``mean`` and ``std`` are of values in [0, 1], one for each channel. ``channels`` 3 makes RGB of
    grey pictures, 1 grey of RGB.
    """

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    channels: Literal[1, 3] = 3
    resample: str = "bicubic"
    fit: Literal["stretch", "crop"] = "stretch"
    resize: int | None = None
    """The shorter edge before the centre is cut; ``size`` unless given."""
    centre: Literal["below", "even"] = "below"
    """Where a cut begins that would begin between two pixels: transformers takes the one below,
    torchvision the even one."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels or self.size < 1:
            raise DataError(
                "an image preparation is not consistent",
                expected=f"a mean and a deviation for each of {self.channels} channels",
                found=f"{len(self.mean)} and {len(self.std)}, size {self.size}",
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ImagePreparation:
        """From a ``preprocessor_config.json`` of CLIP, ViT, DINOv2, ResNet or ConvNeXt.

        Raises DataError if it asks for something that is not done here.
        """
        crop = config.get("do_center_crop", "crop_size" in config)
        edge = _edge(config["size"])
        if not crop and isinstance(config["size"], Mapping) and "shortest_edge" in config["size"]:
            raise DataError(
                "pictures of different sizes make no batch", where="preprocessor_config.json",
                expected="a square size, or a centre crop", found=config["size"],
            )  # fmt: skip
        size = _edge(config["crop_size"]) if crop else edge
        return cls(
            size=size, mean=tuple(config["image_mean"]), std=tuple(config["image_std"]),
            resample=RESAMPLING[config.get("resample", 3)], fit="crop" if crop else "stretch",
            resize=edge if crop else None,
        )  # fmt: skip

    def pixels(self, picture: Any) -> Pixels:
        """A PIL image -> (channels, size, size) uint8."""
        if picture.mode != "L":  # one band is resized faster than three that are the same
            picture = picture.convert("RGB" if self.channels == 3 else "L")
        if picture.size != (self.size, self.size) or self.resize not in (None, self.size):
            picture = self._cropped(picture) if self.fit == "crop" else self._resized(
                picture, (self.size, self.size)
            )  # fmt: skip
        values = np.asarray(picture)
        bands = values.transpose(2, 0, 1) if values.ndim == 3 else values[None]
        return np.ascontiguousarray(np.broadcast_to(bands, (self.channels, *bands.shape[1:])))

    def values(self, pixels: Sequence[Pixels]) -> Tensor:
        """(x - 255 mean) / (255 std): pictures of :meth:`pixels` -> (n, channels, size, size)."""
        import torch

        mean, std = _channels(self.mean), _channels(self.std)
        # In place: three times as fast as one expression, for which fresh memory is fetched.
        joined = np.concatenate(pixels).reshape(-1, *pixels[0].shape)  # stack is slower
        return torch.from_numpy(joined).float().sub_(mean).div_(std)

    def _resized(self, picture: Any, size: tuple[int, int]) -> Any:
        filters = needs("PIL.Image", "tasks").Resampling
        return picture.resize(size, getattr(filters, self.resample.upper()))

    def _cropped(self, picture: Any) -> Any:
        width, height = picture.size
        edge, short = self.resize or self.size, min(width, height)
        if short != edge:
            picture = self._resized(
                picture, (int(edge * width / short), int(edge * height / short))
            )
            width, height = picture.size
        start = round if self.centre == "even" else floor
        left, top = start((width - self.size) / 2), start((height - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))


@lru_cache
def _channels(values: tuple[float, ...]) -> Tensor:
    """Numbers of channels, in units of a pixel's 255 steps, as they meet (n, channels, h, w)."""
    import torch

    with torch.inference_mode(False):  # first met in an evaluation, it is used in training too
        return 255 * torch.tensor(values).view(1, -1, 1, 1)


def _edge(size: Any) -> int:
    """ "size" is a number, {"shortest_edge": n} or {"height": n, "width": n}."""
    if not isinstance(size, Mapping):
        return int(size)
    edges = set(size.values())
    if len(edges) != 1:
        raise DataError("only square sizes are known", where="preprocessor_config.json", found=size)
    return int(edges.pop())
