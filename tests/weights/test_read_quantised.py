"""fp8 with scales becomes float32 exactly; other quantised checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_help import fetch, said, whole
from safetensors.torch import save_file

from fusewright.errors import WeightsError
from fusewright.weights import DType, open_weights
from fusewright.weights.memory import MemoryWeights
from fusewright.weights.quantised import dequantised

F8 = torch.float8_e4m3fn


def quantised(shape: tuple[int, ...], dtype: torch.dtype = F8) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Every block's scale at each of its elements."""
    grown = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return grown[..., : shape[-2], : shape[-1]]


def on_disk(root: Path, tensors: dict[str, torch.Tensor], config: Any = None) -> Path:
    save_file(tensors, root / "model.safetensors")
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("dtype", [F8, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
def test_one_scale_a_tensor(dtype: torch.dtype, name: str, scale_shape: tuple[int, ...]) -> None:
    q = quantised((5, 7), dtype)
    scale = torch.full(scale_shape, 0.3)
    weights = dequantised(MemoryWeights({"l.weight": q, f"l.{name}": scale}))
    assert list(weights) == ["l.weight"] and weights["l.weight"].dtype is DType.F32
    assert torch.equal(whole(weights, "l.weight"), q.float() * 0.3)


def test_one_scale_a_row() -> None:
    q, scale = quantised((5, 7)), torch.rand(5, 1)
    weights = dequantised(MemoryWeights({"l.weight": q, "l.weight_scale": scale}))
    assert torch.equal(whole(weights, "l.weight"), q.float() * scale)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((300, 200), (128, 128)), ((256, 128), (128, 128)), ((10, 7), (4, 3)), ((3, 10, 7), (4, 3))],
)
def test_one_scale_a_block(tmp_path: Path, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    q = quantised(shape)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    config: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}, "hidden_size": 4}
    if block != (128, 128):
        config["quantization_config"]["weight_block_size"] = list(block)
    tensors = {"l.weight": q, "l.weight_scale_inv": scale, "n.weight": torch.ones(3)}
    weights = open_weights(on_disk(tmp_path, tensors, config))
    expected = q.float() * spread(scale, block, shape)
    assert torch.equal(whole(weights, "l.weight"), expected)
    assert torch.equal(whole(weights, "n.weight"), torch.ones(3))
    assert weights.config == {"hidden_size": 4} and weights.root == tmp_path
    assert any("multiplied by their scales" in note for note in weights.notes)
    assert weights.identities()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 90_000), st.integers(0, 90_000))
def test_any_range_is_the_slice(a: int, b: int) -> None:
    q, scale = quantised((300, 300)), torch.rand(3, 3)
    weights = dequantised(MemoryWeights({"l.weight": q, "l.weight_scale_inv": scale}))
    flat = (q.float() * spread(scale, (128, 128), (300, 300))).reshape(-1)
    assert torch.equal(
        fetch(weights, "l.weight", min(a, b), max(a, b)), flat[min(a, b) : max(a, b)]
    )


def test_packed_experts_have_a_scale_beside_their_name() -> None:
    q, scale = quantised((2, 6, 4)), torch.rand(2, 1, 1)
    weights = dequantised(MemoryWeights({"gate_up_proj": q, "gate_up_proj_scale_inv": scale}))
    assert torch.equal(whole(weights, "gate_up_proj"), q.float() * scale)


def test_ranges_of_activations_are_left_out_and_noted() -> None:
    state = {
        "l.weight": quantised((2, 2)), "l.weight_scale": torch.ones(1),
        "l.input_scale": torch.ones(1), "l.k_scale": torch.ones(1),
    }  # fmt: skip
    weights = dequantised(MemoryWeights(state))
    assert list(weights) == ["l.weight"] and "2 tensors" in weights.notes[-1]


def test_plain_fp8_is_a_float_dtype() -> None:
    weights = MemoryWeights({"l.weight": quantised((2, 2)), "l.scale": torch.ones(2)})
    assert dequantised(weights) is weights


def refused(weights: Any, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        open_weights(weights)
    for word in (*words, "quantised"):
        assert word in said(caught.value)


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("l.qweight", "GPTQ or AWQ"),
        ("l.qzeros", "GPTQ or AWQ"),
        ("l.weight.absmax", "bitsandbytes 4-bit"),
        ("l.weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        ("l.SCB", "bitsandbytes 8-bit"),
        ("l.weight_packed", "compressed-tensors"),
        ("l.weight_scale", "without its fp8 weight"),
        ("l.weight_scale_inv", "without its fp8 weight"),
        ("m.gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_other_kinds_are_named(extra: str, kind: str) -> None:
    refused({"l.weight": torch.ones(2, dtype=torch.int8), extra: torch.ones(1)}, kind, extra)


@pytest.mark.parametrize("holder", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_config_that_says_so(tmp_path: Path, holder: str, nested: bool) -> None:
    config: dict[str, Any] = {holder: {"quant_method": "gptq"}}
    config = {"text_config": config} if nested else config
    refused(on_disk(tmp_path, {"l.weight": torch.ones(2, 2)}, config), "gptq")


def test_fp8_that_is_only_partly_scaled() -> None:
    state = {
        "l.weight": quantised((2, 2)), "l.weight_scale": torch.ones(1),
        "m.weight": quantised((2, 2)),
    }  # fmt: skip
    refused(state, "without its scale", "m.weight")


def test_fp8_without_scales_under_a_quantization_config(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    refused(on_disk(tmp_path, {"l.weight": quantised((2, 2))}, config), "without its scale")


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 1, 1)])
def test_scale_that_does_not_fit(shape: tuple[int, ...]) -> None:
    state = {"l.weight": quantised((5, 7)), "l.weight_scale_inv": torch.ones(shape)}
    with pytest.raises(WeightsError, match="does not fit its fp8 tensor"):
        open_weights(state)


@pytest.mark.parametrize("size", [[0, 1], [128], "128", [1.5, 2]])
def test_block_size_that_is_none(tmp_path: Path, size: Any) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    tensors = {"l.weight": quantised((2, 2)), "l.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(WeightsError, match="weight_block_size"):
        open_weights(on_disk(tmp_path, tensors, config))
