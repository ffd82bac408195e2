"""How base, heads and experts are trained. Everything follows from the recipe, data and seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle, seeded
from fusewright.bench.pools.making import PoolRecipe
from fusewright.modules.tensors import device_of
from fusewright.tasks.heads import linear

Tell = Callable[[str], None]
"""Hears of every epoch."""


@dataclass(frozen=True)
class Recipe(PoolRecipe):
    """What the training of a pool of classifiers depends on, beside data and seed.

    The base learns all tasks at once from ``base_rows`` examples of each, through heads that are
    thrown away. The heads that stay are prototypes of ``shots`` examples of each class: few, so
    that the base is not yet competent and experts have something to learn. Experts take small
    steps, so that they stay close to the base and nearly orthogonal to each other.
    ``scale`` multiplies cosines.
    """

    width: int = 192
    layers: int = 6
    base_rows: int = 2000
    base_epochs: int = 10
    base_rate: float = 1e-3
    base_decay: float = 0.05
    smoothing: float = 0.05
    shots: int = 1
    expert_rows: int | None = None
    expert_epochs: int = 5
    batch: int = 128
    scale: float = 16.0
    bfloat16: bool = True
    threads: int = 2

    @property
    def reports(self) -> tuple[int, int]:
        return self.base_epochs, self.expert_epochs


R = TypeVar("R", bound=Recipe)
P = TypeVar("P")


class Examples(ABC, Generic[R]):
    """Inputs of one task and their ``labels`` (n,) int64, in memory."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, at: Tensor | slice) -> Self:
        """Some of the rows."""

    def on(self, device: torch.device) -> Self:
        """The same rows on a device."""
        moved: Self = replace(self, **{n: t.to(device) for n, t in vars(self).items()})  # type: ignore[type-var]
        return moved

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Self], labels: Tensor) -> Self:
        """The inputs of all parts, one after the other, under new labels."""

    @abstractmethod
    def features(self, model: nn.Module, recipe: R) -> Tensor:
        """What a head sees of each row: (n, width)."""

    @abstractmethod
    def batches(self, size: int, recipe: R, draw: torch.Generator) -> Iterator[Self]:
        """One epoch: every row at most once, in full batches, disturbed as training wants it."""


def generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of their own for everything that is trained."""
    digest = sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def pretrain(
    model: nn.Module, data: Mapping[str, Examples[R]], recipe: R, seed: int, tell: Tell
) -> float:
    """Train the base on all tasks at once; answers with the last epoch's mean loss."""
    draw, width, device = generator(seed, "base"), recipe.width, device_of(model)
    parts = [examples[: recipe.base_rows] for examples in data.values()]
    classes = [int(examples.labels.max()) + 1 for examples in data.values()]
    starts = [sum(classes[:i]) for i in range(len(classes))]
    together = parts[0].joined(
        parts, torch.cat([part.labels + at for part, at in zip(parts, starts, strict=True)])
    )
    # Row r of `own` masks what is no class of r's task: one softmax for each task, in one product.
    task = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes))
    other = (task[:, None] != task[None, :]).to(device)
    heads = nn.Parameter(torch.randn(sum(classes), width, generator=draw).to(device))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        cosines = F.normalize(features.float(), dim=1) @ F.normalize(heads, dim=1).T
        logs = (recipe.scale * cosines).masked_fill(other[labels], -torch.inf).log_softmax(1)
        right = -logs.gather(1, labels[:, None])[:, 0]
        even = -logs.masked_fill(other[labels], 0).sum(1) / (~other[labels]).sum(1)
        return torch.lerp(right, even, recipe.smoothing).mean()

    groups = [*decayed(model, recipe.base_decay), {"params": [heads], "weight_decay": 0.0}]
    return _descend(model, groups, together, loss, recipe.base_rate, recipe.base_epochs,
                    recipe, draw, tell)  # fmt: skip


def fine_tune(
    model: nn.Module, examples: Examples[R], head: Tensor, recipe: R, rate: float,
    draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    """Train all that can be trained of a copy of the base through a frozen head."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        logits = linear(features, head, scale=recipe.scale, normalise=True)
        return F.cross_entropy(logits, labels)

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}]
    return _descend(model, groups, examples[: recipe.expert_rows], loss, rate,
                    recipe.expert_epochs, recipe, draw, tell)  # fmt: skip


def prototypes(
    model: nn.Module, examples: Examples[R], recipe: R, draw: torch.Generator
) -> Tensor:
    """A head (classes, width): the direction of the mean feature of ``shots`` rows a class."""
    order = torch.randperm(len(examples), generator=draw)
    labels = examples.labels[order]
    rows = [order[labels == c][: recipe.shots] for c in range(int(labels.max()) + 1)]
    found = []
    model.eval()
    with torch.no_grad():
        for at in rows:
            few = examples[at].on(device_of(model))
            found.append(F.normalize(few.features(model, recipe), dim=1).mean(0).cpu())
    return F.normalize(torch.stack(found), dim=1)


def decayed(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """What can be trained of a model; ``decay`` is for matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip


def _descend(
    model: nn.Module, groups: list[dict[str, Any]], data: Examples[R],
    loss: Callable[[Tensor, Tensor], Tensor], rate: float, epochs: int, recipe: R,
    draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    batch, device = min(recipe.batch, len(data)), device_of(model)

    def found(part: Examples[R]) -> Tensor:
        there = part.on(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            features = there.features(model, recipe)
        return loss(features, there.labels)

    def epoch() -> Iterator[Examples[R]]:
        return data.batches(batch, recipe, draw)

    descent = OneCycle(groups, epochs * (len(data) // batch), rate)
    return descend(model, descent, epoch, found, epochs, draw, tell)


def descend(
    model: nn.Module, descent: OneCycle, epoch: Callable[[], Iterator[P]],
    loss: Callable[[P], Tensor], epochs: int, draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    """A step for each batch of each epoch; answers with the last epoch's mean loss."""
    model.train()
    mean = float("nan")
    with seeded(draw.initial_seed(), device_of(model)):  # dropout
        for _ in range(epochs):
            seen = []
            for part in epoch():
                descent.begin()
                found = loss(part)
                found.backward()
                descent.step()
                seen.append(found.detach())
            mean = float(torch.stack(seen).mean())
            tell(f"loss {mean:.3f}")
    model.eval()
    return mean
