"""Methods whose result sends each input its own way.

Each is a :class:`~fusewright.methods.contract.Routed`: it builds layers that take the place of the
base's (:mod:`fusewright.modules.routed`, :mod:`fusewright.modules.mixed`); the engine puts them in,
saves and loads them.
"""

from fusewright.methods.contract import Method
from fusewright.methods.routed._smile import Smile
from fusewright.methods.routed._wemoe import EWEMoE, WEMoE

METHODS: tuple[type[Method], ...] = (EWEMoE, Smile, WEMoE)

__all__ = ["METHODS", "EWEMoE", "Smile", "WEMoE"]
