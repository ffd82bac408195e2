"""Rank-one MoE: a pool of single directions of all experts, weighed anew for every input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from fusewright.methods.contract import Card
from fusewright.methods.routed._linears import matrices, part_of
from fusewright.methods.routed._wemoe import WEMoE
from fusewright.modules.deltas import leading
from fusewright.modules.linears import LinearMap
from fusewright.modules.mixed import MixedLinear
from fusewright.modules.mixture import Mixture
from fusewright.modules.routers import Router
from fusewright.modules.stacks import FactorStack
from fusewright.modules.vectors import TaskVectors


class RankOneMoE(WEMoE):
    """Weigh single directions of the experts' feed-forward weights anew for every input (*Rank-one
    mixture of experts for multi-task learning*, published in Chinese with the code
    EnnengYang/RankOne-MoE; no arXiv id).

    W = W_0 + Σ_t Σ_{i ≤ k} s_{t,i}(x) σ_{t,i} u_{t,i} v_{t,i}ᵀ in every linear map of a selected
    module, with the k leading singular triples of each expert's change of it. Maps of one module
    share s(x), the mean over x's tokens of a router with T k outputs
    (:class:`~fusewright.modules.routers.Router`). All other tensors, biases too, are
    θ_0 + λ Σ_t τ_t. Routers alone are trained, as :class:`WEMoE` trains them.

    ``rank``: k, 32. ``router``: its depth, 1: as many outputs say enough. ``top``: how many of the
    T k directions count for an input (a soft threshold); None, the code's own setting, for all.
    ``schedule``: constant. All from FusionBench's configuration. ``modules``, ``start``, ``per``,
    ``steps``, ``rate``, ``batch``, ``objective``, ``guard``, ``every`` are WEMoE's.

    It stores T k (in + out) numbers a map where WEMoE stores T in · out. What is said there of text
    holds here: without a prompt, a language model's routers see the tokens that it is scored on.
    Raises as WEMoE.
    """

    name: ClassVar[str] = "rank_one_moe"
    card: ClassVar[Card] = Card(
        "Rank-one MoE", "Rank-one mixture of experts for multi-task learning",
        data="unlabelled", output="routed",
        cost="an SVD of each expert's matrices; a forward and backward pass of each task a step",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"per": "batch", "guard": 0},
    }

    router: Literal[0, 1, 2] = 1
    rank: int = Field(32, ge=1)
    top: int | None = Field(None, ge=1)
    schedule: Literal["constant", "cosine"] = "constant"

    def _router(self, inputs: int, experts: int, start: float, seed: int) -> Router:
        return Router(inputs, experts * self.rank, self.router, start, seed, self.top or 0)

    def _layer(
        self, linear: LinearMap, model: nn.Module, vectors: TaskVectors, mixture: Mixture
    ) -> MixedLinear:
        dtype = vectors.base[linear.weight].dtype
        pools = [leading(delta, self.rank) for delta in matrices(linear, vectors)]
        up = torch.cat([_rows(pool.up.T, self.rank) for pool in pools]).to(dtype)
        down = torch.cat([_rows(pool.down, self.rank) for pool in pools]).to(dtype)
        stack = FactorStack(up[:, :, None], down[:, None].contiguous())
        return MixedLinear(part_of(linear, model), stack, None, mixture)


def _rows(directions: Tensor, count: int) -> Tensor:
    """So many, zeros where there are fewer."""
    return pad(directions, (0, 0, 0, count - len(directions))).contiguous()
