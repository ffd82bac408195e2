"""Linear maps whose weight is mixed anew for every sample, block by block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fusewright.modules import patches
from fusewright.modules.layer import Replacement, Saved
from fusewright.modules.stacks import FactorStack, Stack, restored
from fusewright.modules.tensors import wide_dtype

if TYPE_CHECKING:
    from fusewright.modules.mixture import Mixture

Form = Literal["weights", "outputs", "factors"]

_BLOCK = 3 << 19
"""Bytes of merged rows that are used at once: they stay in a second-level cache."""
_ROWS = 16
"""Rows that are used at once, at least: products of fewer take twice as long."""
_SAMPLES = 8
"""Samples whose rows are merged at once by a product."""
_LINES = 128
"""Rows that are merged at once by a loop, of as many samples as then fit into a block."""
_MERGED = 1 << 27
"""Bytes of a convolution's kernels or patches that are there at once, but for one sample's."""
_PANEL = 7 << 22
"""Bytes of the base's and all experts' rows that are brought together at once."""
_BYTE = 4
"""Multiplications that a processor does while one byte comes from memory."""


class Mixed(Replacement):
    """A layer whose own tensors are mixed by w, which ``mixture`` knows. ``path`` is its place in
    the model, for errors."""

    path: str = ""

    def __init__(self, base: nn.Module, mixture: Mixture) -> None:
        super().__init__(base)
        self.mixture = mixture

    @abstractmethod
    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The base layer's own tensors for one w (experts,): {"weight": …, "bias": …}."""

    def plain(self) -> dict[str, Tensor]:
        own = self.base.state_dict()
        return {**own, **self.merged(self.mixture.settled())}

    @property
    def active(self) -> int:
        return self.added


