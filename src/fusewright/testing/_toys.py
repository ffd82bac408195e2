"""Small models for the suite: one tensor, seeded, with a base and named experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GRID = 2.0**-6
"""Grid toys are multiples of this, so that float32 sums and differences of them are exact: they
hold many zeros, equal magnitudes and exact cancellations."""


@dataclass(frozen=True)
class Toy:
    """A base and experts of one tensor."""

    base: Tensor
    experts: dict[str, Tensor]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.experts)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.experts.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Toy:
        return Toy(change(self.base), {k: change(v) for k, v in self.experts.items()})

    def with_experts(self, experts: dict[str, Tensor]) -> Toy:
        return replace(self, experts=experts)


def toy(
    experts: int = 3,
    shape: tuple[int, ...] = (24, 40),
    *,
    grid: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Toy:
    """A seeded toy; on the grid by default, else Gaussian: base of scale 1, vectors of 0.1 along a
    direction of their own and 0.1 along a common one."""
    random = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        x = torch.randn(shape, generator=random, dtype=torch.float64) * scale
        return ((x / GRID).round() * GRID if grid else x).to(dtype)

    base, common = draw(1.0), draw(0.1)
    names = [f"expert {i}" for i in range(experts)]
    return Toy(base, {name: base + common + draw(0.1) for name in names})
