"""A model evaluated with other weights, without a copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError, nearest
from fusewright.layout.names import leaf, module
from fusewright.modules.tensors import named_tensors, same_tensor


@contextmanager
def with_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with some of its parameters and buffers replaced, until the block ends.

    ``tensors`` by name, of the shapes that the model has; used as they are (no copy, no cast), so
    gradients flow to what they were made of. Names that are absent keep the model's own. A tied
    tensor is given under any of its names and replaced under all. What is computed again in the
    backward pass (checkpointing) must run backward inside the block too. A forward that writes to
    buffers (BatchNorm in training) writes to those given. One thread at a time for each model.

    Raises PlanError for a name that the model lacks, for another shape, and for two different
    tensors where the model has one.
    """
    new = _complete(model, tensors)
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in new.items():
            store, key = _slot(model, name)
            held.append((store, key, store[key]))
            store[key] = tensor
        yield model
    finally:
        for store, key, tensor in reversed(held):
            store[key] = tensor


def functional_call(
    model: nn.Module, tensors: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> Any:
    """``model(*args, **kwargs)`` with other weights: one call inside :func:`with_weights`."""
    with with_weights(model, tensors):
        return model(*args, **kwargs)


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps a tensor. Written to directly: ``setattr`` takes only Parameters."""
    owner, key = model.get_submodule(module(name)), leaf(name)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


def _complete(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under every name they have in the model."""
    own = dict(named_tensors(model))
    for name, tensor in tensors.items():
        _check(name, tensor, own)
    new: dict[str, Tensor] = {}
    for names in same_tensor(model):
        given = [name for name in names if name in tensors]
        for other in given[1:]:
            _check_one(given[0], other, tensors)
        new |= {name: tensors[given[0]] for name in names if given}
    return new


def _check(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> None:
    if name not in own:
        close = nearest(name, list(own))
        raise PlanError("the model has no such tensor", where=name,
                        fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    if tensor.shape != own[name].shape:
        raise PlanError("the tensor has another shape than the model's", where=name,
                        expected=tuple(own[name].shape), found=tuple(tensor.shape))  # fmt: skip


def _check_one(name: str, other: str, tensors: Mapping[str, Tensor]) -> None:
    one, two = tensors[name], tensors[other]
    if one is not two and not torch.equal(one.detach(), two.detach()):
        raise PlanError("two different tensors are given where the model has one",
                        where=f"{name} and {other}", fix=f"leave out {other!r}")  # fmt: skip
