"""Spherical linear interpolation of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Merger, Round, Seen
from fusewright.methods.partials import Partial
from fusewright.methods.settings import PerTensor
from fusewright.methods.static._fields import Number
from fusewright.methods.static._gram import cosines, gram_matrix, gram_partial
from fusewright.methods.static._weighted import weighted_sum

COLLINEAR = 0.9995
"""Above this |cosine| the interpolation is linear, as in the usual implementations."""


class Slerp(Merger):
    """Interpolate two models along the arc between them, tensor by tensor (Shoemake, *Animating
    rotation with quaternion curves*, SIGGRAPH 1985; on checkpoints as mergekit does).

    θ = [sin((1-t)Ω) a + sin(tΩ) b] / sin Ω, Ω the angle of the flattened tensors; linear,
    (1-t) a + t b, when \\|cos Ω\\| > 0.9995 or a tensor is zero. a, b are the two experts in their
    order, or the base and the one expert.

    ``t``: 0.5, halfway; 0 gives a, 1 gives b.

    Raises PlanError unless there are two experts, or a base and one expert.
    """

    name: ClassVar[str] = "slerp"
    card: ClassVar[Card] = Card(
        "Spherical interpolation", "Animating rotation with quaternion curves", None,
        base="optional", experts=(2, 2), cost="two passes; inner products",
        exempt={"order": "t counts from the first model to the second"},
    )  # fmt: skip
    frame: ClassVar[Literal["deltas", "weights"]] = "weights"

    t: PerTensor[Number] = 0.5

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        return (Round("arc", "tensor", _measure, _arc),)

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return weighted_sum(vectors, at.solved["arc"]["weights"])


def _measure(seen: Seen, at: At) -> Partial:
    return gram_partial(seen.vectors)


def _arc(partial: Partial, at: At) -> dict[str, object]:
    gram, t = gram_matrix(partial), at.params.t
    cosine = float(cosines(gram)[0, 1])
    if abs(cosine) > COLLINEAR or not gram.diagonal().all():
        return {"cosine": cosine, "weights": [1 - t, t]}
    angle = math.acos(cosine)
    weights = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return {"cosine": cosine, "weights": weights}
