"""Which bins a sample brackets: the result does not depend on them, the time does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At
from fusewright.methods.order import BRACKET, SAMPLE, _around, _solve_sample
from fusewright.methods.partials import Partial

torch = pytest.importorskip("torch")


def even(first: int, last: int, each: int) -> NDArray[np.int64]:
    histogram = np.zeros(2**16, np.int64)
    histogram[first : last + 1] = each
    return histogram


def test_three_standard_errors_and_the_nearest_that_hold_anything() -> None:
    # 100,000 of which one in SAMPLE = 8 was looked at: 3 · √(¼ · 100,000 · 8) = 1342 ranks, which
    # is 1.3 bins on either side of the 50th from the top.
    assert SAMPLE == 8
    assert _around(even(100, 199, 1000), 0.5) == [147, 148, 149, 150, 151, 152]


def test_an_uneven_share_has_a_smaller_error() -> None:
    # 3 · √(0.02 · 0.98 · 100,000 · 8) = 376 ranks about the 2,000th: within the bins 197 and 198.
    assert _around(even(100, 199, 1000), 0.02) == [196, 197, 198, 199]


def test_at_most_so_many_bins_the_nearest_first() -> None:
    found = _around(even(0, 999, 10), 0.5)
    assert len(found) == BRACKET and 500 in found and found == sorted(found)


def test_bins_that_hold_nothing_are_passed_over() -> None:
    histogram = np.zeros(2**16, np.int64)
    histogram[[10, 5000, 9000, 20000]] = 1000
    # 3 · √(¼ · 4000 · 8) = 268 ranks about the 2,000th, the last of those at 9,000.
    assert _around(histogram, 0.5) == [10, 5000, 8999, 9000, 9001, 20000]


def test_zero_has_no_bin_below() -> None:
    assert _around(even(0, 0, 100), 0.5) == [0, 1]


@pytest.mark.parametrize(("share", "place"), [(0.0, 199), (1.0, 100)])
def test_the_first_and_the_last_rank(share: float, place: int) -> None:
    found = _around(even(100, 199, 1000), share)
    assert place in found


def test_all_vectors_have_as_many_bins() -> None:
    at = At("w", (100_000,), 0, 100_000, ("a", "b"), TensorLayout("w"), torch.float32)
    measured = torch.from_numpy(np.stack([even(100, 199, 1000), even(7, 7, 100_000)]))
    solved = _solve_sample(
        Partial(counts={"histogram": measured}), at, ranks=lambda a, n: [n // 2] * 2
    )
    assert solved == {"bins": [[147, 148, 149, 150, 151, 152], [6, 7, 8, 9, 10, 11]]}
