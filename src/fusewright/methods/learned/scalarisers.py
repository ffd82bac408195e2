"""How the losses of several tasks become one step: a weight for each task's gradient.

Gradients here are those of few numbers, so that one of each task is cheap to have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusewright.errors import RecipeError

Name = Literal["sum", "mgda", "tchebycheff"]
Scalariser = Callable[[Tensor, Tensor], Tensor]
"""(losses (tasks,), gradients (tasks, numbers)) -> weights (tasks,), all float64."""


def mgda(losses: Tensor, gradients: Tensor) -> Tensor:
    """The weights, positive and of sum 1, whose combined gradient is shortest: no task's loss
    rises to first order (*Multiple-gradient descent algorithm*, Désidéri 2012; *Multi-Task
    Learning as Multi-Objective Optimization*, 1810.04650)."""
    return shortest(gradients @ gradients.T)


def tchebycheff(losses: Tensor, gradients: Tensor) -> Tensor:
    """All weight on the task of the largest loss, the first of equals."""
    weights = torch.zeros_like(losses)
    weights[int(losses.argmax())] = 1.0
    return weights


SCALARISERS: Mapping[str, Scalariser | None] = {
    "sum": None, "mgda": mgda, "tchebycheff": tchebycheff,
}  # fmt: skip


def check_weighable(how: str, objective: str, fix: str) -> None:
    """Raises RecipeError where losses that are weighed and then compared are negative."""
    if objective == "diverse_entropy":
        raise RecipeError(
            f"{how} compares weighted losses, and diverse_entropy is negative: a task would count "
            "the less, the more it weighs",
            expected="losses of at least 0", found=f"{how}, {objective}", fix=fix,
        )  # fmt: skip


def shortest(gram: Tensor, rounds: int = 10_000) -> Tensor:
    """argmin of wᵀ G w over w ≥ 0, Σ w = 1, by pairwise Frank-Wolfe steps (1511.05932): weight
    moves from the worst task that has some to the best one, until that gains nothing."""
    size = float(gram.diagonal().max())
    w = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    if size == 0:
        return w
    scaled = gram.double() / size
    for _ in range(rounds):
        slope = scaled @ w
        best, worst = int(slope.argmin()), int(slope.masked_fill(w == 0, -torch.inf).argmax())
        gap = float(slope[worst] - slope[best])
        if not gap >= 1e-12:  # nor if it is no number
            break
        bend = float(scaled[best, best] + scaled[worst, worst] - 2 * scaled[best, worst])
        step = min(gap / bend, float(w[worst])) if bend > 0 else float(w[worst])
        w[best] += step
        w[worst] = 0.0 if step == float(w[worst]) else w[worst] - step
    return w


def combine(
    parameters: Sequence[Tensor], losses: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]], scalarise: Scalariser,
) -> Tensor:  # fmt: skip
    """Set the gradient of ``parameters`` to that of all tasks; answers with the weights."""
    flat = torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in gradients]).double()
    weights = scalarise(torch.stack(list(losses)).double().cpu(), flat.cpu())
    for at, parameter in enumerate(parameters):
        parts = [weight * each[at] for weight, each in zip(weights, gradients, strict=True)]
        parameter.grad = torch.stack(parts).sum(dim=0).to(parameter)
    return weights
