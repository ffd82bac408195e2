"""Linear layers that add to their base what experts say of an input."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.modules import patches
from fusewright.modules.layer import Replacement, Saved


class RoutedLinear(Replacement):
    """y = f_0(x) + Σ_{t ∈ top} p_t (U_t D_t x + s_t), for every row x of the input.

    ``base`` is the layer f_0 as it was, of any class whose inputs and outputs are (…, in) and
    (…, out), or a convolution, whose rows are patches and every place of its answer one of them
    (:mod:`fusewright.modules.patches`). ``up`` (experts, out, k) and ``down`` (experts, k, in) are
    the experts' changes of its weight, ``shift`` (experts, out) those of its bias or None. The gate
    is p = softmax(‖G_t x‖_2), ``gate`` (experts, g, in), of which the ``top`` largest are kept and
    scaled to the sum 1. Norms and the softmax are in float32.
    """

    kind: ClassVar[str] = "linear"

    up: Tensor
    down: Tensor
    gate: Tensor
    shift: Tensor | None

    def __init__(
        self, base: nn.Module, up: Tensor, down: Tensor, gate: Tensor, shift: Tensor | None,
        top: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(base)
        self.top = top
        for name, tensor in (("up", up), ("down", down), ("gate", gate), ("shift", shift)):
            self.register_buffer(name, tensor)

    @property
    def experts(self) -> int:
        return len(self.up)

    def forward(self, inputs: Tensor) -> Tensor:
        if isinstance(self.base, patches.Convolution):  # far faster than patches one by one
            seen, rows = (self._seen(inputs, each) for each in (self.gate, self.down))
        else:
            rows = inputs.reshape(-1, inputs.shape[-1])
            seen = rows @ self.gate.flatten(0, 1).T.to(rows.dtype)
        shares, chosen = self.routed(seen)
        each = [self._one(rows, *pair) for pair in zip(shares.T, chosen.T, strict=True)]
        found: Tensor = self.base(inputs)
        return found + patches.answered(self.base, inputs, sum(each[1:], each[0]))

    def _seen(self, inputs: Tensor, matrices: Tensor) -> Tensor:
        """What matrices (experts, k, in) make of every patch: (n, experts * k)."""
        assert isinstance(self.base, patches.Convolution)
        found = patches.convolved(self.base, inputs, matrices.flatten(0, 1)[None])
        return found.flatten(2).mT.flatten(0, 1)

    def routed(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The shares (n, top) and numbers (n, top) of the experts that each row is sent to, by what
        all gates make of it (n, experts * g)."""
        norms = seen.float().unflatten(1, (self.experts, -1)).norm(dim=2)
        shares, chosen = norms.softmax(dim=1).topk(min(self.top, self.experts), dim=1)
        return shares / shares.sum(dim=1, keepdim=True), chosen

    def _one(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """What each row's expert of one rank adds: rows of one expert are multiplied together."""
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.experts).tolist()
        parts = []
        for expert, mine in enumerate(rows[order].split(counts)):
            if len(mine):
                said = self._inner(mine, expert) @ self.up[expert].T.to(mine)
                parts.append(said if self.shift is None else said + self.shift[expert].to(said))
        if not parts:  # of no rows
            return rows.new_empty(0, self.up.shape[1])
        scaled = torch.cat(parts) * shares[order, None].to(rows)
        return torch.empty_like(scaled).index_copy_(0, order, scaled)

    def _inner(self, rows: Tensor, expert: int) -> Tensor:
        """D_t x of rows x; of a convolution they are D x of all experts already."""
        if isinstance(self.base, patches.Convolution):
            return rows.unflatten(1, (self.experts, -1))[:, expert]
        return rows @ self.down[expert].T.to(rows)

    def described(self) -> dict[str, Any]:
        return {"top": self.top}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        up, down, gate = (saved.tensors[name] for name in ("up", "down", "gate"))
        return cls(saved.base, up, down, gate, saved.tensors.get("shift"), saved.said["top"])

    @property
    def active(self) -> int:
        """Of one token's experts."""
        shift = 0 if self.shift is None else self.shift[0].numel()
        one = self.up[0].numel() + self.down[0].numel() + shift
        return self.gate.numel() + min(self.top, self.experts) * one

    def extra_repr(self) -> str:
        experts, _, rank = self.up.shape
        return f"experts={experts}, rank={rank}, gate={self.gate.shape[1]}, top={self.top}"
