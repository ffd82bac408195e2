"""Training-free methods: from the weights alone, in closed form, once.

One short file each. Transforms of each task vector (``trim``, ``drop``), mergers (``linear``,
``sum``, ``elect``, ``slerp``, ``iso_c`` …) and finishes of the merged vector (``lines``) compose
with ``>>``; ``ties``, ``dare_linear`` and ``dare_ties`` are such compositions with a name.
"""

from fusewright.methods.contract import Method
from fusewright.methods.static._agree import Agree
from fusewright.methods.static._consensus import Consensus
from fusewright.methods.static._dare import DareLinear, DareTies
from fusewright.methods.static._drop import Drop
from fusewright.methods.static._elect import Elect
from fusewright.methods.static._iso_c import IsoC
from fusewright.methods.static._linear import Average, Linear
from fusewright.methods.static._lines import LiNeS
from fusewright.methods.static._metagpt import MetaGPT
from fusewright.methods.static._model_stock import ModelStock
from fusewright.methods.static._passthrough import Passthrough
from fusewright.methods.static._slerp import Slerp
from fusewright.methods.static._sum import Mean, Sum
from fusewright.methods.static._task_arithmetic import TaskArithmetic
from fusewright.methods.static._ties import Ties
from fusewright.methods.static._trim import Trim

METHODS: tuple[type[Method], ...] = (
    Agree, Average, Consensus, DareLinear, DareTies, Drop, Elect, IsoC, LiNeS, Linear, Mean,
    MetaGPT, ModelStock, Passthrough, Slerp, Sum, TaskArithmetic, Ties, Trim,
)  # fmt: skip

__all__ = [
    "METHODS", "Agree", "Average", "Consensus", "DareLinear", "DareTies", "Drop", "Elect", "IsoC",
    "LiNeS", "Linear", "Mean", "MetaGPT", "ModelStock", "Passthrough", "Slerp", "Sum",
    "TaskArithmetic", "Ties", "Trim",
]  # fmt: skip
