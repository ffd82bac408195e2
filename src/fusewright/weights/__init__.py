"""Tensors on disk and in memory: open, read ranges, write, publish.

This room knows files and knows nothing of methods. :func:`open_weights` turns whatever a user
names (a safetensors or torch file, a sharded Hugging Face directory, a Hub id at a revision, a
LoRA adapter over its base, a module or a state dict) into :class:`Weights`: a read-only mapping
from tensor name to :class:`TensorInfo`, with reads of element ranges into the caller's buffer.
Opening proves: a header that lies, a shard that disagrees, a path that leaves its directory, a
pickle that would run code is a WeightsError before anything is read in bulk. Quantised checkpoints
are dequantised exactly or refused.

:func:`align` says, for several inputs, where each output tensor is found in each of them, and
accounts for every tensor that is not used.

Nothing here imports torch until a tensor is asked for.
"""

from __future__ import annotations

from .messy import Aligned, Alignment, align
from .names import canonical, recomputed
from .open import open_weights
from .spec import DType, FileIdentity, LowRank, TensorInfo, Weights

__all__ = [
    "Aligned",
    "Alignment",
    "DType",
    "FileIdentity",
    "LowRank",
    "TensorInfo",
    "Weights",
    "align",
    "canonical",
    "open_weights",
    "recomputed",
]
