"""The k-th largest magnitude is exact: equal to a sort, in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At, Seen
from fusewright.methods.order import kth_rounds, magnitude_bits


def kth(vectors: list[Tensor], ranks: list[int], cuts: int = 1) -> list[float]:
    """Run the rounds by hand, each over ``cuts`` chunks."""
    dtype, n = vectors[0].dtype, vectors[0].numel()
    at = At("w", (n,), 0, n, tuple(map(str, range(len(vectors)))), TensorLayout("w"), dtype)
    seen: list[int] = []

    def count(_: At, elements: int) -> list[int]:
        seen.append(elements)
        return ranks

    solved: dict = {}
    for round_ in kth_rounds("threshold", "tensor", dtype, count):
        where = at.replaced(solved=dict(solved))
        chunks = zip(*(v.chunk(cuts) for v in vectors), strict=True)
        parts = [round_.measure(Seen(list(c)), where) for c in chunks]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        solved[round_.name] = round_.solve(total.rounded(), where)
    assert seen == [n], "ranks are asked for once, with the number of elements"
    return solved["threshold"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_sort(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    dtype = np.float32 if width == 32 else np.float64
    floats = st.floats(width=width, allow_nan=False)
    values = data.draw(arrays(dtype, st.integers(1, 40), elements=floats))
    rank = data.draw(st.integers(1, len(values)))
    expected = float(np.sort(np.abs(values))[-rank])
    found = kth([torch.from_numpy(values)], [rank], data.draw(st.integers(1, 3)))
    assert found == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_vector_has_its_own_rank(dtype: torch.dtype) -> None:
    vectors = [torch.randn(5000, dtype=dtype) * 10.0**i for i in range(3)]
    ranks = [1, 2500, 5000]
    expected = [float(v.abs().sort(descending=True).values[k - 1])
                for v, k in zip(vectors, ranks, strict=True)]  # fmt: skip
    assert kth(vectors, ranks, cuts=4) == expected


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_equal_magnitudes_and_denormals(rank: int) -> None:
    x = torch.tensor([1e-45, -1e-45, 3e-45, 0.0, -0.0])
    assert kth([x], [rank]) == [float(x.abs().sort(descending=True).values[rank - 1])]


def test_float64_digits_below_float32_are_told_apart() -> None:
    x = 1 + torch.arange(4, dtype=torch.float64) * 2.0**-52
    assert kth([x], [2]) == [float(x[2])]


def test_bits_order_as_magnitudes_do() -> None:
    x = torch.tensor([-3e38, 1.0, -1.5, 1e-45, 0.0, -0.0])
    bits = magnitude_bits(x)
    assert bits.dtype == torch.int32
    assert (
        bits.argsort(descending=True)[:4].tolist() == x.abs().argsort(descending=True)[:4].tolist()
    )
    assert bits[4] == bits[5] == 0
