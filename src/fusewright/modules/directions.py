"""Merges in which single directions of every task vector are kept or left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusewright.modules.deltas import Delta, Factors, triples
from fusewright.modules.parametrised import Coefficients, ParametrisedMerge
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors


@dataclass(frozen=True, eq=False)
class Directions:
    """The singular directions of all experts' changes of a tensor, side by side.

    A tensor holds n matrices (1, or one for each slice of a tensor that counts experts first):
    ``up`` (n, rows, T r) holds σ_i u_i and ``down`` (n, T r, columns) v_i, T experts' r directions
    one after the other, in falling order of σ; an expert with fewer has zeros.
    """

    up: Tensor
    down: Tensor
    rank: int

    @classmethod
    def of(cls, deltas: Sequence[Delta], matrices: int) -> Directions:
        """Of the experts' changes of one tensor that holds so many matrices of equal shape."""
        found = [_decomposed(delta, matrices) for delta in deltas]
        rank = max(up.shape[2] for up, _ in found)
        up = [nn.functional.pad(up, (0, rank - up.shape[2])) for up, _ in found]
        down = [nn.functional.pad(down, (0, 0, 0, rank - down.shape[1])) for _, down in found]
        return cls(torch.cat(up, 2), torch.cat(down, 1), rank)

    def combined(self, scales: Tensor) -> Tensor:
        """Σ_i s_i σ_i u_i v_iᵀ for ``scales`` (n, T r): (n, rows, columns)."""
        scales = scales.to(self.up)
        if torch.is_grad_enabled() and scales.requires_grad:
            return (self.up * scales[:, None]) @ self.down
        kept = scales.any(0)
        return (self.up[..., kept] * scales[:, None, kept]) @ self.down[:, kept]

    def projected(self, gradient: Tensor) -> Tensor:
        """⟨g, σ_i u_i v_iᵀ⟩ of every direction: (n, T r)."""
        slices = gradient.reshape(len(self.up), self.up.shape[1], -1).to(self.up)
        return ((self.up.mT @ slices) * self.down).sum(2)

    @property
    def real(self) -> Tensor:
        """Which directions change more than an SVD's error is (LoRA's change, stored whole, has
        others): (n, T r)."""
        sigma = self.up.norm(dim=1).unflatten(1, (-1, self.rank))
        error = torch.finfo(sigma.dtype).eps * max(self.up.shape[1], self.down.shape[2])
        return (sigma > error * sigma.amax(dim=2, keepdim=True)).flatten(1)


class DirectionMasks(Coefficients):
    """B_i of every direction of some tensors, 0 or 1, beside c_t of every tensor, which ``linear``
    knows.

    B = 1[x > 0], whose gradient is taken for that of sigmoid(x / temperature) (the straight-through
    estimator, 1308.3432). Logits x are float32, (matrices, experts, directions); they begin at
    ``margin`` for the ``density`` min(rows, columns) leading directions of each matrix, -``margin``
    behind.
    """

    def __init__(
        self, linear: Coefficients, directions: Mapping[str, Directions], experts: int,
        density: float, temperature: float, margin: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.linear, self.temperature = linear, temperature
        self._at = {name: at for at, name in enumerate(directions)}
        self.logits = nn.ParameterList(
            nn.Parameter(_start(of, experts, density, margin)) for of in directions.values()
        )

    def weights(self, name: str) -> Tensor:
        return self.linear.weights(name)

    def kept(self, name: str) -> Tensor:
        """B of a tensor: (matrices, experts, directions)."""
        logits = self.logits[self._at[name]]
        soft = (logits / self.temperature).sigmoid()
        return (logits > 0).to(soft) + (soft - soft.detach())


class DirectionMerge(ParametrisedMerge):
    """θ(φ) = θ_0 + Σ_t c_t Σ_i B_ti σ_ti u_ti v_tiᵀ where ``directions`` are known, and
    θ_0 + Σ_t c_t τ_t elsewhere."""

    coefficients: DirectionMasks

    def __init__(
        self, model: nn.Module, vectors: TaskVectors, coefficients: DirectionMasks,
        directions: Mapping[str, Directions],
    ) -> None:  # fmt: skip
        super().__init__(model, vectors, coefficients)
        self.directions = directions

    def tensor(self, name: str, wide: bool = False) -> Tensor:
        if name not in self.directions:
            return super().tensor(name, wide)
        base, weights = self.vectors.base[name], self.coefficients.weights(name)
        scales = (self.coefficients.kept(name) * weights[:, None]).flatten(1)
        total = self.directions[name].combined(scales).reshape(base.shape)
        found = base.to(total.dtype) + total
        return found if wide else found.to(base.dtype)

    def project(self, name: str, gradient: Tensor) -> None:
        if name not in self.directions:
            super().project(name, gradient)
            return
        weights, kept = self.coefficients.weights(name), self.coefficients.kept(name)
        seen = self.directions[name].projected(gradient.to(wide_dtype(gradient)))
        each = seen.reshape(kept.shape).to(kept)
        outputs, gradients = [kept], [each * weights.detach()[:, None]]
        if weights.requires_grad:
            outputs.append(weights)
            gradients.append((each * kept.detach()).sum((0, 2)).to(weights))
        torch.autograd.backward(outputs, gradients)

    def share(self, expert: int) -> float:
        """How much of an expert's directions is kept, those that change nothing left out."""
        kept = real = 0
        for name, directions in self.directions.items():
            mask = self.coefficients.kept(name).detach()
            whole = directions.real.reshape(mask.shape)[:, expert]
            kept += int((whole & (mask[:, expert] > 0)).sum())
            real += int(whole.sum())
        return kept / real if real else 0.0


def decomposed(vectors: TaskVectors, matrices: Callable[[str], int]) -> dict[str, Directions]:
    """The directions of all tensors of which ``matrices`` says that they hold one or more."""
    counts = {name: matrices(name) for name in vectors.names}
    return {n: Directions.of(list(vectors.at(n)), count) for n, count in counts.items() if count}


def _decomposed(delta: Delta, matrices: int) -> tuple[Tensor, Tensor]:
    """σ u (n, rows, r) and v (n, r, columns)."""
    if isinstance(delta, Factors) and matrices == 1:
        u, sigma, v = triples(delta, min(len(delta.up), delta.down.shape[1]))
        return (u * sigma)[None], v.mT[None]
    rows = delta.shape[0] if matrices == 1 else delta.shape[1]
    whole = delta.dense().reshape(matrices, rows, -1)
    u, sigma, vt = torch.linalg.svd(whole.to(wide_dtype(whole)), full_matrices=False)
    return u * sigma[:, None], vt


def _start(of: Directions, experts: int, density: float, margin: float) -> Tensor:
    """The share is of the directions that matrices of this shape can have: adapters have fewer than
    the same weights as full checkpoints, and begin with the same ones."""
    logits = torch.full((len(of.up), experts, of.rank), -margin)
    logits[..., : int(density * min(of.up.shape[1], of.down.shape[2]))] = margin
    return logits
