"""A module or a state dict in memory, read by ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .files import check_range
from .spec import DType, TensorInfo, Weights

if TYPE_CHECKING:
    import torch


class MemoryWeights(Weights):
    """An ``nn.Module`` or a mapping from name to tensor. Nothing is copied but the range read.

    Both names of a tied parameter are kept; ``tied`` lists the groups of names whose tensors are
    the same storage. Tensors may be non-contiguous, 0-d, empty, or on another device. ``config``
    is the module's (if it has one that knows ``to_dict``); ``files`` are those that transformers
    saves beside the weights of a model of its own. Raises WeightsError for values that are not
    dense tensors with data and a storage dtype.
    """

    def __init__(
        self, source: torch.nn.Module | Mapping[str, torch.Tensor], label: str | None = None
    ) -> None:
        is_module = not isinstance(source, Mapping)
        state: Mapping[Any, Any] = source.state_dict() if is_module else source  # type: ignore
        self.label = label or (type(source).__name__ if is_module else "state dict")
        self.config: Mapping[str, Any] = _config(source) if is_module else {}
        self.files: Mapping[str, bytes] = _files(source) if is_module else {}
        self._tensors, self.notes = accept_tensors(state, self.label)
        self._infos = {name: _info(name, t, self.label) for name, t in self._tensors.items()}
        self.tied = tied_groups(self._tensors)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        import torch

        check_range(self._infos[name], start, stop, out, self.label)
        if start < stop:
            with torch.no_grad():
                part = _range(self._tensors[name].detach(), start, stop).resolve_neg()
                target = torch.frombuffer(out, dtype=torch.uint8)
                target.copy_(part.contiguous().view(torch.uint8))


def accept_tensors(
    state: Mapping[Any, Any], label: str
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors of a state dict, and a note on what was left out by rule.

    ``*_extra_state`` entries (a module's private, non-tensor state) are left out and noted.
    Raises WeightsError if a key is not a string, or any other value is not a tensor.
    """
    import torch

    bad = [key for key in state if not isinstance(key, str)]
    extra = [
        key
        for key, value in state.items()
        if key not in bad and not isinstance(value, torch.Tensor)
    ]
    private = [key for key in extra if key.endswith("_extra_state")]
    bad += [key for key in extra if key not in private]
    if bad:
        raise WeightsError(
            "not a state dict: these entries are not named tensors",
            where=label,
            expected="a mapping from str to torch.Tensor",
            found=", ".join(f"{key!r}: {type(state[key]).__name__}" for key in bad[:5]),
            fix="pass the state dict itself, e.g. checkpoint['state_dict']",
        )
    notes = (f"left out, not tensors: {', '.join(private)}",) if private else ()
    return {key: value for key, value in state.items() if key not in private}, notes


def tied_groups(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more names whose tensors are the same elements of the same storage."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            groups.setdefault(place, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _info(name: str, tensor: torch.Tensor, label: str) -> TensorInfo:
    import torch

    where = f"{label}: {name}"
    if tensor.device.type == "meta":
        raise WeightsError(
            "tensor has no data", where=where, expected="a real device", found="meta",
            fix="load the model without device_map='meta' or init_empty_weights",
        )  # fmt: skip
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(
            "not a dense tensor", where=where, expected="torch.strided",
            found="quantized" if tensor.is_quantized else tensor.layout, fix="tensor.to_dense()",
        )  # fmt: skip
    try:
        return TensorInfo(name, DType.of(tensor.dtype), tuple(tensor.shape))
    except KeyError:
        raise WeightsError(
            "unknown dtype", where=where,
            expected=", ".join(dtype.torch_name for dtype in DType), found=tensor.dtype,
        ) from None  # fmt: skip


def _range(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) on the CPU, 1-d; copies at most two rows more than the range."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop].cpu()
    row = tensor[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _range(tensor[first], start - first * row, stop - first * row)
    rows = tensor[first : last + 1].reshape(-1)
    return rows[start - first * row : stop - first * row].cpu()


def _config(module: object) -> dict[str, Any]:
    config = getattr(module, "config", None)
    as_dict = getattr(config, "to_dict", None)
    return as_dict() if callable(as_dict) else {}


def _files(module: Any) -> dict[str, bytes]:
    """Of a model of transformers its configs, with the class and dtype that it has now, as
    ``save_pretrained`` writes them; of other modules nothing."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
    if ("transformers.modeling_utils", "PreTrainedModel") not in kinds:
        return {}
    said = json.loads(module.config.to_json_string())
    said["architectures"] = [type(module).__name__]
    said["torch_dtype" if "torch_dtype" in said else "dtype"] = str(module.dtype).split(".")[-1]
    found = {"config.json": json.dumps(said, indent=2) + "\n"}
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        found["generation_config.json"] = module.generation_config.to_json_string()
    return {name: text.encode() for name, text in found.items()}
