"""What is no linear map, mixed anew for every sample: lookup tables, norms, stems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusewright.modules.functional import with_weights
from fusewright.modules.stacks import FactorStack, restored

if TYPE_CHECKING:
    from fusewright.modules.features import SharedMixture
    from fusewright.modules.mixture import Routing


class _Mixed(nn.Module):
    """A layer in the place of ``base``, whose w (samples, experts) ``mixture`` knows."""

    def __init__(self, base: nn.Module, mixture: SharedMixture) -> None:
        super().__init__()
        self.base, self.mixture = base, mixture

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer as it was: models look at its weight's dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def active(self) -> int:
        """Numbers that one input's answer depends on, beside the base's."""
        own = {id(tensor) for tensor in (*self.base.buffers(), *self.base.parameters())}
        return sum(t.numel() for t in self.buffers() if id(t) not in own and t.is_floating_point())


class MixedTable(_Mixed):
    """y_i = E_0[i] + Σ_t w_t U_t[i] D_t for the rows i that are looked up in an ``nn.Embedding``.

    ``stack`` holds U (experts, rows, rank) and D (experts, rank, width). Indices are (samples, …),
    or (1, …) or (…,) of one axis for all.
    """

    def __init__(self, base: nn.Module, stack: FactorStack, mixture: SharedMixture) -> None:
        super().__init__(base, mixture)
        self.stack = stack

    def forward(self, indices: Tensor) -> Tensor:
        indices = indices[None] if indices.dim() == 1 else indices
        weights, found = self.mixture.weights_for(indices), self.base(indices)
        if weights is None:
            return found
        for expert, (up, down) in enumerate(zip(self.stack.up, self.stack.down, strict=True)):
            shares = _beside(weights[:, expert], found)
            found = found + shares * (up[indices] @ down).to(found)
        return found

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The table for one w (experts,)."""
        base: Tensor = self.base.weight  # type: ignore[assignment]
        wide = torch.promote_types(base.dtype, torch.float32)
        total = self.stack.combined(base, weights.to(wide))
        return {"weight": total.to(base.dtype)}

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this layer again."""
        return {"kind": "table", "stack": self.stack.described()}

    @classmethod
    def restored(
        cls, base: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
        routing: Routing | None,
    ) -> MixedTable:  # fmt: skip
        """The layer of that description over a base."""
        held = {n.removeprefix("stack."): t for n, t in tensors.items() if n.startswith("stack.")}
        stack = restored(said["stack"], held)
        assert isinstance(stack, FactorStack) and routing is not None
        return cls(base, stack, routing.mixtures[0])  # type: ignore[arg-type]


class MixedAffine(_Mixed):
    """y = (1 - Σ_t w_t) f(x; θ) + Σ_t w_t f(x; θ_t) for a module f = ``base``: what f(x; θ_w) is if
    f is affine in its tensors, as norms, convolutions and added positions are.

    ``values`` holds the tensors θ_t, (experts, …) by their name inside the module; inputs and
    outputs are (samples, …).
    """

    def __init__(
        self, base: nn.Module, values: Mapping[str, Tensor], mixture: SharedMixture
    ) -> None:
        super().__init__(base, mixture)
        self.names = tuple(values)
        for at, tensor in enumerate(values.values()):
            self.register_buffer(f"values_{at}", tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        weights, found = self.mixture.weights_for(given), self.base(*args, **kwargs)
        if weights is None:
            return found
        total = _beside(1 - weights.sum(dim=1), found) * found
        for expert in range(weights.shape[1]):
            own = {name: tensor[expert] for name, tensor in self._values().items()}
            with with_weights(self.base, own):
                said = self.base(*args, **kwargs)
            total = total + _beside(weights[:, expert], said) * said
        return total

    def _values(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"values_{at}") for at, name in enumerate(self.names)}

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The module's tensors for one w (experts,)."""
        base, found = dict(self.base.named_parameters()), {}
        for name, values in self._values().items():
            wide = torch.promote_types(values.dtype, torch.float32)
            shares = weights.to(wide)
            total = (1 - shares.sum()) * base[name].to(wide)
            found[name] = (total + torch.tensordot(shares, values.to(wide), 1)).to(values.dtype)
        return found

    def described(self) -> dict[str, Any]:
        """What is needed, beside the tensors, to make this layer again."""
        return {"kind": "affine", "names": self.names}

    @classmethod
    def restored(
        cls, base: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
        routing: Routing | None,
    ) -> MixedAffine:  # fmt: skip
        """The layer of that description over a base."""
        assert routing is not None
        values = {name: tensors[f"values_{at}"] for at, name in enumerate(said["names"])}
        return cls(base, values, routing.mixtures[0])  # type: ignore[arg-type]


def _beside(shares: Tensor, values: Tensor) -> Tensor:
    """(samples,) as a factor of (samples, …)."""
    return shares.to(values).reshape(-1, *[1] * (values.dim() - 1))
