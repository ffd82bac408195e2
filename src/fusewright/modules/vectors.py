"""The task vectors of several experts, tensor by tensor, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fusewright.errors import PlanError
from fusewright.modules.deltas import Delta, Dense
from fusewright.modules.tensors import wide_dtype

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
    held: bool = False
    """Whether all of them are in memory."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the base's order."""
        return tuple(self.base)

    def at(self, name: str) -> Iterator[Delta]:
        """Every expert's task vector at a tensor, one after the other."""
        return (self.read(expert, name) for expert in self.experts)

    def combined(self, name: str, weights: Tensor) -> Tensor:
        """Σ_t w_t τ_t at a tensor, for ``weights`` (experts,), in the dtype of the task vectors;
        gradients flow to the weights."""
        learned = torch.is_grad_enabled() and weights.requires_grad
        total: Tensor | None = None
        spare: Tensor | None = None
        for weight, delta in zip(weights, self.at(name), strict=True):
            values = delta.dense()
            weight = weight.to(values.device, wide_dtype(values))  # a wider one widens ()
            if total is None:
                total = weight * values
            elif learned or values.dtype != total.dtype:
                total = total + weight * values
            else:  # without new memory for each expert: it is what such sums are slow by
                spare = torch.mul(weight, values, out=spare)
                total.add_(spare)
        if total is None:
            raise PlanError("there is no expert", expected="at least one")
        return total

    def projected(self, name: str, gradient: Tensor) -> Tensor:
        """⟨g, τ_t⟩ of every expert: (experts,), the gradient with respect to w_t."""
        return torch.stack([delta.dot(gradient) for delta in self.at(name)])

    def select(self, wanted: Callable[[str], bool]) -> TaskVectors:
        """Of some tensors alone."""
        return replace(self, base={n: t for n, t in self.base.items() if wanted(n)})

    def on(self, device: torch.device) -> TaskVectors:
        """The base's tensors on a device, and every task vector brought there when it is read."""
        if device.type == "cpu":
            return self
        read, base = self.read, {name: tensor.to(device) for name, tensor in self.base.items()}
        there = lambda expert, name: read(expert, name).on(device)  # noqa: E731
        return replace(self, base=base, read=there, held=False)

    def expert(self, expert: str) -> dict[str, Tensor]:
        """An expert's own tensors, in the base's dtypes."""
        return {n: (t + self.read(expert, n).dense()).to(t.dtype) for n, t in self.base.items()}

    def mapped(self, change: Callable[[Delta], Delta]) -> TaskVectors:
        """Every task vector changed when it is read: sparsified, decomposed …"""
        read = self.read
        return replace(self, read=lambda expert, name: change(read(expert, name)), held=False)

    def together(self, change: Callable[[str, Sequence[Tensor]], Sequence[Tensor]]) -> TaskVectors:
        """The task vectors of all experts at a tensor changed in the light of each other, by
        ``change(tensor, vectors)``; those of one tensor are in memory at a time."""
        last: dict[str, Sequence[Tensor]] = {}

        def read(expert: str, name: str) -> Delta:
            if name not in last:
                last.clear()
                last[name] = change(name, [delta.dense() for delta in self.at(name)])
            return Dense(last[name][self.experts.index(expert)])

        return replace(self, read=read, held=False)

    def summed(self, weights: Sequence[float]) -> TaskVectors:
        """Σ_t w_t τ_t as the task vector of one expert, "sum", held in memory."""
        total = torch.tensor(weights, dtype=torch.float64)
        read = lambda expert, name: Dense(self.combined(name, total))  # noqa: E731
        return TaskVectors(("sum",), self.base, read).kept()

    def kept(self) -> TaskVectors:
        """Read now, all of them, and held in memory."""
        held = {(e, n): self.read(e, n) for n in self.names for e in self.experts}
        return replace(self, read=lambda expert, name: held[expert, name], held=True)

    def norms2(self) -> dict[str, float]:
        """‖τ_t‖² over all tensors, float64, of every expert."""
        return {e: float(sum(self.read(e, n).norm2() for n in self.names)) for e in self.experts}

