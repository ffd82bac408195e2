"""What is known of architectures, without torch and without tables of architectures.

From the names, shapes and config of a checkpoint, :func:`describe` says of every tensor which
block of which stack it is in, what it does, how its matrix is stored and which tensors are one:
what gradients over the layers, filters, matrix methods and the plan need to know.
``rules.py`` holds every convention about names, as data. :mod:`fusewright.layout.compare` compares
two checkpoints by their headers, configs, tokenizers and licences.
"""

from __future__ import annotations

from fusewright.layout.describe import block_order, describe
from fusewright.layout.names import canonical_order, pattern
from fusewright.layout.spec import ModelLayout, Role, TensorLayout
from fusewright.layout.tied import ties_embeddings

__all__ = [
    "ModelLayout",
    "Role",
    "TensorLayout",
    "block_order",
    "canonical_order",
    "describe",
    "pattern",
    "ties_embeddings",
]
