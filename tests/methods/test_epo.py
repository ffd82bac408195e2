"""Exact Pareto optimal search: its programs solved exactly, and where descent by it ends."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.methods.learned import epo as room
from fusewright.methods.learned.epo import Epo, balance

pytest.importorskip("scipy")


def by_vertices(goal: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> float | None:
    """max goal·α over the simplex within rows α ≥ bounds: the best of all vertices; None if there
    is none."""
    tasks = len(goal)
    kept = np.isfinite(bounds)
    rows = np.vstack([np.eye(tasks), rows[kept]])
    bounds = np.concatenate([np.zeros(tasks), bounds[kept]])
    best = None
    for chosen in combinations(range(len(rows)), tasks - 1):
        system = np.vstack([np.ones(tasks), rows[list(chosen)]])
        if abs(np.linalg.det(system)) < 1e-12:
            continue
        alpha = np.linalg.solve(system, np.concatenate([[1.0], bounds[list(chosen)]]))
        if (rows @ alpha >= bounds - 1e-9).all():
            best = max(float(goal @ alpha), -np.inf if best is None else best)
    return best


def program_of(losses, gram, r, near=1e-4):
    """The published formulas, written out task by task."""
    m = len(losses)
    rl = [r[t] * losses[t] for t in range(m)]
    share = [x / sum(rl) for x in rl]
    mu = sum(s * np.log(m * s) for s in share)
    a = [r[t] * (np.log(m * share[t]) - mu) for t in range(m)]
    ca = [sum(gram[j][t] * a[t] for t in range(m)) for j in range(m)]
    if mu > near:
        if any(x > 0 for x in ca):
            rhs = [-np.inf if x > 0 else x for x in ca]
            rhs[int(np.argmax(rl))] = 0.0
        else:
            rhs = [0.0] * m
        return np.array(ca), np.array(gram), np.array(rhs)
    goal = [sum(gram[j][t] for j in range(m)) for t in range(m)]
    return np.array(goal), np.vstack([gram, ca]), np.array([0.0] * m + [min(0.0, max(ca))])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(0, 10**6), st.booleans())
def test_it_solves_the_published_programs(tasks: int, seed: int, even: bool) -> None:
    draw = np.random.default_rng(seed)
    gradients = draw.normal(size=(tasks, 6)) + draw.normal(size=6)
    r = draw.dirichlet(np.ones(tasks)) * 0.9 + 0.1 / tasks
    losses = 1 / r if even else draw.uniform(0.1, 3, tasks)
    solved_exactly(losses, gradients, r)


def solved_exactly(losses: np.ndarray, gradients: np.ndarray, r: np.ndarray) -> None:
    gram = gradients @ gradients.T
    gram /= gram.diagonal().max()
    goal, rows, bounds = program_of(losses, gram, r)
    found, best = Epo().solve(losses, gram, r), by_vertices(goal, rows, bounds)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.sum() == pytest.approx(1) and (found >= 0).all()
        assert goal @ found == pytest.approx(best, abs=1e-6)
        assert (rows @ found >= bounds - 1e-6).all()


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5, 1e-6])
def test_a_task_of_tiny_gradients_is_not_let_down(size: float) -> None:
    gradients = np.array([[1, 0], [-size, size]])
    found = Epo().solve(np.ones(2), gradients @ gradients.T, np.full(2, 0.5))
    exact = 2 * size / (1 + 2 * size)  # as much of the other task as does not raise its loss
    assert found is not None and found[0] == pytest.approx(exact, rel=1e-6)


def quadratics(x: torch.Tensor) -> torch.Tensor:
    """Two bowls, whose Pareto set is the segment between their centres."""
    centres = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]], dtype=torch.float64)
    return (x - centres).square().sum(dim=1)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.8])
def test_descent_by_it_reaches_the_ray_on_the_front(share: float) -> None:
    r = torch.tensor([share, 1 - share], dtype=torch.float64)
    x = torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)
    search = Epo()
    for step in range(400):
        gradients = torch.autograd.functional.jacobian(quadratics, x)
        alpha = search.weights(quadratics(x), gradients, r)
        x = x - 0.1 / (1 + 0.02 * step) * (alpha @ gradients)
    weighted = r * quadratics(x)
    assert float(weighted[0] / weighted[1]) == pytest.approx(1, abs=0.03)
    roots = quadratics(x).sqrt()
    assert float(roots.sum()) == pytest.approx(4.25**0.5, rel=1e-2)  # between the centres
    assert search.solved == 400 and search.failures == 0


def test_on_the_ray_nothing_is_out_of_balance() -> None:
    r = np.array([0.2, 0.3, 0.5])
    found = balance(2 / r, r)
    assert found.mu == pytest.approx(0, abs=1e-12)
    assert np.allclose(found.a, 0, atol=1e-12)
    off = balance(np.array([5.0, 1.0, 1.0]), r)
    assert off.mu > 0 and off.a[0] == off.a.max() > 0


@pytest.mark.parametrize("losses", [[float("nan"), 1.0], [0.0, 0.0], [-1.0, 2.0]])
def test_where_there_is_no_answer_it_is_the_preference_and_is_counted(losses: list[float]) -> None:
    search, r = Epo(), torch.tensor([0.3, 0.7])
    gradients = torch.eye(2)
    assert torch.allclose(search.weights(torch.tensor(losses), gradients, r), r.double())
    assert (search.solved, search.failures) == (0, 1)
    search.weights(torch.ones(2), gradients, r)
    search.weights(torch.ones(2), torch.zeros(2, 2), r)
    assert (search.solved, search.failures) == (1, 2)


def test_a_solver_that_gives_up_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SimpleNamespace(linprog=lambda *args, **options: SimpleNamespace(status=4))
    monkeypatch.setattr(room, "needs", lambda *asked: failing)
    search, r = Epo(), torch.tensor([0.3, 0.7])
    assert torch.allclose(search.weights(torch.ones(2), torch.eye(2), r), r.double())
    assert search.failures == 1


def test_a_task_that_is_not_preferred_or_has_no_loss_leaves_it_finite() -> None:
    search = Epo()
    for losses, r in (([1.0, 2.0], [0.0, 1.0]), ([0.0, 2.0], [0.5, 0.5])):
        found = search.weights(torch.tensor(losses), torch.randn(2, 5), torch.tensor(r))
        assert bool(found.isfinite().all()) and float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("gradients", "losses"), [
    ([[-1, 0], [3, 3], [-2, 1]], [4, 2, 1]),  # balance: nothing brings the losses nearer
    ([[3, 3], [-3, -1], [1, -3]], [3, 5, 4]),  # what helps has no bound
    ([[2, 3], [-3, -2], [-2, -2]], [2, 1, 5]),  # the largest weighted loss may not rise
    ([[1, 0], [2, 0]], [1.001, 1]),  # descent: what leads away from the ray is bounded
], ids=["stuck", "helping", "largest", "descent"])  # fmt: skip
def test_each_bound_of_the_programs_counts(gradients, losses) -> None:
    tasks = len(losses)
    solved_exactly(np.array(losses, float), np.array(gradients, float), np.full(tasks, 1 / tasks))


def test_the_size_of_gradients_does_not_matter_and_weights_always_sum_to_one() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 5, generator=draw).double()
    losses, r = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.2, 0.3, 0.5])
    alpha = Epo().weights(losses, gradients, r)
    torch.testing.assert_close(Epo().weights(losses, 1e-7 * gradients, r), alpha)
    assert float(Epo().weights(losses, gradients, 4 * r).sum()) == pytest.approx(1)
    none = Epo().weights(-losses, gradients, 4 * r)
    torch.testing.assert_close(none, r.double())
