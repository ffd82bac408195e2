"""What a task vector of one tensor is kept as: whole, a few of its elements, or two factors."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fusewright.modules.tensors import wide_dtype


class Delta(ABC):
    """τ = θ_t - θ_0 of one tensor, in float32 (float64 where the weights are), however it is kept.

    Of a matrix (out, in) it can be applied to inputs without being made whole.
    """

    shape: torch.Size

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole tensor."""

    @abstractmethod
    def dot(self, gradient: Tensor) -> Tensor:
        """⟨gradient, τ⟩, a scalar; ``gradient`` is of τ's shape."""

    @abstractmethod
    def apply(self, inputs: Tensor) -> Tensor:
        """τ x for every row of ``inputs`` (…, in): (…, out)."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def norm2(self) -> Tensor:
        """‖τ‖², float64."""
        return self.dense().double().square().sum()

    def on(self, device: torch.device) -> Self:
        """The same on a device."""
        kept = {name: held for name, held in vars(self).items() if isinstance(held, Tensor)}
        moved: Self = replace(self, **{n: t.to(device) for n, t in kept.items()})  # type: ignore[type-var]
        return moved


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """Every element; ``stored`` is the dtype that the expert's tensor was rounded to, where that is
    known."""

    values: Tensor
    stored: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.values.shape

    def dense(self) -> Tensor:
        return self.values

    def dot(self, gradient: Tensor) -> Tensor:
        return torch.dot(gradient.reshape(-1), self.values.reshape(-1).to(gradient))

    def apply(self, inputs: Tensor) -> Tensor:
        return inputs @ self.values.to(inputs).T

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@dataclass(frozen=True, eq=False)
class Sparse(Delta):
    """The elements that are not zero: ``values`` (k,) at ``places`` (k,) of the flattened tensor,
    ascending, int32 where that is enough."""

    values: Tensor
    places: Tensor
    shape: torch.Size

    @classmethod
    def largest(cls, whole: Tensor, density: float) -> Sparse:
        """The ⌊density n⌋ elements of largest magnitude; of equal ones, the first."""
        flat = whole.reshape(-1)
        count = int(density * flat.numel())
        if not count:
            return cls.at(whole, torch.empty(0, dtype=torch.int64, device=whole.device))
        sizes = flat.abs()
        least = sizes.kthvalue(flat.numel() - count + 1).values  # a sort of all takes far longer
        above, equal = (sizes > least).nonzero()[:, 0], (sizes == least).nonzero()[:, 0]
        return cls.at(whole, torch.cat([above, equal[: count - len(above)]]).sort().values)

    @classmethod
    def at(cls, whole: Tensor, places: Tensor) -> Sparse:
        """The elements at these places."""
        small = whole.numel() <= torch.iinfo(torch.int32).max
        return cls(whole.reshape(-1)[places], places.to(torch.int32 if small else torch.int64),
                   whole.shape)  # fmt: skip

    def dense(self) -> Tensor:
        flat = self.values.new_zeros(self.shape.numel())
        return flat.index_copy_(0, self.places.long(), self.values).reshape(self.shape)

    def dot(self, gradient: Tensor) -> Tensor:
        return torch.dot(gradient.reshape(-1)[self.places.long()], self.values.to(gradient))

    def apply(self, inputs: Tensor) -> Tensor:
        rows = torch.arange(self.shape[0] + 1, device=self.places.device) * self.shape[1]
        starts = torch.searchsorted(self.places.long(), rows)
        columns = self.places.long() % self.shape[1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            matrix = torch.sparse_csr_tensor(
                starts, columns, self.values.to(inputs), tuple(self.shape), check_invariants=False
            )
        flat = inputs.reshape(-1, inputs.shape[-1])
        return (matrix @ flat.T).T.reshape(*inputs.shape[:-1], self.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.places


@dataclass(frozen=True, eq=False)
class Factors(Delta):
    """``up @ down``, (rows, r) @ (r, columns), reshaped to ``shape``: LoRA, or a truncated SVD."""

    up: Tensor
    down: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        return (self.up @ self.down).reshape(self.shape)

    def dot(self, gradient: Tensor) -> Tensor:
        rows = gradient.reshape(len(self.up), -1)
        return ((rows @ self.down.to(gradient).T) * self.up.to(gradient)).sum()

    def apply(self, inputs: Tensor) -> Tensor:
        return inputs @ self.down.to(inputs).T @ self.up.to(inputs).T

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down

    def norm2(self) -> Tensor:
        up, down = self.up.double(), self.down.double()
        return ((up.T @ up) * (down @ down.T)).sum()


def triples(delta: Delta, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a matrix, U (out, r), σ (r,), V (in, r), r at most ``rank``.

    The best approximation of that rank is U σ Vᵀ (Eckart and Young 1936). In float32 or better.
    Factors are not multiplied out: QR of both, and an SVD of the small core.
    """
    if isinstance(delta, Factors):
        (left, one), (right, two) = torch.linalg.qr(delta.up), torch.linalg.qr(delta.down.T)
        u, values, vt = torch.linalg.svd(one @ two.T, full_matrices=False)
        u, v = left @ u, right @ vt.T
    else:
        matrix = delta.dense()
        u, values, vt = torch.linalg.svd(matrix.to(wide_dtype(matrix)), full_matrices=False)
        v = vt.T
    return u[:, :rank], values[:rank], v[:, :rank]


def leading(delta: Delta, rank: int) -> Factors:
    """A matrix's best approximation of a rank; σ goes to ``up``."""
    u, values, v = triples(delta, rank)
    return Factors(u * values, v.T.contiguous(), delta.shape)
