"""Methods that learn few numbers from data: coefficients, masks, routers.

Each is a :class:`~fusewright.methods.contract.Program`: it fits in a live module whose weights are
a function of those numbers (:mod:`fusewright.modules.parametrised`), and answers with an ordinary
Map, which the engine executes as any other, or with the merged tensors. A new one derives from
:class:`~fusewright.methods.learned._fitting.Learner` too, as do those of
:mod:`fusewright.methods.routed` that learn from answers.
"""

from fusewright.methods.contract import Method
from fusewright.methods.learned._adamerging import AdaMerging
from fusewright.methods.learned._concrete import Concrete
from fusewright.methods.learned._dam import DAM
from fusewright.methods.learned._pruning import ANP, AWM

METHODS: tuple[type[Method], ...] = (AdaMerging, ANP, AWM, Concrete, DAM)

__all__ = ["ANP", "AWM", "DAM", "METHODS", "AdaMerging", "Concrete"]
