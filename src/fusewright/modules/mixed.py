"""Linear maps whose weight is mixed anew for every sample, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusewright.errors import PlanError
from fusewright.modules.stacks import FactorStack, Stack, restored

if TYPE_CHECKING:
    from fusewright.modules.mixture import Mixture, Routing

Form = Literal["weights", "outputs", "factors"]

_BLOCK = 1 << 20
"""Bytes of all experts' rows that are mixed at once, and a third of what they are mixed to: both
stay in a second-level cache."""
_BYTE = 4
"""Multiplications that a processor does while one byte comes from memory."""


class MixedLinear(nn.Module):
    """y = (W_0 + Σ_t w_t Δ_t) x + b_0 + Σ_t w_t s_t, in the place of a Linear or Conv1D ``base``.

    w is (samples, experts), or (1, experts) for all samples: what ``mixture`` routed last, shared
    by all linear maps of that mixture. Inputs are (samples, …, in). ``stack`` holds Δ, ``shift``
    (experts, out) s or None; neither is trained. Sums are in float32 or better.
    """

    shift: Tensor | None

    def __init__(
        self, base: nn.Module, stack: Stack, shift: Tensor | None, mixture: Mixture
    ) -> None:
        super().__init__()
        self.base, self.stack, self.mixture = base, stack, mixture
        self.register_buffer("shift", shift)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer as it was: models look at its weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

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
            found = found + bias[:, None].to(found.dtype)
        return found.reshape(*inputs.shape[:-1], found.shape[-1])

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The base layer's own tensors for one w (experts,): {"weight": …, "bias": …}."""
        base, wide = dict(self.base.named_parameters()), _wide(self.matrix)
        deltas = torch.empty(self.stack.shape, dtype=wide, device=weights.device)
        self.stack.fill(deltas, 0)
        total = self.matrix.to(wide) + torch.einsum("t,rti->ri", weights.to(wide), deltas)
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
        wide = bias.to(_wide(bias)).expand(len(weights), -1)
        return wide if self.shift is None else wide + weights.to(wide) @ self.shift.to(wide)

    @property
    def active(self) -> int:
        """Numbers that one input's answer depends on, beside the base's."""
        return sum(t.numel() for t in self.buffers() if t.is_floating_point())

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this layer again."""
        return {"kind": "mixed", "stack": self.stack.described(), "mixture": self.mixture.number}

    @classmethod
    def restored(
        cls, base: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
        routing: Routing | None,
    ) -> MixedLinear:  # fmt: skip
        """The layer of that description over a base."""
        assert routing is not None
        held = {n.removeprefix("stack."): t for n, t in tensors.items() if n.startswith("stack.")}
        stack = restored(said["stack"], held)
        return cls(base, stack, tensors.get("shift"), routing.mixtures[said["mixture"]])

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
    outputs, experts, inputs = stack.shape
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
        shares, found = _with_base(weights, base), x.new_empty(*x.shape[:2], len(base))
        if form == "weights" and len(x) == 1:  # one merged matrix: one product
            return x @ _whole(shares, base, stack).to(x.dtype).T
        for rows, deltas in _blocks(base, stack):
            if form == "outputs":
                said = (x @ deltas.flatten(0, 1).T.to(x)).unflatten(2, (-1, deltas.shape[1]))
                found[..., rows] = torch.einsum("nsrt,nt->nsr", said, shares.to(said))
                continue
            for some in _samples(len(x), deltas):
                merged = _merged(shares[some], deltas).to(x.dtype)
                found[some, :, rows] = torch.bmm(x[some], merged.permute(1, 2, 0))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, base = ctx.saved_tensors
        each = _backward_outputs if ctx.form == "outputs" else _backward_weights
        shares = _with_base(weights, base)
        to_x = torch.zeros_like(x, dtype=shares.dtype) if ctx.needs_input_grad[0] else None
        to_shares = torch.zeros_like(shares)
        for rows, deltas in _blocks(base, ctx.stack):
            for some in _samples(len(x), deltas):
                each(gradient[some, :, rows], x[some], shares[some], deltas,
                     None if to_x is None else to_x[some], to_shares[some])  # fmt: skip
        found = None if to_x is None else to_x.to(x.dtype)
        return found, to_shares[:, :-1].to(weights.dtype), None, None, None


def _backward_weights(
    gradient: Tensor, x: Tensor, shares: Tensor, deltas: Tensor, to_x: Tensor | None,
    to_shares: Tensor,
) -> None:  # fmt: skip
    if to_x is not None:
        merged = _merged(shares, deltas).to(gradient.dtype)
        to_x += gradient @ merged.permute(1, 0, 2)
    of_weight = (gradient.mT @ x).to(deltas.dtype)
    to_shares += (of_weight.transpose(0, 1) @ deltas.mT).sum(dim=0)


def _backward_outputs(
    gradient: Tensor, x: Tensor, shares: Tensor, deltas: Tensor, to_x: Tensor | None,
    to_shares: Tensor,
) -> None:  # fmt: skip
    flat = deltas.flatten(0, 1).to(x.dtype)
    if to_x is not None:
        to_x += (gradient[..., None] * shares.to(gradient)[:, None, None]).flatten(2) @ flat
    said = (x @ flat.T).unflatten(2, (-1, deltas.shape[1]))
    to_shares += torch.einsum("nsr,nsrt->nt", gradient, said).to(to_shares.dtype)


def _with_base(weights: Tensor, base: Tensor) -> Tensor:
    """w with the base as one more expert, of weight 1."""
    wide = weights.to(_wide(base))
    return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)


def _blocks(base: Tensor, stack: Stack) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all experts' Δ and, behind them, of W_0: (rows, experts + 1, in)."""
    outputs, experts, inputs = stack.shape
    wide = _wide(base)
    size = _even(_BLOCK // ((experts + 1) * inputs * wide.itemsize))
    scratch = torch.empty(min(size, outputs), experts + 1, inputs, dtype=wide, device=base.device)
    for start in range(0, outputs, size):
        rows = slice(start, min(start + size, outputs))
        here = scratch[: rows.stop - start]
        stack.fill(here[:, :experts], start)
        here[:, experts] = base[rows]
        yield rows, here


def _samples(count: int, deltas: Tensor) -> Iterator[slice]:
    rows, _, inputs = deltas.shape
    size = _even(3 * _BLOCK // (rows * inputs * deltas.itemsize))
    return (slice(start, start + size) for start in range(0, count, size))


def _merged(shares: Tensor, deltas: Tensor) -> Tensor:
    """W_b's rows for some samples: (rows, samples, in)."""
    return torch.bmm(shares.expand(len(deltas), -1, -1), deltas)


def _whole(shares: Tensor, base: Tensor, stack: Stack) -> Tensor:
    """W_b for one w, (out, in)."""
    found = torch.empty(base.shape, dtype=shares.dtype, device=base.device)
    for rows, deltas in _blocks(base, stack):
        found[rows] = _merged(shares, deltas)[:, 0]
    return found


def _even(size: int) -> int:
    """One at least, and whole runs of 16 where there are some: products of odd sizes are slow."""
    return max(1, size if size < 16 else size // 16 * 16)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def check_samples(inputs: Tensor, weights: Tensor, where: str) -> None:
    """Refuse inputs of which nobody can say which sample they belong to."""
    if len(weights) not in (1, len(inputs)):
        raise PlanError("a mixed layer got other samples than its mixture routed", where=where,
                        expected=f"inputs ({len(weights)}, ...)", found=tuple(inputs.shape),
                        fix="per='batch', or modules that keep samples apart")  # fmt: skip
