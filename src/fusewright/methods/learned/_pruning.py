"""Defences of a single model, restated for a merge: masks over its task vector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fusewright.methods.contract import Card, Context, Fitted, Method, Program
from fusewright.methods.learned import objectives
from fusewright.methods.learned._attack import UniversalAttack
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned.objectives import cross_entropy
from fusewright.methods.settings import AnyMethod
from fusewright.modules.deltas import Delta, Dense
from fusewright.modules.masks import Size, mask_shape
from fusewright.modules.parametrised import Coefficients, ParametrisedMerge
from fusewright.modules.perturbations import Ball, Norm
from fusewright.modules.vectors import TaskVectors


class PlainMasks(Coefficients):
    """m of a single task vector, numbers that begin at 1: for every element or every row.

    ``shift``, if set, is added to the masks: an adversary's, which is not learned.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], size: Size) -> None:
        super().__init__()
        self._at = {name: at for at, name in enumerate(shapes)}
        self.values = nn.ParameterList(
            nn.Parameter(torch.ones(mask_shape(shape, size))) for shape in shapes.values()
        )
        self.shift: list[Tensor] | None = None

    def weights(self, name: str) -> Tensor:
        return torch.ones(1)

    def mask(self, name: str) -> Tensor:
        at = self._at[name]
        return self.values[at] if self.shift is None else self.values[at] + self.shift[at]

    def clamp(self) -> None:
        """Back into [0, 1]."""
        with torch.no_grad():
            for values in self.values:
                values.clamp_(0, 1)

    def cut(self, below: float) -> float:
        """Numbers below become 0, the others 1; answers with the share that was cut."""
        with torch.no_grad():
            for values in self.values:
                values.copy_((values >= below).to(values))
        count = sum(values.numel() for values in self.values)
        return 1 - sum(float(values.detach().sum()) for values in self.values) / count


class Pruned(Learner, Program):
    """θ = θ0 + m ∘ τ, where τ is the task vector of ``merger``'s merge and m in [0, 1]."""

    merger: AnyMethod = "task_arithmetic"
    objective: objectives.Name = "self_label"
    steps: int = Field(500, ge=0)
    rate: float = Field(1e-2, gt=0)
    guard: int = Field(0, ge=0)
    size: ClassVar[Size]

    @field_validator("merger")
    @classmethod
    def _plain(cls, merger: Any) -> Any:
        return merger.spec() if isinstance(merger, Method) else merger

    def fit(self, context: Context) -> Fitted:
        from fusewright.methods.registry import parse_method

        fitting = Fitting(context, self)
        merged = context.merge(parse_method(self.merger))
        own = {n: merged[context.stored(n)].to(context.device) for n in fitting.vectors.names}
        vectors = _alone(fitting.vectors, own)
        masks = PlainMasks({n: t.shape for n, t in vectors.base.items()}, self.size)
        merge = ParametrisedMerge(fitting.model, vectors, masks)
        step, trained = self.step_of(fitting, merge, masks)
        fit = fitting.descend(
            "masks", trained, step, lambda: fitting.score(merge), steps=self.steps,
            rate=self.rate, constrain=masks.clamp,
        )  # fmt: skip
        found = self.finished(masks)
        report = fitting.report(merge, fit) | {"mask": found}
        return Fitted(state={**merge.state(wide=True), **fitting.statistics}, report=report)

    @abstractmethod
    def step_of(
        self, fitting: Fitting, merge: ParametrisedMerge, masks: PlainMasks
    ) -> tuple[Any, nn.Module]:
        """(what leaves gradients in the masks, the module that is trained)."""

    def finished(self, masks: PlainMasks) -> dict[str, float]:
        """The masks as they are used; what to report of them."""
        return {"mean": sum(float(v.detach().sum()) for v in masks.values)
                / sum(v.numel() for v in masks.values)}  # fmt: skip


