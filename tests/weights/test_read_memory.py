"""Tensors in memory are read by ranges, whatever their strides, without copying the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_help import fetch, whole

from fusewright.errors import WeightsError
from fusewright.weights import DType, open_weights
from fusewright.weights.memory import MemoryWeights, _range

BASE = torch.arange(120, dtype=torch.int32).view(2, 3, 4, 5)
VIEWS = {
    "plain": BASE,
    "transposed": BASE.transpose(0, 3),
    "permuted": BASE.permute(2, 0, 3, 1),
    "strided": BASE[:, ::2, 1:, ::3],
    "expanded": BASE[:1].expand(4, 3, 4, 5),
    "row": BASE.view(1, 120).T,
    "scalar": BASE[1, 2, 3, 4],
    "empty": BASE[:0],
    "bool": (BASE % 2).bool().T if BASE.ndim == 2 else (BASE % 2).bool().transpose(1, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides(name: str) -> None:
    weights = MemoryWeights({"x": VIEWS[name]})
    assert torch.equal(whole(weights, "x"), VIEWS[name])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(VIEWS)), st.data())
def test_any_range_is_the_slice(name: str, data: Any) -> None:
    flat = VIEWS[name].reshape(-1)
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert torch.equal(fetch(MemoryWeights({"x": VIEWS[name]}), "x", start, stop), flat[start:stop])


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.code)
def test_every_dtype(dtype: DType) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype.torch)
    weights = MemoryWeights({"x": tensor})
    assert weights["x"].dtype is dtype
    assert torch.equal(whole(weights, "x").view(torch.uint8), tensor.view(torch.uint8))


def test_a_range_copies_at_most_two_rows_more() -> None:
    tensor = torch.zeros(1000, 1000).T
    part = _range(tensor, 500_500, 502_500)
    assert part.untyped_storage().nbytes() <= (2_000 + 2_000) * 4


def test_a_range_of_one_long_row_does_not_copy_the_row() -> None:
    part = _range(torch.zeros(1, 1000, 1000).transpose(1, 2), 5_000, 6_500)
    assert part.untyped_storage().nbytes() <= (1_500 + 2_000) * 4


def test_module_keeps_both_names_of_a_tied_parameter() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    weights = MemoryWeights(module)
    assert set(weights) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert weights.tied == (("a.weight", "b.weight"),)


def test_parts_of_one_storage_are_not_tied() -> None:
    tensor = torch.zeros(4, 4)
    assert MemoryWeights({"a": tensor[:2], "b": tensor[2:], "c": tensor[:1]}).tied == ()


def test_module_with_gradients_and_config() -> None:
    module: Any = torch.nn.Linear(2, 3)
    module.config = type("C", (), {"to_dict": lambda self: {"model_type": "x"}})()
    weights = open_weights(module)
    assert weights.config == {"model_type": "x"}
    assert torch.equal(whole(weights, "weight"), module.weight.detach())


def test_the_source_is_not_changed_by_writing_into_the_buffer() -> None:
    tensor = torch.zeros(4)
    out = fetch(MemoryWeights({"x": tensor}), "x")
    out += 1
    assert tensor.sum() == 0


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.zeros(2, device="meta"), "no data"),
        (torch.eye(2).to_sparse(), "not a dense tensor"),
        (torch.zeros(2, dtype=torch.complex64), "unknown dtype"),
        (3, "not named tensors"),
        (None, "not named tensors"),
        ({"y": torch.zeros(1)}, "not named tensors"),
    ],
)
def test_values_that_are_refused(value: Any, word: str) -> None:
    with pytest.raises(WeightsError, match=word) as caught:
        MemoryWeights({"x": value}, "mine")
    assert "mine" in str(caught.value) and "x" in str(caught.value)


def test_keys_that_are_no_names() -> None:
    with pytest.raises(WeightsError, match="not named tensors"):
        MemoryWeights({0: torch.zeros(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [3, None, [torch.zeros(1)]])
def test_what_is_no_source(value: Any) -> None:
    with pytest.raises(WeightsError, match="cannot open"):
        open_weights(value)


def test_weights_pass_through() -> None:
    weights = MemoryWeights({"x": torch.zeros(1)})
    assert open_weights(weights) is weights
