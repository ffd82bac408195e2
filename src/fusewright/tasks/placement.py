"""Batches brought to where a model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def moved(value: Any, device: torch.device, floating: torch.dtype | None = None) -> Any:
    """A batch on a device, its floating-point tensors in a dtype if one is given: a tensor, or a
    mapping, tuple or list of such; what is none of these stays as it is."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device, floating if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: moved(one, device, floating) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(one, device, floating) for one in value)
    return value


def placed(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Each batch on a device."""
    return iter(batches) if device.type == "cpu" else (moved(batch, device) for batch in batches)
