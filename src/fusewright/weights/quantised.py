"""Quantised checkpoints: fp8 with scales is dequantised as a view, everything else is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .files import check_range
from .lora_math import load, load_range
from .spec import DType, FileIdentity, TensorInfo, Weights

if TYPE_CHECKING:
    import torch

_FP8 = (DType.F8_E4M3, DType.F8_E5M2)
_BLOCK = (128, 128)  # elements; what fp8 checkpoints use when their config does not say
_GROUP = 65536  # elements dequantised at once
_SCALES = ("_scale_inv", "_scale")  # both multiply, whatever the first one's name says
_RUNTIME = re.compile(r"\.(input_scale|activation_scale|k_scale|v_scale|q_scale|kv_scale)$")
_SIGNS = (  # what tensor names betray, in the order of the most telling
    (re.compile(r"\.quant_state\.|\.(absmax|quant_map|nested_absmax)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.SCB$"), "bitsandbytes 8-bit"),
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"_blocks$"), "MXFP4"),
)  # fmt: skip


def dequantised(weights: Weights) -> Weights:
    """``weights`` itself if nothing in it is quantised; a float32 view if it is fp8 with scales.

    fp8 without scales and without a ``quantization_config`` is a plain float dtype. Raises
    WeightsError for every other quantised checkpoint, and for fp8 that is only partly scaled.
    """
    config = quantization_config(weights.config)
    scales = _scales(weights)
    _refuse_other(weights, config, scales)
    if not scales:
        return weights
    return Fp8View(weights, scales, _block_size(config))


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A model config's ``quantization_config`` (its own, or its language model's), or None."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            found = holder.get("quantization_config") or holder.get("compression_config")
            if isinstance(found, Mapping):
                return found
    return None


def _scales(weights: Weights) -> dict[str, str]:
    """fp8 tensor to the name of its scale."""
    found = {}
    for name, info in weights.items():
        if info.dtype in _FP8:
            for suffix in _SCALES:
                if name + suffix in weights:
                    found[name] = name + suffix
    return found


def _refuse_other(
    weights: Weights, config: Mapping[str, Any] | None, scales: Mapping[str, str]
) -> None:
    for pattern, kind in _SIGNS:
        for name in weights:
            if pattern.search(name):
                _refuse(weights, name, f"{kind} tensors")
    known = set(scales.values())
    for name, info in weights.items():
        if name.endswith((".weight_scale", ".weight_scale_inv")) and name not in known:
            _refuse(weights, name, "a scale without its fp8 weight (int8, or packed)")
        if (config is not None or scales) and info.dtype in _FP8 and name not in scales:
            _refuse(weights, name, "an fp8 tensor without its scale")
    if config is not None and not scales:
        method = config.get("quant_method", "unnamed")
        _refuse(weights, "config.json", f"quantization_config with quant_method {method}")


def _refuse(weights: Weights, name: str, found: str) -> None:
    raise WeightsError(
        "the checkpoint is quantised in a way that cannot be undone exactly here",
        where=f"{weights.label}: {name}",
        expected="floating-point weights, or fp8 with weight_scale or weight_scale_inv",
        found=found,
        fix="use the model it was quantised from, or save it dequantised: "
        "AutoModelForCausalLM.from_pretrained(ID).dequantize().save_pretrained(OUT) "
        "(if its weights are plain, remove quantization_config from config.json)",
    )


def _block_size(config: Mapping[str, Any] | None) -> tuple[int, int]:
    size = (config or {}).get("weight_block_size")
    if size is None:
        return _BLOCK
    whole = isinstance(size, list) and all(isinstance(n, int) and n > 0 for n in size)
    if not whole or len(size) != 2:
        raise WeightsError(
            "weight_block_size is not two positive integers",
            where="config.json: quantization_config.weight_block_size",
            expected="[128, 128]", found=size,
        )  # fmt: skip
    return size[0], size[1]


@dataclass(frozen=True, slots=True)
class _Grid:
    """A scale seen as (stacks, block rows, block columns) over blocks of rows x cols elements."""

    scale: str
    shape: tuple[int, int, int]
    block: tuple[int, int]


class Fp8View(Weights):
    """fp8 · scale, as float32, element by element; scales and run-time ranges are left out.

    A scale of one element holds for the tensor; one an output row ``(…, rows, 1)``; or one a block
    ``(…, ceil(rows / b0), ceil(cols / b1))``. ``config`` is without its quantization_config.
    """

    def __init__(self, weights: Weights, scales: Mapping[str, str], block: tuple[int, int]) -> None:
        self.inner, self.label, self.root = weights, weights.label, weights.root
        self.config = _without_quantisation(weights.config)
        runtime = [name for name in weights if _RUNTIME.search(name)]
        self._grids = {name: _grid(weights, name, scales[name], block) for name in scales}
        left = {*scales.values(), *runtime}
        self._infos = {
            name: TensorInfo(name, DType.F32, info.shape) if name in scales else info
            for name, info in weights.items()
            if name not in left
        }
        mended = f"{len(scales)} fp8 tensors are multiplied by their scales (float32)"
        dropped = f"left out, for quantised inference only: {len(runtime)} tensors"
        self.notes = (*weights.notes, mended, *([dropped] if runtime else []))

    def identities(self) -> tuple[FileIdentity, ...]:
        return self.inner.identities()

    def close(self) -> None:
        self.inner.close()

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        if name not in self._grids:
            self._infos[name]
            return self.inner.read(name, start, stop, out)
        import torch

        check_range(self._infos[name], start, stop, out, self.label)
        if start == stop:
            return None
        info, grid = self._infos[name], self._grids[name]
        scale = load(self.inner, grid.scale).float().reshape(grid.shape)
        target = torch.frombuffer(out, dtype=torch.float32)
        for first in range(start, stop, _GROUP):
            last = min(stop, first + _GROUP)
            values = load_range(self.inner, name, first, last).float()
            scales = _scale_at(scale, torch.arange(first, last), grid, info)
            target[first - start : last - start] = values * scales
        return None


def _scale_at(
    scale: torch.Tensor, at: torch.Tensor, grid: _Grid, info: TensorInfo
) -> torch.Tensor:
    """The scale of each flat element index."""
    if scale.numel() == 1:
        return scale.reshape(())
    row, col = at // info.shape[-1], at % info.shape[-1]
    stack, row = row // info.shape[-2], row % info.shape[-2]
    return scale[stack, row // grid.block[0], col // grid.block[1]]


def _grid(weights: Weights, name: str, scale: str, block: tuple[int, int]) -> _Grid:
    shape, found = weights[name].shape, weights[scale].shape
    if weights[scale].numel == 1:
        return _Grid(scale, (1, 1, 1), (1, 1))
    if len(shape) >= 2 and weights[scale].dtype.is_float:
        *stacks, rows, cols = shape
        stack = 1
        for size in stacks:
            stack *= size
        if found == (*stacks, rows, 1):
            return _Grid(scale, (stack, rows, 1), (1, cols))
        blocks = (-(-rows // block[0]), -(-cols // block[1]))
        if found == (*stacks, *blocks):
            return _Grid(scale, (stack, *blocks), block)
    raise WeightsError(
        "a scale does not fit its fp8 tensor",
        where=f"{weights.label}: {scale}",
        expected=f"one, one a row, or one a block of {block[0]}x{block[1]} of {list(shape)}",
        found=list(found),
        fix="set quantization_config.weight_block_size in config.json to the block that was used",
    )


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    said = ("quantization_config", "compression_config")
    plain = {key: value for key, value in config.items() if key not in said}
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = _without_quantisation(text)
    return plain
