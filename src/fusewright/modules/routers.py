"""Gates: how much of each expert an input asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SHARPNESS = 100.0


class Router(nn.Module):
    """w = mean over tokens of r(x), with r of one of three depths (WEMoE, 2402.00433):

        0: b        1: W_1 x + b_1        2: W_2 ReLU(W_1 x + b_1) + b_2, as many hidden as inputs

    Weights are drawn from N(0, 0.01²) by ``seed``; hidden biases are 0, the last is ``start``, so
    that it begins as nearly the same for all inputs. There is neither softmax nor clamp. In
    float32, whatever the model is in.

    ``top``: 0, or how many of w count: w ← w · sigmoid(100 (w - w_(top))), so that the last of
    them is halved and smaller ones all but vanish (rank-one MoE's code).
    """

    def __init__(
        self, inputs: int, experts: int, depth: int, start: float = 0.3, seed: int = 0,
        top: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inputs, self.experts, self.depth, self.top = inputs, experts, depth, top
        draw = torch.Generator().manual_seed(seed)
        self.hidden = _drawn(inputs, inputs, draw) if depth == 2 else None
        self.weight = nn.Parameter(_normal(experts, inputs, draw)) if depth else None
        self.bias = nn.Parameter(torch.full((experts,), start))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(samples, tokens, inputs), and (samples, tokens) true where a token counts ->
        (samples, experts); of depth 0 (1, experts). A row of padding alone gets the last bias."""
        if self.weight is None:
            return self.chosen(self.bias[None])
        seen = tokens.to(self.weight.dtype)
        if self.hidden is not None:
            seen = self.hidden(seen).relu()
        return self.chosen(_mean(seen, mask) @ self.weight.T + self.bias)

    def chosen(self, weights: Tensor) -> Tensor:
        """Of each row (samples, experts) the ``top`` largest."""
        if not 0 < self.top < self.experts:
            return weights
        least = weights.topk(self.top, dim=1).values.amin(dim=1, keepdim=True)
        return weights * (_SHARPNESS * (weights - least)).sigmoid()

    def described(self) -> dict[str, Any]:
        said = {"inputs": self.inputs, "experts": self.experts, "depth": self.depth}
        return {**said, "top": self.top} if self.top else said

    @classmethod
    def restored(cls, said: Mapping[str, Any]) -> Router:
        """A router of that description, whose weights are still to be loaded."""
        return cls(said["inputs"], said["experts"], said["depth"], top=said.get("top", 0))


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Over the tokens that count; the last map is linear, so it may come after the mean."""
    if mask is None:
        return tokens.mean(dim=1)
    counts = mask.to(tokens)[..., None]
    return (tokens * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def _drawn(inputs: int, outputs: int, draw: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(_normal(outputs, inputs, draw))
        layer.bias.zero_()
    return layer


def _normal(outputs: int, inputs: int, draw: torch.Generator) -> Tensor:
    return 0.01 * torch.randn(outputs, inputs, generator=draw)
