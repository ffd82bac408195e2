"""SAU, restated for a merge: masks over its task vector that unlearn shared adversarial inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fusewright.methods.contract import Card
from fusewright.methods.learned._fitting import Fitting
from fusewright.methods.learned._pruning import PlainMasks, Pruned
from fusewright.methods.learned._surfaces import surface_of
from fusewright.modules.functional import with_weights
from fusewright.modules.masks import Size
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.perturbations import Ball, Norm

_TINY = 1e-6
"""Keeps logarithms finite, as in the code."""


class SAU(Pruned):
    """Weaken the weights of a merge's task vector by which it is fooled as it was before (after
    *Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples*,
    arXiv 2307.10562).

    With f the masked merge, f' the merge as it was, and y what f' says of x, each input gets its
    own δ in a ball, by ``attack_steps`` of ascent of β₁ ½ [CE(f(x + δ), y) + CE(f'(x + δ), y)] - β₂
    JS(f(x + δ), f'(x + δ)): it fools both alike. Masks m of elements minimise L - λ Σ_x log(1 -
    f(x + δ)_z) over the inputs where z, what f' says under δ, is not y. The paper fine-tunes one
    model with labels; here masks of the task vector of ``merger``'s merge are learned, and L is
    ``objective``, by default agreement with each task's own expert.

    ``adversarial``: β₁, 0.01; ``similar``: β₂, 1; ``shared``: λ, 1; ``attack_steps``: 5;
    ``attack_rate``: 1, a whole radius a step, all as the code; ``norm``, ``radius``: the ball, of
    pictures or of tokens' embeddings, as :class:`DAM`'s. Profile "dam": 0.5, 0.5 and λ 0.01, as
    that paper's baseline. ``steps``, ``rate`` (Adam's): 500, 0.01; ``batch``, ``guard``,
    ``every``: as :class:`ANP`. Raises as DAM.
    """

    name: ClassVar[str] = "sau"
    card: ClassVar[Card] = Card(
        "Shared adversarial unlearning of a merge",
        "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial "
        "Examples", "2307.10562", data="unlabelled",
        cost="about twelve forward and backward passes of each task a step",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dam": {"adversarial": 0.5, "similar": 0.5, "shared": 0.01},
    }
    size: ClassVar[Size] = "element"

    adversarial: float = Field(0.01, ge=0)
    similar: float = Field(1.0, ge=0)
    shared: float = Field(1.0, ge=0)
    norm: Norm = "l2"
    radius: float = Field(0.1, gt=0)
    attack_steps: int = Field(5, ge=1)
    attack_rate: float = Field(1.0, gt=0)

    def step_of(
        self, fitting: Fitting, merge: ParametrisedMerge, masks: PlainMasks
    ) -> tuple[Any, nn.Module]:
        before = merge.state()  # masks are 1 as yet
        asked = {task: _Asked(self, fitting, task, before) for task in fitting.questions}

        def loss(model: nn.Module, task: str, number: int) -> Tensor:
            return asked[task].loss(model, number)

        def step(number: int) -> Mapping[str, float]:
            return fitting.gradients(merge, number, loss=loss)

        return step, masks


class _Asked:
    """One task's losses; ``before`` are the weights of the merge as it was."""

    def __init__(
        self, method: SAU, fitting: Fitting, task: str, before: Mapping[str, Tensor]
    ) -> None:
        self.method, self.fitting, self.task, self.before = method, fitting, task, before
        self.question = fitting.questions[task]
        self.surface = surface_of(task, self.question, fitting.model)

    def loss(self, model: nn.Module, number: int) -> Tensor:
        batch = self.fitting.batch(self.task, number)
        with torch.no_grad():
            said = self._before(model, batch).argmax(-1)
        delta = self._shared(model, batch, said)
        with torch.no_grad():
            fooled = self._before(model, batch, delta).argmax(-1)
        left = unlearned(self.surface.logits(model, batch, delta), said, fooled)
        return self.fitting.loss_on(model, self.task, batch) + self.method.shared * left

    def _shared(self, model: nn.Module, batch: Any, said: Tensor) -> Tensor:
        """δ of each item."""
        ball = Ball(self.method.norm, self.method.radius)
        delta = self.surface.start(model, batch)
        for _ in range(self.method.attack_steps):
            leaf = delta.requires_grad_()
            gain = shared_gain(
                self.surface.logits(model, batch, leaf), self._before(model, batch, leaf), said,
                self.method.adversarial, self.method.similar,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(gain, leaf)
            delta = ball.ascended(leaf.detach(), gradient, self.method.attack_rate)
        return delta

    def _before(self, model: nn.Module, batch: Any, delta: Tensor | None = None) -> Tensor:
        with with_weights(model, self.before):
            if delta is None:
                return self.question.logits(model, batch)
            return self.surface.logits(model, batch, delta)


def shared_gain(
    after: Tensor, before: Tensor, said: Tensor, adversarial: float, similar: float
) -> Tensor:
    """β₁ ½ Σ CE of the items that a model still gets right, less β₂ Σ JS of those that do not fool
    both into one class; over the number of items. ``after``, ``before``: logits (…, classes), of an
    item or of each of its tokens.
    """
    after, before, said = after.flatten(0, -2), before.flatten(0, -2), said.flatten()
    answers = [logits.argmax(-1) for logits in (after, before)]
    right = sum(
        (F.cross_entropy(logits.float(), said, reduction="none") * (answer == said)).sum()
        for logits, answer in zip((after, before), answers, strict=True)
    )
    shared = (answers[0] != said) & (answers[0] == answers[1])
    apart = (divergence(after, before) * ~shared).sum()
    return (adversarial * right / 2 - similar * apart) / len(said)


def divergence(one: Tensor, two: Tensor) -> Tensor:
    """Jensen and Shannon's, of the predictions of each item, in nats: (items,)."""
    p, q = (logits.float().softmax(-1).clamp_min(1e-8) for logits in (one, two))
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(-1) + (q * (q.log() - middle)).sum(-1)) / 2


def unlearned(logits: Tensor, said: Tensor, fooled: Tensor) -> Tensor:
    """-log(1 - p_z) of the items whose z = ``fooled`` is not what was ``said``, over all items."""
    p = logits.float().softmax(-1).gather(-1, fooled[..., None])[..., 0]
    return (-(1 + _TINY - p).log() * (fooled != said)).sum() / said.numel()
