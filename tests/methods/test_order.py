"""The k-th largest magnitude is exact: equal to a sort, in any chunks."""

from __future__ import annotations

import operator
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At, Seen
from fusewright.methods.order import SAMPLE, kth_rounds, magnitude_bits, stands_for
from fusewright.methods.partials import BLOCK


def whole(name: str, dtype: torch.dtype, n: int, experts: int = 1) -> At:
    return At(name, (n,), 0, n, tuple(map(str, range(experts))), TensorLayout(name), dtype)


def solved_by(
    vectors: list[Tensor], ranks: list[int], sample: list[slice] | None = None, cuts: int = 1
) -> tuple[dict, list[str]]:
    """Every round's solution, over ``cuts`` chunks (the sample: where ``sample`` says); the rounds
    needed."""
    n = vectors[0].numel()
    at = whole("w", vectors[0].dtype, n, len(vectors))

    def asked(_: At, elements: int) -> list[int]:
        assert elements == n
        return ranks

    solved: dict = {}
    ran: list[str] = []
    step = -(-n // cuts)
    chunks = [slice(start, start + step) for start in range(0, n, step)]
    for round_ in kth_rounds("threshold", "tensor", at.dtype, asked):
        where = at.replaced(solved=dict(solved))
        if not round_.needed(where):
            solved[round_.name] = round_.solve(None, where)
            continue
        ran.append(round_.name)
        seen = sample if sample and round_.every > 1 else chunks
        parts = [round_.measure(Seen([v[cut] for v in vectors]), where) for cut in seen]
        solved[round_.name] = round_.solve(reduce(operator.add, parts).rounded(), where)
    return solved, ran


def kth(vectors: list[Tensor], ranks: list[int], cuts: int = 1) -> list[float]:
    return solved_by(vectors, ranks, cuts=cuts)[0]["threshold"]


def normal(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


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
    vectors = [normal(i, 5000, dtype) * 10.0**i for i in range(3)]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_good_sample_saves_the_digits_that_it_brackets(dtype: torch.dtype) -> None:
    x = normal(0, 400_000, dtype)
    solved, ran = solved_by([x], [80_000], [slice(0, 50_000)])
    assert solved["threshold"] == [float(x.abs().sort(descending=True).values[79_999])]
    digits = [] if dtype == torch.float32 else ["threshold, digit 3", "threshold"]
    assert ran == ["threshold, sample", "threshold, bracket", *digits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_sample_that_misleads_costs_time_only(dtype: torch.dtype, factor: float) -> None:
    x = normal(0, 40_000, dtype)
    x[:5000] *= factor
    y = normal(1, 40_000, dtype)
    solved, ran = solved_by([x, y], [8000] * 2, [slice(0, 5000)])
    expected = [float(v.abs().sort(descending=True).values[7999]) for v in (x, y)]
    assert solved["threshold"] == expected
    assert solved["threshold, bracket"]["prefix"][0] is None
    assert "threshold, digit 1" in ran


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_answer_does_not_depend_on_the_sample(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([32, 64]))
    dtype = np.float32 if width == 32 else np.float64
    floats = st.floats(width=width, allow_nan=False)
    values = data.draw(arrays(dtype, st.integers(2, 40), elements=floats))
    rank = data.draw(st.integers(1, len(values)))
    stop = data.draw(st.integers(1, len(values)))
    expected = float(np.sort(np.abs(values))[-rank])
    solved, _ = solved_by([torch.from_numpy(values)], [rank], [slice(0, stop)])
    assert solved["threshold"] == [expected]


def test_ranks_at_the_edges_of_the_bins() -> None:
    """The first and the last value of the bins are inside, their neighbours are not."""
    low = 0x3F80 - 1  # the sample lies at 1.0, alone: its neighbours on both sides are looked into
    edges = [(low << 16) - 1, low << 16, ((low + 3) << 16) - 1, (low + 3) << 16]
    values = np.array([0x3F800000, *edges], np.int32).view(np.float32)
    ordered = sorted(map(float, values), reverse=True)
    for rank, expected in enumerate(ordered, start=1):
        solved, ran = solved_by([torch.from_numpy(values)], [rank], [slice(0, 1)])
        assert solved["threshold"] == [expected]
        assert ("threshold, digit 1" in ran) == (expected in (ordered[0], ordered[-1]))


@pytest.mark.parametrize("rank", [3999, 4000, 4001])
def test_few_values_far_apart_are_bracketed(rank: int) -> None:
    """As differences of bfloat16 are; the rank may lie on either side of a step."""
    steps = torch.tensor([0.0, 0.5, 1.0, 8.0])
    x = steps.repeat(2000)[torch.randperm(8000, generator=torch.Generator().manual_seed(0))]
    solved, ran = solved_by([x], [rank], [slice(0, 1000)])
    assert solved["threshold"] == [float(x.sort(descending=True).values[rank - 1])]
    assert "threshold, digit 1" not in ran


@pytest.mark.parametrize(
    ("blocks", "weight"), [(1, 1), (SAMPLE, SAMPLE), (SAMPLE + 1, 4), (100, 100 // 13)]
)
def test_a_sampled_block_stands_for_the_others(blocks: int, weight: int) -> None:
    at = whole("w", torch.float32, blocks * BLOCK)
    assert stands_for(at.replaced(start=0, stop=BLOCK)) == weight
    assert stands_for(at) == 1
