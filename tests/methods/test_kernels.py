"""Fused kernels give the bits of the torch definitions, or step back from what is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from fusewright import DareLinear, Drop, Elect, Linear, Slerp, TaskArithmetic, Ties, Trim
from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import At
from fusewright.methods.door import spans
from fusewright.methods.kernels import find_kernel
from fusewright.methods.pipeline import Place, as_pipeline, resolved
from fusewright.weights import DType

KEYS = ("a", "b", "c")
MAPS: dict[str, Any] = {
    "linear": Linear(weight={"a": 0.7, "b": 0.3, "c": -0.25}),
    "linear, weights of 1": Linear(normalize=False),
    "task_arithmetic": TaskArithmetic(scale=0.3),
    "slerp": Slerp(t=0.3),
    "dare_linear": DareLinear(density={"a": 0.5, "b": 0.1, "c": 1.0}),
    "dare without rescaling": DareLinear(density=0.3, rescale="none"),
    "ties": Ties(density=0.2),
    "ties, weighted": Ties(density={"a": 0.5, "b": 1.0}, weight={"a": -0.5, "c": 2.0}, scale=0.7),
    "ties, summed": Ties(density=0.3, normalize=False, zero_sign="positive"),
    "ties, no sign for zero": Ties(density=0.3, zero_sign="zero", scope="tensor"),
    "trim and elect": Trim(density=0.6) >> Elect(),
    "drop and add": Drop(density=0.4) >> TaskArithmetic(scale=1.0),
}
STORED = {DType.BF16: torch.bfloat16, DType.F32: torch.float32}
SIZES = st.sampled_from([1, 2, 3, 5, 4095, 4096, 4097, 65_535, 65_537])


def both(
    method: Any, base: Tensor, weights: list[Tensor], stored: DType, out: DType,
    misled: bool = False,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Raw bytes by the kernel (None where it steps back) and by the definition; ``misled``: as if
    samples had been of no use."""
    pipeline = as_pipeline(method)
    kernel = find_kernel(pipeline, torch.float32)
    assert kernel is not None and kernel.takes([stored] * 2, out)
    needs = pipeline.frame == "deltas"
    weights = weights[:2] if isinstance(method, Slerp) else weights
    keys = KEYS[: len(weights)]
    layout = TensorLayout("w")
    at = At("w", tuple(base.shape), 0, base.numel(), keys, layout, torch.float32, 7)
    params = tuple(resolved(stage, layout, keys) for stage in pipeline.chain)
    wide = base.float() if needs else None
    cuts = spans(tuple(base.shape), pipeline.unit(tuple(base.shape), layout))
    solved: dict[Any, Any] = {}

    def parts(start: int, stop: int) -> Any:
        raws = [t[start:stop].contiguous().view(torch.uint8) for t in (base, *weights)]
        low = None if wide is None else wide[start:stop]
        xs = [w[start:stop].float() - low if needs else w[start:stop].float() for w in weights]
        place = Place(at.replaced(start=start, stop=stop), params, dict(solved))
        return raws, low, xs, place

    for step in pipeline.steps(torch.float32):
        whole = Place(at, params, dict(solved)).at(step.index)
        if not step.round.needed(whole):
            solved[step.key] = step.round.solve(None, whole)
            continue
        total = None
        for cut in cuts:
            raws, low, xs, place = parts(*cut)
            part = pipeline.measure(step, xs, low, place)
            total = part if total is None else total + part
            if kernel.measures(step):
                own = kernel.measure(step, raws[0], raws[1:], [stored] * len(weights), place)
                assert own is None or _same(own, part)
        place = Place(at, params, dict(solved))
        solved[step.key] = step.round.solve(total.rounded(), place.at(step.index))
        if misled and step.round.name.endswith("bracket"):
            solved[step.key]["prefix"] = [None] * len(weights)
    made, wanted = [], []
    for start, stop in cuts:
        raws, low, xs, place = parts(start, stop)
        raw = torch.empty((stop - start) * out.itemsize, dtype=torch.uint8)
        base_raw = raws[0] if needs else None
        kept = kernel.run(base_raw, raws[1:], [stored] * len(weights), raw, out, place)
        made.append(raw if kept else None)
        x = pipeline.combine(xs, low, place)
        wanted.append(x.to(STORED[out]).contiguous().view(torch.uint8))
    whole = None if any(m is None for m in made) else torch.cat(made)
    return whole, torch.cat(wanted)


def _same(one: Any, two: Any) -> bool:
    return all(np.array_equal(one[k], two[k]) for k in one._counts)