class MixedLinear(Mixed):
    """y = (W_0 + Σ_t w_t Δ_t) x + b_0 + Σ_t w_t s_t, in the place of a Linear, a Conv1D or a
    convolution ``base``, whose x are patches (:mod:`fusewright.modules.patches`).

    w is (samples, experts), or (1, experts) for all samples: what ``mixture`` routed last, shared
    by all linear maps of that mixture. Inputs are (samples, …, in), a convolution's (samples,
    channels, …). ``stack`` holds Δ, ``shift`` (experts, out) s or None; neither is trained. Sums
    are in float32 or better.
    """

    kind: ClassVar[str] = "mixed"

    shift: Tensor | None

    def __init__(
        self, base: nn.Module, stack: Stack, shift: Tensor | None, mixture: Mixture
    ) -> None:
        super().__init__(base, mixture)
        self.stack = stack
        self.register_buffer("shift", shift)

    @property
    def matrix(self) -> Tensor:
        """W_0, (out, in)."""
        return patches.matrix(self.base)

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.mixture.weights_for(inputs, self.path)
        if weights is None:
            return self.base(inputs)
        if isinstance(self.base, patches.Convolution):
            return self._convolved(self.base, inputs, weights)
        return self._answered(inputs, weights)

    def _convolved(self, base: patches.Convolution, inputs: Tensor, weights: Tensor) -> Tensor:
        """By patches, if they are needed for a gradient or far smaller than kernels; else with
        merged kernels. Of so many samples at a time as either takes memory."""
        if torch.is_grad_enabled() and (inputs.requires_grad or weights.requires_grad):
            return self._answered(inputs, weights)
        if len(weights) == 1:
            return self._by_kernels(base, inputs, weights)
        few = by_patches(prod(patches.places(base, inputs)), len(self.matrix))
        count = max(1, _MERGED // (self.matrix.numel() * wide_dtype(self.matrix).itemsize))
        pairs = zip(inputs.split(count), weights.split(count), strict=True)
        return torch.cat([self._answered(x, w) if few else self._by_kernels(base, x, w)
                          for x, w in pairs])  # fmt: skip

    def _by_kernels(self, base: patches.Convolution, inputs: Tensor, weights: Tensor) -> Tensor:
        found, bias = patches.convolved(base, inputs, self._merged(weights)), self._bias(weights)
        if bias is not None:
            found += bias[(..., *[None] * (found.dim() - 2))].to(found.dtype)
        return found

    def _merged(self, weights: Tensor) -> Tensor:
        """W_b for every row of w: (n, out, in)."""
        matrix = self.matrix
        shares = _with_base(weights, matrix)
        if len(weights) == 1:
            return self.stack.combined(matrix, weights[0].to(shares.dtype))[None]
        found = shares.new_empty(len(weights), *matrix.shape)
        for some, rows, merged in _merged_blocks(shares, self.stack, matrix):
            found[some, rows] = merged
        return found

    def _answered(self, inputs: Tensor, weights: Tensor) -> Tensor:
        x = patches.rows(self.base, inputs)
        x = x.reshape(len(weights), -1, x.shape[-1])
        form = cheapest(len(weights), x.shape[0] * x.shape[1], self.stack)
        if form == "factors":
            assert isinstance(self.stack, FactorStack)
            found = x @ self.matrix.T + self.stack.added(x, weights)
        else:
            found = _Mix.apply(x, weights, self.matrix, self.stack, form)
        bias = self._bias(weights)
        if bias is not None:
            found += bias[:, None].to(found.dtype)
        return patches.answered(self.base, inputs, found)

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        matrix, bias = self.matrix, self._bias(weights[None])
        total = self.stack.combined(matrix, weights.to(wide_dtype(matrix)))
        found = {"weight": patches.stored(self.base, total)}
        if bias is not None:
            found["bias"] = bias[0]
        return {n: tensor.to(getattr(self.base, n).dtype) for n, tensor in found.items()}

    def _bias(self, weights: Tensor) -> Tensor | None:
        """b_0 + Σ_t w_t s_t: (n, out)."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if bias is None:
            return None
        wide = bias.to(wide_dtype(bias)).expand(len(weights), -1)
        return wide if self.shift is None else wide + weights.to(wide) @ self.shift.to(wide)

    def described(self) -> dict[str, Any]:
        return {"stack": self.stack.described(), "mixture": self.mixture.number}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        stack = restored(saved.said["stack"], saved.inside("stack"))
        mixture = saved.mixtures[saved.said["mixture"]]
        return cls(saved.base, stack, saved.tensors.get("shift"), mixture)

    def extra_repr(self) -> str:
        return f"experts={self.stack.experts}, {self.stack.kind}"


def by_patches(places: int, outputs: int) -> bool:
    """Whether a sample's patches are so much smaller than a kernel of its own that they are faster:
    where both are as large, kernels are."""
    return 4 * places < outputs


def cheapest(samples: int, tokens: int, stack: Stack) -> Form:
    """How Σ_t w_t Δ_t is applied: by the estimated time, in multiplications.

    With n rows of w, m tokens, T experts and |W| elements:

    - "weights", merge and multiply: (nT + m)|W|, and the bytes of T matrices read and n written;
    - "outputs", multiply and mix: m(1 + T)|W|, and the bytes of T matrices read;
    - "factors" of rank k: m(|W| + kT(out + in)), and the bytes of factors read.

    A byte counts as four multiplications, and elements as four bytes. So long inputs, and one w for
    many, are merged; single tokens are not.
    """
    experts, outputs, inputs = stack.shape
    size = outputs * inputs
    whole = 4 * _BYTE * experts * size
    costs: dict[Form, float] = {
        "weights": (samples * experts + tokens) * size + whole + 4 * _BYTE * samples * size,
        "outputs": tokens * (1 + experts) * size + whole,
    }
    if isinstance(stack, FactorStack):
        thin = stack.rank * experts * (outputs + inputs)
        costs["weights"] += stack.rank * experts * size
        costs["outputs"] += stack.rank * experts * size
        costs["factors"] = tokens * (size + thin) + 4 * _BYTE * thin
    return min(costs, key=lambda form: costs[form])


class _Mix(torch.autograd.Function):
    """(n, tokens, in), (n, experts), (out, in) -> (n, tokens, out), for gradients of the first two.

    ∂L/∂x = ∂L/∂y W_b and ∂L/∂w_t = ⟨∂L/∂W_b, Δ_t⟩, W_b = W_0 + Σ_t w_t Δ_t, are found block by
    block of W's rows as the values are: no more than one block of merged weights is ever held. For
    "weights" the base counts as one more expert, of weight 1: a single product merges a block.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, base: Tensor, stack: Stack, form: Form
    ) -> Tensor:
        ctx.save_for_backward(x, weights, base)
        ctx.stack, ctx.form = stack, form
        if form == "weights" and len(x) == 1:  # one merged matrix: one product
            return x @ stack.combined(base, weights[0].to(wide_dtype(base))).to(x.dtype).T
        shares = _with_base(weights, base)
        found = x.new_empty(*x.shape[:2], len(base))
        if form == "outputs":
            for rows, deltas in _panels(stack, shares.dtype):
                mixed = torch.einsum("nstr,nt->nsr", _said(x, deltas), shares[:, :-1].to(x))
                found[..., rows] = x @ base[rows].T + mixed
            return found
        for some, rows, merged in _merged_blocks(shares, stack, base):
            found[some, :, rows] = torch.bmm(x[some], merged.to(x.dtype).mT)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, base = ctx.saved_tensors
        shares = _with_base(weights, base)
        to_x = torch.zeros_like(x, dtype=shares.dtype) if ctx.needs_input_grad[0] else None
        to_shares = torch.zeros_like(shares)
        if ctx.form == "outputs":
            for rows, deltas in _panels(ctx.stack, shares.dtype):
                part = gradient[..., rows]
                if to_x is not None:
                    to_x += part @ base[rows].to(part)
                    mixed = torch.einsum("nsr,nt->nstr", part, shares[:, :-1].to(part))
                    to_x += mixed.flatten(2) @ deltas.flatten(0, 1).to(part)
                said = torch.einsum("nsr,nstr->nt", part, _said(x, deltas))
                to_shares[:, :-1] += said.to(to_shares)
        else:
            for some, rows, block in _blocks(len(x), ctx.stack, base, shares.dtype):
                part = gradient[some, :, rows]
                if to_x is not None:
                    to_x[some] += torch.bmm(part, _merged(shares[some], block).to(part.dtype))
                of_weight = torch.bmm(part.mT, x[some]).to(block.dtype)
                to_shares[some] += of_weight.flatten(1) @ block.flatten(1).T
        found = None if to_x is None else to_x.to(x.dtype)
        return found, to_shares[:, :-1].to(weights.dtype), None, None, None


