"""DAM: Concrete masks that also resist universal perturbations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.methods.contract import Card
from fusewright.methods.learned._attack import Aim, UniversalAttack
from fusewright.methods.learned._concrete import Concrete, MaskFit
from fusewright.methods.learned._fitting import Fitting
from fusewright.methods.learned.coefficients import MaskedCoefficients
from fusewright.methods.learned.objectives import cross_entropy, entropy
from fusewright.modules.masks import ConcreteMasks, Masks, ProductMasks
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.perturbations import Ball, Norm

_PAPER = (
    "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace"
)


class DAM(Concrete):
    """Learn masks in which task vectors interfere little and a backdoor finds little hold
    (*Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace*,
    arXiv 2410.13910).

    θ = θ0 + m₁ ∘ m₂ ∘ Σ_t λ_t τ_t. The task-shared mask m₁ and the backdoor-detection mask m₂ are
    :class:`Concrete`'s, learned in turn: even steps move m₁ down L_perf, the objective; odd steps
    move m₂ down L_perf + α L_safe. L_safe is a loss under a universal perturbation δ of each
    task's pictures or, of texts, of every token's embedding, which takes a step of ascent before
    each: no trigger is known.

    ``alpha``: α, 0.1; with 0 this is :class:`Concrete`. ``detection``: False is the published
    code's form: one mask, every step down L_perf + α L_safe. ``safe``: "cross_entropy" of the
    answers under δ with those without; or their "entropy", as that code, which asks for sure
    answers whatever they are. ``aim``: δ leads "away" from the answers, or "toward" one class in
    turn. ``norm``, ``radius``: the ball of δ (:class:`~fusewright.modules.perturbations.Ball`), in
    raw pixels of [0, 1]; "l2", root mean square 0.1, the size of a bright patch on 1 % of
    the pixels; of texts in root mean squares of the base's embeddings, where it is a tenth of a
    token's size. ``attack_rate``: a step of δ as a share of the radius, 0.1. Parameters as in
    :class:`Concrete` otherwise. ``guard`` is 0: agreement on clean inputs alone would undo the
    defence.

    Profile "fusionbench": one mask, entropy, and Concrete's profile.

    Memory: with ``detection`` twice Concrete's. Raises PlanError for data that are neither pictures
    nor tokens of a model of transformers.
    """

    name: ClassVar[str] = "dam"
    card: ClassVar[Card] = Card(
        "Defense-aware merging", _PAPER, "2410.13910", data="unlabelled",
        cost="about three forward and backward passes of each task every other step",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {
            **Concrete.profiles["fusionbench"], "detection": False, "safe": "entropy",
        },
    }  # fmt: skip

    guard: int = Field(0, ge=0)
    alpha: float = Field(0.1, ge=0)
    detection: bool = True
    safe: Literal["cross_entropy", "entropy"] = "cross_entropy"
    aim: Aim = "away"
    norm: Norm = "l2"
    radius: float = Field(0.1, gt=0)
    attack_rate: float = Field(0.1, gt=0)

    def new_masks(
        self, shapes: Mapping[str, torch.Size], spectra: Mapping[str, Tensor], seed: int
    ) -> Masks:
        shared = super().new_masks(shapes, spectra, seed)
        if not (self.alpha and self.detection):
            return shared
        detection = super().new_masks(shapes, spectra, -1 - seed)
        assert isinstance(shared, ConcreteMasks) and isinstance(detection, ConcreteMasks)
        return ProductMasks(shared, detection)

    def mask_fit(
        self, fitting: Fitting, merge: ParametrisedMerge, coefficients: MaskedCoefficients
    ) -> MaskFit:
        if not self.alpha:
            return super().mask_fit(fitting, merge, coefficients)
        return _DefendedFit(self, fitting, merge, coefficients)


class _DefendedFit(MaskFit):
    """The descent on both masks, with a perturbation that ascends."""

    method: DAM

    def __init__(
        self, method: DAM, fitting: Fitting, merge: ParametrisedMerge,
        coefficients: MaskedCoefficients,
    ) -> None:  # fmt: skip
        super().__init__(method, fitting, merge, coefficients)
        self.attack = UniversalAttack(
            fitting.model, fitting.questions, Ball(method.norm, method.radius), method.aim,
            method.attack_rate, fitting.context.seed,
        )  # fmt: skip

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "attack": self.attack}

    def gradients(self, step: int, batch: int) -> Mapping[str, float]:
        masks, round = self.coefficients.masks, step
        if isinstance(masks, ProductMasks):
            round, detects = divmod(step, 2)
            masks.first.requires_grad_(not detects)
            masks.second.requires_grad_(bool(detects))
            if not detects:
                return super().gradients(step, batch)
        losses = self.fitting.gradients(self.merge, batch, loss=partial(self._loss, round))
        self.attack.gather(self.fitting.processes)
        return losses

    def _loss(self, round: int, model: nn.Module, task: str, number: int) -> Tensor:
        batch = self.fitting.batch(task, number)
        clean, changed = self.attack.stepped(model, task, batch, round)
        safe = (
            entropy(changed) if self.method.safe == "entropy"
            else cross_entropy(changed, clean.argmax(-1))
        )  # fmt: skip
        return self.fitting.loss_on(model, task, batch) + self.method.alpha * safe
