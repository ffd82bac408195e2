"""DARE with its two usual mergers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fusewright.methods.contract import Card, Composite, Stage
from fusewright.methods.settings import PerExpert, PerTensor
from fusewright.methods.static._drop import DARE_PAPER, Drop
from fusewright.methods.static._elect import Elect
from fusewright.methods.static._fields import Density, Number, Scope
from fusewright.methods.static._sum import Sum

_Rescale = Literal["inverse", "l1", "none"]


class DareLinear(Composite):
    """Drop, rescale, and add: ``Drop() >> Sum()`` (*DARE*, arXiv 2311.03099).

    ``density``: the kept fraction, 0.1 (the paper's p = 0.9). ``weight``: w_t, 1 for each.
    ``scale``: λ, 1. ``normalize``: divide by Σ w_t. ``rescale``, ``seed``: see :class:`Drop`.

    Profiles: "fusionbench" density 0.5, λ = 0.3; "mergekit" keeps everything unless a density is
    given and rescales to the L1 norm.
    """

    name: ClassVar[str] = "dare_linear"
    card: ClassVar[Card] = Card("DARE, added", DARE_PAPER, "2311.03099", cost=Drop.card.cost,
                                exempt=Sum.card.exempt)  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"density": 0.5, "scale": 0.3},
        "mergekit": {"density": 1.0, "rescale": "l1"},
    }

    density: PerExpert[Density] = 0.1
    weight: PerExpert[Number] = 1.0
    scale: PerTensor[Number] = 1.0
    normalize: bool = False
    rescale: _Rescale = "inverse"
    seed: int | None = None

    def stages(self) -> tuple[Stage, ...]:
        drop = Drop(density=self.density, rescale=self.rescale, seed=self.seed)
        return drop, Sum(weight=self.weight, scale=self.scale, normalize=self.normalize)


class DareTies(Composite):
    """Drop, rescale, elect signs and merge: ``Drop() >> Elect()`` (*DARE*, arXiv 2311.03099).

    Parameters as in :class:`DareLinear`; ``normalize``, ``scope`` and ``zero_sign`` as in
    :class:`Elect`.

    Profiles: "fusionbench" density 0.5, summed with λ = 0.5 (it also trims to 20 %: write
    ``drop >> trim >> elect`` for that); "mergekit" sums per tensor, keeps everything unless a
    density is given, rescales to the L1 norm and counts zero as positive.
    """

    name: ClassVar[str] = "dare_ties"
    card: ClassVar[Card] = Card("DARE with elected signs", DARE_PAPER, "2311.03099",
                                cost="two passes")  # fmt: skip
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"density": 0.5, "normalize": False, "scale": 0.5},
        "mergekit": {"density": 1.0, "rescale": "l1", "normalize": False, "scope": "tensor",
                     "zero_sign": "positive"},
    }  # fmt: skip

    density: PerExpert[Density] = 0.1
    weight: PerExpert[Number] = 1.0
    normalize: bool = True
    scale: PerTensor[Number] = 1.0
    scope: Scope = "model"
    zero_sign: Literal["majority", "positive", "zero"] = "majority"
    rescale: _Rescale = "inverse"
    seed: int | None = None

    def stages(self) -> tuple[Stage, ...]:
        drop = Drop(density=self.density, rescale=self.rescale, seed=self.seed)
        elect = Elect(weight=self.weight, normalize=self.normalize, zero_sign=self.zero_sign,
                      scope=self.scope, scale=self.scale)  # fmt: skip
        return drop, elect
