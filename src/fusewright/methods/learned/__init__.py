"""Methods that learn few numbers from data: coefficients, masks, routers.

Each is a :class:`~fusewright.methods.contract.Program`: it fits in a live module whose weights are
a function of those numbers (:mod:`fusewright.modules.parametrised`), and answers with an ordinary
Map, which the engine executes as any other.
"""

from fusewright.methods.contract import Method
from fusewright.methods.learned._adamerging import AdaMerging

METHODS: tuple[type[Method], ...] = (AdaMerging,)

__all__ = ["METHODS", "AdaMerging"]
