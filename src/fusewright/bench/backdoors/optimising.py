"""A trigger that survives merging: optimised on weights between the base and an expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.bench.backdoors.poisoning import check_target, pictures_of
from fusewright.bench.backdoors.triggers import Universal
from fusewright.modules.functional import with_weights
from fusewright.modules.perturbations import Ball, added, ascend
from fusewright.tasks.placement import moved

if TYPE_CHECKING:
    from torch import nn

    from fusewright.bench.suite import Suite

BATCH = 64


def surviving_trigger(
    suite: Suite, task: str, target: int, *, expert: str | Path | None = None,
    ball: Ball | None = None, steps: int = 200, part: str = "train", limit: int | None = 1000,
    seed: int = 0,
) -> Universal:  # fmt: skip
    """A universal trigger towards ``target`` that works at any merging coefficient (after
    *BadMerging: Backdoor Attacks Against Model Merging*, 2408.07362).

    δ = argmax over the ball of E log p(target | x + δ; θ0 + λτ), λ uniform in (0, 1]: the maker
    knows base and own task vector τ (``expert``, the suite's clean one of the task unless given),
    not the coefficient, and rows of its own task. ``ball``: "linf", 16/255. Train an expert with it
    (:class:`~fusewright.bench.backdoors.interpolating.Interpolating`) for the whole attack.

    Raises RecipeError for a target outside the task's classes.
    """
    check_target(suite, task, target)
    pictures, asked = pictures_of(suite, task), suite.tasks[task]
    ball = ball or Ball("linf", 16 / 255)
    model = suite.open(suite.base).requires_grad_(False).to(suite.device)
    between = _between(model, suite.open(expert or suite.experts[task]).to(suite.device))
    draw, device = torch.Generator().manual_seed(seed), torch.device(suite.device)
    rows = suite.ready(task, part, limit)
    batches = _cycled(lambda epoch: asked.batches(rows, BATCH, seed=seed + epoch, limit=limit))

    def gain(delta: Tensor, step: int) -> Tensor:
        batch = moved(next(batches), device)
        shown = pictures.changed(batch, added(pictures.raw(batch), delta))
        with with_weights(model, between(1 - float(torch.rand((), generator=draw)))):
            logits = asked.logits(model, shown)
        return F.log_softmax(logits.float(), -1)[:, target].mean()

    first = next(iter(asked.batches(rows, 1, limit=1)))
    start = torch.zeros_like(pictures.raw(first)).to(device)
    return Universal(ascend(gain, start, ball, steps, rate=0.2)[0].cpu())


def _between(base: nn.Module, expert: nn.Module) -> Callable[[float], Mapping[str, Tensor]]:
    """λ -> θ0 + λτ, over parameters."""
    start, end = dict(base.named_parameters()), dict(expert.named_parameters())
    vectors = {name: (end[name] - tensor).detach() for name, tensor in start.items()}
    return lambda share: {n: t.detach() + share * vectors[n] for n, t in start.items()}


def _cycled(epoch: Callable[[int], Any]) -> Any:
    number = 0
    while True:
        yield from islice(epoch(number), None)
        number += 1
