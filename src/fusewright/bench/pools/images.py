"""Data sets of small pictures, held in memory as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fusewright.bench.pools.training import Examples, Recipe
from fusewright.tasks.heads import image_features
from fusewright.tasks.images import ImagePreparation

if TYPE_CHECKING:
    from fusewright.bench.suite_file import TaskSpec


@dataclass(frozen=True)
class VisionRecipe(Recipe):
    """A pool of image classifiers: pictures of ``size`` pixels, moved by up to ``shift`` in
    training."""

    size: int = 32
    shift: int = 3

    @property
    def prepared(self) -> ImagePreparation:
        """How pictures become inputs."""
        return ImagePreparation(size=self.size, resample="bilinear")


@dataclass(frozen=True)
class Images(Examples[VisionRecipe]):
    """Pictures (n, channels, size, size) uint8 and their labels (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, at: Tensor | slice) -> Images:
        return Images(self.pixels[at], self.labels[at])

    @classmethod
    def joined(cls, parts: Sequence[Images], labels: Tensor) -> Images:
        return cls(torch.cat([part.pixels for part in parts]), labels)

    def features(self, model: nn.Module, recipe: VisionRecipe) -> Tensor:
        return image_features(model, inputs(self.pixels, recipe))

    def batches(self, size: int, recipe: VisionRecipe, draw: torch.Generator) -> Iterator[Images]:
        order = torch.randperm(len(self), generator=draw)
        for start in range(0, len(self) - size + 1, size):
            part = self[order[start : start + size]]
            yield Images(shifted(part.pixels, recipe.shift, draw), part.labels)

    def digest(self) -> str:
        """SHA-256 of the pixels and labels, in order: the same pictures from any source."""
        found = sha256(self.pixels.contiguous().numpy().tobytes())
        found.update(self.labels.contiguous().numpy().tobytes())
        return found.hexdigest()


def load_images(
    tasks: Mapping[str, TaskSpec], data: Path | None, prepared: ImagePreparation
) -> dict[str, Images]:
    """The ``train`` split of each task.

    Raises SuiteError if a task has none, DataError if it cannot be read.
    """
    from fusewright.bench.suite_tasks import open_split

    found = {}
    for name, spec in tasks.items():
        split = open_split(name, spec, "train", data)
        rows = split.rows(range(len(split)))
        pixels = np.stack([prepared.pixels(picture) for picture in rows["image"]])
        labels = torch.as_tensor(np.asarray(rows["label"], dtype=np.int64))
        found[name] = Images(torch.from_numpy(pixels), labels)
    return found


def inputs(pixels: Tensor, recipe: VisionRecipe) -> Tensor:
    """Bytes to what the model is called with."""
    found = pixels.float()
    mean, std = (found.new_tensor(v).view(1, -1, 1, 1)
                 for v in (recipe.prepared.mean, recipe.prepared.std))  # fmt: skip
    return found.div_(255).sub_(mean).div_(std)


def shifted(pixels: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Each picture moved by up to ``by`` pixels in both directions, black coming in."""
    count, channels, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (by, by, by, by))
    down, right = torch.randint(0, 2 * by + 1, (2, count, 1), generator=draw)
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    picture, channel = torch.arange(count), torch.arange(channels)
    return padded[picture[:, None, None, None], channel[None, :, None, None], rows, columns]
