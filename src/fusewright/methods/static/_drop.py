"""Drop random entries of each task vector and rescale the rest."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fusewright.methods.contract import At, Card, Round, Seen, Transform
from fusewright.methods.partials import Partial, block_sums
from fusewright.methods.random import threshold
from fusewright.methods.settings import PerExpert
from fusewright.methods.static._fields import Density
from fusewright.methods.static._weighted import times

DARE_PAPER = (
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
)
_NEGLIGIBLE = 1e-7  # mergekit's: below it an L1 norm is not rescaled


class Drop(Transform):
    """Drop random entries of each task vector, rescale the rest (*DARE*, arXiv 2311.03099).

    τ_t ← b ⊙ τ_t / density, b ~ Bernoulli(density): the expectation is τ_t. An entry is kept if
    its random word, keyed by (seed, expert, tensor, element), is below round(density·2³²).

    ``density``: the kept fraction 1 - p, 0.1 as the paper's p = 0.9. ``rescale``: "inverse",
    1/density as in the paper; "l1", to the L1 norm that the tensor had (mergekit); or "none".
    ``seed``: its own, or None for the merge's.
    """

    name: ClassVar[str] = "drop"
    card: ClassVar[Card] = Card(
        "Drop and rescale", DARE_PAPER, "2311.03099", cost="one pass; two with l1"
    )

    density: PerExpert[Density] = 0.1
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    seed: int | None = None

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        if self.rescale != "l1":
            return ()
        return (Round("l1", "tensor", partial(_norms, self), _ratios),)

    def apply(self, vector: Tensor, expert: int, at: At) -> Tensor:
        return times(_kept(vector, expert, at), self._factor(expert, at))

    def _factor(self, expert: int, at: At) -> float:
        if self.rescale == "l1":
            return float(at.solved["l1"][expert])
        return 1 / at.params.density[expert] if self.rescale == "inverse" else 1.0


def _kept(vector: Tensor, expert: int, at: At) -> Tensor:
    keep = at.words(expert, vector.device) < threshold(at.params.density[expert])
    return torch.where(keep.reshape(vector.shape), vector, 0.0)


def _norms(drop: Drop, seen: Seen, at: At) -> Partial:
    before = [v.reshape(-1).abs() for v in seen.vectors]
    after = [_kept(v, t, at).reshape(-1).abs() for t, v in enumerate(seen.vectors)]
    return Partial({"before": block_sums(torch.stack(before)),
                    "after": block_sums(torch.stack(after))})  # fmt: skip


def _ratios(found: Partial, at: At) -> list[float]:
    pairs = zip(found["before"].tolist(), found["after"].tolist(), strict=True)
    return [b / a if min(a, b) >= _NEGLIGIBLE else 1.0 for b, a in pairs]
