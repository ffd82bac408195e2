"""Where experts differ most from their base: norms of task vectors by kind of tensor."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from fusewright.layout import ModelLayout, Role
from fusewright.layout.names import weight_of
from fusewright.modules.architecture import describe_module
from fusewright.modules.vectors import TaskVectors


def critical(vectors: TaskVectors, model: nn.Module) -> dict[str, dict[str, float]]:
    """By kind ("attention", "mlp", "norm", "embedding" …), the means over experts of

        l2 = ‖τ_t‖_2        rms = ‖τ_t‖_2 / √n        relative = ‖τ_t‖_2 / ‖θ_0‖_2

    and ``elements`` n, in float64. A bias is of its weight's kind. l2 alone, which E-WEMoE
    (2410.21804) takes to call feed-forward parts critical, grows with the number of elements: it
    and rms can rank kinds the other way round.
    """
    layout = describe_module(model).layout
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(vectors.experts))
    base: dict[str, float] = defaultdict(float)
    elements: dict[str, int] = defaultdict(int)
    for name in vectors.names:
        kind = kind_of(layout, name)
        for at, delta in enumerate(vectors.at(name)):
            squares[kind][at] += float(delta.norm2())
        base[kind] += float(vectors.base[name].double().square().sum())
        elements[kind] += vectors.base[name].numel()
    return {kind: _means(squares[kind], base[kind], elements[kind]) for kind in elements}


def kind_of(layout: ModelLayout, name: str) -> str:
    """A tensor's role; of a bias, that of its weight."""
    role = layout[name].role
    if role is Role.BIAS and weight_of(name) in layout:
        role = layout[weight_of(name)].role
    return str(role)


def _means(squares: list[float], base: float, elements: int) -> dict[str, float]:
    l2 = sum(s**0.5 for s in squares) / len(squares)
    return {
        "l2": l2, "rms": l2 / elements**0.5, "relative": l2 / base**0.5 if base else float("nan"),
        "elements": float(elements),
    }  # fmt: skip
