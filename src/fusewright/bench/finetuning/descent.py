"""One task's training: the loop of joint training with one task, that goes on after a kill."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle, draws_of, draws_on, relative, seeded
from fusewright.bench.finetuning.recipe import FineTuning
from fusewright.bench.joint.train import Augment, Loss, task_loss, task_stream
from fusewright.bench.pools.training import decayed
from fusewright.errors import NumericError, RecipeError
from fusewright.modules.tensors import device_of
from fusewright.tasks.task import Split, Task
from fusewright.weights.checkpoint import read_checkpoint, write_checkpoint

CHECKPOINTS = 20
"""How often a run keeps what it has, so that a kill costs a twentieth of it."""

Tell = Callable[[float], None]
"""Hears of each step's loss, those of an earlier run too."""


@dataclass(frozen=True)
class Checkpoint:
    """What is trained, what else moves (BatchNorm's statistics), the optimiser and the random
    numbers, in a file that is complete or not there."""

    path: Path

    def save(self, model: nn.Module, descent: Resumable, losses: list[float]) -> None:
        held = {
            "model": {name: tensor.detach() for name, tensor in _moving(model)},
            "descent": descent.state(), "losses": losses, "random": draws_of(device_of(model)),
        }  # fmt: skip
        write_checkpoint(self.path, held)

    def load(self) -> dict[str, Any] | None:
        return read_checkpoint(self.path) if self.path.exists() else None


class Resumable(OneCycle):
    """A descent whose state can be kept."""

    def state(self) -> dict[str, Any]:
        return {
            "optimiser": self._optimiser.state_dict(), "schedule": self._schedule.last_epoch,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self._optimiser.load_state_dict(state["optimiser"])  # the rate of the next step as well
        self._schedule.last_epoch = state["schedule"]


def descend(
    model: nn.Module, task: Task, split: Split, recipe: FineTuning, augment: Augment | None,
    checkpoint: Checkpoint, tell: Tell, own: Loss | None = None,
) -> list[float]:  # fmt: skip
    """Train what requires gradients, from the checkpoint on if there is one; every step's loss.
    ``own``: what is minimised in place of the task's loss.

    The end is the same whether or not it was interrupted. Raises NumericError where a loss or a
    weight is no longer finite, RecipeError if nothing can be trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RecipeError("the model has no parameter that requires gradients")
    model.train()
    finite = _finite(model)
    with seeded(recipe.seed, trained[0].device):
        stream = task_stream(task, split, recipe.batch, recipe.seed, augment)
        groups = (relative(trained, recipe.rate, recipe.decay) if recipe.relative
                  else decayed(model, recipe.decay))  # fmt: skip
        descent = Resumable(groups, recipe.steps, recipe.rate, betas=recipe.betas)
        losses: list[float] = []
        if (held := checkpoint.load()) is not None:
            losses = held["losses"]
            for loss in losses:
                next(stream)  # draws as it did
                tell(loss)
            _restore(model, descent, held)
        every = ceil(recipe.steps / CHECKPOINTS)
        autocast = torch.bfloat16 if recipe.bfloat16 else None
        while len(losses) < recipe.steps:
            descent.begin()
            found = task_loss(task, model, next(stream), len(losses) + 1, autocast, own)
            found.backward()
            descent.step()
            losses.append(found.item())
            tell(losses[-1])
            if len(losses) % every == 0:
                _check_finite(model, finite, len(losses))
                checkpoint.save(model, descent, losses)
    _check_finite(model, finite, recipe.steps)
    model.eval()
    return losses


def _moving(model: nn.Module) -> list[tuple[str, Tensor]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [*trained, *model.named_buffers()]


def _restore(model: nn.Module, descent: Resumable, held: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, tensor in _moving(model):
            tensor.copy_(held["model"][name])
    descent.restore(held["descent"])
    draws_on(device_of(model), held["random"])


def _finite(model: nn.Module) -> frozenset[str]:
    """What has no infinity to begin with, as a buffer that masks attention has."""
    return frozenset(
        name for name, tensor in _moving(model)
        if tensor.is_floating_point() and bool(tensor.isfinite().all())
    )


def _check_finite(model: nn.Module, names: Collection[str], step: int) -> None:
    """Raises NumericError where one of these is no longer finite."""
    if odd := sorted(set(names) - _finite(model)):
        raise NumericError("a weight is no longer finite", where=f"{odd[0]}, step {step}",
                           fix="lower the learning rate")  # fmt: skip
