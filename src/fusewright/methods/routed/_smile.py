"""SMILE: every linear layer as a sparse mixture of low-rank experts, without training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar
from warnings import warn

import torch
from pydantic import Field
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning, PlanError
from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.methods.learned._rest import is_statistic, summed
from fusewright.methods.routed._linears import (
    Users,
    changed,
    matrices,
    matrix_of,
    opened,
    part_of,
    shifts,
    tensors_of,
    untaken,
    warn_of_left,
)
from fusewright.methods.settings import PerTensor, Range, resolve
from fusewright.methods.static._fields import Number
from fusewright.modules.architecture import describe_module
from fusewright.modules.deltas import Delta, Dense, triples
from fusewright.modules.layer import Layer
from fusewright.modules.linears import LinearMap, Span
from fusewright.modules.routed import RoutedLinear
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors


class Smile(Routed):
    """Send each token, in each linear layer, to the experts whose change of that layer it excites
    most (*SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained
    Foundation Models*, arXiv 2408.10174).

    ΔW_t = U_t Σ_t V_tᵀ; y = W_0 x + b_0 + Σ_{t ∈ top} p_t (U_{t,:k} Σ_{t,:k} V_{t,:k}ᵀ x + Δb_t),
    p = softmax(‖V_{t,:g}ᵀ x‖_2), the ``top`` largest renormalised.

    In every linear map of the blocks: Linear, Conv1D, q, k, v and out of ``nn.MultiheadAttention``;
    in a model whose blocks have none, as a ResNet, in their convolutions of one group, where x are
    patches and a token is a place of the answer. The paper has no convolutions, and beside linear
    maps they cost: those between the stages of vision-mini's model 1.1 points.

    ``rank``: k, 32, and ``gate``: g, 16: the paper's smaller setting of CLIP, 1.6 times the
    parameters. ``top``: 1; more experts did worse there. ``rest``: λ, 0; all other tensors, those
    outside blocks too, are θ_0 + λ Σ_t τ_t, so that they stay the base's as in the paper (the
    report names those that experts changed: "left"); running statistics are the experts' mean.
    Where experts changed word embeddings that leaves out most of what they learned: text-mini
    gained 3 points by ``[{"filter": "word_embeddings", "value": 1}, 0]``. Of LoRA experts a rank of
    theirs or more is exact.

    V_{t,:g} are directions that an expert changed: one whose σ may be rounding alone is no part of
    the gate, so that weights are routed alike as adapter and as full checkpoint. An expert that
    left a layer's weight alone has no gate there: its norm is 0, and of ``top`` 1 it takes a token
    only where all others' are 0, too. What all left alone stays as it was. Modules whose weights
    are one tensor are routed each by itself, from one copy of the experts' factors; what shares its
    weight with anything but a block's linear maps is not routed, and ``rest`` is for it.

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
        of_tensors: dict[object, RoutedLinear] = {}
        taken: dict[str, list[Span]] = defaultdict(list)
        users = Users(described, model, vectors)
        for linear in _routed(users, vectors):
            base = part_of(linear, model)
            if (tied := of_tensors.get(tensors_of(linear))) is None:
                layer = self._layer(linear, base, vectors)
            else:
                layer = RoutedLinear(base, tied.up, tied.down, tied.gate, tied.shift, self.top)
            found[linear.module] = of_tensors[tensors_of(linear)] = layer
            taken[linear.weight].append(linear.rows)
            if layer.shift is not None and linear.bias is not None:
                taken[linear.bias].append(linear.bias_rows)
        if not found:
            raise PlanError("no linear layer of a block is changed by an expert",
                            expected="nn.Linear, Conv1D or a convolution inside blocks",
                            fix="`fusewright inspect` shows what the experts change")  # fmt: skip
        _warn_of_blind(found)
        rest = untaken(vectors, taken, model)
        scaled = rest.select(lambda name: self._is_scaled(name, context))
        left = changed(rest.select(lambda name: name not in scaled.base))
        maps = {linear.weight for linear in _inside(described.linears.values())}
        warn_of_left([n for n in left if n in maps], "stay the base's, unless `rest` is for them")
        layers = {**opened(found, model), **found}
        return Parts(layers, summed(context, scaled, self.rest), {"left": left})

    def _is_scaled(self, name: str, context: Context) -> bool:
        return resolve(self.rest, context.layout(name)) != 0 or is_statistic(context, name)

    def _layer(self, linear: LinearMap, base: nn.Module, vectors: TaskVectors) -> RoutedLinear:
        wide = max(self.rank, self.gate)
        deltas = matrices(linear, vectors)
        split = [triples(delta, wide) for delta in deltas]
        start = vectors.base[linear.weight]
        floors = _floors(deltas, split, matrix_of(Dense(start), linear).dense())
        up = _stacked([(u * s)[:, : self.rank] for u, s, _ in split]).to(start.dtype)
        down = _stacked([v[:, : self.rank] for *_, v in split]).mT.contiguous().to(start.dtype)
        heard = [v[:, s > floor] for (_, s, v), floor in zip(split, floors, strict=True)]
        gate = _stacked([v[:, : self.gate] for v in heard]).mT.contiguous().to(start.dtype)
        each = shifts(linear, vectors)
        bias = None if each is None else torch.stack(each).to(start.dtype)
        return RoutedLinear(base, up, down, gate, bias, self.top)


