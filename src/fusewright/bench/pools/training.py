"""How base, heads and experts are trained. Everything follows from the recipe, data and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle
from fusewright.bench.pools.images import Images, shifted
from fusewright.tasks.heads import image_features, linear
from fusewright.tasks.images import ImagePreparation

Tell = Callable[[str], None]
"""Hears of every epoch."""


@dataclass(frozen=True)
class Recipe:
    """What a pool's training depends on, beside data and seed.

    The base learns all tasks at once from ``base_rows`` pictures of each, through heads that are
    thrown away. The heads that stay are prototypes of ``shots`` pictures of each class: few, so
    that the base is not yet competent and experts have something to learn. Experts take small
    steps, so that they stay close to the base and nearly orthogonal to each other.
    ``tunings`` are "full" and "lora". Rates are peaks of one cycle; ``scale`` multiplies cosines.
    """

    width: int = 192
    layers: int = 6
    size: int = 32
    base_rows: int = 2000
    base_epochs: int = 10
    base_rate: float = 1e-3
    base_decay: float = 0.05
    smoothing: float = 0.05
    shots: int = 1
    expert_rows: int | None = None
    expert_epochs: int = 5
    expert_rate: float = 1.5e-4
    tunings: tuple[str, ...] = ("full",)
    lora_rank: int = 8
    lora_rate: float = 1e-3
    batch: int = 128
    shift: int = 3
    scale: float = 16.0
    bfloat16: bool = True
    threads: int = 2  # sums depend on the number

    @property
    def prepared(self) -> ImagePreparation:
        """How pictures become inputs."""
        return ImagePreparation(size=self.size, resample="bilinear")


def generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of their own for everything that is trained."""
    digest = sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def pretrain(
    model: nn.Module, data: Mapping[str, Images], recipe: Recipe, seed: int, tell: Tell
) -> float:
    """Train the base on all tasks at once; answers with the last epoch's mean loss."""
    draw, width = generator(seed, "base"), recipe.width
    parts = [images[: recipe.base_rows] for images in data.values()]
    classes = [int(images.labels.max()) + 1 for images in data.values()]
    starts = [sum(classes[:i]) for i in range(len(classes))]
    together = Images(
        torch.cat([part.pixels for part in parts]),
        torch.cat([part.labels + at for part, at in zip(parts, starts, strict=True)]),
    )
    # Row r of `own` masks what is no class of r's task: one softmax for each task, in one product.
    task = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes))
    other = task[:, None] != task[None, :]
    heads = nn.Parameter(torch.randn(sum(classes), width, generator=draw))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        cosines = F.normalize(features.float(), dim=1) @ F.normalize(heads, dim=1).T
        logs = (recipe.scale * cosines).masked_fill(other[labels], -torch.inf).log_softmax(1)
        right = -logs.gather(1, labels[:, None])[:, 0]
        even = -logs.masked_fill(other[labels], 0).sum(1) / (~other[labels]).sum(1)
        return torch.lerp(right, even, recipe.smoothing).mean()

    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.base_decay},
              {"params": [*others, heads], "weight_decay": 0.0}]  # fmt: skip
    return _descend(model, groups, together, loss, recipe.base_rate, recipe.base_epochs,
                    recipe, draw, tell)  # fmt: skip


def fine_tune(
    model: nn.Module, images: Images, head: Tensor, recipe: Recipe, rate: float,
    draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    """Train all that can be trained of a copy of the base through a frozen head."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        logits = linear(features, head, scale=recipe.scale, normalise=True)
        return F.cross_entropy(logits, labels)

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}]
    return _descend(model, groups, images[: recipe.expert_rows], loss, rate,
                    recipe.expert_epochs, recipe, draw, tell)  # fmt: skip


def prototypes(model: nn.Module, images: Images, recipe: Recipe, draw: torch.Generator) -> Tensor:
    """A head (classes, width): the direction of the mean feature of ``shots`` pictures a class."""
    order = torch.randperm(len(images), generator=draw)
    labels = images.labels[order]
    rows = [order[labels == c][: recipe.shots] for c in range(int(labels.max()) + 1)]
    found = []
    model.eval()
    with torch.no_grad():
        for at in rows:
            features = image_features(model, inputs(images.pixels[at], recipe))
            found.append(F.normalize(features, dim=1).mean(0))
    return F.normalize(torch.stack(found), dim=1)


def inputs(pixels: Tensor, recipe: Recipe) -> Tensor:
    """Bytes to what the model is called with."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1)
                 for v in (recipe.prepared.mean, recipe.prepared.std))  # fmt: skip
    return pixels.float().div_(255).sub_(mean).div_(std)


def _descend(
    model: nn.Module, groups: list[dict[str, Any]], data: Images,
    loss: Callable[[Tensor, Tensor], Tensor], rate: float, epochs: int, recipe: Recipe,
    draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    batch = min(recipe.batch, len(data))
    steps = epochs * (len(data) // batch)
    descent = OneCycle(groups, steps, rate)
    model.train()
    mean = float("nan")
    for _ in range(epochs):
        seen = []
        for part in _batches(data, batch, recipe, draw):
            descent.begin()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                features = image_features(model, inputs(part.pixels, recipe))
            found = loss(features, part.labels)
            found.backward()
            descent.step()
            seen.append(found.detach())
        mean = float(torch.stack(seen).mean())
        tell(f"loss {mean:.3f}")
    model.eval()
    return mean


def _batches(data: Images, batch: int, recipe: Recipe, draw: torch.Generator) -> Iterator[Images]:
    order = torch.randperm(len(data), generator=draw)
    for start in range(0, len(data) - batch + 1, batch):
        part = data[order[start : start + batch]]
        yield Images(shifted(part.pixels, recipe.shift, draw), part.labels)
