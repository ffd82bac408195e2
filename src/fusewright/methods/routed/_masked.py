"""EMR-Merging and TALL masks: one vector, and a mask for each task that must be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fusewright.layout import Role
from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.modules.masked import MASKS, TaskMasks, packed
from fusewright.modules.vectors import TaskVectors


class Masked(Routed, ABC):
    """A vector and masks that are found element by element."""

    @abstractmethod
    def shared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the task vectors (experts, n): the one vector (n,), and the masks (experts, n)."""

    def scales(self, wanted: Tensor, masked: Tensor) -> Tensor:
        """s_t (experts,), of Σ|τ_t| and Σ|M_t τ|, both (experts,) float64."""
        return torch.ones_like(wanted)

    def build(self, context: Context) -> Parts:
        vectors = context.vectors()
        statistics = [n for n in vectors.names if context.layout(n).role is Role.STATISTIC]
        names = [name for name in vectors.names if name not in statistics]
        parts, masks = [], []
        count = len(vectors.experts)
        wanted = masked = torch.zeros(count, dtype=torch.float64, device=context.device)
        for name in names:
            each = _flat(vectors, name)
            vector, mask = self.shared(each)
            parts.append(vector.to(vectors.base[name].dtype))
            masks.append(packed(mask))
            wanted = wanted + each.abs().sum(dim=1, dtype=torch.float64)
            masked = masked + (vector.abs() * mask).sum(dim=1, dtype=torch.float64)
        kept = [torch.empty(count, 0, device=context.device)]
        kept += [_flat(vectors, name) for name in statistics]
        tensors = {
            "vector": torch.cat(parts), "masks": torch.cat(masks, dim=1),
            "scales": self.scales(wanted, masked).float(),
            "kept": torch.cat(kept, dim=1),
        }  # fmt: skip
        said = {"scales": tensors["scales"].tolist()}
        return Parts({MASKS: TaskMasks(vectors.experts, names, statistics, tensors)}, report=said)


class EMR(Masked):
    """Elect one vector of the largest entries, and give each task a mask and a scale of it
    (*EMR-Merging: Tuning-Free High-Performance Model Merging*, arXiv 2405.17461).

    γ = sign(Σ_t τ_t); τ = γ max {|τ_t| : τ_t γ > 0}; M_t = 1[τ_t τ > 0];
    s_t = Σ|τ_t| / Σ|M_t τ|, sums over the whole model; θ_t = θ_0 + s_t M_t ⊙ τ.

    The task of every input must be told: ``model.set_task("mnist")``, or ``unload(task="mnist")``
    for a plain model. One expert gives itself back; in sixteen bits up to the rounding of τ, which
    is kept in the base's dtype: in a wider one it would be as large as two models. Running
    statistics are each task's own. The official code adds up the tensors' means for s_t, where
    small tensors weigh as much as large ones. It has no parameters.
    """

    name: ClassVar[str] = "emr"
    card: ClassVar[Card] = Card(
        "EMR-Merging", "EMR-Merging: Tuning-Free High-Performance Model Merging", "2405.17461",
        output="routed", task_id=True, cost="one pass; a bit for each element and task",
    )  # fmt: skip

    def shared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        sign = vectors.sum(dim=0).sign()
        agree = vectors.sign() == sign
        vector = sign * torch.where(agree, vectors.abs(), 0).amax(dim=0)
        return vector, vectors * vector > 0

    def scales(self, wanted: Tensor, masked: Tensor) -> Tensor:
        return torch.where(masked > 0, wanted / masked, 1.0)


class Tall(Masked):
    """Give each task a mask of the sum of all task vectors (*Localizing Task Information for
    Improved Model Merging and Compression*, arXiv 2405.07813).

    τ = Σ_t τ_t; M_t = 1[|τ_t| ≥ λ |τ - τ_t|]; θ_t = θ_0 + M_t ⊙ τ.

    ``strictness``: λ; 0 keeps every entry, more means fewer. The paper chooses it from 0.2, 0.3,
    0.4, 0.5 and 0.6 by validation; 0.4 is their middle. The task of every input must be told:
    ``model.set_task("mnist")``, or ``unload(task="mnist")``. One expert gives itself back, up to
    the rounding of τ, as of :class:`EMR`. Running statistics are each task's own. See
    :class:`~fusewright.methods.static.Consensus` for one model of these masks.
    """

    name: ClassVar[str] = "tall"
    card: ClassVar[Card] = Card(
        "TALL masks", "Localizing Task Information for Improved Model Merging and Compression",
        "2405.07813", output="routed", task_id=True,
        cost="one pass; a bit for each element and task",
    )  # fmt: skip

    strictness: float = Field(0.4, ge=0, allow_inf_nan=False)

    def shared(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        total = vectors.sum(dim=0)
        return total, vectors.abs() >= self.strictness * (total - vectors).abs()


def _flat(vectors: TaskVectors, name: str) -> Tensor:
    """All task vectors of a tensor, (experts, n)."""
    return torch.stack([delta.dense().reshape(-1) for delta in vectors.at(name)])
