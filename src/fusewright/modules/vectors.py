"""The task vectors of several experts, tensor by tensor, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusewright.errors import PlanError
from fusewright.modules.deltas import Delta

Read = Callable[[str, str], Delta]
"""(expert, tensor) -> its task vector there."""


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """θ_0 and τ_t = θ_t - θ_0, *Editing models with task arithmetic* (2212.04089).

    ``base`` holds θ_0 by tensor name: of tied tensors the stored name only, and only what experts
    may change. ``read`` gives one task vector at one tensor; unless :meth:`kept`, it is called
    whenever one is needed and nothing is held, so that memory stays at θ_0 and one task vector of
    one tensor.
    """

    experts: tuple[str, ...]
    base: Mapping[str, Tensor]
    read: Read = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the base's order."""
        return tuple(self.base)

    def at(self, name: str) -> Iterator[Delta]:
        """Every expert's task vector at a tensor, one after the other."""
        return (self.read(expert, name) for expert in self.experts)

    def combined(self, name: str, weights: Tensor) -> Tensor:
        """Σ_t w_t τ_t at a tensor, for ``weights`` (experts,); gradients flow to the weights."""
        total: Tensor | None = None
        for weight, delta in zip(weights, self.at(name), strict=True):
            part = weight * delta.dense()
            total = part if total is None else total + part
        if total is None:
            raise PlanError("there is no expert", expected="at least one")
        return total

    def projected(self, name: str, gradient: Tensor) -> Tensor:
        """⟨g, τ_t⟩ of every expert: (experts,), the gradient with respect to w_t."""
        return torch.stack([delta.dot(gradient) for delta in self.at(name)])

    def select(self, wanted: Callable[[str], bool]) -> TaskVectors:
        """Of some tensors alone."""
        return replace(self, base={n: t for n, t in self.base.items() if wanted(n)})

    def mapped(self, change: Callable[[Delta], Delta]) -> TaskVectors:
        """Every task vector changed when it is read: sparsified, decomposed …"""
        return replace(self, read=lambda expert, name: change(self.read(expert, name)))

    def kept(self) -> TaskVectors:
        """Read now, all of them, and held in memory."""
        held = {(e, n): self.read(e, n) for n in self.names for e in self.experts}
        return replace(self, read=lambda expert, name: held[expert, name])

    def norms2(self) -> dict[str, float]:
        """‖τ_t‖² over all tensors, float64, of every expert."""
        return {e: float(sum(self.read(e, n).norm2() for n in self.names)) for e in self.experts}

