"""A method against a slow reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At, Method
from fusewright.testing._promise import ContractViolation
from fusewright.testing._subject import NAME, SEED, count, run, variants
from fusewright.testing._toys import toy

Array = NDArray[np.float64]
Reference = Callable[[Method, Array, Sequence[Array], At], Array]
"""(method, base, experts, at) to the merged array; ``at`` tells keys, tensor name, seed, layout."""


def check_reference(cls: type[Method], reference: Reference) -> None:
    """Compare every variant of a method with its reference, on and off the grid, in float32 and
    float64, as a vector and as a matrix. Raises ContractViolation."""
    for method in variants(cls):
        for shape in ((501,), (24, 40), (4, 3, 3, 3)):
            for grid in (True, False):
                for dtype in (torch.float32, torch.float64):
                    wrong = _difference(method, reference, shape, grid, dtype)
                    if wrong:
                        raise ContractViolation(
                            f"{method!r} differs from its reference on {shape}, grid={grid}, "
                            f"{dtype}: {wrong}"
                        )


def _difference(
    method: Method, reference: Reference, shape: tuple[int, ...], grid: bool, dtype: torch.dtype
) -> str | None:
    models = toy(count(type(method)), shape, grid=grid, dtype=dtype)
    layout = TensorLayout(NAME, stack="layers", layer=1, depth=3, matrix=len(shape) >= 2)
    at = At(NAME, shape, 0, models.base.numel(), models.keys, layout, dtype, SEED)
    found = run(method, models, layout=layout).double().numpy()
    wide = models.map(lambda x: x.double())
    expected = reference(method, wide.base.numpy(), [x.numpy() for x in wide.tensors], at)
    size = float(np.abs(expected).max())
    tolerance = (2e-6 if dtype == torch.float32 else 1e-12) * size
    worst = float(np.abs(found - expected).max())
    return None if worst <= tolerance else f"by {worst:.3g}, of at most {size:.3g}"
