"""Fused CPU kernels: optional twins of torch definitions, bit-equal to them by contract test.

A kernel takes raw bytes and gives raw bytes. Which one runs is decided in the plan alone; without
Numba none is found, and everything works, slower.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from fusewright.methods.partials import Partial
    from fusewright.methods.pipeline import Pipeline, Place, Step
    from fusewright.weights.spec import DType


class Kernel(Protocol):
    """A fused twin of a pipeline's combine."""

    @property
    def name(self) -> str:
        """What the plan and reports call it."""
        ...

    def takes(self, inputs: Sequence[DType], output: DType) -> bool:
        """Whether it has these storage dtypes."""
        ...

    def run(
        self,
        base: Tensor | None,
        vectors: Sequence[Tensor],
        dtypes: Sequence[DType],
        out: Tensor,
        out_dtype: DType,
        place: Place,
    ) -> bool:
        """Fill ``out``; False if anything was not finite, in or out (``out`` is then void)."""
        ...

    def measures(self, step: Step) -> bool:
        """Whether it measures this round."""
        ...

    def measure(
        self,
        step: Step,
        base: Tensor | None,
        vectors: Sequence[Tensor],
        dtypes: Sequence[DType],
        place: Place,
        into: Partial | None = None,
    ) -> Partial | None:
        """A round's partial, or None where something is not finite. It may be added to ``into``, an
        earlier one of the same round and tensor, which is then returned (and void if None is)."""
        ...


def find_kernel(pipeline: Pipeline, dtype: torch.dtype) -> Kernel | None:
    """The fused twin of a pipeline, if Numba is installed and there is one."""
    import torch

    if find_spec("numba") is None or dtype != torch.float32:
        return None
    from fusewright.methods.kernels._fused import fused

    return fused(pipeline)
