"""Small problems for methods that learn: a network of two layers, two experts, four batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

QUICK: dict[str, Any] = {"steps": 6, "batch": 16, "every": 3, "guard": 16}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def experts(base: nn.Module, size: float = 0.2) -> dict[str, nn.Module]:
    return {name: moved(base, number, size) for number, name in enumerate(("a", "b"))}


def moved(base: nn.Module, seed: int, size: float = 0.2) -> nn.Module:
    """A copy with noise on every floating-point tensor, statistics too."""
    draw, found = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in (*found.named_parameters(), *found.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
                tensor.add_(size * (noise.abs() if "var" in name else noise))
    return found


def data(dtype: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return {
        n: [torch.randn(16, 6, generator=draw).to(dtype) for _ in range(4)] for n in ("a", "b")
    }


class Killed(KeyboardInterrupt):
    pass


def stop_at(stage_step: int):
    """A listener that kills a fit after so many steps."""
    seen = []

    def listener(now) -> None:
        if now.unit == "steps":
            seen.append(now)
            if len(seen) == stage_step:
                raise Killed

    return listener
