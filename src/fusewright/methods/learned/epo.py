"""Exact Pareto optimal search: task weights that lead to the point a preference asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, as_tensor

from fusewright.extras import needs

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Balance:
    """How far losses are from the ray on which all r_t l_t are equal: ``mu`` ≥ 0, 0 on the ray,
    and the direction ``a`` (tasks,) of losses in which it grows."""

    mu: float
    a: Vector


def balance(losses: Vector, preference: Vector) -> Balance:
    """l̂ = r ∘ l / Σ r_t l_t, μ = Σ l̂ log(m l̂), a = r ∘ (log(m l̂) - μ), of m tasks.

    A task of no weighted loss counts as one of the smallest that float64 tells from 0.
    """
    weighted = preference * losses
    share = np.maximum(weighted / weighted.sum(), np.finfo(np.float64).eps)
    logs = np.log(len(losses) * share)
    mu = float(share @ logs)
    return Balance(mu, preference * (logs - mu))


@dataclass
class Epo:
    """Weights α (tasks,), at least 0 and of sum 1, by which gradients G (tasks, numbers) are
    combined (*Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in
    Pareto Optimization*, Mahapatra and Rajan 2020). With C = G Gᵀ:

    - μ > ``near``, to balance: max αᵀ C a, so that (C α)_j ≥ b_j: no bound where (C a)_j > 0, 0
      for the largest r_j l_j, else (C a)_j; all 0 if no (C a)_j is positive;
    - otherwise, to descend: max Σ_j (C α)_j, so that C α ≥ 0 and αᵀ C a ≥ min(0, max_j (C a)_j).

    Solved exactly as linear programs (HiGHS). Where there is no solution, or numbers are not
    finite, α = r: ``failures`` counts that, ``solved`` the others. ``near``: 1e-4, as published.

    Raises FusewrightError without scipy.
    """

    near: float = 1e-4
    solved: int = 0
    failures: int = 0

    def weights(self, losses: Tensor, gradients: Tensor, preference: Tensor) -> Tensor:
        """α for losses (tasks,), gradients (tasks, numbers) and r (tasks,); float64."""
        gram = (gradients.double() @ gradients.double().T).cpu().numpy()
        r = preference.double().cpu().numpy()
        found = self.solve(losses.double().cpu().numpy(), gram, r)
        self.solved, self.failures = self.solved + (found is not None), self.failures + (
            found is None
        )
        return as_tensor(r / r.sum() if found is None else found)

    def solve(self, losses: Vector, gram: Vector, preference: Vector) -> Vector | None:
        """α for C itself; None where there is none."""
        size = float(gram.diagonal().max())
        weighted = preference * losses
        if not (np.isfinite(gram).all() and np.isfinite(losses).all() and size > 0):
            return None
        if (weighted < 0).any() or not weighted.sum() > 0:
            return None
        scaled = gram / size
        goal, rows, bounds = program(weighted, scaled, balance(losses, preference), self.near)
        # A solver takes what is tiny beside 1 for 0, and so a task of tiny gradients: each task's
        # row is divided by its gradient's length, which changes no α.
        lengths = np.ones(len(rows))
        lengths[: len(gram)] = np.sqrt(scaled.diagonal())
        lengths[lengths == 0] = 1.0
        return maximised(goal, rows / lengths[:, None], bounds / lengths)


def program(
    weighted: Vector, gram: Vector, found: Balance, near: float
) -> tuple[Vector, Vector, Vector]:
    """(goal, rows, bounds): α maximises goal · α, so that rows @ α ≥ bounds."""
    along = gram @ found.a
    if found.mu > near:
        bounds = np.zeros_like(along)
        if (along > 0).any():
            bounds = np.where(along > 0, -np.inf, along)
            bounds[weighted == weighted.max()] = 0.0
        return along, gram, bounds
    rows = np.vstack([gram, along])
    return gram.sum(axis=0), rows, np.append(np.zeros_like(along), min(0.0, along.max()))


def maximised(goal: Vector, rows: Vector, bounds: Vector) -> Vector | None:
    """The α of the simplex that is best within the bounds."""
    optimize: Any = needs("scipy.optimize", "tasks")
    kept = np.isfinite(bounds)
    found = optimize.linprog(
        -goal, A_ub=-rows[kept] if kept.any() else None,
        b_ub=-bounds[kept] if kept.any() else None,
        A_eq=np.ones((1, len(goal))), b_eq=[1.0], bounds=(0, None), method="highs",
    )  # fmt: skip
    if found.status != 0:
        return None
    alpha = np.clip(found.x, 0.0, None)
    weights: Vector = alpha / alpha.sum()
    return weights
