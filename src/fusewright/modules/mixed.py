"""Linear maps whose weight is mixed anew for every sample, block by block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusewright.errors import PlanError
from fusewright.modules.layer import Replacement, Saved
from fusewright.modules.stacks import FactorStack, Stack, restored
from fusewright.modules.tensors import wide_dtype

if TYPE_CHECKING:
    from fusewright.modules.mixture import Mixture

Form = Literal["weights", "outputs", "factors"]

_BLOCK = 3 << 19
"""Bytes of merged rows that are used at once: they stay in a second-level cache."""
_SAMPLES = 16
"""Samples whose rows are merged at once."""
_PANEL = 1 << 25
"""Bytes of all experts' rows that are made at once, where they are not held as they are needed."""
_BYTE = 4
"""Multiplications that a processor does while one byte comes from memory."""


class Mixed(Replacement):
    """A layer whose own tensors are mixed by w, which ``mixture`` knows."""

    def __init__(self, base: nn.Module, mixture: Mixture) -> None:
        super().__init__(base)
        self.mixture = mixture

    @abstractmethod
    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The base layer's own tensors for one w (experts,): {"weight": …, "bias": …}."""

    @property
    def active(self) -> int:
        return self.added


class MixedLinear(Mixed):
    """y = (W_0 + Σ_t w_t Δ_t) x + b_0 + Σ_t w_t s_t, in the place of a Linear or Conv1D ``base``.

    w is (samples, experts), or (1, experts) for all samples: what ``mixture`` routed last, shared
    by all linear maps of that mixture. Inputs are (samples, …, in). ``stack`` holds Δ, ``shift``
    (experts, out) s or None; neither is trained. Sums are in float32 or better.
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
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight if isinstance(self.base, nn.Linear) else weight.T

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.mixture.weights_for(inputs)
        if weights is None:
            return self.base(inputs)
        x = inputs.reshape(len(weights), -1, inputs.shape[-1])
        form = cheapest(len(weights), x.shape[0] * x.shape[1], self.stack)
        if form == "factors":
            assert isinstance(self.stack, FactorStack)
            found = x @ self.matrix.T + self.stack.added(x, weights)
        else:
            found = _Mix.apply(x, weights, self.matrix, self.stack, form)
        bias = self._bias(weights)
        if bias is not None:
            found += bias[:, None].to(found.dtype)
        return found.reshape(*inputs.shape[:-1], found.shape[-1])

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        base, wide = dict(self.base.named_parameters()), wide_dtype(self.matrix)
        total = self.stack.combined(self.matrix, weights.to(wide))
        found = {"weight": total if isinstance(self.base, nn.Linear) else total.T.contiguous()}
        bias = self._bias(weights[None])
        if bias is not None:
            found["bias"] = bias[0]
        return {name: tensor.to(base[name].dtype) for name, tensor in found.items()}

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
    block of W's rows as the values are: no more than one block of merged weights is ever held.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, base: Tensor, stack: Stack, form: Form
    ) -> Tensor:
        ctx.save_for_backward(x, weights, base)
        ctx.stack, ctx.form = stack, form
        shares = weights.to(wide_dtype(base))
        if form == "weights" and len(x) == 1:  # one merged matrix: one product
            return x @ stack.combined(base, shares[0]).to(x.dtype).T
        found = x.new_empty(*x.shape[:2], len(base))
        if form == "outputs":
            for rows, deltas in _panels(stack, shares.dtype):
                mixed = torch.einsum("nstr,nt->nsr", _said(x, deltas), shares.to(x))
                found[..., rows] = x @ base[rows].T + mixed
            return found
        for some, rows, deltas in _blocks(len(x), stack, shares.dtype):
            merged = _merged(base[rows], shares[some], deltas).to(x.dtype)
            found[some, :, rows] = torch.bmm(x[some], merged.mT)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, base = ctx.saved_tensors
        shares = weights.to(wide_dtype(base))
        to_x = torch.zeros_like(x, dtype=shares.dtype) if ctx.needs_input_grad[0] else None
        to_shares = torch.zeros_like(shares)
        if ctx.form == "outputs":
            for rows, deltas in _panels(ctx.stack, shares.dtype):
                part = gradient[..., rows]
                if to_x is not None:
                    to_x += part @ base[rows].to(part)
                    mixed = torch.einsum("nsr,nt->nstr", part, shares.to(part))
                    to_x += mixed.flatten(2) @ deltas.flatten(0, 1).to(part)
                to_shares += torch.einsum("nsr,nstr->nt", part, _said(x, deltas)).to(to_shares)
        else:
            for some, rows, deltas in _blocks(len(x), ctx.stack, shares.dtype):
                part = gradient[some, :, rows]
                if to_x is not None:
                    merged = _merged(base[rows], shares[some], deltas).to(part.dtype)
                    to_x[some] += torch.bmm(part, merged)
                of_weight = torch.bmm(part.mT, x[some]).to(deltas.dtype)
                to_shares[some] += of_weight.flatten(1) @ deltas.flatten(1).T
        found = None if to_x is None else to_x.to(x.dtype)
        return found, to_shares.to(weights.dtype), None, None, None


def _said(x: Tensor, deltas: Tensor) -> Tensor:
    """Every expert's Δ_t x: (n, tokens, experts, rows)."""
    return (x @ deltas.flatten(0, 1).T.to(x)).unflatten(2, deltas.shape[:2])


def _merged(base: Tensor, shares: Tensor, deltas: Tensor) -> Tensor:
    """Some rows of W_b for some samples: (samples, rows, in)."""
    start = base.to(shares.dtype).reshape(1, -1)
    return torch.addmm(start, shares, deltas.flatten(1)).view(-1, *base.shape)


def _panels(stack: Stack, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all experts' Δ, (experts, rows, in): all, or as many as are to be made at once."""
    experts, outputs, inputs = stack.shape
    size = outputs
    if not stack.holds(dtype):
        size = _even(_PANEL // (experts * inputs * dtype.itemsize))
    for start in range(0, outputs, size):
        stop = min(start + size, outputs)
        yield slice(start, stop), stack.rows(start, stop, dtype)


def _blocks(
    count: int, stack: Stack, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Samples, and rows of Δ, few enough of both for what is merged of them to stay in a cache."""
    samples = min(count, _SAMPLES)
    size = _even(_BLOCK // (samples * stack.shape[2] * dtype.itemsize))
    for panel, deltas in _panels(stack, dtype):
        for first in range(0, count, samples):
            for start in range(0, deltas.shape[1], size):
                part = deltas[:, start : start + size]
                begin = panel.start + start
                yield slice(first, first + samples), slice(begin, begin + part.shape[1]), part


def _even(size: int) -> int:
    """One at least, and whole runs of 16 where there are some: products of odd sizes are slow."""
    return max(1, size if size < 16 else size // 16 * 16)


def check_samples(inputs: Tensor, weights: Tensor, where: str) -> None:
    """Refuse inputs of which nobody can say which sample they belong to."""
    if len(weights) not in (1, len(inputs)):
        raise PlanError("a mixed layer got other samples than its mixture routed", where=where,
                        expected=f"inputs ({len(weights)}, ...)", found=tuple(inputs.shape),
                        fix="per='batch', or modules that keep samples apart")  # fmt: skip
