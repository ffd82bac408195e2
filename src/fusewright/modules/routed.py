"""Linear layers that add to their base what experts say of an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RoutedLinear(nn.Module):
    """y = f_0(x) + Σ_{t ∈ top} p_t (U_t D_t x + s_t), for every row x of the input.

    ``base`` is the layer f_0 as it was, of any class whose inputs and outputs are (…, in) and
    (…, out). ``up`` (experts, out, k) and ``down`` (experts, k, in) are the experts' changes of its
    weight, ``shift`` (experts, out) those of its bias or None. The gate is
    p = softmax(‖G_t x‖_2), ``gate`` (experts, g, in), of which the ``top`` largest are kept and
    scaled to the sum 1. Norms and the softmax are in float32.
    """

    up: Tensor
    down: Tensor
    gate: Tensor
    shift: Tensor | None

    def __init__(
        self, base: nn.Module, up: Tensor, down: Tensor, gate: Tensor, shift: Tensor | None,
        top: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base, self.top = base, top
        for name, tensor in (("up", up), ("down", down), ("gate", gate), ("shift", shift)):
            self.register_buffer(name, tensor)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer as it was: models look at its weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def experts(self) -> int:
        return len(self.up)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        shares, chosen = self.routed(rows)
        found = self.base(inputs)
        total = found.reshape(-1, found.shape[-1])
        added = [self._one(rows, shares[:, k], chosen[:, k]) for k in range(shares.shape[1])]
        return (total + sum(added)).reshape(found.shape)

    def routed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The shares (n, top) and numbers (n, top) of the experts that each row is sent to."""
        seen = rows @ self.gate.flatten(0, 1).T.to(rows.dtype)
        norms = seen.float().reshape(len(rows), self.experts, -1).norm(dim=2)
        shares, chosen = norms.softmax(dim=1).topk(min(self.top, self.experts), dim=1)
        return shares / shares.sum(dim=1, keepdim=True), chosen

    def _one(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """What each row's expert of one rank adds: rows of one expert are multiplied together."""
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.experts).tolist()
        parts = []
        for expert, mine in enumerate(rows[order].split(counts)):
            if len(mine):
                said = mine @ self.down[expert].T.to(mine) @ self.up[expert].T.to(mine)
                parts.append(said if self.shift is None else said + self.shift[expert].to(said))
        scaled = torch.cat(parts) * shares[order, None].to(rows)
        return torch.empty_like(scaled).index_copy_(0, order, scaled)

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this layer again."""
        return {"kind": "linear", "top": self.top}

    @classmethod
    def restored(
        cls, base: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
        routing: object = None,
    ) -> RoutedLinear:  # fmt: skip
        """The layer of that description over a base."""
        up, down, gate = (tensors[name] for name in ("up", "down", "gate"))
        return cls(base, up, down, gate, tensors.get("shift"), said["top"])

    @property
    def active(self) -> int:
        """Numbers that one input's answer depends on, beside the base's: of one token's experts."""
        shift = 0 if self.shift is None else self.shift[0].numel()
        one = self.up[0].numel() + self.down[0].numel() + shift
        return self.gate.numel() + min(self.top, self.experts) * one

    def extra_repr(self) -> str:
        experts, _, rank = self.up.shape
        return f"experts={experts}, rank={rank}, gate={self.gate.shape[1]}, top={self.top}"


def put_in(
    model: nn.Module, layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Put layers at their paths and other values into tensors, in place; a path that is new becomes
    a child. Layers that listen to others do so from then on."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in (tensors or {}).items():
            own[name].copy_(tensor)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    for layer in layers.values():
        if hasattr(layer, "listen"):
            layer.listen(model)  # type: ignore[operator]
