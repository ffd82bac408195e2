"""Coefficients that follow a preference over the tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fusewright.modules.parametrised import Coefficients
from fusewright.modules.preferences import PreferenceRouters


class PreferenceCoefficients(Coefficients):
    """c(name) = g_M(r), M being the tensor's module by ``places``; ``preference`` is the present
    r (experts,) and may be assigned."""

    def __init__(
        self, routers: PreferenceRouters, places: Mapping[str, int], preference: Tensor
    ) -> None:
        super().__init__()
        self.routers, self.places, self.preference = routers, places, preference

    def weights(self, name: str) -> Tensor:
        found: Tensor = self.routers(self.places[name], self.preference)
        return found


def drawn(experts: int, concentration: float, seed: int, number: int) -> Tensor:
    """The preference of step ``number``: Dirichlet(α, …, α), of ``seed`` and ``number`` alone, so
    that a fit that goes on draws what it would have drawn. float32 (experts,)."""
    draw = np.random.default_rng([seed % 2**64, number])
    return torch.from_numpy(draw.dirichlet([concentration] * experts)).float()
