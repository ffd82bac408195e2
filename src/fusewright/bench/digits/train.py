"""How base, heads and experts were trained. Everything follows from the recipe and the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.bench.descent import OneCycle
from fusewright.bench.digits.model import features, new_model
from fusewright.bench.digits.tasks import KNOWN_VIEWS, Split, Task, seen, splits


@dataclass(frozen=True)
class Training:
    """What training depends on, beside the seed.

    The base sees enough to be well trained; an expert takes few and small steps from it, with a
    peak learning rate a quarter of the base's. Experts that go far only cancel out when merged.
    """

    width: int = 64
    layers: int = 4
    batch: int = 128
    base_steps: int = 250
    base_rate: float = 2e-3
    expert_steps: int = 60
    expert_rate: float = 5e-4
    multitask_steps: int = 150
    shots: int = 1
    noise: float = 0.1
    threads: int = 1  # so small a model gains nothing from more, and sums depend on the number


def pretrain(training: Training, seed: int) -> Any:
    """The base: it learned to read digits in the known views, with a head that is thrown away."""
    data, draw = splits()["train"], _generator(seed, 0)
    model = new_model(seed, training.width, training.layers)
    heads = torch.randn(len(KNOWN_VIEWS), 10, training.width, generator=draw)
    heads = F.normalize(heads, dim=-1).requires_grad_()
    share = training.batch // len(KNOWN_VIEWS)

    def loss() -> Tensor:
        drawn = [_batch(data, share, draw) for _ in KNOWN_VIEWS]
        shown = [disturbed(seen(b.images, v), training, draw)
                 for b, v in zip(drawn, KNOWN_VIEWS, strict=True)]  # fmt: skip
        tokens = features(model, torch.cat(shown)).unflatten(0, (len(KNOWN_VIEWS), share))
        logits = torch.einsum("vnw,vcw->vnc", tokens, heads).flatten(0, 1)
        digits = torch.cat([b.digits for b in drawn])
        return F.cross_entropy(logits, digits, label_smoothing=0.1)

    parameters = [*model.parameters(), heads]
    _descend(parameters, loss, training.base_steps, training.base_rate, decay=0.05)
    return model.eval()


@torch.no_grad()
def frozen_head(base: Any, task: Task, training: Training, seed: int) -> Tensor:
    """A head (classes, width) from ``shots`` labelled images of each digit, the same for every
    task: the direction in which the mean feature of a class differs from that of all classes."""
    data = splits()["train"]
    order = torch.randperm(len(data), generator=_generator(seed, 1))
    digits = data.digits[order]
    few = torch.stack([order[digits == d][: training.shots] for d in range(10)])
    tokens = features(base, seen(data.images[few.flatten()], task.view))
    labels = task.labels(data.digits[few.flatten()])
    means = torch.stack([tokens[labels == c].mean(dim=0) for c in range(task.outputs)])
    return F.normalize(means - means.mean(dim=0), dim=1)


def expert(base: Any, task: Task, head: Tensor, training: Training, seed: int) -> Any:
    """A copy of the base, fine-tuned on one task through its frozen head."""
    steps = training.expert_steps
    return _fine_tuned(base, {task: head}, training, _generator(seed, 2, task.name), steps)


def multitask(base: Any, heads: Mapping[Task, Tensor], training: Training, seed: int) -> Any:
    """A copy of the base, fine-tuned on all tasks at once: what merging is an attempt to reach."""
    return _fine_tuned(base, heads, training, _generator(seed, 3), training.multitask_steps)


def _fine_tuned(
    base: Any, heads: Mapping[Task, Tensor], training: Training, draw: torch.Generator, steps: int
) -> Any:
    data, model = splits()["train"], deepcopy(base).train()
    share = training.batch // len(heads)

    def loss() -> Tensor:
        drawn = [_batch(data, share, draw) for _ in heads]
        shown = [disturbed(seen(b.images, t.view), training, draw)
                 for b, t in zip(drawn, heads, strict=True)]  # fmt: skip
        tokens = features(model, torch.cat(shown)).split(share)
        losses = [F.cross_entropy(x @ heads[t].T, t.labels(b.digits))
                  for x, b, t in zip(tokens, drawn, heads, strict=True)]  # fmt: skip
        return torch.stack(losses).mean()

    _descend(model.parameters(), loss, steps, training.expert_rate, decay=0.0)
    return model.eval()


def _descend(
    parameters: Iterable[Tensor], loss: Callable[[], Tensor], steps: int, rate: float, decay: float
) -> None:
    groups = [{"params": list(parameters), "weight_decay": decay}]
    descent = OneCycle(groups, steps, rate)
    for _ in range(steps):
        descent.begin()
        loss().backward()
        descent.step()


def _batch(data: Split, size: int, draw: torch.Generator) -> Split:
    at = torch.randint(len(data), (size,), generator=draw)
    return Split(data.images[at], data.digits[at])


def disturbed(images: Tensor, training: Training, draw: torch.Generator) -> Tensor:
    """Half of the batches moved by at most a pixel, all with noise: against learning by heart."""
    down, right = torch.randint(-1, 2, (2,), generator=draw).tolist()
    if torch.rand((), generator=draw) < 0.5:
        images = images.roll((down, right), (2, 3))
    return images + training.noise * torch.randn(images.shape, generator=draw)


def _generator(seed: int, purpose: int, name: str = "") -> torch.Generator:
    """Random numbers of their own for everything that is trained."""
    from hashlib import sha256

    digest = sha256(f"{seed} {purpose} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
