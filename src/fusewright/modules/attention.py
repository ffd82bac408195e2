"""``nn.MultiheadAttention`` taken apart, so that each of its linear maps can be a layer."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    _canonical_mask,
    _none_or_dtype,
    dropout,
    linear,
    pad,
    scaled_dot_product_attention,
)

from fusewright.errors import PlanError
from fusewright.modules.layer import Replacement, Saved
from fusewright.modules.linears import Span

INWARD = ("q_proj", "k_proj", "v_proj")
"""The maps of queries, keys and values, as they lie one below the other."""
OUTWARD = "out_proj"


def slot(of: nn.MultiheadAttention, name: str, kind: str) -> tuple[str, Span]:
    """Where an attention keeps a map's "weight" or "bias": the tensor, and its rows."""
    if name == OUTWARD:
        return f"{OUTWARD}.{kind}", (None, None)
    if kind == "weight" and not of._qkv_same_embed_dim:
        return f"{name}_weight", (None, None)
    at = INWARD.index(name) * of.embed_dim
    return f"in_proj_{kind}", (at, at + of.embed_dim)


class Rows(nn.Module):
    """One linear map of an attention, which holds its tensors."""

    def __init__(self, of: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        self.name = name
        self._of = (of,)  # in a tuple: no child of its child

    @property
    def weight(self) -> Tensor:
        found = self._held("weight")
        assert found is not None
        return found

    @property
    def bias(self) -> Tensor | None:
        return self._held("bias")

    def _held(self, kind: str) -> Tensor | None:
        name, rows = slot(self._of[0], self.name, kind)
        found: Tensor | None = attrgetter(name)(self._of[0])
        return None if found is None else found[slice(*rows)]

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return self.name


class OpenAttention(Replacement):
    """What ``base``, an ``nn.MultiheadAttention``, answers, through ``q_proj``, ``k_proj``,
    ``v_proj`` and ``out_proj``, which are called with (samples, tokens, width) whatever the base's
    ``batch_first``: layers may take their places. Its tensors stay the base's."""

    kind: ClassVar[str] = "attention"
    base: nn.MultiheadAttention

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__(base)
        for name in (*INWARD, OUTWARD):
            setattr(self, name, Rows(base, name))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        batched, given = query.dim() == 3, [query, key, value]
        if not batched:
            given = [each[None] for each in given]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.base.batch_first:
            given = [each.transpose(0, 1) for each in given]
        if is_causal and attn_mask is None:
            raise PlanError("is_causal is a hint at what attn_mask says", found="no attn_mask",
                            expected="the causal mask")  # fmt: skip
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(key_padding_mask, attn_mask, given)
        q, k, v = (self._heads(getattr(self, name)(each))
                   for name, each in zip(INWARD, given, strict=True))  # fmt: skip
        k, v, mask = self._longer(k, v, mask)
        found, shares = self._attended(q, k, v, mask, causal, need_weights)
        found = getattr(self, OUTWARD)(found.transpose(1, 2).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(dim=1)
        if not batched:
            return found[0], None if shares is None else shares[0]
        return found if self.base.batch_first else found.transpose(0, 1), shares

    def _heads(self, found: Tensor) -> Tensor:
        """(samples, tokens, width) -> (samples, heads, tokens, width of a head)."""
        return found.unflatten(2, (self.base.num_heads, -1)).transpose(1, 2)

    def _mask(
        self, padding: Tensor | None, attn_mask: Tensor | None, given: list[Tensor]
    ) -> Tensor | None:
        """Both masks, as what is added to (samples, heads, queries, keys)."""
        query, key, _ = given
        other = _none_or_dtype(attn_mask)
        padding = _canonical_mask(padding, "key_padding_mask", other, "attn_mask", query.dtype)
        found = _canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        if found is not None and found.dim() == 3:
            found = found.view(len(query), self.base.num_heads, query.shape[1], key.shape[1])
        if padding is not None:
            padding = padding[:, None, None]
            found = padding if found is None else found + padding
        return found

    def _longer(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the keys and values that an attention may have of its own."""
        more: list[tuple[Tensor, Tensor]] = []
        if self.base.bias_k is not None and self.base.bias_v is not None:
            more.append((self._heads(self.base.bias_k), self._heads(self.base.bias_v)))
        if self.base.add_zero_attn:
            more.append((torch.zeros_like(k[:1, :, :1]), torch.zeros_like(v[:1, :, :1])))
        for one, two in more:
            k = torch.cat([k, one.expand(len(k), -1, -1, -1)], dim=2)
            v = torch.cat([v, two.expand(len(v), -1, -1, -1)], dim=2)
            mask = None if mask is None else pad(mask, (0, 1))
        return k, v, mask

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, shares: bool
    ) -> tuple[Tensor, Tensor | None]:
        rate = self.base.dropout if self.training else 0.0
        if not shares:
            return scaled_dot_product_attention(q, k, v, mask, rate, causal), None
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        found = dropout((scores if mask is None else scores + mask).softmax(dim=-1), rate)
        return found @ v, found

    @property
    def active(self) -> int:
        """None of its own: layers inside it count by themselves."""
        return 0

    @property
    def added(self) -> int:
        return 0

    @property
    def trained(self) -> int:
        return 0

    @property
    def precise(self) -> tuple[str, ...]:
        return ()

    def plain(self) -> dict[str, Tensor]:
        found = {name: tensor.clone() for name, tensor in self.base.state_dict().items()}
        for name in (*INWARD, OUTWARD):
            part = getattr(self, name)
            for kind, tensor in part.plain().items() if isinstance(part, Replacement) else ():
                at, rows = slot(self.base, name, kind)
                found[at][slice(*rows)] = tensor
        return found

    def described(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        base = saved.base
        assert isinstance(base, nn.MultiheadAttention)
        return cls(base)
