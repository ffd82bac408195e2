"""How the losses of several tasks become one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fusewright.bench.joint.gradients import gramian, rows_of, write
from fusewright.bench.joint.gradnorm import GradNorm
from fusewright.errors import RecipeError, nearest
from fusewright.extras import needs

EXTRA = "bench"
CAGRAD_RADIUS = 0.4
"""c of CAGrad: what the paper chose for NYUv2."""


class Combination(Protocol):
    """A plug-in of the training loop; it may keep state from step to step."""

    def parameters(self) -> list[Tensor]:
        """What it learns together with the model, by the same losses."""

    def backward(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Set ``grad`` of the parameters; ``losses`` are scalars whose graphs share no nodes."""

    def end_epoch(self) -> None:
        """Called when about as many items were seen as all splits have."""


class OfLosses:
    """One loss from all, by a scalarizer of TorchJD; then ordinary back-propagation."""

    def __init__(self, scalarizer: Any) -> None:
        self.scalarizer = scalarizer

    def parameters(self) -> list[Tensor]:
        return list(self.scalarizer.parameters())

    def backward(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.scalarizer.to(losses[0].device)
        self.scalarizer(torch.stack(tuple(losses))).backward()

    def end_epoch(self) -> None:
        getattr(self.scalarizer, "step", lambda: None)()


class OfGradients:
    """Weights of the gradients from their inner products (float64), by a weighting of TorchJD.

    The products are divided by their trace: these weights do not depend on the gradients' common
    scale, but TorchJD's thresholds would (below a norm of 0.01 CAGrad would stand still).
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        self.weighting = weighting

    def parameters(self) -> list[Tensor]:
        return []

    def backward(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        rows = rows_of(losses, parameters)
        products = gramian(rows)
        scale = products.trace()
        weights = self.weighting(products / scale if scale > 0 else products)
        write(rows, weights, parameters)

    def end_epoch(self) -> None: ...


def _scalarizer(name: str, *args: Any) -> Combination:
    return OfLosses(getattr(needs("torchjd.scalarization", EXTRA), name)(*args))


def _weighting(name: str, *args: Any, solver: tuple[str, ...] = ()) -> Combination:
    for library in solver:
        needs(library, EXTRA)
    return OfGradients(getattr(needs("torchjd.aggregation", EXTRA), name)(*args))


COMBINATIONS: dict[str, Callable[[int], Combination]] = {
    "sum": lambda tasks: _scalarizer("Sum"),
    "uncertainty": lambda tasks: _scalarizer("UW", tasks),
    "dwa": lambda tasks: _scalarizer("DWA"),
    "gradnorm": GradNorm,
    "pcgrad": lambda tasks: _weighting("PCGradWeighting"),
    "mgda": lambda tasks: _weighting("MGDAWeighting"),
    "cagrad": lambda tasks: _weighting(
        "CAGradWeighting", CAGRAD_RADIUS, solver=("cvxpy", "clarabel")
    ),
    "upgrad": lambda tasks: _weighting("UPGradWeighting", solver=("qpsolvers", "quadprog")),
}
"""By name, made for a number of tasks: the plain sum; uncertainty weighting (1705.07115), as
Σ e^(-s) L / 2 + s / 2; dynamic weight average (1803.10704, temperature 2); GradNorm (1711.02257);
PCGrad (2001.06782); MGDA (1810.04650); CAGrad (2110.14048, c = 0.4); UPGrad (2406.16232)."""


def combination(how: str, tasks: int) -> Combination:
    """A new combination of so many tasks.

    Raises RecipeError for an unknown name, FusewrightError if a library that it needs is not
    installed.
    """
    if how not in COMBINATIONS:
        close = nearest(how, list(COMBINATIONS))
        raise RecipeError(f"there is no way {how!r} to train tasks jointly",
                          expected=", ".join(COMBINATIONS),
                          fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    return COMBINATIONS[how](tasks)
