"""One change of many inputs, kept in a ball and, of pictures, in the range of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]


def added(raw: Tensor, delta: Tensor) -> Tensor:
    """Raw pixels + δ, clamped to [0, 1]. Pixels that were outside before (noise of training) stay
    where they were: clamping them would mark a changed picture."""
    return torch.clamp(raw + delta, raw.detach().clamp_max(0), raw.detach().clamp_min(1))


@dataclass(frozen=True)
class Ball:
    """All δ (rows, …) of size at most ``radius``, each row by itself.

    The size is max |δ| ("linf"), or the root mean square of δ ("l2": ‖δ‖₂ / √numel, so that a
    radius means the same at every resolution), of pictures in raw pixels of [0, 1].
    """

    norm: Norm = "l2"
    radius: float = 0.1

    def size(self, delta: Tensor) -> Tensor:
        """Of each row: (rows,)."""
        flat = delta.flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else flat.square().mean(1).sqrt()

    def project(self, delta: Tensor) -> Tensor:
        """The nearest δ of the ball."""
        if self.norm == "linf":
            return delta.clamp(-self.radius, self.radius)
        size = self.size(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * (self.radius / size).clamp_max(1).view(-1, *(1 for _ in delta.shape[1:]))

    def ascended(self, delta: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """After a step of steepest ascent of size ``rate`` · radius; where there is no gradient, no
        step."""
        if self.norm == "linf":
            way = gradient.sign()
        else:
            size = self.size(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
            way = gradient / size.view(-1, *(1 for _ in gradient.shape[1:]))
        return self.project(delta + rate * self.radius * way)


def ascend(
    gain: Callable[[Tensor, int], Tensor], start: Tensor, ball: Ball, steps: int, rate: float = 0.3
) -> Tensor:
    """The δ of the ball that ``gain(δ, step)`` is largest for, by steps whose size falls from
    ``rate`` · radius to nothing."""
    delta = ball.project(start)
    for step in range(steps):
        leaf = delta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(gain(leaf, step), leaf)
        delta = ball.ascended(delta, gradient, rate * (1 - step / steps))
    return delta.detach()