def _inside(maps: Iterable[LinearMap]) -> list[LinearMap]:
    """The linear maps of blocks; if there are none, their convolutions."""
    inside = [linear for linear in maps if linear.block is not None]
    return [linear for linear in inside if not linear.kernel] or inside


def _routed(users: Users, vectors: TaskVectors) -> list[LinearMap]:
    """Those that an expert changes."""
    owned = users.owned(_inside(users.maps))
    moved = [linear for linear in owned
             if any(bool(delta.norm2() > 0) for delta in matrices(linear, vectors))]  # fmt: skip
    return users.with_biases(moved)


def _floors(
    deltas: Sequence[Delta], split: Sequence[tuple[Tensor, Tensor, Tensor]], start: Tensor
) -> list[float]:
    """Of every expert's σ those up to this one may be nothing but rounding, of which gates must not
    hear: full checkpoints have min(in, out) directions whatever was learned, adapters r.

    An SVD errs by ε max(in, out) σ_1, ε that of what it is made in. Before that, every element of
    θ_t was rounded in the dtype that it is stored in, by ε/√12 of itself, root mean square. Such
    errors are noise, whose norm is about that of the longest row and that of the longest column
    together (1408.6185); θ_t's are no longer than θ_0's and σ_1. Of adapters, too, so that they are
    routed as the same weights merged. Where no expert's change is larger (updates of the last bit),
    it is all there is to route by, and only the SVD's error counts.
    """
    wide = start.to(wide_dtype(start))
    longest = sum(float(wide.norm(dim=axis).max()) for axis in (0, 1))
    found, least = [], []
    for delta, (_, sigma, _) in zip(deltas, split, strict=True):
        stored = delta.stored if isinstance(delta, Dense) and delta.stored else start.dtype
        coarse = max(torch.finfo(dtype).eps for dtype in (stored, start.dtype))
        first = float(sigma.max()) if len(sigma) else 0.0
        least.append(torch.finfo(sigma.dtype).eps * max(start.shape) * first)
        found.append(max(least[-1], coarse / 12**0.5 * (longest + 2 * first)))
    heard = any(bool((s > floor).any()) for (_, s, _), floor in zip(split, found, strict=True))
    return found if heard else least


def _warn_of_blind(layers: Mapping[str, Layer]) -> None:
    """A gate as wide as the input has the input's own norm for every expert."""
    widths = {path: layer.gate.shape[1:] for path, layer in layers.items()
              if isinstance(layer, RoutedLinear) and len(layer.gate) > 1}  # fmt: skip
    blind = {path: inputs for path, (rank, inputs) in widths.items() if rank >= inputs}
    if blind:
        warn(f"the gates of {len(blind)} layers ({next(iter(blind))}) are as wide as their inputs "
             f"and cannot tell experts apart: choose a gate below {min(blind.values())}",
             FusewrightWarning, stacklevel=2)  # fmt: skip


def _stacked(columns: list[Tensor]) -> Tensor:
    """Matrices of the same height side by side in a new first axis, narrow ones filled up with
    zeros: (experts, height, width)."""
    width = max(c.shape[1] for c in columns)
    return torch.stack([nn.functional.pad(c, (0, width - c.shape[1])) for c in columns])
