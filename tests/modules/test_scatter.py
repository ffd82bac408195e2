"""The compiled loop that adds sparse changes to a base: what products of whole matrices give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusewright.modules import mixed, scatter
from fusewright.modules.mixed import _Mix
from fusewright.modules.stacks import SparseStack

pytest.importorskip("numba")

EXPERTS, OUT, IN, SAMPLES = 3, 37, 300, 6


def changes() -> Tensor:
    """A tenth of all elements; some rows with none, and gaps of more than 255."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(EXPERTS, OUT, IN, generator=draw)
    found *= torch.rand(found.shape, generator=draw) < 0.1
    found[1], found[:, 4:9], found[2, 10, 3:290] = 0, 0, 0
    return found


def stack(whole: Tensor, dtype: torch.dtype = torch.float32) -> SparseStack:
    places = whole.flatten().nonzero()[:, 0]
    return SparseStack.of(whole.flatten()[places].to(dtype), places, whole.shape)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("across", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("block", [1, 1 << 20], ids=["one sample at a time", "all at once"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_loop_answers_as_whole_matrices(
    across: bool, block: int, threads: int, monkeypatch
) -> None:
    monkeypatch.setattr(mixed, "_BLOCK", block)
    monkeypatch.setattr(mixed, "_LINES", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole, x, w = changes(), drawn(SAMPLES, 5, IN), drawn(SAMPLES, EXPERTS)
    base = drawn(IN, OUT).T if across else drawn(OUT, IN)
    merged = base.double() + torch.einsum("nt,toi->noi", w.double(), whole.double())
    made = stack(whole)
    assert made.adds_rows(w)
    found = _Mix.apply(x, w, base, made, "weights")
    torch.testing.assert_close(found.double(), x.double() @ merged.mT, rtol=1e-5, atol=5e-5)
    for weights, want in zip(w, merged, strict=True):
        one = made.combined(base, weights)
        torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=5e-6)
    assert torch.equal(found, _Mix.apply(x, w, base, made, "weights"))


def test_a_base_in_16_bits_is_added_to_in_32() -> None:
    whole, x, w = changes(), drawn(SAMPLES, 5, IN), drawn(SAMPLES, EXPERTS)
    base = drawn(OUT, IN).bfloat16()
    merged = base.float() + torch.einsum("nt,toi->noi", w, whole)
    found = _Mix.apply(x, w, base, stack(whole), "weights")
    torch.testing.assert_close(found, x @ merged.mT, rtol=1e-5, atol=5e-5)


def test_without_the_loop_nothing_but_rounding_differs(monkeypatch) -> None:
    whole, x, w, base = changes(), drawn(SAMPLES, 5, IN), drawn(SAMPLES, EXPERTS), drawn(OUT, IN)
    fast = _Mix.apply(x, w, base, stack(whole), "weights")
    monkeypatch.setattr(scatter, "installed", lambda: False)
    assert not stack(whole).adds_rows(w)
    slow = _Mix.apply(x, w, base, stack(whole), "weights")
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=5e-5)


def test_no_change_at_all_is_the_base() -> None:
    none = SparseStack(torch.zeros(0), torch.zeros(0, dtype=torch.uint8), (EXPERTS, OUT, IN))
    base = drawn(OUT, IN)
    assert torch.equal(none.combined(base, drawn(EXPERTS)), base)
    assert torch.equal(none.whole(torch.float32), torch.zeros(EXPERTS, OUT, IN))


@pytest.mark.parametrize("values, weights", [(torch.float64, torch.float32),
                                             (torch.float32, torch.float64),
                                             (torch.bfloat16, torch.float32)])  # fmt: skip
def test_other_dtypes_go_without_it(values: torch.dtype, weights: torch.dtype) -> None:
    assert not stack(changes(), values).adds_rows(torch.ones(1, EXPERTS, dtype=weights))
