"""Methods whose result sends each input its own way.

Each is a :class:`~fusewright.methods.contract.Routed`: it builds layers that take the place of the
base's (:mod:`fusewright.modules.routed`); the engine puts them in, saves and loads them.
"""

from fusewright.methods.contract import Method
from fusewright.methods.routed._smile import Smile

METHODS: tuple[type[Method], ...] = (Smile,)

__all__ = ["METHODS", "Smile"]
