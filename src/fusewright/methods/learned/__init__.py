"""Methods that learn few numbers from data: coefficients, masks, routers.

Each is a :class:`~fusewright.methods.contract.Program`: it fits in a live module whose weights are
a function of those numbers (:mod:`fusewright.modules.parametrised`), and answers with an ordinary
Map, which the engine executes as any other, or with the merged tensors. A new one derives from
:class:`Learner` too, as do those of :mod:`fusewright.methods.routed` that learn from answers, and
descends in a :class:`Fitting`; :class:`LinearCoefficients` are a number for each expert and group
of tensors, and :func:`asked` gives what the caller's data ask of each task. docs/new-method.md
shows how.
"""

from fusewright.methods.contract import Method
from fusewright.methods.learned._ada_rank import AdaRank
from fusewright.methods.learned._adamerging import AdaMerging
from fusewright.methods.learned._concrete import Concrete
from fusewright.methods.learned._dam import DAM
from fusewright.methods.learned._fitting import Fitting, Learner, asked
from fusewright.methods.learned._fw_merging import FWMerging
from fusewright.methods.learned._prodistill import ProDistill
from fusewright.methods.learned._pruning import ANP, AWM
from fusewright.methods.learned._sau import SAU
from fusewright.methods.learned.coefficients import LinearCoefficients

METHODS: tuple[type[Method], ...] = (
    AdaMerging, AdaRank, ANP, AWM, Concrete, DAM, FWMerging, ProDistill, SAU,
)  # fmt: skip

__all__ = [
    "ANP", "AWM", "DAM", "METHODS", "AdaMerging", "Concrete", "FWMerging", "Fitting", "Learner",
    "LinearCoefficients", "ProDistill", "asked",
]  # fmt: skip
