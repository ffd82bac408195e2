"""SMILE: every linear layer as a sparse mixture of low-rank experts, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar
from warnings import warn

import torch
from pydantic import Field
from torch import nn

from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.methods.learned._rest import is_statistic, summed
from fusewright.methods.routed._linears import (
    changed,
    matrices,
    opened,
    part_of,
    routable,
    shifts,
    warn_of_left,
)
from fusewright.methods.settings import PerTensor, Range, resolve
from fusewright.methods.static._fields import Number
from fusewright.modules.architecture import describe_module
from fusewright.modules.deltas import triples
from fusewright.modules.layer import Layer
from fusewright.modules.linears import LinearMap
from fusewright.modules.routed import RoutedLinear
from fusewright.modules.vectors import TaskVectors


class Smile(Routed):
    """Send each token, in each linear layer, to the experts whose change of that layer it excites
    most (*SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained
    Foundation Models*, arXiv 2408.10174).

    ΔW_t = U_t Σ_t V_tᵀ; y = W_0 x + b_0 + Σ_{t ∈ top} p_t (U_{t,:k} Σ_{t,:k} V_{t,:k}ᵀ x + Δb_t),
    p = softmax(‖V_{t,:g}ᵀ x‖_2), the ``top`` largest renormalised.

    In every linear map of the blocks: Linear, Conv1D, q, k, v and out of ``nn.MultiheadAttention``,
    and convolutions of one group, where x are patches and a token is a place of the answer; the
    paper has no convolutions.

    ``rank``: k, 32, and ``gate``: g, 16: the paper's smaller setting of CLIP, 1.6 times the
    parameters. ``top``: 1; more experts did worse there. ``rest``: λ, 0; all other tensors, those
    outside blocks too, are θ_0 + λ Σ_t τ_t, so that they stay the base's as in the paper (the
    report names those that experts changed: "left"); running statistics are the experts' mean.
    Where experts changed word embeddings that leaves out most of what they learned: text-mini
    gained 3 points by ``[{"filter": "word_embeddings", "value": 1}, 0]``. Of LoRA experts a rank of
    theirs or more is exact.

    Raises PlanError if no linear layer of the blocks is changed.
    """

    name: ClassVar[str] = "smile"
    card: ClassVar[Card] = Card(
        "SMILE", "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From "
        "Pre-Trained Foundation Models", "2408.10174", output="routed",
        cost="an SVD of each expert's matrices; gate and expert at every token",
    )  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"rank": 128, "gate": 1},
    }

    rank: Annotated[int, Range(4, 128, log=True)] = Field(32, ge=1)
    gate: Annotated[int, Range(1, 48, log=True)] = Field(16, ge=1)
    top: int = Field(1, ge=1)
    rest: Annotated[PerTensor[Number], Range(0.0, 1.0)] = 0.0

    def build(self, context: Context) -> Parts:
        model, vectors = context.module(), context.vectors()
        described = describe_module(model)
        found: dict[str, Layer] = {}
        taken: set[str | None] = set()
        for linear in routable(described, model):
            if linear.block is not None and linear.weight in vectors.base:
                layer = self._layer(linear, part_of(linear, model), vectors)
                if layer is not None:
                    found[linear.module] = layer
                    taken |= {linear.weight, linear.bias}
        if not found:
            raise PlanError("no linear layer of a block is changed by an expert",
                            expected="nn.Linear, Conv1D or a convolution inside blocks",
                            fix="`fusewright inspect` shows what the experts change")  # fmt: skip
        _warn_of_blind(found)
        rest = vectors.select(lambda name: name not in taken)
        scaled = rest.select(lambda name: self._is_scaled(name, context))
        left = changed(rest.select(lambda name: name not in scaled.base))
        maps = {name for name, linear in described.linears.items() if linear.block is not None}
        warn_of_left([n for n in left if n in maps], "stay the base's, unless `rest` is for them")
        layers = {**opened(found, model), **found}
        return Parts(layers, summed(context, scaled, self.rest), {"left": left})

    def _is_scaled(self, name: str, context: Context) -> bool:
        return resolve(self.rest, context.layout(name)) != 0 or is_statistic(context, name)

    def _layer(
        self, linear: LinearMap, base: nn.Module, vectors: TaskVectors
    ) -> RoutedLinear | None:
        wide = max(self.rank, self.gate)
        split = [triples(delta, wide) for delta in matrices(linear, vectors)]
        if not any(bool(values.any()) for _, values, _ in split):
            return None
        dtype = vectors.base[linear.weight].dtype
        up = _stacked([(u * s)[:, : self.rank] for u, s, _ in split]).to(dtype)
        down = _stacked([v[:, : self.rank] for *_, v in split]).mT.contiguous().to(dtype)
        gate = _stacked([v[:, : self.gate] for *_, v in split]).mT.contiguous().to(dtype)
        each = shifts(linear, vectors)
        bias = None if each is None else torch.stack(each).to(dtype)
        return RoutedLinear(base, up, down, gate, bias, self.top)


def _warn_of_blind(layers: Mapping[str, Layer]) -> None:
    """A gate as wide as the input has the input's own norm for every expert."""
    widths = {path: layer.gate.shape[1:] for path, layer in layers.items()
              if isinstance(layer, RoutedLinear) and len(layer.gate) > 1}  # fmt: skip
    blind = {path: inputs for path, (rank, inputs) in widths.items() if rank >= inputs}
    if blind:
        warn(f"the gates of {len(blind)} layers ({next(iter(blind))}) are as wide as their inputs "
             f"and cannot tell experts apart: choose a gate below {min(blind.values())}",
             FusewrightWarning, stacklevel=2)  # fmt: skip


def _stacked(columns: list[torch.Tensor]) -> torch.Tensor:
    """Matrices of the same height side by side in a new first axis, narrow ones filled up with
    zeros: (experts, height, width)."""
    width = max(c.shape[1] for c in columns)
    return torch.stack([nn.functional.pad(c, (0, width - c.shape[1])) for c in columns])
