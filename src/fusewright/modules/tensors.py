"""The tensors of a live model, under every name that they have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def same_tensor(model: nn.Module) -> list[list[str]]:
    """All names, in groups of those that are one parameter or buffer of the model."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(model):
        groups[id(tensor)].append(name)
    return list(groups.values())


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are, which are all on one device."""
    first = next((tensor for _, tensor in named_tensors(model)), None)
    return torch.device("cpu") if first is None else first.device


def beside(model: nn.Module, module: M) -> M:
    """A module brought to the device where the model is."""
    return module.to(device_of(model))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is added up in: the tensor's own dtype, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def tied_names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of two names or more for one tensor, the first that is met leading."""
    return tuple(tuple(names) for names in same_tensor(model) if len(names) > 1)
