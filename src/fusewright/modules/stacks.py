"""What all experts change of one matrix, kept together: whole, a tenth of it, or in factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fusewright.modules.deltas import Delta, Factors, Sparse

_WIDEST_GAP = 255


class Stack(nn.Module, ABC):
    """Δ_1, …, Δ_T of one matrix, each (outputs, inputs). ``shape`` is (outputs, experts, inputs):
    in this order rows of all experts lie side by side, so that a block of rows is one run."""

    kind: ClassVar[str]
    shape: tuple[int, int, int]

    @abstractmethod
    def fill(self, out: Tensor, start: int) -> None:
        """Write the rows from ``start`` on into ``out`` (rows, experts, inputs), in its dtype."""

    @property
    def experts(self) -> int:
        return self.shape[1]

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this stack again."""
        return {"kind": self.kind, "shape": list(self.shape)}


class DenseStack(Stack):
    """Every element: ``values`` (outputs, experts, inputs)."""

    kind: ClassVar[str] = "dense"
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        outputs, experts, inputs = values.shape
        self.shape = outputs, experts, inputs

    def fill(self, out: Tensor, start: int) -> None:
        out.copy_(self.values[start : start + len(out)])


class SparseStack(Stack):
    """The elements that are not zero: ``values`` (k,), and how far each lies behind the one before
    it, ``gaps`` (k,) uint8, in the flattened (outputs, experts, inputs); a gap of more than 255 is
    filled up with zeros. One byte a place: four would outweigh values of two. Places are counted
    when they are first needed, as int32 where that is enough."""

    kind: ClassVar[str] = "sparse"
    values: Tensor
    gaps: Tensor

    def __init__(self, values: Tensor, gaps: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("gaps", gaps)
        outputs, experts, inputs = shape
        self.shape = outputs, experts, inputs
        self._found: tuple[Tensor, list[int]] | None = None

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

    def fill(self, out: Tensor, start: int) -> None:
        places, starts = self._places()
        first, last = starts[start], starts[start + len(out)]
        flat = torch.zeros(out.shape, dtype=out.dtype, device=out.device).reshape(-1)
        here = places[first:last].long() - start * self.shape[1] * self.shape[2]
        flat.index_copy_(0, here, self.values[first:last].to(out.dtype))
        out.copy_(flat.view(out.shape))

    def _places(self) -> tuple[Tensor, list[int]]:
        """Where the values are, and with which of them each row of outputs begins."""
        if self._found is None or self._found[0].device != self.gaps.device:
            outputs, experts, inputs = self.shape
            small = outputs * experts * inputs <= torch.iinfo(torch.int32).max
            places = self.gaps.cumsum(0, dtype=torch.int32 if small else torch.int64)
            rows = torch.arange(outputs + 1, device=places.device) * experts * inputs
            self._found = places, torch.searchsorted(places, rows.to(places)).tolist()
        return self._found


class FactorStack(Stack):
    """Products: ``up`` (experts, outputs, rank) times ``down`` (experts, rank, inputs)."""

    kind: ClassVar[str] = "factors"
    up: Tensor
    down: Tensor

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.shape = up.shape[1], up.shape[0], down.shape[2]
        self.rank = up.shape[2]

    def fill(self, out: Tensor, start: int) -> None:
        rows = self.up[:, start : start + len(out)].to(out.dtype)
        out.copy_((rows @ self.down.to(out.dtype)).transpose(0, 1))

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
    values = torch.empty(outputs, len(deltas), inputs, dtype=dtype)
    for at, delta in enumerate(deltas):
        values[:, at] = delta.dense()
    return DenseStack(values)


def restored(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stack:
    """A stack of that description."""
    if said["kind"] == SparseStack.kind:
        return SparseStack(tensors["values"], tensors["gaps"], said["shape"])
    return KINDS[said["kind"]](**tensors)


def _sparse(deltas: Sequence[Sparse], dtype: torch.dtype) -> SparseStack:
    outputs, inputs = deltas[0].shape
    places = []
    for at, delta in enumerate(deltas):
        flat = delta.places.long()
        places.append(flat // inputs * (len(deltas) * inputs) + at * inputs + flat % inputs)
    order = torch.cat(places).argsort()
    values = torch.cat([delta.values for delta in deltas]).to(dtype)
    return SparseStack.of(values[order], torch.cat(places)[order],
                          (outputs, len(deltas), inputs))  # fmt: skip