def _with_base(weights: Tensor, base: Tensor) -> Tensor:
    """w and a last 1, for the base: (n, experts + 1)."""
    return pad(weights.to(wide_dtype(base)), (0, 1), value=1.0)


def _said(x: Tensor, deltas: Tensor) -> Tensor:
    """Every expert's Δ_t x: (n, tokens, experts, rows)."""
    return (x @ deltas.flatten(0, 1).T.to(x)).unflatten(2, deltas.shape[:2])


def _merged_blocks(
    shares: Tensor, stack: Stack, base: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """All of W_b, of some samples and rows at a time: (samples, rows, in)."""
    if not stack.adds_rows(shares):
        for some, rows, block in _blocks(len(shares), stack, base, shares.dtype):
            yield some, rows, _merged(shares[some], block)
        return
    _, outputs, inputs = stack.shape
    size = min(_LINES, outputs)
    samples = max(1, min(len(shares), _BLOCK // (size * inputs * shares.itemsize)))
    held = shares.new_empty(samples * size * inputs)
    mixing = shares[:, :-1].contiguous()
    for start in range(0, outputs, size):
        rows = slice(start, min(start + size, outputs))
        part = base[rows].to(shares.dtype).contiguous()
        for first in range(0, len(shares), samples):
            some = slice(first, min(first + samples, len(shares)))
            shape = some.stop - first, *part.shape
            merged = held[: prod(shape)].view(shape)
            stack.add_rows(merged, part, mixing[some], start)
            yield some, rows, merged


def _merged(shares: Tensor, block: Tensor) -> Tensor:
    """Some rows of W_b for some samples: (samples, rows, in)."""
    return (shares @ block.flatten(1)).view(-1, *block.shape[1:])


def _panels(
    stack: Stack, dtype: torch.dtype, base: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all experts' Δ, and last of the base if one is given: (experts [+ 1], rows, in).

    What is not held so is written, some rows after the others, in the same place: fresh memory
    costs more than what is written there.
    """
    experts, outputs, inputs = stack.shape
    if base is None and stack.holds(dtype):
        yield slice(0, outputs), stack.whole(dtype)
        return
    parts = experts + (base is not None)
    size = min(outputs, _even(_PANEL // (parts * inputs * dtype.itemsize)))
    held = torch.empty(parts * size * inputs, dtype=dtype, device=stack.device)
    for start in range(0, outputs, size):
        rows = slice(start, min(start + size, outputs))
        count = rows.stop - start
        panel = held[: parts * count * inputs].view(parts, count, inputs)
        stack.write(panel[:experts], start)
        if base is not None:
            panel[experts] = base[rows]
        yield rows, panel


def _blocks(
    count: int, stack: Stack, base: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Samples, and rows of panels, few enough of both for what is merged of them to stay in a
    cache."""
    samples = min(count, _SAMPLES)
    size = max(_ROWS, _even(_BLOCK // (samples * stack.shape[2] * dtype.itemsize)))
    for rows, panel in _panels(stack, dtype, base):
        for first in range(0, count, samples):
            for start in range(0, panel.shape[1], size):
                part = panel[:, start : start + size]
                begin = rows.start + start
                yield slice(first, first + samples), slice(begin, begin + part.shape[1]), part


def _even(size: int) -> int:
    """One at least, and whole runs of 16 where there are some: products of odd sizes are slow."""
    return max(1, size if size < 16 else size // 16 * 16)