class ANP(Pruned):
    """Prune the rows of a merge's task vector that are most sensitive to an adversary (after
    *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, arXiv 2110.14430).

    Masks m of rows minimise α L(m) + (1 - α) L(m + p), where p, at most ``budget`` in each number,
    was moved once to raise L on the same inputs. Rows whose mask ends below ``threshold`` are
    pruned: they are the base's again. The paper prunes neurons of one model with labels; here rows
    of the task vector of ``merger``'s merge, and L is ``objective``, by default agreement with each
    task's own expert.

    ``tradeoff``: α, 0.2, ``budget``: 0.4, ``threshold``: 0.2, as there. ``steps``, ``rate``
    (Adam's): 500, 0.01. ``batch``, ``guard``, ``every``: see :class:`Learner`; ``guard`` is 0,
    since the objective is agreement. Raises as AdaMerging.
    """

    name: ClassVar[str] = "anp"
    card: ClassVar[Card] = Card(
        "Adversarial neuron pruning of a merge",
        "Adversarial Neuron Pruning Purifies Backdoored Deep Models", "2110.14430",
        data="unlabelled", cost="two forward and backward passes of each task a step",
    )  # fmt: skip
    size: ClassVar[Size] = "row"

    tradeoff: float = Field(0.2, ge=0, le=1)
    budget: float = Field(0.4, gt=0)
    threshold: float = Field(0.2, ge=0, le=1)

    def step_of(
        self, fitting: Fitting, merge: ParametrisedMerge, masks: PlainMasks
    ) -> tuple[Any, nn.Module]:
        def step(number: int) -> Mapping[str, float]:
            losses = fitting.gradients(merge, number)
            plain = [_taken(values) for values in masks.values]
            masks.shift = [self.budget * gradient.sign() for gradient in plain]
            fitting.gradients(merge, number)
            masks.shift = None
            for values, gradient in zip(masks.values, plain, strict=True):
                adverse = _taken(values)
                values.grad = self.tradeoff * gradient + (1 - self.tradeoff) * adverse
            return losses

        return step, masks

    def finished(self, masks: PlainMasks) -> dict[str, float]:
        return {"pruned": masks.cut(self.threshold)}


class AWM(Pruned):
    """Weaken the weights of a merge's task vector that a universal perturbation leans on (after
    *One-shot Neural Backdoor Erasing via Adversarial Weight Masking*, arXiv 2207.04497).

    Masks m of elements minimise L + α CE(f(x + δ), what f says of x) + γ Σ |m|, where δ, one of
    each task's pictures or tokens and kept in a ball, takes a step of ascent before each. The paper
    masks one model with labels; here the task vector of ``merger``'s merge, and L is ``objective``,
    by default agreement with each task's own expert.

    ``alpha``: 0.9, ``gamma``: 1e-8; ``norm``, ``radius``, ``attack_rate``: of δ, as :class:`DAM`.
    ``steps``, ``rate`` (Adam's): 500, 0.01; ``batch``, ``guard``, ``every``: as :class:`ANP`.
    Raises as DAM.
    """

    name: ClassVar[str] = "awm"
    card: ClassVar[Card] = Card(
        "Adversarial weight masking of a merge",
        "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", "2207.04497",
        data="unlabelled", cost="about three forward and backward passes of each task a step",
    )  # fmt: skip
    size: ClassVar[Size] = "element"

    alpha: float = Field(0.9, ge=0)
    gamma: float = Field(1e-8, ge=0)
    norm: Norm = "l2"
    radius: float = Field(0.1, gt=0)
    attack_rate: float = Field(0.1, gt=0)

    def step_of(
        self, fitting: Fitting, merge: ParametrisedMerge, masks: PlainMasks
    ) -> tuple[Any, nn.Module]:
        attack = UniversalAttack(
            fitting.model, fitting.questions, Ball(self.norm, self.radius), "away",
            self.attack_rate, fitting.context.seed,
        )  # fmt: skip

        def loss(model: nn.Module, task: str, number: int) -> Tensor:
            batch = fitting.batch(task, number)
            clean, changed = attack.stepped(model, task, batch, number)
            adverse = cross_entropy(changed, clean.argmax(-1))
            return fitting.loss_on(model, task, batch) + self.alpha * adverse

        def step(number: int) -> Mapping[str, float]:
            losses = fitting.gradients(merge, number, loss=loss)
            attack.gather(fitting.processes)
            for values in masks.values:  # the gradient of γ Σ |m|, for m ≥ 0
                if values.grad is not None:
                    values.grad.add_(self.gamma)
            return losses

        return step, nn.ModuleDict({"masks": masks, "attack": attack})


def _alone(vectors: TaskVectors, merged: Mapping[str, Tensor]) -> TaskVectors:
    """The task vector of a merge, as that of one expert."""
    def read(expert: str, name: str) -> Delta:
        base = vectors.base[name]
        wide = torch.promote_types(base.dtype, torch.float32)
        return Dense(merged[name].to(wide) - base.to(wide))

    return TaskVectors(("merged",), vectors.base, read).kept()


def _taken(parameter: Tensor) -> Tensor:
    found, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if found is None else found