def models(kind: DType, count: int, seed: int, size: float) -> tuple[Tensor, list[Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=draws) * size
    others = [base + 0.1 * size * torch.randn(count, generator=draws) for _ in KEYS]
    return base.to(STORED[kind]), [t.to(STORED[kind]) for t in others]


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    count=SIZES, stored=st.sampled_from(list(STORED)), out=st.sampled_from(list(STORED)),
    seed=st.integers(0, 2**20), size=st.sampled_from([1.0, 1e-44, 1e-38, 3e-39, 1e30]),
)  # fmt: skip
def test_a_kernel_gives_the_definitions_bits(
    name: str, misled: bool, count: int, stored: DType, out: DType, seed: int, size: float
) -> None:
    made, wanted = both(MAPS[name], *models(stored, count, seed, size), stored, out, misled)
    assert made is not None and torch.equal(made, wanted)


BITS = {DType.BF16: (st.integers(0, 2**16 - 1), np.uint16), DType.F32: (
    st.integers(0, 2**32 - 1), np.uint32)}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), stored=st.sampled_from(list(STORED)))
def test_any_bits_give_the_definitions_bits_or_are_left_to_it(
    name: str, data: Any, stored: DType
) -> None:
    words, kind = BITS[stored]
    edges = st.sampled_from([0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x8000, 0xFF80, 0x3F80])
    count = data.draw(st.integers(1, 6))
    rows = [
        np.array(data.draw(st.lists(words | edges, min_size=count, max_size=count)), kind)
        for _ in range(4)
    ]
    base, *weights = (torch.from_numpy(r).view(STORED[stored]) for r in rows)
    finite = all(t.isfinite().all() for t in (base, *weights))
    if not finite and MAPS[name].__class__ is Slerp:
        return  # the definition's own statistics are refused before
    if not finite:
        return self_restrained(name, base, weights, stored)
    made, wanted = both(MAPS[name], base, weights, stored, stored)
    values = wanted.view(STORED[stored])
    if values.isfinite().all() and made is not None:
        assert torch.equal(made, wanted)
    if not values.isfinite().all():
        assert made is None


def self_restrained(name: str, base: Tensor, weights: list[Tensor], stored: DType) -> None:
    """The kernel of a map without statistics must step back from inputs that are not finite."""
    pipeline = as_pipeline(MAPS[name])
    if pipeline.steps(torch.float32) or pipeline.frame == "weights":
        return
    made, _ = both(MAPS[name], base, weights, stored, stored)
    assert made is None


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("stored", list(STORED), ids=str)
def test_tensors_of_several_units(name: str, stored: DType) -> None:
    made, wanted = both(MAPS[name], *models(stored, 4 * 65_536 + 4097, 3, 1.0), stored, stored)
    assert made is not None and torch.equal(made, wanted)


@pytest.mark.parametrize("name", MAPS)
def test_a_sum_that_overflows_the_storage_is_left_to_the_definition(name: str) -> None:
    big = torch.tensor([3.39e38, 3.39e38, 1.0]).bfloat16()
    base = torch.tensor([0.0, -3.39e38, 0.0]).bfloat16()
    made, wanted = both(MAPS[name], base, [big] * 3, DType.BF16, DType.BF16)
    if not wanted.view(torch.bfloat16).isfinite().all():
        assert made is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("place", [0, 4095, 4096, 4999])
def test_one_bad_value_anywhere_is_seen(name: str, place: int, bad: float) -> None:
    base, weights = models(DType.F32, 5000, 1, 1.0)
    weights[-1][place] = bad
    made, _ = both(MAPS[name], base, weights, DType.F32, DType.F32)
    assert made is None


def test_what_has_no_twin_has_none() -> None:
    from fusewright import IsoC, LiNeS, Sum

    for method in (IsoC(), Drop() >> Sum() >> LiNeS(), Trim() >> Sum()):
        assert find_kernel(as_pipeline(method), torch.float32) is None
    assert find_kernel(as_pipeline(Ties()), torch.float64) is None
    kernel = find_kernel(as_pipeline(Linear()), torch.float32)
    assert kernel is not None
    assert not kernel.takes([DType.BF16, DType.F32], DType.BF16)
    assert not kernel.takes([DType.F16], DType.F16)


def test_a_stage_that_does_something_else_has_no_twin() -> None:
    class Doubled(TaskArithmetic):
        """A sum whose merge is its own."""

        def merge(self, vectors: Any, base: Any, at: At) -> Tensor:
            return 2 * super().merge(vectors, base, at)

    class OtherDrop(Drop):
        """Drops in its own way."""

        def apply(self, vector: Tensor, expert: int, at: At) -> Tensor:
            return vector

    class OtherElect(Elect):
        """Elects in its own way."""

    class Halved(TaskArithmetic):
        """Only its numbers differ: the twin asks for them."""

        def coefficients(self, at: At) -> list[float]:
            return [0.5] * len(at.experts)

    for method in (Doubled(), OtherDrop() >> TaskArithmetic(), Trim() >> OtherElect()):
        assert find_kernel(as_pipeline(method), torch.float32) is None
    made, wanted = both(Halved(), *models(DType.F32, 10, 1, 1.0), DType.F32, DType.F32)
    assert made is not None and torch.equal(made, wanted)
