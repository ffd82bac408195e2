"""What is known of one tensor's place in its architecture, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor does, as far as its name, shape and config tell."""

    EMBEDDING = "embedding"        # token embedding: one row a vocabulary entry
    POSITION = "position"          # learned positions, class tokens
    ATTENTION = "attention"        # q, k, v, output projections, packed or not
    MLP = "mlp"                    # feed-forward
    EXPERT = "expert"              # feed-forward of a mixture's expert (2-D, or 3-D packed)
    ROUTER = "router"              # a mixture's gate
    CONV = "conv"
    NORM = "norm"                  # LayerNorm, RMSNorm, BatchNorm scale and shift
    BIAS = "bias"
    HEAD = "head"                  # lm_head, classifier, projection onto classes
    PROJECTION = "projection"      # between towers (CLIP's text_projection ...)
    STATISTIC = "statistic"        # running mean and variance: float buffers
    BUFFER = "buffer"              # integer or recomputable buffers
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor's place.

    ``layer`` of ``depth`` blocks counts within ``stack`` (``model.layers``, ``encoder.block`` …);
    None outside blocks. ``in_first`` says that a 2-D weight is stored in by out (Conv1D).
    ``packed`` are the sizes along ``packed_axis`` of independent matrices stored as one (QKV), or
    () if there is one. ``experts_first`` marks a 3-D tensor whose first axis counts matrices.
    ``matrix`` is True for weights that act as a linear map (2-D, or conv, or packed).
    ``vocabulary`` marks tensors whose first axis is the vocabulary. ``after`` marks tensors
    outside blocks that are used after the last one (final norm, head, pooler).
    """

    name: str
    role: Role = Role.OTHER
    stack: str = ""
    layer: int | None = None
    depth: int = 0
    matrix: bool = False
    in_first: bool = False
    packed: tuple[int, ...] = ()
    packed_axis: int = 0
    experts_first: bool = False
    vocabulary: bool = False
    after: bool = False

    @property
    def fraction(self) -> float:
        """The layer's position from 0 (first block, and everything before it) to 1 (last block,
        and heads and final norms after it): what gradients over the layers interpolate."""
        if self.layer is None:
            return 1.0 if self.after or self.role is Role.HEAD else 0.0
        return self.layer / (self.depth - 1) if self.depth > 1 else 1.0


class ModelLayout(Mapping[str, TensorLayout]):
    """The layout of every tensor of a model; ``tied`` lists groups of names that share storage
    in the model (first name is the one that is stored); ``notes`` says what was inferred."""

    def __init__(
        self,
        tensors: Mapping[str, TensorLayout],
        tied: tuple[tuple[str, ...], ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self._tensors, self.tied, self.notes = dict(tensors), tied, notes

    def __getitem__(self, name: str) -> TensorLayout:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
