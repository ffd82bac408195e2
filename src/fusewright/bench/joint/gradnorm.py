"""GradNorm, which TorchJD does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright.bench.joint.gradients import gramian, rows_of, write

LEAST = 1e-3
"""Weights are kept above this: a negative one would train a task backwards."""


class GradNorm:
    """Weights that make the tasks learn at like rates (*GradNorm*, 1711.02257).

    With G_i = w_i ‖∇L_i‖, Ḡ their mean and r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)), each step
    descends on Σ \\|G_i - Ḡ r_i^α\\| in w alone (the target held constant), then scales w to
    sum to the number of tasks. Norms are over all parameters that are trained: backbones are
    shared to the last layer, since heads are frozen; the paper takes the last shared layer to save
    time. L_i(0) is the first batch's loss.

    ``alpha``: 1.5, the paper's for NYUv2. ``lr``: 0.025, Adam, as in the paper's experiments.
    """

    def __init__(self, tasks: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        self.alpha = alpha
        self.weights = torch.ones(tasks, dtype=torch.float64, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.weights], lr=lr)
        self.first: Tensor | None = None

    def parameters(self) -> list[Tensor]:
        """None: the weights have an optimiser and a loss of their own."""
        return []

    def backward(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """The step's gradient by the weights of before it; then the weights move."""
        values = torch.stack([loss.detach().double().cpu() for loss in losses])
        rows = rows_of(losses, parameters)
        norms = gramian(rows).diagonal().sqrt().cpu()
        write(rows, self.weights.detach(), parameters)
        self.first = values.clamp_min(1e-12) if self.first is None else self.first
        self._move(values / self.first, norms)

    def end_epoch(self) -> None:
        """Nothing: it acts at every step."""

    def slope(self, ratios: Tensor, norms: Tensor) -> Tensor:
        """∂/∂w of Σ |G_i - Ḡ r_i^α|: ‖∇L_i‖ times the sign of what G_i lies above its target.

        ``ratios``: L_i / L_i(0). ``norms``: ‖∇L_i‖, both (tasks,) float64.
        """
        weighted = self.weights.detach() * norms
        target = weighted.mean() * (ratios / ratios.mean()) ** self.alpha
        return norms * torch.sign(weighted - target)

    def _move(self, ratios: Tensor, norms: Tensor) -> None:
        self.weights.grad = self.slope(ratios, norms)
        self.optimiser.step()
        with torch.no_grad():
            self.weights.clamp_(min=LEAST)
            self.weights.mul_(len(self.weights) / self.weights.sum())
