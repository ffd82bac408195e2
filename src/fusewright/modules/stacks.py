"""What all experts change of one matrix, kept together: whole, a tenth of it, or in factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fusewright.modules import scatter
from fusewright.modules.deltas import Delta, Factors, Sparse

_WIDEST_GAP = 255


class Stack(nn.Module, ABC):
    """Δ_1, …, Δ_T of one matrix: ``shape`` is (experts, outputs, inputs)."""

    kind: ClassVar[str]
    shape: tuple[int, int, int]

    @abstractmethod
    def write(self, out: Tensor, start: int) -> None:
        """All experts' rows from ``start`` on, as many as ``out`` (experts, rows, inputs) has."""

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`whole` is there already, so that asking for it costs nothing."""
        return False

    def adds_rows(self, weights: Tensor) -> bool:
        """Whether :meth:`add_rows` is there for such weights, and faster than products."""
        return False

    def add_rows(self, out: Tensor, base: Tensor, weights: Tensor, start: int) -> None:
        """W_0 + Σ_t w_bt Δ_t for several w (samples, experts), in their dtype: rows from ``start``
        on, as many as ``out`` (samples, rows, inputs) and ``base`` (rows, inputs) have."""
        raise NotImplementedError

    def combined(self, base: Tensor, weights: Tensor) -> Tensor:
        """W_0 + Σ_t w_t Δ_t for one w (experts,), in its dtype; ``base`` is (outputs, inputs)."""
        whole = self.whole(weights.dtype).flatten(1)
        start = base.to(weights.dtype).reshape(-1)
        return torch.addmv(start, whole.T, weights).view(base.shape)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All experts' Δ: ``shape``."""
        found = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.write(found, 0)
        return found

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def experts(self) -> int:
        return self.shape[0]

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this stack again."""
        return {"kind": self.kind, "shape": list(self.shape)}


class DenseStack(Stack):
    """Every element: ``values`` (experts, outputs, inputs)."""

    kind: ClassVar[str] = "dense"
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        experts, outputs, inputs = values.shape
        self.shape = experts, outputs, inputs

    def write(self, out: Tensor, start: int) -> None:
        out.copy_(self.values[:, start : start + out.shape[1]])

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    def holds(self, dtype: torch.dtype) -> bool:
        return self.values.dtype == dtype


class SparseStack(Stack):
    """The elements that are not zero: ``values`` (k,), and how far each lies behind the one before
    it, ``gaps`` (k,) uint8, in the flattened (experts, outputs, inputs); a gap of more than 255 is
    filled up with zeros. One byte a place: four would outweigh values of two. Places are counted
    when they are first needed; the compiled loop needs those of rows alone."""

    kind: ClassVar[str] = "sparse"
    values: Tensor
    gaps: Tensor

    def __init__(self, values: Tensor, gaps: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("gaps", gaps)
        experts, outputs, inputs = shape
        self.shape = experts, outputs, inputs
        self._places: Tensor | None = None
        self._begins: scatter.Rows | None = None

    @classmethod
    def of(cls, values: Tensor, places: Tensor, shape: Sequence[int]) -> SparseStack:
        """Of elements at ascending places (int64)."""
        gaps = places.diff(prepend=places.new_zeros(1))
        fillers = (gaps - 1).clamp(min=0) // _WIDEST_GAP
        ends = (fillers + 1).cumsum(0) - 1
        size = int(ends[-1]) + 1 if len(ends) else 0
        kept, steps = values.new_zeros(size), places.new_full((size,), _WIDEST_GAP)
        kept[ends], steps[ends] = values, gaps - fillers * _WIDEST_GAP
        return cls(kept, steps.to(torch.uint8), shape)

    def write(self, out: Tensor, start: int) -> None:
        _, outputs, inputs = self.shape
        out.zero_()
        for at, expert in enumerate(out):
            places, values = self._between(at, start, start + out.shape[1])
            offset = (at * outputs + start) * inputs
            expert.view(-1).index_copy_(0, places - offset, values.to(out.dtype))

    def adds_rows(self, weights: Tensor) -> bool:
        return scatter.compiled(self.values, weights)

    def add_rows(self, out: Tensor, base: Tensor, weights: Tensor, start: int) -> None:
        scatter.add_rows(out, base, weights, self.values, self.gaps, self._rows(), start)

    def combined(self, base: Tensor, weights: Tensor) -> Tensor:
        _, outputs, inputs = self.shape
        if self.adds_rows(weights):
            made = torch.empty(1, outputs, inputs)
            self.add_rows(made, base.to(weights.dtype).contiguous(), weights[None], 0)
            return made[0]
        found = base.to(weights.dtype, copy=True).reshape(-1)
        for at, weight in enumerate(weights):
            places, values = self._between(at, 0, outputs)
            found.index_add_(0, places - at * outputs * inputs, weight * values.to(found.dtype))
        return found.view(base.shape)

    def _between(self, expert: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """One expert's places (int64: what writes them wants that) and values in some rows."""
        if self._places is None or self._places.device != self.gaps.device:
            self._places = self.gaps.cumsum(0, dtype=torch.int64)
        starts = self._rows().starts[expert]
        some = slice(int(starts[start]), int(starts[stop]))
        return self._places[some], self.values[some]

    def _rows(self) -> scatter.Rows:
        if self._begins is None or self._begins.starts.device != self.gaps.device:
            experts, outputs, inputs = self.shape
            places = self.gaps.cumsum(0, dtype=torch.int64)
            ends = torch.arange(experts * outputs + 1, device=places.device) * inputs
            at = torch.searchsorted(places, ends)
            first = places[at[:-1].clamp(max=len(places) - 1)] if len(places) else at[:-1]
            starts = torch.stack([at[e * outputs : (e + 1) * outputs + 1] for e in range(experts)])
            self._begins = scatter.Rows(starts, (first - ends[:-1]).view(experts, outputs))
        return self._begins


