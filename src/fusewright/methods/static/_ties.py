"""TIES-Merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fusewright.methods.contract import Card, Composite, Stage
from fusewright.methods.settings import PerExpert, PerTensor
from fusewright.methods.static._elect import Elect
from fusewright.methods.static._fields import Density, Number, Scope
from fusewright.methods.static._trim import TIES_PAPER, Trim


class Ties(Composite):
    """Trim, elect signs, merge what agrees: ``Trim() >> Elect()`` (*TIES-Merging*, 2306.01708).

    ``density``: the fraction kept by magnitude, 0.2. ``weight``: w_t, 1 for each. ``normalize``:
    mean (true) or sum (false) of the entries that agree. ``scale``: λ, 1, the paper's choice
    without validation data. ``scope``: thresholds and majority over the "model" or each "tensor".
    ``zero_sign``: see :class:`Elect`.

    Profiles: "fusionbench" sums with λ = 0.3; "mergekit" works on each tensor, keeps everything
    unless a density is given, and counts zero as positive.
    """

    name: ClassVar[str] = "ties"
    card: ClassVar[Card] = Card(
        "TIES-Merging", TIES_PAPER, "2306.01708", cost="three passes and a sample"
    )
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fusionbench": {"normalize": False, "scale": 0.3},
        "mergekit": {"density": 1.0, "scope": "tensor", "zero_sign": "positive"},
    }

    density: PerExpert[Density] = 0.2
    weight: PerExpert[Number] = 1.0
    normalize: bool = True
    scale: PerTensor[Number] = 1.0
    scope: Scope = "model"
    zero_sign: Literal["majority", "positive", "zero"] = "majority"

    def stages(self) -> tuple[Stage, ...]:
        trim = Trim(density=self.density, scope=self.scope)
        elect = Elect(weight=self.weight, normalize=self.normalize, zero_sign=self.zero_sign,
                      scope=self.scope, scale=self.scale)  # fmt: skip
        return trim, elect
