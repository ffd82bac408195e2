"""A model whose weights are a function of a few numbers, and the gradient of those numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fusewright.modules.functional import with_weights
from fusewright.modules.tensors import beside, wide_dtype
from fusewright.modules.vectors import TaskVectors

Mode = Literal["projection", "autograd"]


class Coefficients(nn.Module, ABC):
    """How much of every task vector each tensor gets. Its parameters are all that is trained."""

    @abstractmethod
    def weights(self, name: str) -> Tensor:
        """c_t at a tensor: (experts,)."""

    def mask(self, name: str) -> Tensor | None:
        """What multiplies the sum of task vectors there, of a shape that broadcasts to the tensor's
        or as :meth:`ParametrisedMerge.masked` takes it; None for 1."""
        return None


class ParametrisedMerge:
    """θ(φ) = θ_0 + m(φ) ∘ Σ_t c_t(φ) τ_t in a live module, for any ``nn.Module``.

    ``model`` lends its architecture; its own weights are not changed. φ are the parameters of
    ``coefficients``. Sums are in float32 or better and are cast to the model's dtype at the end.

    Gradients come in two modes. "autograd" differentiates through the merge: every τ_t stays in
    memory until the backward pass. "projection" is exact as well: the merged tensors are leaves,
    g = ∂L/∂θ, and then, one task vector at a time,

        ∂L/∂c_t = ⟨g ∘ m, τ_t⟩        ∂L/∂m = g ∘ Σ_t c_t τ_t

    so that memory stays at θ_0, θ, g and one τ_t of one tensor.
    """

    def __init__(self, model: nn.Module, vectors: TaskVectors, coefficients: Coefficients) -> None:
        self.model, self.vectors = model, vectors
        self.coefficients = beside(model, coefficients)

    def tensor(self, name: str, wide: bool = False) -> Tensor:
        """The merged tensor; gradients flow to φ. ``wide``: as it was summed, not cast to the
        model's dtype."""
        total = self.vectors.combined(name, self.coefficients.weights(name))
        mask = self.coefficients.mask(name)
        base = self.vectors.base[name]
        found = base.to(total.dtype) + (total if mask is None else self.masked(name, total, mask))
        return found if wide else found.to(base.dtype)

    def masked(self, name: str, change: Tensor, mask: Tensor) -> Tensor:
        """A mask's act on a change of a tensor: linear in both, and its own adjoint in the
        change."""
        return mask * change

    def slopes(self, name: str, gradient: Tensor, change: Tensor, mask: Tensor) -> Tensor:
        """⟨gradient, :meth:`masked`⟩ derived by the mask, of the mask's shape."""
        return (gradient * change).sum_to_size(mask.shape)

    def state(self, wide: bool = False) -> dict[str, Tensor]:
        """Every merged tensor, without a gradient."""
        with torch.no_grad():
            return {name: self.tensor(name, wide) for name in self.vectors.names}

    def project(self, name: str, gradient: Tensor) -> None:
        """Bring the gradient of one merged tensor to those of φ."""
        weights, mask = self.coefficients.weights(name), self.coefficients.mask(name)
        wide = gradient.to(wide_dtype(gradient))
        found: list[tuple[Tensor, Tensor]] = []
        if weights.requires_grad:
            seen = wide if mask is None else self.masked(name, wide, mask.detach())
            found.append((weights, self.vectors.projected(name, seen).to(weights)))
        if mask is not None and mask.requires_grad:
            total = self.vectors.combined(name, weights.detach())
            found.append((mask, self.slopes(name, wide, total, mask).to(mask)))
        if found:
            outputs, gradients = zip(*found, strict=True)
            torch.autograd.backward(outputs, gradients)

    @contextmanager
    def live(self, mode: Mode = "projection") -> Iterator[Live]:
        """The model with the merged weights, to run and to go backward in; see :class:`Live`."""
        if mode == "autograd":
            tensors = {name: self.tensor(name) for name in self.vectors.names}
            live = Live(self, tensors, leaves=False)
        else:
            tensors = {name: t.requires_grad_() for name, t in self.state().items()}
            live = Live(self, tensors, leaves=True)
        with with_weights(self.model, tensors) as model:
            live.model = model
            yield live


class Live:
    """A merged model between two changes of φ: any number of losses go backward in it."""

    model: nn.Module

    def __init__(self, merge: ParametrisedMerge, tensors: Mapping[str, Tensor], leaves: bool):
        self._merge, self._tensors, self._leaves = merge, tensors, leaves

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; :meth:`collect` brings it to φ."""
        loss.backward(retain_graph=not self._leaves)

    def collect(self) -> None:
        """Bring what came backward so far to the gradients of φ."""
        if self._leaves:
            for name, gradient in self.taken():
                self._merge.project(name, gradient)

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Instead: ∂L/∂θ of each merged tensor by its name, as it came backward so far; for
        "projection" alone. What is taken is gone."""
        for name, leaf in self._tensors.items():
            if leaf.grad is not None:
                gradient, leaf.grad = leaf.grad, None
                yield name, gradient