class FactorStack(Stack):
    """Products: ``up`` (experts, outputs, rank) times ``down`` (experts, rank, inputs)."""

    kind: ClassVar[str] = "factors"
    up: Tensor
    down: Tensor

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.shape = up.shape[0], up.shape[1], down.shape[2]
        self.rank = up.shape[2]

    def write(self, out: Tensor, start: int) -> None:
        up, down = self.up[:, start : start + out.shape[1]], self.down
        torch.matmul(up.to(out.dtype), down.to(out.dtype), out=out)

    def combined(self, base: Tensor, weights: Tensor) -> Tensor:
        up = (self.up.to(weights) * weights[:, None, None]).transpose(0, 1).flatten(1)
        return base.to(weights.dtype) + up @ self.down.flatten(0, 1).to(weights)

    def added(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Σ_t w_t Δ_t x for inputs (n, tokens, in) and weights (n, experts): no Δ is made whole."""
        seen = inputs @ self.down.flatten(0, 1).T.to(inputs)
        shares = weights.repeat_interleave(self.rank, dim=1)[:, None].to(seen)
        return (seen * shares) @ self.up.transpose(1, 2).flatten(0, 1).to(seen)


KINDS: dict[str, type[Stack]] = {k.kind: k for k in (DenseStack, SparseStack, FactorStack)}


def stacked(deltas: Sequence[Delta], density: float, dtype: torch.dtype) -> Stack:
    """The experts' changes of a matrix (outputs, inputs), stored in ``dtype``.

    ``density`` below 1 keeps the largest of each expert. Factors stay factors where they are
    smaller than the whole and nothing is left out.
    """
    if density < 1:
        return _sparse([Sparse.largest(delta.dense(), density) for delta in deltas], dtype)
    low = [delta for delta in deltas if isinstance(delta, Factors)]
    rank, (outputs, inputs) = max((len(d.down) for d in low), default=0), deltas[0].shape
    if len(low) == len(deltas) and rank * (outputs + inputs) < outputs * inputs:
        up = torch.stack([pad(d.up, (0, rank - len(d.down))) for d in low])
        down = torch.stack([pad(d.down, (0, 0, 0, rank - len(d.down))) for d in low])
        return FactorStack(up.to(dtype), down.to(dtype))
    return DenseStack(torch.stack([delta.dense().to(dtype) for delta in deltas]))


def restored(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stack:
    """A stack of that description."""
    if said["kind"] == SparseStack.kind:
        return SparseStack(tensors["values"], tensors["gaps"], said["shape"])
    return KINDS[said["kind"]](**tensors)


def _sparse(deltas: Sequence[Sparse], dtype: torch.dtype) -> SparseStack:
    outputs, inputs = deltas[0].shape
    places = [d.places.long() + at * outputs * inputs for at, d in enumerate(deltas)]
    values = torch.cat([delta.values for delta in deltas]).to(dtype)
    return SparseStack.of(values, torch.cat(places), (len(deltas), outputs, inputs))
