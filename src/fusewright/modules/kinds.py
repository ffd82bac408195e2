"""What names and shapes cannot tell of a weight and its module's class can: as data.

Classes are written by their names, so that no library has to be imported to recognise its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Kind:
    """How modules of a class use one of their parameters.

    ``linear``: it is multiplied with. ``in_first``: stored in by out. ``parts``: how many matrices
    of equal size are stored one below the other (1: it says nothing, the layout decides).
    """

    parameter: str
    linear: bool = True
    in_first: bool = False
    parts: int = 1


_WEIGHT = (Kind("weight"),)
_NOT_LINEAR = (Kind("weight", linear=False),)

#: By the qualified name of a class or of one it derives from; the most derived one decides.
KINDS: dict[str, tuple[Kind, ...]] = {
    "torch.nn.modules.linear.Linear": _WEIGHT,
    "torch.nn.modules.conv._ConvNd": _WEIGHT,
    "torch.nn.modules.conv._ConvTransposeNd": (Kind("weight", in_first=True),),
    "transformers.pytorch_utils.Conv1D": (Kind("weight", in_first=True),),
    "torch.nn.modules.activation.MultiheadAttention": (
        Kind("in_proj_weight", parts=3), Kind("q_proj_weight"), Kind("k_proj_weight"),
        Kind("v_proj_weight"), Kind("bias_k", linear=False), Kind("bias_v", linear=False),
    ),
    "torch.nn.modules.sparse.Embedding": _NOT_LINEAR,
    "torch.nn.modules.sparse.EmbeddingBag": _NOT_LINEAR,
    "torch.nn.modules.batchnorm._NormBase": _NOT_LINEAR,
    "torch.nn.modules.normalization.LayerNorm": _NOT_LINEAR,
    "torch.nn.modules.normalization.RMSNorm": _NOT_LINEAR,
    "torch.nn.modules.normalization.GroupNorm": _NOT_LINEAR,
}  # fmt: skip


def kinds_of(module: nn.Module) -> tuple[Kind, ...]:
    """What is known of a module's parameters by its class; () for a class that is not listed."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((KINDS[name] for name in names if name in KINDS), ())
