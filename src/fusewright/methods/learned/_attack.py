"""A universal perturbation of every task's pictures or tokens, as strong as it can be made while a
defence is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusewright.methods.learned._surfaces import surface_of
from fusewright.methods.learned.objectives import cross_entropy
from fusewright.methods.learned.processes import Processes
from fusewright.modules.perturbations import Ball

if TYPE_CHECKING:
    from fusewright.tasks.adaptation import Question

Aim = Literal["away", "toward"]


class UniversalAttack(nn.Module):
    """δ of every task, one or, aimed "toward" classes, one for each class: (rows, channels, height,
    width) of pictures, (rows, 1, width) of tokens' embeddings.

    "away": it raises the cross-entropy of what the model says without it. "toward": in round r it
    raises the probability of class r mod classes, as a backdoor's trigger does. The δ are buffers,
    so that a killed fit goes on with them. Raises PlanError for data that are neither pictures nor
    tokens.
    """

    def __init__(
        self, model: nn.Module, questions: Mapping[str, Question], ball: Ball, aim: Aim,
        rate: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ball, self.aim, self.rate = ball, aim, rate
        self.surfaces = {task: surface_of(task, q, model) for task, q in questions.items()}
        self.questions = dict(questions)
        self._at = {task: f"delta{number}" for number, task in enumerate(questions)}
        for task, question in questions.items():
            first = next(question.stream(1, seed))
            with torch.no_grad():
                rows = 1 if aim == "away" else question.logits(model, first).shape[-1]
            start = self.surfaces[task].start(model, first)
            self.register_buffer(self._at[task], start.new_zeros((rows, *start.shape[1:])))

    def delta(self, task: str, round: int = 0) -> Tensor:
        """The perturbation of a round: (1, …)."""
        held: Tensor = getattr(self, self._at[task])
        at = round % len(held)
        return held[at : at + 1]

    def ascend(self, model: nn.Module, task: str, batch: Any, clean: Tensor, round: int) -> None:
        """One step; ``clean`` are the model's logits of the batch."""
        delta = self.delta(task, round).clone().requires_grad_()
        logits = self.surfaces[task].logits(model, batch, delta)
        if self.aim == "away":
            gain = cross_entropy(logits, clean.argmax(-1))
        else:
            gain = F.log_softmax(logits.float(), -1)[..., round % logits.shape[-1]].mean()
        (gradient,) = torch.autograd.grad(gain, delta)
        with torch.no_grad():
            self.delta(task, round).copy_(self.ball.ascended(delta, gradient, self.rate))

    def logits(self, model: nn.Module, task: str, batch: Any, round: int) -> Tensor:
        """What the model says of the batch under δ."""
        return self.surfaces[task].logits(model, batch, self.delta(task, round))

    def stepped(
        self, model: nn.Module, task: str, batch: Any, round: int
    ) -> tuple[Tensor, Tensor]:
        """After a step: what the model says of the batch, without a gradient, and under δ."""
        with torch.no_grad():
            clean = self.questions[task].logits(model, batch)
        self.ascend(model, task, batch, clean, round)
        return clean, self.logits(model, task, batch, round)

    def gather(self, processes: Processes) -> None:
        """Take each task's δ from the process that asks about it."""
        if processes.count == 1:
            return
        own = {task: getattr(self, self._at[task]) for task in processes.mine(self._at)}
        for task, delta in processes.gathered(own, self._at).items():
            getattr(self, self._at[task]).copy_(delta)
