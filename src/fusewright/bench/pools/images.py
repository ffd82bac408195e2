"""Data sets of small pictures, held in memory as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusewright.tasks.images import ImagePreparation

if TYPE_CHECKING:
    from fusewright.bench.suite_file import TaskSpec


@dataclass(frozen=True)
class Images:
    """Pictures (n, channels, size, size) uint8 and their labels (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Tensor | slice) -> Images:
        return Images(self.pixels[at], self.labels[at])

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


def shifted(pixels: Tensor, by: int, draw: torch.Generator) -> Tensor:
    """Each picture moved by up to ``by`` pixels in both directions, black coming in."""
    count, channels, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (by, by, by, by))
    down, right = torch.randint(0, 2 * by + 1, (2, count, 1), generator=draw)
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    picture, channel = torch.arange(count), torch.arange(channels)
    return padded[picture[:, None, None, None], channel[None, :, None, None], rows, columns]
