"""The exact hypervolume: by hand, against counting, and what it does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.bench.hypervolume import hypervolume, nondominated
from fusewright.errors import PlanError

GRID = st.integers(-1, 5).map(float)


@pytest.mark.parametrize(("points", "reference", "volume"), [
    ([], (0, 0), 0.0),
    ([(2, 3)], (0, 0), 6.0),
    ([(2, 3)], (1, 1), 2.0),
    ([(2, 3), (3, 1)], (0, 0), 7.0),
    ([(2, 3), (3, 1), (1, 1), (2, 3)], (0, 0), 7.0),
    ([(2, 3), (5, 0), (-1, 9)], (0, 0), 6.0),
    ([(1, 2, 3)], (0, 0, 0), 6.0),
    ([(1, 2, 3), (2, 1, 1)], (0, 0, 0), 7.0),
    ([(1, 1, 2), (1, 2, 1), (2, 1, 1)], (0, 0, 0), 4.0),
    ([(1, 2, 3), (2, 1, 1), (9, 9, 0)], (0, 0, 0), 7.0),
])  # fmt: skip
def test_by_hand(points: list, reference: tuple, volume: float) -> None:
    assert hypervolume(points, reference) == pytest.approx(volume)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([2, 3]).flatmap(
    lambda size: st.lists(st.tuples(*[GRID] * size), min_size=1, max_size=8)))  # fmt: skip
def test_it_counts_the_cells_of_a_grid(points: list[tuple[float, ...]]) -> None:
    size = len(points[0])
    cells = np.stack(np.meshgrid(*[np.arange(5) + 0.5] * size), axis=-1).reshape(-1, size)
    under = (cells[:, None] <= np.array(points)[None]).all(axis=2).any(axis=1)
    assert hypervolume(points, (0.0,) * size) == under.sum()


@pytest.mark.parametrize("size", [2, 3])
def test_against_monte_carlo(size: int) -> None:
    draw = np.random.default_rng(size)
    points = draw.uniform(0, 1, (12, size))
    seen = draw.uniform(0, 1, (200_000, size))
    share = (seen[:, None] <= points[None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(points.tolist(), [0.0] * size) == pytest.approx(share, abs=0.005)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(GRID, GRID, GRID), min_size=1, max_size=8), st.randoms())
def test_order_and_dominated_points_do_not_matter(points: list, random) -> None:
    whole = hypervolume(points, (0, 0, 0))
    random.shuffle(points)
    front = [points[at] for at in nondominated(points)]
    assert hypervolume(points, (0, 0, 0)) == whole == hypervolume(front, (0, 0, 0))
    turned = [(z, x, y) for x, y, z in points]
    assert hypervolume(turned, (0, 0, 0)) == whole
    flat = [(x, y, 1.0) for x, y, _ in points]
    assert hypervolume(flat, (0, 0, 0)) == hypervolume([p[:2] for p in flat], (0, 0))


def test_other_coordinates_are_refused() -> None:
    for points, reference in (([(1.0,)], (0.0,)), ([(1, 2, 3)], (0, 0)), ([(1,) * 4], (0,) * 4)):
        with pytest.raises(PlanError, match="two or three coordinates"):
            hypervolume(points, reference)
    for points, reference in (([(float("nan"), 1.0)], (0.0, 0.0)),
                              ([(1.0, 1.0)], (float("-inf"), 0.0))):  # fmt: skip
        with pytest.raises(PlanError, match="not finite"):
            hypervolume(points, reference)


def test_what_is_no_worse_anywhere_and_better_somewhere_dominates() -> None:
    assert nondominated([(1, 2), (1, 1), (2, 0), (0, 2), (1, 2)]) == [0, 2, 4]
