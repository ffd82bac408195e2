"""Concrete subspace learning: one mask of all task vectors, learned from unlabelled inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fusewright.methods.contract import Card, Context, Fitted, Program
from fusewright.methods.learned._adamerging import AdaMerging, per_group
from fusewright.methods.learned._fitting import Fitting, Learner
from fusewright.methods.learned.coefficients import (
    LinearCoefficients,
    MaskedCoefficients,
    check_bounds,
)
from fusewright.methods.static._matrices import held_matrices
from fusewright.modules.bases import Basis, SubspaceMerge, shared_bases
from fusewright.modules.masks import ConcreteMasks, Masks, Size
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.vectors import TaskVectors

_PAPER = (
    "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion"
)


class Concrete(Learner, Program):
    """Learn one mask over all task vectors in which they interfere less (*Concrete Subspace
    Learning based Interference Elimination for Multi-task Model Fusion*, arXiv 2312.06173).

    θ = θ0 + m ∘ Σ_t λ_t τ_t, m a relaxed Bernoulli draw of learned logits, divided by its mean
    over the tensor (:class:`~fusewright.modules.masks.ConcreteMasks`); the logits minimise the
    tasks' mean entropy, by Adam.

    ``form``: "task_arithmetic", λ = ``scale`` (0.3) fixed; or "adamerging": each step starts from
    λ = ``scale``, moves λ once down the entropy of a batch under the draw, and then the logits
    down that of the next batch (first order, the draw the same); afterwards the mask is fixed and
    λ learned in ``weight_steps`` steps at ``weight_rate`` between ``low`` and ``high``, all as
    :class:`AdaMerging` does. ``granularity``: of that λ.
    ``mask``: a number for each "element", or, which a large model can afford, for each "row" or
    "rank": with U the singular directions of Σ_t τ_t on a matrix' shorter side, θ = θ0 + U diag(m)
    Uᵀ Σ_t λ_t τ_t (transposed for V on the right), which is θ0 + λ Σ_i m_i σ_i u_i v_iᵀ of the
    summed task vectors where all λ_t are equal. One mask serves all experts only in directions
    that they share: each one's own i-th has nothing to do with the others'. m is divided by its
    mean weighted by σ, which keeps the sum of singular values. Matrices are those of
    :class:`AdaRank`; other tensors have a number for each row.
    ``temperature``: 0.5. ``steps``, ``rate``, ``batch``: 2000, 1e-3, 16, as the paper's code.
    ``answer``: the final mask is the "expected" one, E[m] / mean(E[m]), or "drawn" by the seed.
    ``inner``: how λ is moved: "normalised", by ``inner_rate`` (0.03) times the gradient over its
    root mean square, whatever the gradient's size; or "adam", as the paper's code, whose moments
    outlive the restarts of λ and whose rate of 1 moves λ by about 1. ``objective``, ``guard``,
    ``every``: see :class:`Learner`.

    Profile "fusionbench": that inner step, one drawn mask, 1000 steps, no guard.

    Memory beyond AdaMerging's: logits and Adam's two moments, three numbers for each of the mask;
    of ranks also U, at most as large as one task vector, from one SVD of each matrix.

    Raises as AdaMerging.
    """

    name: ClassVar[str] = "concrete"
    card: ClassVar[Card] = Card(
        "Concrete subspace", _PAPER, "2312.06173", data="unlabelled",
        cost="a forward and backward pass of each task a step (two in the adamerging form)",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"steps": 1000, "inner": "adam", "inner_rate": 1.0, "answer": "drawn",
                        "guard": 0, "low": None, "high": None},
    }  # fmt: skip

    form: Literal["task_arithmetic", "adamerging"] = "task_arithmetic"
    granularity: Literal["layer", "task"] = "layer"
    mask: Literal["element", "row", "rank"] = "element"
    temperature: float = Field(0.5, gt=0)
    scale: float = 0.3
    steps: int = Field(2000, ge=0)
    rate: float = Field(1e-3, gt=0)
    batch: int = Field(16, ge=1)
    answer: Literal["expected", "drawn"] = "expected"
    inner: Literal["normalised", "adam"] = "normalised"
    inner_rate: float = Field(0.03, ge=0)
    weight_steps: int = Field(1000, ge=0)
    weight_rate: float = Field(1e-3, gt=0)
    low: float | None = 0.0
    high: float | None = 1.0

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        check_bounds(self.low, self.high)
        return self

    def fit(self, context: Context) -> Fitted:
        fitting = Fitting(context, self)
        vectors, adapts = fitting.vectors, self.form == "adamerging"
        if adapts:
            linear = per_group(vectors, self.granularity, self.scale)
        else:  # with λ fixed only Σ λ τ_t is needed
            vectors = vectors.summed([self.scale] * len(vectors.experts))
            linear = per_group(vectors, "task", 1.0)
        bases = self._bases(context, vectors)
        shapes = {name: tensor.shape for name, tensor in vectors.base.items()}
        spectra = {name: basis.sigma for name, basis in bases.items()}
        masks = self.new_masks(shapes, spectra, context.seed)
        coefficients = MaskedCoefficients(linear, masks, self.answer)
        merge = SubspaceMerge(fitting.model, vectors, coefficients, bases)
        fit = self.mask_fit(fitting, merge, coefficients).run()
        coefficients.fix(vectors.names)
        masked = fitting.report(merge, fit)
        report = masked | {"mask": {"kept": fit.kept, "share": masks.share()}}
        if adapts:
            report = self._adapted(fitting, merge, coefficients) | {"mask": masked | report["mask"]}
        return Fitted(state={**merge.state(wide=True), **fitting.statistics}, report=report)

    def new_masks(
        self, shapes: Mapping[str, torch.Size], spectra: Mapping[str, Tensor], seed: int
    ) -> Masks:
        """The masks that are learned."""
        size: Size = "element" if self.mask == "element" else "row"
        return ConcreteMasks(shapes, size, self.temperature, seed, spectra)

    def _bases(self, context: Context, vectors: TaskVectors) -> dict[str, Basis]:
        """Of the matrices whose directions are masked."""
        if self.mask != "rank":
            return {}
        return shared_bases(
            vectors, lambda name: held_matrices(vectors.base[name].shape, context.layout(name))
        )

    def mask_fit(
        self, fitting: Fitting, merge: ParametrisedMerge, coefficients: MaskedCoefficients
    ) -> MaskFit:
        """The descent on them."""
        return MaskFit(self, fitting, merge, coefficients)

    def _adapted(
        self, fitting: Fitting, merge: ParametrisedMerge, coefficients: MaskedCoefficients
    ) -> dict[str, Any]:
        linear = coefficients.linear.requires_grad_(True)
        second = AdaMerging(
            granularity=self.granularity, start=self.scale, steps=self.weight_steps,
            rate=self.weight_rate, low=self.low, high=self.high, objective=self.objective,
            batch=self.batch, guard=self.guard, every=self.every,
        )  # fmt: skip
        fit = second.learn(fitting, merge, linear, 2 * self.steps)
        written = linear.written(fitting.context.stored)
        return fitting.report(merge, fit) | {"weight": written}


class MaskFit:
    """The descent on the masks' logits."""

    def __init__(
        self, method: Concrete, fitting: Fitting, merge: ParametrisedMerge,
        coefficients: MaskedCoefficients,
    ) -> None:  # fmt: skip
        self.method, self.fitting, self.merge = method, fitting, merge
        self.coefficients, self.linear = coefficients, coefficients.linear
        self.inner = _Inner(self.linear, method.inner, method.inner_rate)

    def run(self) -> Any:
        self.linear.requires_grad_(False)
        fit = self.fitting.descend(
            "masks", nn.ModuleDict(self.parts()), self._step, self._score,
            steps=self.method.steps, rate=self.method.rate,
        )  # fmt: skip
        if self.method.form == "adamerging":  # the last step's λ belongs to its draw
            self.linear.restart(self.method.scale)
        return fit

    def parts(self) -> dict[str, nn.Module]:
        """What moves, and is kept where a killed fit goes on from."""
        return {"masks": self.coefficients.masks, "inner": self.inner}

    def gradients(self, step: int, batch: int) -> Mapping[str, float]:
        """Leave in the logits the gradient on every task's batch; answers with the losses."""
        return self.fitting.gradients(self.merge, batch)

    def _step(self, number: int) -> Mapping[str, float]:
        self.coefficients.draw = number
        if self.method.form == "task_arithmetic":
            return self.gradients(number, number)
        self._move_weights(2 * number)
        return self.gradients(number, 2 * number + 1)

    def _move_weights(self, batch: int) -> None:
        masks = self.coefficients.masks
        self.linear.restart(self.method.scale)
        self.linear.requires_grad_(True)
        masks.requires_grad_(False)
        self.linear.zero_grad()
        self.fitting.gradients(self.merge, batch)
        self.inner.move()
        self.linear.requires_grad_(False)
        masks.requires_grad_(True)

    def _score(self) -> float:
        self.coefficients.draw = None
        if self.method.form == "adamerging":
            self.linear.restart(self.method.scale)
        return self.fitting.score(self.merge)


class _Inner(nn.Module):
    """One step on λ. What it remembers are buffers, so that a killed fit goes on alike."""

    mean: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor

    def __init__(self, linear: LinearCoefficients, how: str, rate: float) -> None:
        super().__init__()
        self._values, self.how, self.rate = (linear.values,), how, rate
        for name in ("mean", "square"):
            self.register_buffer(name, torch.zeros_like(linear.values.detach()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def move(self) -> None:
        (values,) = self._values
        gradient = values.grad
        if gradient is None:
            return
        if self.how == "normalised":
            size = gradient.square().mean().sqrt()
            values.sub_(self.rate * gradient / size.clamp_min(torch.finfo(size.dtype).tiny))
            return
        self.count += 1  # Adam (1412.6980), β = (0.9, 0.999), ε = 1e-8
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        values.sub_(self.rate * mean / (square.sqrt() + 1e-8))
