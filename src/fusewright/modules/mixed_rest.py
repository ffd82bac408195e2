"""What is no linear map, mixed anew for every sample: lookup tables, norms, stems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.modules.functional import with_weights
from fusewright.modules.layer import Saved
from fusewright.modules.mixed import Mixed
from fusewright.modules.stacks import FactorStack, restored
from fusewright.modules.tensors import wide_dtype

if TYPE_CHECKING:
    from fusewright.modules.features import SharedMixture


class MixedTable(Mixed):
    """y_i = s (E_0[i] + Σ_t w_t U_t[i] D_t) for the rows i that are looked up in a table that
    answers s E[i]: ``nn.Embedding`` (s = 1), or one that scales
    (:func:`~fusewright.modules.embeddings.table_scale`).

    ``stack`` holds U (experts, rows, rank) and D (experts, rank, width). Indices are (samples, …),
    or (1, …) or (…,) of one axis for all.
    """

    kind: ClassVar[str] = "table"
    mixture: SharedMixture

    def __init__(
        self, base: nn.Module, stack: FactorStack, mixture: SharedMixture, scale: float = 1.0
    ) -> None:
        super().__init__(base, mixture)
        self.stack, self.scale = stack, scale

    def forward(self, indices: Tensor) -> Tensor:
        indices = indices[None] if indices.dim() == 1 else indices
        weights, found = self.mixture.shared_by(indices, self.path), self.base(indices)
        if weights is None:
            return found
        for expert, (up, down) in enumerate(zip(self.stack.up, self.stack.down, strict=True)):
            shares = _beside(self.scale * weights[:, expert], found)
            found = found + shares * (up[indices] @ down).to(found)
        return found

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        base: Tensor = self.base.weight  # type: ignore[assignment]
        total = self.stack.combined(base, weights.to(wide_dtype(base)))
        return {"weight": total.to(base.dtype)}

    def described(self) -> dict[str, Any]:
        return {"stack": self.stack.described(), "scale": self.scale}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        stack = restored(saved.said["stack"], saved.inside("stack"))
        assert isinstance(stack, FactorStack)
        return cls(saved.base, stack, saved.mixtures[0], float(saved.said.get("scale", 1.0)))


class MixedAffine(Mixed):
    """y = (1 - Σ_t w_t) f(x; θ) + Σ_t w_t f(x; θ_t) for a module f = ``base``: what f(x; θ_w) is if
    f is affine in its tensors, as norms, convolutions and added positions are.

    ``values`` holds the tensors θ_t, (experts, …) by their name inside the module; inputs and
    outputs are (samples, …).
    """

    kind: ClassVar[str] = "affine"
    mixture: SharedMixture

    def __init__(
        self, base: nn.Module, values: Mapping[str, Tensor], mixture: SharedMixture
    ) -> None:
        super().__init__(base, mixture)
        self.names = tuple(values)
        for at, tensor in enumerate(values.values()):
            self.register_buffer(f"values_{at}", tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        weights, found = self.mixture.shared_by(given, self.path), self.base(*args, **kwargs)
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
        base, found = dict(self.base.named_parameters()), {}
        for name, values in self._values().items():
            wide = wide_dtype(values)
            shares = weights.to(wide)
            total = (1 - shares.sum()) * base[name].to(wide)
            found[name] = (total + torch.tensordot(shares, values.to(wide), 1)).to(values.dtype)
        return found

    def described(self) -> dict[str, Any]:
        return {"names": self.names}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        names = saved.said["names"]
        values = {name: saved.tensors[f"values_{at}"] for at, name in enumerate(names)}
        return cls(saved.base, values, saved.mixtures[0])


def _beside(shares: Tensor, values: Tensor) -> Tensor:
    """(samples,) as a factor of (samples, …)."""
    return shares.to(values).reshape(-1, *[1] * (values.dim() - 1))
