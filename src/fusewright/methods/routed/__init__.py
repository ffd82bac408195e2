"""Methods whose result sends each input its own way.

Each is a :class:`~fusewright.methods.contract.Routed`: it builds layers that take the place of the
base's (:mod:`fusewright.modules.routed`, :mod:`fusewright.modules.mixed`); the engine puts them in,
saves and loads them.
"""

from fusewright.methods.contract import Method
from fusewright.methods.routed._masked import EMR, Tall
from fusewright.methods.routed._pareto import ParetoSet
from fusewright.methods.routed._rank_one import RankOneMoE
from fusewright.methods.routed._smile import Smile
from fusewright.methods.routed._surgery import RepresentationSurgery
from fusewright.methods.routed._twin import Twin
from fusewright.methods.routed._wemoe import EWEMoE, WEMoE

METHODS: tuple[type[Method], ...] = (
    EMR, EWEMoE, ParetoSet, RankOneMoE, RepresentationSurgery, Smile, Tall, Twin, WEMoE,
)  # fmt: skip

__all__ = [
    "EMR", "METHODS", "EWEMoE", "ParetoSet", "RankOneMoE", "RepresentationSurgery", "Smile", "Tall",
    "Twin", "WEMoE",
]  # fmt: skip
